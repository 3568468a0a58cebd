"""Recheck a plan without the solver and without the search's tables.

``verify`` rebuilds the request from the plan's own inputs and asks, in its own words:

* do the digests, degrees, stages and the user's constraints agree;
* does the cost model, run on this one layout, give every predicted number again, and does it fit;
* is the lower bound a lower bound: every layout of the space is enumerated by plain loops, and each
  whose relaxed bound is below the claimed one is taken apart, partition by partition, until its
  own bound or its simulated time is not.

It imports the cost models and nothing of ``space``, ``tables``, ``program``, ``solve`` or
``search``. Bookkeeping of the search (what was removed under which reason, how many leaves were
opened) is not a claim about the plan; ``planner.studies.verify`` replays the search for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cost_models.configs import Configs, cp_kind_code, price_configs
from cost_models.leaf import (
    EMPTY_LABEL,
    ChunkCosts,
    Completion,
    Label,
    Leaf,
    Recompute,
    chunk_costs,
    extend_label,
    fits,
    interleaved_bounds,
    peak_bytes,
    rank_costs,
    simulate_step,
    stage_costs,
    surrogate_ns,
)
from cost_models.relaxation import Relaxation
from cost_models.step import Field
from hardware_profiles.schema import ClusterSpec
from planner.errors import PlannerError
from planner.models.spec import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from planner.plan import Layout, Plan, digest, round_floats
from planner.predict import completion_of, predict, price
from planner.request import Request
from planner.specs import JobSpec

SLACK = 1e-8
"""Relative slack for numbers that were rounded to nine digits."""
LARGEST_LEAF = 2_000_000
"""Partial completions that one leaf may take; beyond it the bound counts as unchecked."""


def verify(plan: Plan) -> list[str]:
    """What does not hold in ``plan``, as sentences; an empty list means that all of it does."""
    findings = list(_check_inputs(plan))
    if findings:
        return findings
    try:
        request = request_of(plan)
        findings += _check_layout(plan.layout, request)
        findings += _check_constraints(plan.layout, request)
        if findings:
            return findings
        findings += _check_prediction(plan, request)
        findings += _check_alternatives(plan, request)
        findings += _check_certificate(plan)
        if not findings:
            findings += _check_bound(plan, request)
    except PlannerError as error:
        findings.append(error.message)
    return findings


def request_of(plan: Plan) -> Request:
    """The request that a plan answers, from its inputs."""
    from hardware_profiles.documents import DocumentError, validate
    from hardware_profiles.loader import load_stack
    from planner.errors import RefutedError

    inputs = plan.inputs
    try:
        model = validate(ModelSpec, inputs.model.document, where="inputs.model")
        cluster = validate(ClusterSpec, inputs.cluster.document, where="inputs.cluster")
        job = validate(JobSpec, inputs.job.document, where="inputs.job")
        stack = load_stack(job.stack)
    except DocumentError as error:
        raise RefutedError(f"the plan's inputs cannot be read: {error.message}") from error
    if (stack.name, stack.version) != (plan.target.stack, plan.target.version):
        raise RefutedError(
            f"the plan is for {plan.target.stack} {plan.target.version}, the job asks for "
            f"{stack.name} and {stack.version} is what ships"
        )
    return Request(model, cluster, job, stack)


def _check_inputs(plan: Plan) -> Iterator[str]:
    for name in ("model", "cluster", "job"):
        entry = getattr(plan.inputs, name)
        if digest(entry.document) != entry.digest:
            yield f"inputs.{name}: the digest is not that of the document"
    model, cluster = plan.inputs.model, plan.inputs.cluster
    if model.document.get("name") != model.name or cluster.document.get("name") != cluster.name:
        yield "inputs: a name differs from its document"


def _check_layout(layout: Layout, request: Request) -> Iterator[str]:
    """Degrees multiply, stages partition, devices follow, the stack's limits hold."""
    dp = layout.dp_replicate * layout.dp_shard
    world = dp * layout.cp * layout.tp * layout.pp
    if world != request.devices:
        yield f"the degrees multiply to {world}, the cluster has {request.devices} devices"
    if layout.microbatch_size * layout.num_microbatches * dp != request.global_batch:
        yield "microbatch_size x num_microbatches x dp is not the global batch"
    ranks = layout.dp_shard * layout.cp * layout.tp
    if ranks % (layout.ep * layout.etp):
        yield "ep x etp does not divide dp_shard x cp x tp"
    elif layout.expert_dp * layout.ep * layout.etp != ranks * layout.dp_replicate:
        yield "expert_dp does not follow from the other degrees"
    if layout.rank_order != request.stack.rank_order:
        yield "rank_order is not the stack's"
    if layout.reshard_after_forward != (layout.zero_stage == 3):
        yield "reshard_after_forward does not follow from the ZeRO stage"
    if layout.optimizer_offload:
        yield "optimizer_offload is not in the space"
    yield from _check_stages(layout, request)
    reason = _impossible(_Mesh.of(layout), request) or _impossible_layout(
        layout.dp_shard, layout.zero_stage, layout.schedule, layout.vpp, _Mesh.of(layout), request
    )
    if reason:
        yield reason


def _check_stages(layout: Layout, request: Request) -> Iterator[str]:
    per_stage = request.devices // layout.pp
    chunks = {}
    for rank, stage in enumerate(layout.stages):
        if stage.devices != (rank * per_stage, (rank + 1) * per_stage):
            yield f"stage {rank}: devices {stage.devices} are not its own"
        if len(stage.chunks) != layout.vpp:
            yield f"stage {rank}: {len(stage.chunks)} chunks, but vpp = {layout.vpp}"
        if stage.activation_offload_layers:
            yield f"stage {rank}: activation offload is not in the space"
        for index, chunk in enumerate(stage.chunks):
            chunks[index * layout.pp + rank] = chunk
    position = 0
    for j, chunk in sorted(chunks.items()):
        if chunk.layers[0] != position or chunk.layers[1] < position:
            yield f"virtual stage {j} holds layers {chunk.layers}, expected to start at {position}"
            return
        position = chunk.layers[1]
        if chunk.has_embedding != (j == 0) or chunk.has_head != (j == len(chunks) - 1):
            yield f"virtual stage {j}: embedding or head in the wrong place"
    if position != request.model.layer_count:
        yield f"the stages hold {position} of {request.model.layer_count} layers"
        return
    yield from _check_recompute(layout, request)


def _check_recompute(layout: Layout, request: Request) -> Iterator[str]:
    """The per-kind counts are those of one mode and number of layers, as the stack allows."""
    completion = completion_of(layout, request)
    kinds = request.workload.layers
    for rank, stage in enumerate(layout.stages):
        counts: dict[tuple[str, str], int] = {}
        for j in range(rank, layout.pp * layout.vpp, layout.pp):
            mode, limit = completion.recompute[j]
            first, last = completion.bounds[j], completion.bounds[j + 1]
            upto = last if mode == "selective" else min(last, first + limit)
            for kind in kinds[first:upto] if mode != "none" else ():
                counts[kind, mode] = counts.get((kind, mode), 0) + 1
        stated = {(part.kind, part.mode): part.layers for part in stage.recompute}
        if stated != counts:
            yield f"stage {rank}: recompute {stated} is not what its layers make, {counts}"
    modes = {mode for mode, _ in completion.recompute}
    allowed = set(_modes(request))
    if not modes <= allowed:
        yield f"recompute modes {sorted(modes - allowed)} are not allowed"


def _check_constraints(layout: Layout, request: Request) -> Iterator[str]:
    limits = request.job.constraints
    values = layout.model_dump()
    for name, value in limits.fix.items():
        if values[name] != value:
            yield f"{name} = {values[name]}, asked for {value}"
    for name, value in limits.max.items():
        if values[name] > value:
            yield f"{name} = {values[name]}, asked for at most {value}"
    for name in limits.forbid:
        if values[name] > (0 if name == "zero_stage" else 1):
            yield f"{name} = {values[name]}, asked for none"
    if limits.schedule is not None and layout.pp > 1 and layout.schedule != limits.schedule:
        yield f"schedule {layout.schedule}, asked for {limits.schedule}"
    sp = limits.sequence_parallel
    if sp is not None and layout.tp > 1 and layout.sequence_parallel != sp:
        yield f"sequence_parallel = {layout.sequence_parallel}, asked for {sp}"


def _check_prediction(plan: Plan, request: Request) -> Iterator[str]:
    again = predict(price(plan.layout, request), request)
    stated, found = (
        round_floats(document.model_dump(mode="json")) for document in (plan.prediction, again)
    )
    for path, one, other in differences(stated, found):
        yield f"prediction{path} is {one}, the cost model says {other}"
    if not again.fits:
        yield "the layout does not fit in memory"


def _check_alternatives(plan: Plan, request: Request) -> Iterator[str]:
    for index, other in enumerate(plan.alternatives):
        priced = price(other.layout, request)
        peak = max(
            peak_bytes(priced.leaf, rank, costs.chunks) for rank, costs in enumerate(priced.ranks)
        )
        if abs(priced.step.total_ns / 1e9 - other.step_time_s) > SLACK * other.step_time_s:
            yield f"alternatives[{index}].step_time_s is not what the cost model says"
        if peak != other.max_peak_bytes or priced.fits != other.fits:
            yield f"alternatives[{index}]: memory is not what the cost model says"


def _check_certificate(plan: Plan) -> Iterator[str]:
    proof = plan.certificate
    objective, bound, gap = proof.objective_s, proof.lower_bound_s, proof.relative_gap
    if objective is None or bound is None or gap is None:
        yield "certificate: a plan needs objective, bound and gap"
        return
    if abs(objective - plan.prediction.step_time_s) > SLACK * objective:
        yield "certificate.objective_s is not the predicted step time"
    if bound > objective * (1 + SLACK):
        yield "certificate.lower_bound_s exceeds the objective"
    if abs(gap - max(0.0, 1 - bound / objective)) > SLACK:
        yield "certificate.relative_gap is not 1 - bound / objective"
    if proof.status == "infeasible":
        yield "certificate.status is infeasible, but there is a plan"
    if proof.status == "optimal" and gap > proof.tolerance + SLACK:
        yield "certificate.status is optimal, but the gap exceeds the tolerance"
    if proof.space_size != proof.priced + sum(proof.removed.values()):
        yield "certificate: priced and removed layouts do not add up to the space"


def differences(one: object, other: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Paths at which two JSON values differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}[{index}]")
    elif one != other:
        yield path, one, other


@dataclass(frozen=True)
class _Mesh:
    tp: int
    sp: bool
    cp: int
    cp_kind: str
    pp: int
    ep: int
    etp: int
    mbs: int
    dp: int

    @staticmethod
    def of(layout: Layout) -> _Mesh:
        return _Mesh(
            layout.tp, layout.sequence_parallel, layout.cp, layout.cp_kind, layout.pp, layout.ep,
            layout.etp, layout.microbatch_size, layout.dp_replicate * layout.dp_shard,
        )  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _modes(request: Request) -> tuple[str, ...]:
    job = request.job
    return tuple(
        mode
        for mode in request.stack.recompute
        if (job.allow_recompute or mode == "none") and job.constraints.recompute in (None, mode)
    )


def _meshes(request: Request) -> Iterator[_Mesh]:
    """Every mesh that the model, the job and the stack allow."""
    stack, batch, devices = request.stack, request.global_batch, request.devices
    experts = request.workload.expert_count
    sizes = _divisors(devices)
    eps = _divisors(experts) if experts else [1]
    for tp in sizes:
        flags = {"optional": (False, True), "always": (True,), "never": (False,)}
        for cp in (c for c in sizes if devices % (tp * c) == 0):
            for pp in (p for p in sizes if devices % (tp * cp * p) == 0):
                dp = devices // (tp * cp * pp)
                if batch % dp:
                    continue
                for sp in flags[stack.sequence_parallel] if tp > 1 else (False,):
                    for kind in stack.cp_kinds if cp > 1 else stack.cp_kinds[:1] or ("p2p",):
                        for ep in (e for e in eps if (dp * cp * tp) % e == 0):
                            for etp in (
                                _divisors(tp) if experts and stack.expert_tensor_parallel else [1]
                            ):
                                for mbs in _divisors(batch // dp):
                                    mesh = _Mesh(tp, sp, cp, kind, pp, ep, etp, mbs, dp)
                                    if _impossible(mesh, request) is None:
                                        yield mesh


def _impossible(mesh: _Mesh, request: Request) -> str | None:
    """Why no layout of this mesh can run, or None."""
    model, stack, sequence = request.model, request.stack, request.sequence
    for block in model.blocks.values():
        mixer, feed_forward = block.mixer, block.feed_forward
        if mixer is not None and mixer.heads % mesh.tp:
            return f"{mixer.heads} heads do not split over tp {mesh.tp}"
        if (
            isinstance(mixer, AttentionSpec)
            and mixer.kv_heads % mesh.tp
            and (mesh.tp % mixer.kv_heads)
        ):
            return f"{mixer.kv_heads} KV heads do not split over tp {mesh.tp}"
        if mesh.cp > 1 and mesh.cp_kind == "a2a":
            shared = mixer.kv_heads if isinstance(mixer, AttentionSpec) else 0
            shared = mixer.heads if isinstance(mixer, LatentAttentionSpec) else shared
            if shared % (mesh.tp * mesh.cp):
                return f"{shared} heads do not split over tp x cp"
        if isinstance(feed_forward, MlpSpec) and feed_forward.intermediate % mesh.tp:
            return f"width {feed_forward.intermediate} does not split over tp {mesh.tp}"
        if isinstance(feed_forward, MoeSpec):
            if feed_forward.experts % mesh.ep or feed_forward.intermediate % mesh.etp:
                return "experts do not split over ep and etp"
            if feed_forward.shared_intermediate % mesh.tp:
                return "shared experts do not split over tp"
            if "moe_with_tp_needs_sequence_parallel" in stack.rules and (
                mesh.tp > 1 and not mesh.sp
            ):
                return "experts with tp need sequence parallelism"
            if "no_experts" in stack.rules:
                return "the stack has no mixture of experts"
    if (mesh.dp * mesh.cp * mesh.tp) % (mesh.ep * mesh.etp):
        return "ep x etp does not divide dp x cp x tp"
    if mesh.cp > 1 and (sequence % (2 * mesh.cp) or not stack.cp_kinds):
        return f"the sequence does not split over cp {mesh.cp}"
    if mesh.sp and sequence % (mesh.cp * mesh.tp):
        return "the sequence does not split over cp x tp"
    if mesh.sp and stack.sequence_parallel == "never":
        return "the stack has no sequence parallelism"
    if stack.tensor_parallel_max is not None and mesh.tp > stack.tensor_parallel_max:
        return f"the stack splits tensors at most {stack.tensor_parallel_max} ways"
    if mesh.pp > model.layer_count + (2 if stack.uneven_stages else 0):
        return "more stages than layers"
    if request.global_batch % (mesh.dp * mesh.mbs):
        return "the batch does not split over dp x microbatch"
    return None


def _impossible_layout(
    shard: int, zero: int, schedule: str, vpp: int, mesh: _Mesh, request: Request
) -> str | None:
    """Why this layout of a possible mesh cannot run, or None."""
    stack, layers = request.stack, request.model.layer_count
    m = request.global_batch // (mesh.dp * mesh.mbs)
    stages = mesh.pp * vpp
    if mesh.pp > 1 and schedule not in stack.schedules:
        return f"the stack has no schedule {schedule}"
    if (vpp > 1) != (schedule == "interleaved"):
        return "interleaving is what vpp > 1 means"
    if request.workload.expert_count and (shard * mesh.cp * mesh.tp) % (mesh.ep * mesh.etp):
        return "ep x etp does not divide dp_shard x cp x tp"
    if zero and shard * mesh.cp == 1 and 0 in stack.zero_stages:
        return "sharding over one rank is ZeRO stage 0"
    if schedule == "interleaved":
        if "interleaved_needs_multiple_of_pp" in stack.rules and m % mesh.pp:
            return "interleaving needs a multiple of pp microbatches"
        height = -(-layers // stages)
        if stages * height - layers > (2 * height if stack.uneven_stages else 0):
            return "no even split into virtual stages"
    if (
        zero == 0
        and "zero_0_is_replicate_only" in stack.rules
        and mesh.dp > 1
        and (mesh.tp * mesh.cp * mesh.pp > 1)
    ):
        return "replication alone does not combine"
    if zero == 3 and mesh.pp > 1 and "no_zero_3_with_pipeline" in stack.rules:
        return "parameters stay gathered under a pipeline"
    if not stack.uneven_stages and layers % stages:
        return "layers do not split evenly"
    return None


def _layouts(mesh: _Mesh, request: Request) -> Iterator[tuple[int, int, int, int, int]]:
    """``(replicate, shard, zero, schedule code, vpp)`` of every layout of a mesh."""
    stack, layers = request.stack, request.model.layer_count
    pipelines = [("1f1b", 1)] if mesh.pp == 1 else []
    if mesh.pp > 1:
        most = (layers + 2) // mesh.pp if stack.uneven_stages else layers // mesh.pp
        pipelines += [(name, 1) for name in stack.schedules if name != "interleaved"]
        if "interleaved" in stack.schedules:
            pipelines += [("interleaved", v) for v in range(2, most + 1)]
    codes = {"gpipe": 0, "1f1b": 1, "interleaved": 2}
    for zero in stack.zero_stages:
        shards = _divisors(mesh.dp) if stack.hybrid_sharding else [mesh.dp]
        for shard in shards if zero else [1]:
            for schedule, vpp in pipelines:
                if _impossible_layout(shard, zero, schedule, vpp, mesh, request) is None:
                    yield mesh.dp // shard, shard, zero, codes[schedule], vpp


def _wanted(mesh: _Mesh, entry: tuple[int, int, int, int, int], request: Request) -> bool:
    """Whether a layout respects the user's constraints."""
    limits = request.job.constraints
    values: dict[str, int] = {
        "tp": mesh.tp, "cp": mesh.cp, "pp": mesh.pp, "ep": mesh.ep, "etp": mesh.etp,
        "microbatch_size": mesh.mbs, "dp_replicate": entry[0], "dp_shard": entry[1],
        "zero_stage": entry[2], "vpp": entry[4],
    }  # fmt: skip
    names = ("gpipe", "1f1b", "interleaved")
    schedule, sp = limits.schedule, limits.sequence_parallel
    return (
        all(values[name] == value for name, value in limits.fix.items())
        and all(values[name] <= value for name, value in limits.max.items())
        and all(values[n] <= (0 if n == "zero_stage" else 1) for n in limits.forbid)
        and (schedule is None or mesh.pp == 1 or names[entry[3]] == schedule)
        and (sp is None or mesh.tp == 1 or mesh.sp == sp)
    )


BATCH = 20_000
"""Layouts priced at once."""


def _check_bound(plan: Plan, request: Request) -> Iterator[str]:
    """No layout of the space has a bound below the claimed one that does not rise to it."""
    claimed = plan.certificate.lower_bound_s
    assert claimed is not None
    least = int(claimed * 1e9 * (1 - SLACK))
    batch: list[tuple[int, ...]] = []
    columns = 0

    def flush() -> str | None:
        return _refute(np.array(batch, dtype=np.int64), least, request)

    for mesh in _meshes(request):
        for entry in _layouts(mesh, request):
            if _wanted(mesh, entry, request):
                batch.append(
                    (
                        mesh.tp, int(mesh.sp), mesh.cp, cp_kind_code(mesh.cp_kind), mesh.pp,
                        mesh.ep, mesh.etp, mesh.mbs, *entry,
                    )
                )  # fmt: skip
                columns += 1
        if len(batch) >= BATCH:
            finding = flush()
            batch.clear()
            if finding:
                yield finding
                return
    finding = flush() if batch else None
    if finding:
        yield finding


def _refute(rows: np.ndarray[Any, np.dtype[np.int64]], least: int, request: Request) -> str | None:
    """A layout among ``rows`` that beats the claimed bound, in words."""
    tp, sp, cp, kind, pp, ep, etp, mbs, replicate, shard, zero, schedule, vpp = rows.T
    tables = price_configs(
        request.workload, request.machine,
        Configs(mbs, tp, cp, kind, ep, etp, sp.astype(bool), replicate, shard, pp, zero),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.capacity_bytes,
    )  # fmt: skip
    m = request.global_batch // (replicate * shard * mbs)
    bounds = Relaxation(
        tables,
        config=np.arange(len(rows)),
        schedule=schedule,
        vpp=vpp,
        microbatches=m,
        modes=_modes(request),
        counted=request.stack.recompute_layer_count,
        per_stage=request.stack.recompute_per_stage,
    ).bounds(float(least))
    names = ("gpipe", "1f1b", "interleaved")
    for index in np.flatnonzero(bounds < least).tolist():
        leaf = tables.leaf(
            index,
            schedule=names[int(schedule[index])],  # type: ignore[arg-type]
            vpp=int(vpp[index]),
            microbatches=int(m[index]),
            uneven=request.stack.uneven_stages,
        )
        better = _better_completion(leaf, least, request)
        if better is not None:
            return (
                f"certificate.lower_bound_s: tp {tp[index]} cp {cp[index]} pp {pp[index]} ep "
                f"{ep[index]} vpp {vpp[index]} microbatch {mbs[index]} {better}"
            )
    return None


def _better_completion(leaf: Leaf, least: int, request: Request) -> str | None:
    """A completion that fits and simulates below ``least`` ns, in words, or None."""
    options: list[Recompute] = []
    for mode in _modes(request):
        if mode == "full":
            counts = range(1, len(leaf.sequence) + 1)
            if not request.stack.recompute_layer_count:
                counts = range(len(leaf.sequence), len(leaf.sequence) + 1)
            options += [("full", count) for count in counts]
        else:
            options.append((mode, 0))  # type: ignore[arg-type]
    if leaf.vpp > 1:
        return _better_interleaved(leaf, least, options)
    groups = [options] if request.stack.recompute_per_stage else [[option] for option in options]
    budget = [LARGEST_LEAF]
    for group in groups:
        found = _descend(
            leaf, least, group, leaf.pp - 1, len(leaf.sequence), EMPTY_LABEL, [], budget
        )
        if found is not None:
            return found
        if budget[0] <= 0:
            return "takes too long to check"
        if group[0][0] == "full" and _time_only(leaf, group[0]) >= least:
            break
    return None


def _time_only(leaf: Leaf, option: Recompute) -> int:
    """Work of the widest rank, at least the average, with at least ``option`` layers recomputed on
    every stage that has as many: none is counted where a stage may have fewer."""
    work = sum(
        leaf.kinds[kind][Field.FORWARD] + leaf.kinds[kind][Field.BACKWARD] for kind in leaf.sequence
    )
    if option[1] >= len(leaf.sequence):
        work += sum(leaf.kinds[kind][Field.FULL] for kind in leaf.sequence)
    return leaf.microbatches * work // leaf.pp


def _better_interleaved(leaf: Leaf, least: int, options: list[Recompute]) -> str | None:
    for bounds in interleaved_bounds(leaf):
        tallest = max(b - a for a, b in pairwise(bounds))
        for option in options:
            if option[0] == "full" and option[1] > tallest and option != options[-1]:
                continue
            completion = Completion(bounds, (option,) * leaf.stages)
            ranks = stage_costs(leaf, completion)
            if surrogate_ns(leaf, ranks) >= least:
                if option[0] == "selective":
                    continue
                break
            if fits(leaf, ranks) and simulate_step(leaf, ranks).total_ns < least:
                return f"with {option} takes {simulate_step(leaf, ranks).total_ns / 1e9:.6g} s"
    return None


def _descend(
    leaf: Leaf, least: int, options: list[Recompute], rank: int, last: int, label: Label,
    chosen: list[tuple[int, Recompute, ChunkCosts]], budget: list[int],
) -> str | None:  # fmt: skip
    """Depth first over partitions, last rank first, while the surrogate stays below ``least``."""
    budget[0] -= 1
    if budget[0] <= 0:
        return None
    if rank < 0:
        ranks = tuple(rank_costs(leaf, (chunk,)) for _, _, chunk in reversed(chosen))
        if last == 0 and simulate_step(leaf, ranks).total_ns < least:
            return f"takes {simulate_step(leaf, ranks).total_ns / 1e9:.6g} s"
        return None
    layers = len(leaf.sequence)
    fewest = 0 if leaf.pp > 1 and rank in (0, leaf.pp - 1) else 1
    if leaf.uneven:
        firsts = range(last - fewest, -1, -1) if rank else range(0, -1, -1)
    else:
        firsts = range(rank * layers // leaf.pp, rank * layers // leaf.pp - 1, -1)
    for first in firsts:
        if first > last - fewest:
            continue
        slow = True
        for option in options:
            chunk = chunk_costs(leaf, rank, first, last, option)
            costs = rank_costs(leaf, (chunk,))
            if leaf.microbatches * costs.work_ns >= least:
                continue
            slow = False
            if peak_bytes(leaf, rank, (chunk,)) > leaf.capacity_bytes:
                continue
            extended = extend_label(leaf, label, rank, costs)
            if _least_total(leaf, extended, rank, first) >= least:
                continue
            chosen.append((first, option, chunk))
            found = _descend(leaf, least, options, rank - 1, first, extended, chosen, budget)
            chosen.pop()
            if found is not None:
                return found
        if slow:
            break
    return None


def _least_total(leaf: Leaf, label: Label, rank: int, left: int) -> int:
    """A bound on all ways to place the first ``left`` layers on the ranks before ``rank``."""
    counts = leaf.counts[left]
    work = sum(
        count * (kind[Field.FORWARD] + kind[Field.BACKWARD])
        for kind, count in zip(leaf.kinds, counts, strict=True)
    )
    total = max(label.ends, label.nested + work)
    if rank:
        total = max(total, -(-leaf.microbatches * work // rank))
    if leaf.schedule == "1f1b":
        trips = 1 + (leaf.microbatches - 1) // leaf.pp
        total = max(total, trips * (label.work + work) + label.tail)
    return total + label.update + leaf.sync_ns
