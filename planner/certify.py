"""Recheck a plan without the solver and without the search's tables.

``verify`` rebuilds the request from the plan's own inputs and asks, in its own words:

* do the digests, degrees, stages and the user's constraints agree;
* does the cost model, run on this one layout, give every predicted number again, and does it fit;
* is the lower bound a lower bound: every layout of the space is enumerated by plain loops, and each
  whose relaxed bound is below the claimed one is taken apart, partition by partition, until its
  own bound or its simulated time is not.

The space is enumerated in ``recount``, layouts are taken apart in ``refute``. All three import the
cost models and nothing of ``space``, ``rules``, ``tables``, ``program``, ``solve`` or ``search``.
Bookkeeping of the search (what was removed under which reason, how many leaves were opened) is not
a claim about the plan; ``planner.studies.verify`` replays the search for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from cost_models.peaks import peak_bytes
from hardware_profiles.schema import ClusterSpec
from planner.accuracy import band, overlap
from planner.errors import LimitReachedError, PlannerError
from planner.layouts import completion_of
from planner.models.kinds import model_of
from planner.plan import Layout, Plan, digest, round_floats
from planner.predict import predict, price, run_class
from planner.recount import (
    DIVIDED,
    ON_A_V,
    SPLIT,
    Mesh,
    impossible_layout,
    impossible_mesh,
    rounds_of,
)
from planner.recount_degrees import context_levels
from planner.recount_host import outputs_held
from planner.recount_modes import mixed_modes, recompute_modes
from planner.recount_stages import unlike_stages
from planner.refute import better_layout
from planner.request import Request
from planner.specs import JobSpec

SLACK = 1e-8
"""Relative slack for numbers that were rounded to nine digits."""


def verify(plan: Plan) -> list[str]:
    """What does not hold in ``plan``, as sentences; an empty list means that all of it does.

    Raises :class:`LimitReachedError` if all else holds and the bound is too much to check.
    """
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
    except LimitReachedError:
        raise
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
        model = model_of(inputs.model.document, where="inputs.model")
        cluster = validate(ClusterSpec, inputs.cluster.document, where="inputs.cluster")
        job = validate(JobSpec, inputs.job.document, where="inputs.job")
        stack = load_stack(job.stack or "")
    except DocumentError as error:
        raise RefutedError(f"the plan's inputs cannot be read: {error.message}") from error
    if (stack.name, stack.version) != (plan.target.stack, plan.target.version):
        raise RefutedError(
            f"the plan is for {plan.target.stack} {plan.target.version}, the job asks for "
            f"{stack.name} and {stack.version} is what ships"
        )
    if plan.target.not_priced != tuple(stack.not_priced):
        raise RefutedError("target.not_priced is not what the stack's file leaves out of the space")
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
    if (layout.cp_kind, layout.cp_inner) not in context_levels(request, layout.cp):
        yield f"cp_kind {layout.cp_kind} with cp_inner {layout.cp_inner} is no way to run the stack"
    options = request.reshard_options(layout.zero_stage, layout.dp_shard * layout.cp)
    resharding = [request.resharding(layout.zero_stage, group) for group in options]
    if str(layout.reshard_after_forward) not in map(str, resharding):
        yield "reshard_after_forward does not follow from the ZeRO stage and the stack"
    if layout.optimizer_offload != request.job.optimizer_offload:
        yield "optimizer_offload is not the job's"
    if layout.parameter_offload != request.job.parameter_offload:
        yield "parameter_offload is not the job's"
    yield from _check_stages(layout, request)
    mesh = Mesh.of(layout)
    reason = impossible_mesh(mesh, request) or impossible_layout(
        layout.dp_shard, layout.zero_stage, layout.schedule, layout.vpp, mesh, request,
        layout.round_size, layout.layers_outside,
    )  # fmt: skip
    if reason:
        yield reason
        return
    if layout.round_size not in rounds_of(layout.schedule, mesh, request):
        yield f"the stack has no rounds of {layout.round_size} microbatches for {layout.schedule}"
    node = request.cluster.groups[0].node
    if outputs_held(layout, request) > (node.host_memory.si if node.host_memory else 0):
        yield "the hosts do not hold the outputs that recomputation sends there"


def _stage(layout: Layout, rank: int, index: int) -> int:
    """Virtual stage that a rank holds as its chunk ``index``: row by row, or there and back."""
    back = layout.schedule in ON_A_V and index == 1
    return 2 * layout.pp - 1 - rank if back else index * layout.pp + rank


def _check_stages(layout: Layout, request: Request) -> Iterator[str]:
    per_stage = request.devices // layout.pp
    chunks = {}
    for rank, stage in enumerate(layout.stages):
        if stage.devices != (rank * per_stage, (rank + 1) * per_stage):
            yield f"stage {rank}: devices {stage.devices} are not its own"
        if len(stage.chunks) != layout.vpp:
            yield f"stage {rank}: {len(stage.chunks)} chunks, but vpp = {layout.vpp}"
        whole = {"full", "partitioned", "tiled"}
        full = sum(p.layers for p in stage.recompute if p.mode.split(":")[0] in whole)
        if stage.activation_offload_layers != full * request.job.activation_offload:
            yield f"stage {rank}: activation_offload_layers is not what the job asks"
        for index, chunk in enumerate(stage.chunks):
            chunks[_stage(layout, rank, index)] = chunk
    position, layers = 0, request.model.layer_count
    if layout.layers_outside:
        # The first ones where the model starts with another kind of layer, else the last.
        names = request.workload.layers
        ahead = names[0] != names[-1]
        position = layout.layers_outside if ahead else 0
        layers -= 0 if ahead else layout.layers_outside
    for j, chunk in sorted(chunks.items()):
        if chunk.layers[0] != position or chunk.layers[1] < position:
            yield f"virtual stage {j} holds layers {chunk.layers}, expected to start at {position}"
            return
        position = chunk.layers[1]
        everywhere = layout.schedule in DIVIDED and layout.pp > 1
        ends = (everywhere or j == 0, everywhere or j == len(chunks) - 1)
        if (chunk.has_embedding, chunk.has_head) != ends:
            yield f"virtual stage {j}: embedding or head in the wrong place"
    if position != layers:
        yield f"the stages hold layers up to {position} of {layers}"
        return
    yield from _check_recompute(layout, request)
    yield from unlike_stages(layout, request)


def _check_recompute(layout: Layout, request: Request) -> Iterator[str]:
    """The per-kind counts are those of one mode and number of layers, as the stack allows."""
    completion = completion_of(layout, request)
    kinds = request.workload.layers
    for rank, stage in enumerate(layout.stages):
        counts: dict[tuple[str, str], int] = {}
        for j in [_stage(layout, rank, index) for index in range(layout.vpp)]:
            mode, limit = completion.recompute[j]
            first, last = completion.bounds[j], completion.bounds[j + 1]
            front, _, rest = ("full/none" if mode == "full" else mode).partition("/")
            for index in range(first, last):
                own = rest if rest and index >= first + limit else front
                if own != "none":
                    counts[kinds[index], own] = counts.get((kinds[index], own), 0) + 1
        stated = {(part.kind, part.mode): part.layers for part in stage.recompute}
        if stated != counts:
            yield f"stage {rank}: recompute {stated} is not what its layers make, {counts}"
    modes = {mode for mode, _ in completion.recompute}
    allowed = {*recompute_modes(request)}
    if layout.schedule in ("1f1b", "gpipe"):
        allowed |= {*mixed_modes(request)}
    if layout.schedule in SPLIT:
        allowed &= {"none", "full"}
    if layout.tp == 1 or layout.sequence_parallel:
        allowed = {mode for mode in allowed if not mode.startswith("partitioned")}
    elif request.stack.recompute_layer_count and "partitioned" in allowed:
        allowed |= {"partitioned/none"}
    if layout.pp > 1:
        allowed -= {mode for mode in allowed if mode.startswith("offload:")}
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
        if values[name] > (name not in ("zero_stage", "layers_outside")):
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
        wrong = next(_check_layout(other.layout, request), None)
        if wrong is not None:
            yield f"alternatives[{index}]: {wrong}"
            continue
        priced = price(other.layout, request)
        peak = max(
            peak_bytes(priced.leaf, rank, costs.chunks) for rank, costs in enumerate(priced.ranks)
        )
        if abs(priced.step.total_ns / 1e9 - other.step_time_s) > SLACK * other.step_time_s:
            yield f"alternatives[{index}].step_time_s is not what the cost model says"
        if peak != other.max_peak_bytes or priced.fits != other.fits:
            yield f"alternatives[{index}]: memory is not what the cost model says"
        low, high, _ = band(other.step_time_s, run_class(priced, request))
        stated = other.step_time_band_s
        if any(abs(a - b) > SLACK * b for a, b in zip(stated, (low, high), strict=True)):
            yield f"alternatives[{index}].step_time_band_s is not what the measurements earned"
        if other.tie != overlap(stated, plan.prediction.step_time_band_s):
            yield f"alternatives[{index}].tie is not what the two bands say"


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


def _check_bound(plan: Plan, request: Request) -> Iterator[str]:
    """No layout of the space has a bound below the claimed one that does not rise to it."""
    claimed = plan.certificate.lower_bound_s
    assert claimed is not None
    better = better_layout(request, int(claimed * 1e9 * (1 - SLACK)))
    if better is not None:
        yield f"certificate.lower_bound_s: {better}"


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
