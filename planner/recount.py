"""The space once more, by plain loops: the recheck must not trust the list of the search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_models.layout import SCHEDULES
from hardware_profiles.stack_words import AttentionSort
from planner import recount_degrees as degrees
from planner.hosting import (
    cannot_offload,
    host_capacity,
    least_bytes_per_node,
    loses_gradients,
    offload_stage,
)
from planner.models.spec import MlpSpec, MoeSpec
from planner.plan import Layout
from planner.recount_host import inputs_held
from planner.recount_mixers import impossible_mixer
from planner.recount_order import impossible_order, order_shape
from planner.recount_outside import breaks_patterns, left_outside
from planner.request import Request


@dataclass(frozen=True)
class Mesh:
    """What fixes a mesh: all degrees but the split of data parallelism."""

    tp: int
    sp: bool
    cp: int
    cp_kind: str
    cp_inner: int
    pp: int
    ep: int
    etp: int
    mbs: int
    dp: int

    @staticmethod
    def of(layout: Layout) -> Mesh:
        return Mesh(
            layout.tp, layout.sequence_parallel, layout.cp, layout.cp_kind, layout.cp_inner,
            layout.pp, layout.ep, layout.etp, layout.microbatch_size,
            layout.dp_replicate * layout.dp_shard,
        )  # fmt: skip


SPLIT = ("interleaved_zero_bubble", "zbv", "dualpipev", "given_split", "given_v_split")
"""Schedules that split the backward: whole layers run again or nothing does."""
DIVIDED = ("1f1b_vocab_1", "1f1b_vocab_2", "1f1b_interlaced")  # parts of both ends on all ranks
ONE_STAGE = ("gpipe", "gpipe_delayed", "1f1b", *DIVIDED)
CODES: dict[str, int] = {name: code for code, name in enumerate(SCHEDULES)}
ON_A_V = ("zbv", "dualpipev", "given_v", "given_v_split")
HALVES = ("interleaved_zero_bubble", "zbv", "dualpipev", "given_split", "given_v_split")
"""Schedules whose ranks hold two virtual stages, there and back."""


def every_mesh(request: Request) -> Iterator[Mesh]:
    """Every mesh that the model, the job and the stack allow."""
    stack, batch, devices = request.stack, request.global_batch, request.devices
    experts = request.workload.expert_count
    sizes = degrees.divisors(devices)
    eps = degrees.divisors(experts) if experts else [1]
    for tp in sizes:
        flags = {"optional": (False, True), "always": (True,), "never": (False,)}
        for cp in (c for c in sizes if devices % (tp * c) == 0):
            for pp in (p for p in sizes if devices % (tp * cp * p) == 0):
                dp = devices // (tp * cp * pp)
                if batch % dp:
                    continue
                for sp in flags[stack.sequence_parallel] if tp > 1 else (False,):
                    for kind, inner in degrees.context_levels(request, cp):
                        for ep in (e for e in eps if (dp * cp * tp) % e == 0):
                            for etp in degrees.expert_degrees(request, tp, devices // pp // ep):
                                for mbs in degrees.divisors(batch // dp):
                                    mesh = Mesh(tp, sp, cp, kind, inner, pp, ep, etp, mbs, dp)
                                    if impossible_mesh(mesh, request) is None:
                                        yield mesh


def impossible_mesh(mesh: Mesh, request: Request) -> str | None:
    """Why no layout of this mesh can run, or None."""
    model, stack, sequence = request.model, request.stack, request.sequence
    blocks = list(model.blocks.values())
    for block in [*blocks, *([model.vision.block] if model.vision else [])]:
        mixer, feed_forward, tower = block.mixer, block.feed_forward, block not in blocks
        for own in degrees.meshes_of_layers(mesh, block, request):
            if reason := impossible_mixer(mixer, own, request, tower):
                return reason
        if degrees.parts_of_groups(mixer, mesh.tp, request):
            return "Muon takes whole query groups"
        if isinstance(feed_forward, MlpSpec) and feed_forward.intermediate % mesh.tp:
            return f"width {feed_forward.intermediate} does not split over tp {mesh.tp}"
        if isinstance(feed_forward, MoeSpec):
            if feed_forward.experts % mesh.ep or feed_forward.intermediate % mesh.etp:
                return "experts do not split over ep and etp"
            if "experts_follow_tp" in stack.rules and mesh.etp != mesh.tp:
                return "experts are split as tp is"
            if "experts_over_ep_or_tp" in stack.rules and (
                mesh.etp != (mesh.tp if mesh.ep == 1 else 1)
            ):
                return "experts are split over ep, or as tp is without it"
            apart = mesh.dp % mesh.ep == 0 or mesh.cp % mesh.ep == 0
            if "experts_over_data_or_context" in stack.rules and not apart:
                return "experts are split over samples or over pieces of them, not both"
            if feed_forward.shared_intermediate % mesh.tp:
                return "shared experts do not split over tp"
            whole = mesh.tp > 1 and not mesh.sp
            if whole and "moe_with_tp_needs_sequence_parallel" in stack.rules:
                return "experts with tp need sequence parallelism"
            if whole and mesh.ep > 1 and "ep_with_tp_needs_sequence_parallel" in stack.rules:
                return "expert parallelism with tp needs sequence parallelism"
            if mesh.tp > 1 and "no_experts_with_tp" in stack.rules:
                return "no mixture of experts under tp"
            if "no_experts" in stack.rules:
                return "the stack has no mixture of experts"
    if request.job.optimizer == "muon" and mesh.tp > 1 and not stack.muon.tensor_parallel:
        return "muon takes whole matrices"
    if request.job.optimizer == "muon" and mesh.pp > 1 and not stack.muon.pipeline:
        return "muon takes all layers"
    if loses_gradients(request, mesh.dp * mesh.cp):
        return "the drives lose gradients"
    transposed = request.job.tensor_transpose
    if transposed > 1 and mesh.tp % transposed:
        return "tensor_transpose is a part of tp"
    beside = mesh.tp > transposed or mesh.ep > 1
    if transposed > 1 and beside and request.workload.expert_count:
        return "mixtures run tensor_transpose alone"
    asked = request.job.constraints.recompute or "none"
    if asked.startswith("partitioned") and (mesh.tp == 1 or mesh.sp):
        return "no rank holds what another holds too"
    sent, number = (request.job.constraints.recompute or "").partition(":")[::2]
    if sent == "offload" and (mesh.pp > 1 or int(number) >= model.layer_count):
        return "no layers wait on the host"
    if not model.splits_sequence and (mesh.cp > 1 or mesh.sp):
        return "the network does not split along a sequence"
    sort: AttentionSort = (
        "mixtures of experts" if request.workload.expert_count else "models without experts"
    )
    kinds = {*(request.job.cp_kinds or [mesh.cp_kind])}
    if mesh.cp > 1 and not kinds <= {*stack.cp_kinds_of.get(sort, stack.cp_kinds)}:
        return f"no such context parallelism of {sort}"
    if model.tensor_split is not None and model.tensor_split % mesh.tp:
        return "the network does not split over tp"
    if (mesh.dp * mesh.cp * mesh.tp) % (mesh.ep * mesh.etp):
        return "ep x etp does not divide dp x cp x tp"
    halves = 2 if stack.balanced_context is True else 1
    if mesh.cp > 1 and (sequence % (halves * mesh.cp) or not stack.cp_kinds):
        return f"the sequence does not split over cp {mesh.cp}"
    if mesh.sp and sequence % (mesh.cp * mesh.tp):
        return "the sequence does not split over cp x tp"
    if mesh.sp and mesh.cp > 1 and "no_sequence_parallelism_with_context" in stack.rules:
        return "sequence and context parallelism exclude each other"
    if mesh.sp and stack.sequence_parallel == "never":
        return "the stack has no sequence parallelism"
    if stack.tensor_parallel_max is not None and mesh.tp > stack.tensor_parallel_max:
        return f"the stack splits tensors at most {stack.tensor_parallel_max} ways"
    tied = request.workload.tied_embeddings and "no_tied_embeddings_in_pipeline" in stack.rules
    if request.workload.tied_embeddings and "no_tied_embeddings" in stack.rules:
        return "the stack ties no embeddings"
    if mesh.pp > 1 and tied:
        return "the stack ties no embeddings under a pipeline"
    if request.predicts:
        if mesh.pp > 1 and "no_prediction_in_pipeline" in stack.rules:
            return "no further tokens are predicted under a pipeline"
        if mesh.cp > 1 and "no_prediction_with_context" in stack.rules:
            return "no further tokens are predicted with context parallelism"
    if mesh.pp > 1 and "no_pipeline" in stack.rules:
        return "the stack has no pipeline"
    in_fp8 = request.job.precision == "fp8"
    if in_fp8 and mesh.pp > 1 and "no_pipeline_in_fp8" in stack.rules:
        return "the stack's pipelines are not in fp8"
    if in_fp8 and request.workload.expert_count and "no_experts_in_fp8" in stack.rules:
        return "the stack has no mixture of experts in fp8"
    if mesh.ep > 1 and "no_expert_parallelism" in stack.rules:
        return "the stack has no expert parallelism"
    if mesh.tp > 1 and mesh.ep == 1 and "tp_needs_expert_parallelism" in stack.rules:
        return "the stack has no tensor parallelism without expert parallelism"
    if mesh.pp > model.layer_count + (2 if stack.uneven_stages else 0):
        return "more stages than layers"
    accumulates = mesh.pp == 1 and mesh.dp * mesh.mbs < request.global_batch
    if accumulates and in_fp8 and "no_accumulation_in_fp8" in stack.rules:
        return "the stack accumulates no gradients in fp8"
    if accumulates and "no_accumulation" in stack.rules:
        return "a step of the stack is one microbatch"
    if request.global_batch % (mesh.dp * mesh.mbs):
        return "the batch does not split over dp x microbatch"
    return None


def rounds_of(schedule: str, mesh: Mesh, request: Request) -> list[int]:
    """Sizes of rounds in which the stack runs the microbatches; only 0 without rounds."""
    if schedule not in ("interleaved", "interleaved_zero_bubble"):
        return [0]
    m, pp = request.global_batch // (mesh.dp * mesh.mbs), mesh.pp
    match request.stack.rounds:
        case "pp":
            return [] if m % pp else [pp]
        case "equal":
            rounds = max(1, m // pp)
            return [] if m % rounds else [m // rounds]
        case "any" if m < pp:
            return [m]
    return [size for size in range(pp, m + 1) if m % size == 0 or m % size >= pp]


def impossible_layout(
    shard: int, zero: int, schedule: str, vpp: int, mesh: Mesh, request: Request, size: int = 0,
    outside: int = 0,
) -> str | None:  # fmt: skip
    """Why this layout of a possible mesh cannot run (in rounds of ``size``, if not 0, and with so
    many layers ``outside`` the pipeline), or None."""
    stack, layers = request.stack, request.model.layer_count - outside
    if outside not in left_outside(schedule, mesh.pp * vpp, request):
        return f"no {outside} layers stay outside this pipeline"
    m = request.global_batch // (mesh.dp * mesh.mbs)
    stages = mesh.pp * vpp
    if schedule.startswith("given"):
        rows = request.job.schedule_actions
        reason = impossible_order(rows, schedule, mesh.pp, vpp, m)
        if reason:
            return reason
    elif mesh.pp > 1 and schedule not in stack.schedules:
        return f"the stack has no schedule {schedule}"
    elif (vpp > 1) != (schedule not in ONE_STAGE):
        return "interleaving is what vpp > 1 means"
    if stages > 1 and breaks_patterns(layers / stages, request):
        return "stages hold whole patterns of layers"
    if schedule in ON_A_V and vpp != 2:
        return "a V has two virtual stages per rank"
    if "pipeline_needs_multiple_of_pp" in stack.rules and m % mesh.pp:
        return "a pipeline needs a multiple of pp microbatches"
    if schedule == "dualpipev" and m < stages:
        return "DualPipeV needs at least 2 x pp microbatches"
    if schedule.endswith("_delayed") and m < 2 * mesh.pp:
        return "delayed transfers need at least 2 x pp microbatches"
    if request.workload.expert_count and (shard * mesh.cp * mesh.tp) % (mesh.ep * mesh.etp):
        return "ep x etp does not divide dp_shard x cp x tp"
    job = request.job
    if zero < request.least_zero_stage and mesh.dp * mesh.cp > 1:
        return "the optimizer needs ZeRO"
    if request.machine.offload.anything:
        if (reason := cannot_offload(request)) is not None:
            return reason
        bound = stack.offload is not None and stack.offload.takes_experts == "without_ep"
        if job.optimizer_offload and bound and mesh.ep > 1:
            return "under ep nothing is offloaded"
        if job.optimizer_offload and job.optimizer_offload_share < 1 and zero < 3:
            return "shares of the optimizer state are those of split weights"
        if job.parameter_offload and zero < offload_stage(request):
            return "the host holds weights that are split only"
        copies = mesh.dp // shard * (1 if zero else shard * mesh.cp)
        held = least_bytes_per_node(request) * float(copies)
        if request.machine.offload.inputs or job.activation_offload:
            held += inputs_held(mesh, (schedule, vpp, m, size or min(m, mesh.pp)), request)
        if held > (host_capacity(request) or 0):
            return "the hosts do not hold what is offloaded"
    if shard * mesh.cp == 1 and 0 in _zero_stages(request):
        wrapped = "shards_over_one_rank" in stack.rules and mesh.tp * mesh.pp > 1
        if zero and not wrapped:
            return "sharding over one rank is ZeRO stage 0"
        if not zero and wrapped and mesh.dp * mesh.cp == 1:
            return "weights that no rank shares are sharded over one"
    if not rounds_of(schedule, mesh, request):
        return "the stack has no rounds of so many microbatches"
    if vpp > 1 or schedule.startswith("given"):
        height = -(-layers // stages)
        most = 2 * height if stack.uneven_stages else 0
        fits = stages * height - layers <= most
        if schedule in ON_A_V and stack.uneven_stages:
            fits = layers - (mesh.pp - 1) * max(2, -(-layers // mesh.pp)) >= 0
        if not fits and not request.free_stages:
            return "no even split into virtual stages"
    beside = mesh.dp > 1 and mesh.tp * mesh.cp * mesh.pp > 1
    if zero == 0 and beside and "zero_0_is_replicate_only" in stack.rules:
        return "replication alone does not combine"
    whole = zero < 2 and mesh.dp * mesh.cp > 1 and m > 1
    if whole and "whole_gradients_need_one_microbatch" in stack.rules:
        return "whole gradients are summed anew with each microbatch"
    if zero == 1 and shard < mesh.dp and "zero_1_shards_over_all" in stack.rules:
        return "the optimizer's state is split over all of dp"
    if zero == 2 and mesh.pp > 1 and "no_zero_2_with_pipeline" in stack.rules:
        return "no sharded gradients under a pipeline"
    if zero == 2 and mesh.ep == 1 and "zero_2_needs_expert_parallelism" in stack.rules:
        return "layers give their weights back after each forward"
    if zero == 2 and mesh.pp == 1 and "zero_2_needs_pipeline" in stack.rules:
        return "weights stay gathered for the microbatches of a pipeline"
    if zero == 3 and mesh.cp > 1 and "no_zero_3_with_context" in stack.rules:
        return "parameters are split where each rank has whole sequences"
    if zero == 3 and mesh.pp > 1 and "no_zero_3_with_pipeline" in stack.rules:
        return "parameters stay gathered under a pipeline"
    halves = mesh.pp > 1 and schedule in HALVES
    if zero == 3 and halves and "no_zero_3_with_split_backward" in stack.rules:
        return "weights that a forward gave back get no gradients from half a backward"
    group, ways = request.machine.reshard_group, shard * mesh.cp
    node = request.cluster.groups[0].node.devices_per_node
    if "shards_fill_nodes" in stack.rules and (ways == node or ways % node or ways < node):
        return f"the weights' {ways} ranks do not fill several nodes"
    if zero and shard < mesh.dp and not stack.hybrid_sharding:
        return "the stack splits over all of dp"
    if zero and shard not in (mesh.dp, node) and "hybrid_shards_are_nodes" in stack.rules:
        return "shards of replicas are those of a node"
    if zero and mesh.dp > shard == 1 and "replicas_share_weights" in stack.rules:
        return "each replica's weights are on one data-parallel rank"
    if zero == 3 and group is not None and ways > group and ways % group:
        return f"the weights' {ways} ranks are no multiple of the {group} that keep a copy"
    if not stack.uneven_stages and layers % stages:
        return "layers do not split evenly"
    return None


Entry = tuple[int, int, int, int, int, int, int]
"""Replicas, shards, ZeRO stage, schedule code, vpp, ranks that keep weights, layers outside."""


def every_layout(mesh: Mesh, request: Request) -> Iterator[Entry]:
    """Every layout of a mesh."""
    stack, layers = request.stack, request.model.layer_count
    pipelines = [("1f1b", 1)] if mesh.pp == 1 else []
    given = order_shape(request.job.schedule_actions)
    if given is not None:
        pipelines = [(given.schedule, given.vpp)]
    elif mesh.pp > 1:
        most = (layers + 2) // mesh.pp if stack.uneven_stages else layers // mesh.pp
        pipelines += [(name, 1) for name in stack.schedules if name in ONE_STAGE]
        pipelines += [
            (name, v)
            for name in stack.schedules
            for v in range(2, most + 1)
            if name not in ONE_STAGE
        ]
    for zero in _zero_stages(request):
        shards = degrees.divisors(mesh.dp) if stack.hybrid_sharding else [mesh.dp]
        for shard in shards if zero else [1]:
            for schedule, vpp in pipelines:
                for out in left_outside(schedule, mesh.pp * vpp, request):
                    data = shard, zero, schedule, vpp
                    if impossible_layout(*data, mesh, request, outside=out) is None:
                        for keep in _kept(zero, shard * mesh.cp, request):
                            code = CODES[schedule]
                            yield mesh.dp // shard, shard, zero, code, vpp, keep, out


def _zero_stages(request: Request) -> tuple[int, ...]:
    """ZeRO stages that the stack has in the job's precision."""
    in_precision = request.stack.zero_stages_of
    if request.job.precision in in_precision:
        return in_precision[request.job.precision]
    return request.stack.zero_stages


def _kept(zero: int, ways: int, request: Request) -> list[int]:
    """How many of the ranks that share the weights may keep a copy for the backward."""
    if zero == 3 and request.stack.reshard_group == "any":
        return [0, *degrees.divisors(ways)[1:-1]]
    return [request.machine.reshard_group or 0 if zero == 3 else 0]


def wanted(mesh: Mesh, entry: Entry, request: Request) -> bool:
    """Whether a layout respects the user's constraints."""
    limits = request.job.constraints
    values: dict[str, int] = {
        "tp": mesh.tp, "cp": mesh.cp, "pp": mesh.pp, "ep": mesh.ep, "etp": mesh.etp,
        "microbatch_size": mesh.mbs, "dp_replicate": entry[0], "dp_shard": entry[1],
        "zero_stage": entry[2], "vpp": entry[4], "layers_outside": entry[6],
    }  # fmt: skip
    sizes = rounds_of(SCHEDULES[entry[3]], mesh, request)
    schedule, sp = limits.schedule, limits.sequence_parallel
    return (
        any(wanted_round(size, request) for size in sizes)
        and all(values.get(name, value) == value for name, value in limits.fix.items())
        and all(values.get(name, 0) <= value for name, value in limits.max.items())
        and all(
            values.get(n, 0) <= (n not in ("zero_stage", "layers_outside")) for n in limits.forbid
        )
        and (schedule is None or mesh.pp == 1 or SCHEDULES[entry[3]] == schedule)
        and (sp is None or mesh.tp == 1 or mesh.sp == sp)
    )


def wanted_round(size: int, request: Request) -> bool:
    """Whether the user's constraints allow rounds of ``size``; 0: a schedule without rounds."""
    limits = request.job.constraints
    if size and "round_size" in limits.forbid:
        return False
    return limits.fix.get("round_size", size) == size <= limits.max.get("round_size", size)
