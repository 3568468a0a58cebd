"""Between a plan's layout and a completed leaf: fill a layout in, take it apart, build it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cost_models.configs import Configs
from cost_models.cp_kinds import TWO_LEVELS, cp_kind_code
from cost_models.layout import (
    CHUNKED,
    GIVEN,
    IN_ROUNDS,
    SPLIT_BACKWARD,
    V_SHAPED,
    RecomputeMode,
    Schedule,
    ends_on,
    stage_of,
)
from cost_models.leaf import Completion, Recompute
from cost_models.recompute import keeps_inputs
from cost_models.split_backward import SPLIT_MODES
from planner.blocks.registry import attention_sorts
from planner.errors import InputError, did_you_mean
from planner.even_stages import even_bounds
from planner.given_orders import require_shape, settle_order
from planner.given_outside import settled_outside, with_stages_left_out
from planner.given_rounds import no_rounds, settled_round
from planner.given_stages import settled_stages
from planner.layer_contexts import column_kind
from planner.plan import Chunk, Layout, RecomputeLayers, Stage
from planner.request import Request
from planner.stage_recompute import asked_recompute, recompute_of, stated


def complete_layout(raw: Mapping[str, Any], request: Request) -> Layout:
    """Fill a partial layout: degrees default to 1, ``vpp`` to 2 on a V, ``dp_shard`` to what is
    left, stages to an even split. ``recompute`` (a mode, ``planner.recompute``) and
    ``recompute_layers`` may stand for the stages' lists. Raises :class:`InputError` where no such
    layout exists."""
    known = {*Layout.model_fields, "recompute", "recompute_layers"}
    for key in raw:
        if key not in known:
            raise InputError(
                f"unknown key {key!r} in layout", hint=did_you_mean(str(key), sorted(known))
            )
    _require_numbers(raw)
    base = {key: value for key, value in raw.items() if value is not None}
    recompute = str(base.pop("recompute", request.stack.recompute[0]))
    limit = base.pop("recompute_layers", None)
    settle_order(base, request)
    if base.get("schedule") in V_SHAPED:
        base.setdefault("vpp", 2)
    degree = _degrees(base, request)
    vpp = degree["vpp"]
    schedule = base.setdefault("schedule", _usual_schedule(request, degree))
    if schedule in GIVEN:
        require_shape(schedule, degree, request)
    else:
        _require_runnable(schedule, degree)
    if schedule in IN_ROUNDS and degree["pp"] > 1:
        base["round_size"] = settled_round(base.get("round_size", 0), request, degree)
    elif base.get("round_size"):
        raise no_rounds(base["round_size"], schedule, degree["pp"])
    if not base.get("stages"):
        outside = settled_outside(base.get("layers_outside"), schedule, degree, request)
        base["layers_outside"] = outside
    base.setdefault("zero_stage", _default_zero(request, degree))
    for key, constant in request.layout_constants.items():
        base.setdefault(key, constant)
    base.setdefault(
        "sequence_parallel",
        degree["tp"] > 1
        and request.stack.sequence_parallel != "never"
        and request.model.splits_sequence
        and not (
            degree["cp"] > 1 and "no_sequence_parallelism_with_context" in request.stack.rules
        ),
    )
    _complete_resharding(base, degree, request)
    _complete_context(base, degree["cp"], request)
    base |= degree
    layout = _validated(base)
    if layout.stages:
        modes = [part.mode for stage in layout.stages for part in stage.recompute]
        _require_possible(layout.schedule, modes)
        layout = settled_stages(with_stages_left_out(layout, request), request)
        settled_outside(layout.layers_outside, schedule, degree, request)
        return layout
    mode = asked_recompute(recompute, limit, request)
    _require_possible(layout.schedule, [mode[0]])
    bounds = even_bounds(request, degree["pp"], vpp, layout.layers_outside)
    completion = Completion(bounds, tuple(mode for _ in range(degree["pp"] * vpp)))
    return layout_of(base, completion, request)


def _usual_schedule(request: Request, degree: Mapping[str, int]) -> Schedule:
    """1F1B, interleaved where ranks have several virtual stages, or what the stack has instead."""
    usual: Schedule = "interleaved" if degree["vpp"] > 1 else "1f1b"
    own = request.stack.schedules
    if degree["pp"] == 1 or usual in own:
        return usual
    fitting = [name for name in own if (name in CHUNKED) == (degree["vpp"] > 1)]
    return fitting[0] if fitting else usual


def _complete_resharding(base: dict[str, Any], degree: Mapping[str, int], request: Request) -> None:
    """What becomes of gathered weights: as the stack does; of a choice, a node's ranks."""
    zero = base["zero_stage"]
    if not isinstance(zero, int):
        return  # Said with all other fields that are not what they should be.
    options = request.reshard_options(zero, degree["dp_shard"] * degree["cp"])
    node = request.cluster.groups[0].node.devices_per_node
    usual = options[0] if request.stack.reshards_unasked or node not in options else node
    asked = base.setdefault("reshard_after_forward", request.resharding(zero, usual))
    found = [request.resharding(zero, group) for group in options]
    if not any(asked == each and type(asked) is type(each) for each in found):
        raise InputError(
            f"layout: reshard_after_forward = {asked}, but {request.stack.name} in ZeRO stage "
            f"{zero} does {' or '.join(map(str, found))}",
            hint="leave it out, or set reshard_group in a stack that extends this one",
        )


def _complete_context(base: dict[str, Any], cp: int, request: Request) -> None:
    """Fill the kind of context parallelism in: the stack's first that runs the model's attention.
    Inner groups belong to the kinds of two levels, which have no meaning without."""
    stack, listed = request.stack, request.job.cp_kinds
    if listed and cp > 1:
        column = column_kind(listed)
        if base.setdefault("cp_kind", column) != column:
            raise InputError(
                f"layout: cp_kind = {base['cp_kind']}, but the job lists kinds by layer (cp_kinds)",
                hint="leave cp_kind out of the layout, or cp_kinds out of the job",
            )
    if stack.cp_kinds and "cp_kind" not in base:
        limits = [stack.cp_kinds_of.get(s, stack.cp_kinds) for s in attention_sorts(request.model)]
        runs = [kind for kind in stack.cp_kinds if all(kind in limit for limit in limits)]
        base["cp_kind"] = (runs or stack.cp_kinds)[0]
    inner = base.get("cp_inner", 1)
    kind = base.get("cp_kind")
    if kind not in TWO_LEVELS:
        if inner != 1:
            raise InputError(f"cp_inner = {inner} belongs to cp_kind {' or '.join(TWO_LEVELS)}")
    elif cp > 1 and (not 1 < inner < cp or cp % inner):
        possible = " or ".join(str(n) for n in range(2, cp) if cp % n == 0)
        raise InputError(
            f"{kind}: cp_inner = {inner} is no divisor of cp = {cp} between 1 and it",
            hint=(
                f"cp_inner {possible}: ranks that exchange heads; cp / cp_inner of them are joined"
                if possible
                else f"cp = {cp} has no such divisor: cp_kind p2p or a2a, or another cp"
            ),
        )


def _require_numbers(raw: Mapping[str, Any]) -> None:
    """Refuse true, false and fractions where a layout counts something."""
    from hardware_profiles.documents import refuse_flags

    refuse_flags(Layout, raw, "layout")
    limit = raw.get("recompute_layers", 0) or 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InputError(f"layout: recompute_layers = {limit!r} is not a whole number")


def _require_runnable(schedule: Schedule, degree: Mapping[str, int]) -> None:
    """Refuse what has no order of work: a schedule with too few or too many chunks."""
    pp, vpp = degree["pp"], degree["vpp"]
    if pp == 1 and schedule in CHUNKED:
        raise InputError(
            f"schedule {schedule} with pp = 1: without a pipeline there is nothing to schedule",
            hint="--pp 2, or no schedule",
        )
    if (schedule in CHUNKED) != (vpp > 1):
        raise InputError(
            f"schedule {schedule} with vpp = {vpp}: virtual stages are what interleaving means",
            hint=(
                "--vpp 2"
                if schedule in CHUNKED
                else "vpp 1, or one of these schedules: " + ", ".join(CHUNKED)
            ),
        )
    if schedule in V_SHAPED and vpp != 2:
        raise InputError(
            f"schedule {schedule} with vpp = {vpp}: a V has two virtual stages per rank",
            hint="--vpp 2",
        )


def _require_possible(schedule: Schedule, modes: Iterable[RecomputeMode]) -> None:
    """Refuse recomputation that a split backward cannot run."""
    wrong = sorted(set(modes) - set(SPLIT_MODES)) if schedule in SPLIT_BACKWARD else []
    if wrong:
        raise InputError(
            f"schedule {schedule} with recompute {wrong[0]}: its two backward passes go through a "
            "layer twice, which a save list does not allow",
            hint="--recompute none or full, or another schedule",
        )


def _validated(base: Mapping[str, Any]) -> Layout:
    from hardware_profiles.documents import validate

    return validate(Layout, dict(base), where="layout")


_DEGREES = (
    "tp", "cp", "pp", "vpp", "ep", "etp", "microbatch_size", "dp_replicate", "dp_shard",
)  # fmt: skip


def _degrees(base: Mapping[str, Any], request: Request) -> dict[str, int]:
    degree: dict[str, int] = {}
    for name in _DEGREES:
        value = base.get(name, _usual_etp(degree, request) if name == "etp" else 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"layout: {name} = {value!r} is not a positive whole number")
        degree[name] = value
    world = request.devices
    if "dp_shard" not in base:
        rest = degree["tp"] * degree["cp"] * degree["pp"] * degree["dp_replicate"]
        if world % rest:
            raise InputError(
                f"tp {degree['tp']} x cp {degree['cp']} x pp {degree['pp']} x dp_replicate "
                f"{degree['dp_replicate']} = {rest} does not divide {world} devices"
            )
        degree["dp_shard"] = world // rest
    used = degree["tp"] * degree["cp"] * degree["pp"] * degree["dp_replicate"] * degree["dp_shard"]
    if used != world:
        raise InputError(
            f"dp_replicate {degree['dp_replicate']} x dp_shard {degree['dp_shard']} x cp "
            f"{degree['cp']} x tp {degree['tp']} x pp {degree['pp']} = {used}, but the cluster has "
            f"{world} devices"
        )
    dp = degree["dp_replicate"] * degree["dp_shard"]
    per_rank = dp * degree["microbatch_size"]
    if request.global_batch % per_rank:
        raise InputError(
            f"the global batch of {request.global_batch} samples is not a multiple of dp {dp} x "
            f"microbatch {degree['microbatch_size']} = {per_rank}"
        )
    microbatches = request.global_batch // per_rank
    if base.get("num_microbatches", microbatches) != microbatches:
        raise InputError(
            f"num_microbatches = {base['num_microbatches']}, but {request.global_batch} samples / "
            f"{per_rank} = {microbatches}"
        )
    degree["num_microbatches"] = microbatches
    ranks = degree["dp_shard"] * degree["cp"] * degree["tp"]
    if ranks % (degree["ep"] * degree["etp"]):
        raise InputError(
            f"ep {degree['ep']} x etp {degree['etp']} does not divide dp_shard x cp x tp = {ranks}"
        )
    degree["expert_dp"] = degree["dp_replicate"] * ranks // (degree["ep"] * degree["etp"])
    return degree


def _usual_etp(degree: Mapping[str, int], request: Request) -> int:
    """Ranks that share an expert where nobody says: what the stack's rules leave, else one."""
    rules = request.stack.rules
    follows = "experts_follow_tp" in rules or (
        "experts_over_ep_or_tp" in rules and degree["ep"] == 1
    )
    return degree["tp"] if follows and request.workload.expert_count else 1


def _default_zero(request: Request, degree: Mapping[str, int]) -> int:
    """The stack's usual stage: the lowest that shards anything, if there is anything to shard."""
    wraps = "shards_over_one_rank" in request.stack.rules and degree["tp"] * degree["pp"] > 1
    if degree["dp_shard"] * degree["cp"] == 1 and 0 in request.zero_stages and not wraps:
        return 0
    sharded = [stage for stage in request.zero_stages if stage > 0]
    returns = "zero_2_needs_expert_parallelism" in request.stack.rules and degree["ep"] == 1
    if (degree["pp"] == 1 or returns) and 3 in sharded:
        return 3
    return min(sharded) if sharded else 0


def layout_of(base: Mapping[str, Any], completion: Completion, request: Request) -> Layout:
    """The plan's layout from degrees and a completion."""
    pp, vpp = int(base["pp"]), int(base["vpp"])
    per_stage = request.devices // pp
    kinds = request.workload.layers
    stages = []
    for rank in range(pp):
        chunks = []
        held = []
        for j in [stage_of(base["schedule"], pp, rank, chunk) for chunk in range(vpp)]:
            first, last = completion.bounds[j], completion.bounds[j + 1]
            embedding, head = ends_on(base["schedule"], pp, vpp, j)
            chunks.append(Chunk(layers=(first, last), has_embedding=embedding, has_head=head))
            held.append((completion.recompute[j], first, last))
        recompute = stated(held, kinds)
        stages.append(
            Stage(
                chunks=tuple(chunks),
                recompute=recompute,
                activation_offload_layers=_offloaded(recompute, request),
                devices=(rank * per_stage, (rank + 1) * per_stage),
            )
        )
    known = {key: value for key, value in base.items() if key in Layout.model_fields}
    return Layout(**{**known, "stages": tuple(stages)})


def _offloaded(recompute: tuple[RecomputeLayers, ...], request: Request) -> int:
    """Layers of a stage whose inputs the host holds: those of which nothing else is
    kept."""
    if not request.job.activation_offload:
        return 0
    return sum(part.layers for part in recompute if keeps_inputs(part.mode))


def completion_of(layout: Layout, request: Request) -> Completion:
    """Partition and recompute of a complete layout."""
    bounds = [layout.stages[0].chunks[0].layers[0]] * (layout.pp * layout.vpp + 1)
    modes: list[Recompute] = [("none", 0)] * (layout.pp * layout.vpp)
    for rank, stage in enumerate(layout.stages):
        mode = recompute_of(stage, request)
        for index, chunk in enumerate(stage.chunks):
            j = stage_of(layout.schedule, layout.pp, rank, index)
            bounds[j + 1] = chunk.layers[1]
            modes[j] = mode
    held, layers = bounds[-1] - bounds[0], request.model.layer_count
    if held != layers - layout.layers_outside:
        raise InputError(f"the stages hold {held} layers, the model has {layers}")
    return Completion(tuple(bounds), tuple(modes))


def configs_of(layout: Layout) -> Configs:
    """The layout as a table of one configuration."""

    def one(value: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return np.array([value], dtype=np.int64)

    return Configs(
        microbatch=one(layout.microbatch_size),
        tp=one(layout.tp),
        cp=one(layout.cp),
        cp_kind=one(cp_kind_code(layout.cp_kind, layout.cp_inner)),
        ep=one(layout.ep),
        etp=one(layout.etp),
        sequence_parallel=np.array([layout.sequence_parallel]),
        dp_replicate=one(layout.dp_replicate),
        dp_shard=one(layout.dp_shard),
        pp=one(layout.pp),
        zero_stage=one(layout.zero_stage),
        reshard=one(layout.reshard_group),
    )
