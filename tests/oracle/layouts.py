"""The space of layouts stated a second time: nested loops, and the rules in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from planner.models.spec import AttentionSpec, MlpSpec, ModelSpec, MoeSpec
from planner.request import Request
from tests.oracle.swapped import drives_lose_gradients
from tests.oracle.timeline import GIVEN, given_rows, splits, turns

ONE_STAGE = ("gpipe", "gpipe_delayed", "1f1b", "1f1b_vocab_1", "1f1b_vocab_2", "1f1b_interlaced")
"""Schedules with one virtual stage per rank."""
FORBIDDEN = {"zero_stage": 0, "layers_outside": 0}
CP_KINDS = ("p2p", "all_gather", "a2a", "a2a_p2p", "a2a_all_gather")


@dataclass(frozen=True, order=True)
class Layout:
    """Every degree of one layout."""

    tp: int
    sp: int
    cp: int
    cp_kind: str
    cp_inner: int
    pp: int
    ep: int
    etp: int
    microbatch: int
    dp_replicate: int
    dp_shard: int
    zero: int
    reshard: int
    schedule: str
    vpp: int
    outside: int = 0

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    def config(self) -> tuple[object, ...]:
        """What prices depend on: all but schedule and virtual stages."""
        return astuple(self)[:13]


def factors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def every_layout(request: Request) -> Iterator[Layout]:
    """All layouts that the rules allow; none where every recompute mode is ruled out."""
    world, stack = request.devices, request.stack
    if not recompute_choices(request):
        return
    experts = max(
        (b.feed_forward.experts for b in request.model.blocks.values()
         if isinstance(b.feed_forward, MoeSpec)),
        default=0,
    )  # fmt: skip
    for tp in factors(world):
        for cp in factors(world // tp):
            for pp in factors(world // tp // cp):
                dp = world // tp // cp // pp
                if request.global_batch % dp:
                    continue
                for sp in _sequence_parallel(stack.sequence_parallel, tp):
                    for kind, inner in _context(listed_kind(request), cp):
                        for ep in factors(experts) if experts else [1]:
                            for etp in _expert_tp(request, experts, tp, world // pp):
                                for mbs in factors(request.global_batch // dp):
                                    for rep, shard, zero, keep in _sharding(request, dp, cp):
                                        for schedule, vpp, out in _schedules(request, pp):
                                            layout = Layout(
                                                tp, sp, cp, kind, inner, pp, ep, etp, mbs, rep,
                                                shard, zero, keep, schedule, vpp, out,
                                            )  # fmt: skip
                                            if runs(request, layout) and wanted(request, layout):
                                                yield layout


def _sequence_parallel(rule: str, tp: int) -> list[int]:
    if tp == 1 or rule == "never":
        return [0]
    return [1] if rule == "always" else [0, 1]


def listed_kind(request: Request) -> tuple[str, ...]:
    """The stack's kinds, or the one that a list by layer leaves to the mesh."""
    listed = request.job.cp_kinds
    two = [kind for kind in listed if kind in CP_KINDS[3:]]
    return tuple((two or list(listed))[:1]) or request.stack.cp_kinds


def own_kinds(request: Request, block: str, mesh_kind: str) -> set[str]:
    """Kinds of the layers of a block."""
    listed = request.job.cp_kinds
    if not listed:
        return {mesh_kind}
    names = [run.block for run in request.model.layers for _ in range(run.count)]
    return {listed[i % len(listed)] for i, name in enumerate(names) if name == block}


def _context(kinds: tuple[str, ...], cp: int) -> Iterator[tuple[str, int]]:
    """Kinds of context parallelism, and the inner group of those that have two levels."""
    if cp == 1:
        yield (kinds[0] if kinds else "p2p"), 1
        return
    for kind in kinds:
        for inner in range(2, cp) if kind in CP_KINDS[3:] else [1]:
            if cp % inner == 0:
                yield kind, inner


def _expert_tp(request: Request, experts: int, tp: int, stage: int) -> list[int]:
    """Of a stage's devices where the stack says ``any``, else of tensor parallelism's."""
    shares = request.stack.expert_tensor_parallel
    if not experts or shares is False:
        return [1]
    return factors(stage) if shares == "any" else factors(tp)


def _sharding(request: Request, dp: int, cp: int) -> Iterator[tuple[int, int, int, int]]:
    for zero in _zero_choices(request):
        for shard in factors(dp):
            if zero == 0 and shard > 1:
                continue
            if zero > 0 and shard < dp and not request.stack.hybrid_sharding:
                continue
            for keep in _keeping(request, shard * cp) if zero == 3 else [0]:
                yield dp // shard, shard, zero, keep


def _zero_choices(request: Request) -> tuple[int, ...]:
    stack = request.stack
    return stack.zero_stages_of.get(request.job.precision) or stack.zero_stages


def _keeping(request: Request, spread: int) -> list[int]:
    """Ranks that may hold weights for the backward, apart from all that share them."""
    keeps = request.stack.reshard_group
    if keeps == "any":
        return [0] + [n for n in range(2, spread) if spread % n == 0]
    return [request.cluster.groups[0].node.devices_per_node if keeps == "node" else keeps or 0]


def _schedules(request: Request, pp: int) -> Iterator[tuple[str, int, int]]:
    """Schedules, virtual stages per rank, and layers outside the pipeline."""
    if pp == 1:
        if not request.job.schedule_actions:
            yield "1f1b", 1, 0
        return
    rows = request.job.schedule_actions
    if rows:
        schedule = GIVEN + ";".join(rows)
        if len(rows) == pp:
            yield schedule, len({stage for _, stage, _ in given_rows(schedule)[0]}), 0
        return
    for schedule, vpp in _orders(request, pp):
        for out in range(request.model.layer_count):
            if may_be_outside(request, schedule, out):
                yield schedule, vpp, out


def may_be_outside(request: Request, schedule: str, out: int) -> bool:
    """Whether the stack leaves so many layers out of the pipeline, apart from how many it holds."""
    before, inside, behind = parts(request, out)
    if not request.stack.outside_layers or schedule not in (
        "gpipe", "looped_bfs", "gpipe_delayed", "looped_bfs_delayed"
    ):  # fmt: skip
        return out == 0
    kinds = [run.block for run in request.model.layers]
    if len(kinds) > 2:
        each = _repeated(request)
        return out == 0 or (each > 0 and len(inside) > 0 and len(inside) % each == 0)
    # Of a model of two kinds the first does not enter the pipeline.
    return len({request.workload.layers[n] for n in inside}) == 1 and (not before or not behind)


def parts(request: Request, out: int) -> tuple[range, range, range]:
    """Layers ahead of the pipeline, in it, and behind it."""
    layers, kinds = request.model.layer_count, len(request.model.layers)
    first, last = (out, layers) if kinds == 2 else (0, layers - out)
    return range(first), range(first, last), range(last, layers)


def _orders(request: Request, pp: int) -> Iterator[tuple[str, int]]:
    for schedule in request.stack.schedules:
        if schedule in ONE_STAGE:
            yield schedule, 1
        else:
            # Every virtual stage but the first and the last holds a layer; a V has two per rank.
            for vpp in range(2, request.model.layer_count + 3):
                on_v = schedule in ("zbv", "dualpipev")
                if pp * vpp <= request.model.layer_count + 2 and not (on_v and vpp > 2):
                    yield schedule, vpp


def _repeated(request: Request) -> int:
    """Layers of the pattern that the stack pipes, 0 where it has none as long."""
    kinds, most = request.workload.layers, request.stack.longest_pattern or 0
    whole = (n for n in range(2, most + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)])
    return next(whole, 0)


def _one_kind(kinds: Sequence[str]) -> bool:
    """Whether all layers behind those of the first kind are of one kind."""
    rest = [*itertools.dropwhile(lambda kind: kind == kinds[0], kinds)]
    return len({*rest}) < 2


def runs(request: Request, x: Layout) -> bool:
    """Whether the model splits this way and the stack can run it."""
    stack, layers = request.stack, request.model.layer_count - x.outside
    transposed = request.job.tensor_transpose
    if x.tp % transposed:
        return False
    if transposed > 1 and (x.tp > transposed or x.ep > 1) and request.workload.expert_count:
        return False
    if stack.longest_pattern is not None and x.pp > 1 and not _one_kind(request.workload.layers):
        each = _repeated(request)
        if not each or layers // (x.pp * x.vpp) % each:
            return False
    experts = False
    host = request.cluster.groups[0].node.host_memory
    if stack.offload is not None and stack.offload.inputs and host is None:
        return False
    if request.job.optimizer_offload and request.job.optimizer_offload_share < 1 and x.zero < 3:
        return False
    # Without ZeRO nobody reads what is asked of the hosts.
    asked = request.job.optimizer_offload and stack.offload is not None
    least = stack.offload.least_zero_stage if asked and stack.offload is not None else 0
    if request.job.optimizer == "muon":
        least = max(least, stack.muon.least_zero_stage)
        if asked and stack.offload is not None and stack.offload.muon_zero_stage:
            # What is offloaded is orthogonalised in stage 3 alone.
            least = 3
    if x.zero < least and x.dp_replicate * x.dp_shard * x.cp > 1:
        return False
    split = request.model.tensor_split
    if split is not None and split % x.tp:
        return False
    if not request.model.splits_sequence and (x.cp > 1 or x.sp):
        return False
    for name, block in request.model.blocks.items():
        mixer, feed = block.mixer, block.feed_forward
        if mixer is not None:
            if mixer.heads % x.tp:
                return False
            exchanged = mixer.heads
            if isinstance(mixer, AttentionSpec):
                exchanged = mixer.kv_heads
                repeats = request.stack.kv_head_replication and x.tp % mixer.kv_heads == 0
                if mixer.kv_heads % x.tp and (mixer.output_gate or not repeats):
                    return False
                muon = request.job.optimizer == "muon"
                if (
                    mixer.kv_heads % x.tp
                    and muon
                    and "muon_takes_whole_query_groups" in stack.rules
                ):
                    return False
            sort = "latent attention"
            if isinstance(mixer, AttentionSpec):
                sort = "sliding windows" if mixer.window is not None else "plain"
            for kind in own_kinds(request, name, x.cp_kind):
                dealt = {"a2a": x.cp, "p2p": 1, "all_gather": 1}.get(kind, x.cp_inner)
                if x.cp > 1 and exchanged % (x.tp * dealt):
                    return False
                if x.cp > 1 and kind not in stack.cp_kinds_of.get(sort, stack.cp_kinds):
                    return False
                sinks = isinstance(mixer, AttentionSpec) and mixer.sinks
                able = stack.cp_kinds_of.get("attention sinks", stack.cp_kinds)
                if x.cp > 1 and sinks and kind not in able:
                    return False
        if isinstance(feed, MlpSpec) and feed.intermediate % x.tp:
            return False
        if isinstance(feed, MoeSpec):
            experts = True
            if feed.experts % x.ep or feed.intermediate % x.etp:
                return False
            if feed.shared_intermediate % x.tp:
                return False
    if (x.dp_shard * x.cp * x.tp) % (x.ep * x.etp):
        return False
    dealt = x.cp * (1 + (stack.balanced_context is True))
    if x.cp > 1 and (not stack.cp_kinds or request.sequence % dealt):
        return False
    sort = "mixtures of experts" if experts else "models without experts"
    able = stack.cp_kinds_of.get(sort, stack.cp_kinds)
    if x.cp > 1 and not {*(request.job.cp_kinds or [x.cp_kind])} <= {*able}:
        return False
    if x.sp and request.sequence % (x.cp * x.tp):
        return False
    if stack.tensor_parallel_max is not None and x.tp > stack.tensor_parallel_max:
        return False
    if x.dp_shard * x.cp == 1 and 0 in _zero_choices(request):
        wraps = "shards_over_one_rank" in stack.rules and x.tp * x.pp > 1
        if x.zero > 0 and not wraps:
            return False
        if x.zero == 0 and x.dp == 1 and wraps:
            return False
    if request.global_batch % (x.dp * x.microbatch):
        return False
    m = request.global_batch // (x.dp * x.microbatch)
    stages = x.pp * x.vpp
    if stages > layers + 2 or (not stack.uneven_stages and layers % stages):
        return False
    if not partitions(layers, x.schedule, x.pp, x.vpp, stack.uneven_stages, request.free_stages):
        return False
    rules = set(stack.rules)
    if "pipeline_needs_multiple_of_pp" in rules and m % x.pp:
        return False
    if x.schedule in ("dualpipev", "gpipe_delayed", "looped_bfs_delayed") and m < 2 * x.pp:
        return False
    if x.schedule.startswith(GIVEN) and 1 + max(i for *_, i in given_rows(x.schedule)[0]) != m:
        return False
    if "moe_with_tp_needs_sequence_parallel" in rules and experts and x.tp > 1 and not x.sp:
        return False
    exchanged = experts and x.tp > 1 and x.ep > 1
    if "ep_with_tp_needs_sequence_parallel" in rules and exchanged and not x.sp:
        return False
    if "no_sequence_parallelism_with_context" in rules and x.sp and x.cp > 1:
        return False
    if "no_experts_with_tp" in rules and experts and x.tp > 1:
        return False
    if "experts_over_ep_or_tp" in rules and experts and x.etp != (1 if x.ep > 1 else x.tp):
        return False
    if "experts_follow_tp" in rules and experts and x.etp != x.tp:
        return False
    if "experts_over_data_or_context" in rules and x.dp % x.ep and x.cp % x.ep:
        return False
    if "no_accumulation_in_fp8" in rules and request.job.precision == "fp8" and x.pp == 1 and m > 1:
        return False
    if request.job.precision == "fp8" and (
        ("no_pipeline_in_fp8" in rules and x.pp > 1) or ("no_experts_in_fp8" in rules and experts)
    ):
        return False
    if "no_sinks_in_16_bit_pipelines" in rules and x.pp > 1 and request.job.precision != "fp32":
        for block in request.model.blocks.values():
            if isinstance(block.mixer, AttentionSpec) and block.mixer.sinks:
                return False
    if request.job.optimizer == "muon" and (
        (x.tp > 1 and not stack.muon.tensor_parallel) or (x.pp > 1 and not stack.muon.pipeline)
    ):
        return False
    if drives_lose_gradients(request, x):
        return False
    if "no_experts" in rules and experts:
        return False
    if "no_tied_embeddings_in_pipeline" in rules and request.model.tied_embeddings and x.pp > 1:
        return False
    if "no_tied_embeddings" in rules and request.model.tied_embeddings:
        return False
    if isinstance(request.model, ModelSpec) and request.model.mtp and request.job.mtp:
        if "no_prediction_in_pipeline" in rules and x.pp > 1:
            return False
        if "no_prediction_with_context" in rules and x.cp > 1:
            return False
    if "no_pipeline" in rules and x.pp > 1:
        return False
    if "no_expert_parallelism" in rules and x.ep > 1:
        return False
    if "tp_needs_expert_parallelism" in rules and x.ep == 1 and x.tp > 1:
        return False
    replicated = x.zero == 0 and x.dp > 1
    if "zero_0_is_replicate_only" in rules and replicated and x.tp * x.cp * x.pp > 1:
        return False
    anew = x.zero < 2 and x.dp * x.cp > 1 and m > 1
    if "whole_gradients_need_one_microbatch" in rules and anew:
        return False
    if "no_zero_2_with_pipeline" in rules and x.zero == 2 and x.pp > 1:
        return False
    if "zero_2_needs_pipeline" in rules and x.zero == 2 and x.pp < 2:
        return False
    if "zero_1_shards_over_all" in rules and x.zero == 1 and x.dp_shard != x.dp:
        return False
    nodes_filled, rest = divmod(x.dp_shard * x.cp, request.cluster.groups[0].node.devices_per_node)
    if "shards_fill_nodes" in rules and (rest or nodes_filled < 2):
        return False
    a_node = request.cluster.groups[0].node.devices_per_node
    replicas = x.zero > 0 and x.dp_shard < x.dp
    if "hybrid_shards_are_nodes" in rules and replicas and x.dp_shard != a_node:
        return False
    if "replicas_share_weights" in rules and replicas and x.dp_shard == 1:
        return False
    if "no_accumulation" in rules and m > 1:
        return False
    keeps = stack.reshard_group
    if keeps == "node":
        keeps = request.cluster.groups[0].node.devices_per_node
    spread = x.dp_shard * x.cp
    if x.zero == 3 and keeps not in (None, "any") and spread > keeps and spread % keeps:
        return False
    if "zero_2_needs_expert_parallelism" in rules and x.zero == 2 and x.ep == 1:
        return False
    if x.zero == 3 and x.cp > 1 and "no_zero_3_with_context" in rules:
        return False
    if "no_zero_3_with_split_backward" in rules and x.zero == 3 and x.pp > 1 and splits(x.schedule):
        return False
    return not ("no_zero_3_with_pipeline" in rules and x.zero == 3 and x.pp > 1)


def rounds(request: Request, x: Layout) -> list[int]:
    """Sizes of rounds that the stack runs and the user allows; 0 where a schedule has none."""
    sizes = [0]
    if x.schedule in ("interleaved", "interleaved_zero_bubble"):
        m, rule = request.global_batch // (x.dp * x.microbatch), request.stack.rounds
        sizes = []
        for size in range(1, m + 1):
            full, rest = divmod(m, size)
            if size < x.pp and not (size == m and rule in ("equal", "any")):
                continue
            if rest and (rule in ("pp", "equal") or rest < x.pp):
                continue
            if (rule == "pp" and size > x.pp) or (rule == "equal" and full != max(1, m // x.pp)):
                continue
            sizes.append(size)
    limits = request.job.constraints
    if "round_size" in limits.forbid:
        sizes = [size for size in sizes if not size]
    if "round_size" in limits.fix:
        sizes = [size for size in sizes if size == limits.fix["round_size"]]
    return [size for size in sizes if size <= limits.max.get("round_size", size)]


def wanted(request: Request, x: Layout) -> bool:
    """Whether the user's constraints admit the layout."""
    limits = request.job.constraints
    degree = {
        "tp": x.tp, "cp": x.cp, "pp": x.pp, "vpp": x.vpp, "dp_replicate": x.dp_replicate,
        "dp_shard": x.dp_shard, "ep": x.ep, "etp": x.etp, "microbatch_size": x.microbatch,
        "zero_stage": x.zero, "round_size": 0, "layers_outside": x.outside,
    }  # fmt: skip
    if not rounds(request, x):
        return False
    apart = ("round_size",)
    if any(degree[name] != value for name, value in limits.fix.items() if name not in apart):
        return False
    if any(degree[name] > value for name, value in limits.max.items()):
        return False
    if any(degree[name] > FORBIDDEN.get(name, 1) for name in limits.forbid):
        return False
    if limits.schedule is not None and x.pp > 1 and x.schedule != limits.schedule:
        return False
    wanted_sp = limits.sequence_parallel
    return wanted_sp is None or x.tp == 1 or bool(x.sp) == wanted_sp


def partitions(
    layers: int, schedule: str, pp: int, vpp: int, uneven: bool, free: bool = False
) -> list[list[int]]:
    """Sizes of the virtual stages, every way that the schedule and the stack allow."""
    stages = pp * vpp
    if not uneven:
        return [[layers // stages] * stages]
    if stages == 1:
        return [[layers]]
    if free:
        return list(_compositions(layers, stages, at_start=True))
    if turns(schedule):
        return _on_a_v(layers, pp)
    if schedule not in ONE_STAGE:
        found = []
        for height in range(1, layers + 1):
            for first in range(height + 1):
                last = layers - first - (stages - 2) * height
                if 0 <= last <= height:
                    found.append([first, *[height] * (stages - 2), last])
        return found
    return list(_compositions(layers, pp, at_start=True))


def _on_a_v(layers: int, pp: int) -> list[list[int]]:
    """Equal ranks behind a lighter first one; the two chunks of a rank differ by one at most."""
    found = []
    for down in range(1, layers + 1):
        for up in range(max(1, down - 1), down + 2):
            for first in range(down + 1):
                last = layers - first - (pp - 1) * (down + up)
                if 0 <= last <= up:
                    found.append([first, *[down] * (pp - 1), *[up] * (pp - 1), last])
    return found


def _compositions(layers: int, parts: int, *, at_start: bool) -> Iterator[list[int]]:
    """Ordered sums; the first and the last stage hold an end of the model and may hold no layer."""
    if parts == 1:
        yield [layers]
        return
    for size in range(0 if at_start else 1, layers + 1):
        for rest in _compositions(layers - size, parts - 1, at_start=False):
            yield [size, *rest]


Option = tuple[str, int]


def recompute_choices(request: Request) -> list[Option]:
    """What a stage may recompute: a mode, and how many layers at a chunk's front for ``full`` and
    for two modes."""
    limits, stack = request.job.constraints, request.stack
    choices: list[Option] = []
    layers = request.model.layer_count
    offered = ["none"] if "none" in stack.recompute else []
    refused = stack.recompute_refused.get(request.job.precision, ())
    able = [p.name for p in request.workload.policies if not any(m in p.modules for m in refused)]
    for mode in (*offered, *able):
        if limits.recompute is not None and mode != limits.recompute:
            continue
        if mode != "none" and not request.job.allow_recompute:
            continue
        if mode != "full":
            choices.append((mode, 0))
        elif stack.recompute_layer_count:
            choices += [("full", count) for count in range(1, layers + 1)]
        else:
            choices.append(("full", layers))
    return choices + _mixtures(request, {mode for mode, _ in choices}, layers)


def _mixtures(request: Request, modes: set[str], layers: int) -> list[Option]:
    """Two modes in one stage, the one at the front running again all that the other does."""
    if not request.stack.recompute_mixed:
        return []
    again = {p.name: p.modules for p in request.workload.policies if p.keeps is None}
    again["none"] = frozenset()
    found = []
    for front in modes:
        for rest in again.keys() & modes - {front}:
            wanted = front in again and again[rest] <= again[front]
            if front == "full":
                wanted = request.stack.recompute_layer_count and rest != "none"
            if wanted:
                found += [(f"{front}/{rest}", count) for count in range(1, layers)]
    return sorted(found)
