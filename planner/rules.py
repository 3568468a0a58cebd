"""What the batch, the model or the stack cannot run, each with its reason.

A rule is a sentence and a predicate that is True where a mesh or a layout breaks it. The user's own
constraints are not here: they bound the search (``planner.space``), not a layout asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cost_models.cp_kinds import TWO_LEVELS, cp_kind_code, exchange_ways, is_kind
from cost_models.graph import Bools, Int64, Shard
from cost_models.layout import (
    ALL_AT_ONCE,
    DELAYED,
    IN_ROUNDS,
    LISTED,
    V_SHAPED,
    codes_of,
)
from cost_models.outside import pattern_of
from cost_models.rounds import runnable
from hardware_profiles.stack_words import ContextKind
from planner.blocks.registry import attention_sorts, model_splits
from planner.blocks.splits import LATE_SPLITS, Split
from planner.hosted_inputs import Pipelines, input_bytes_per_node
from planner.hosting import (
    cannot_offload,
    host_capacity,
    least_bytes_per_node,
    offload_stage,
    overfilled,
)  # fmt: skip
from planner.job_rules import job_rules
from planner.layer_contexts import contexts_of_sort, exchanging
from planner.meshes import Layouts, Meshes
from planner.request import Request
from planner.stack_rules import STACK_RULES, concerns
from planner.zero_rules import LayoutRule, one_rank_rules, zero_rules

Rule = tuple[str, Callable[[Meshes], Bools]]


def mesh_rules(request: Request) -> Iterator[Rule]:
    """Reasons why a mesh cannot run, in the order in which they are counted."""
    yield from _batch_rules(request)
    yield from _model_rules(request)
    yield from _stack_rules(request)


def _batch_rules(request: Request) -> Iterator[Rule]:
    batch = request.global_batch
    yield (
        f"the global batch of {batch:,} is not a multiple of dp x microbatch",
        lambda m: batch % (m.dp * m.microbatch) != 0,
    )


def _model_rules(request: Request) -> Iterator[Rule]:
    model, sequence = request.model, request.sequence
    splits = model_splits(model)
    for split in splits:
        if split.rank < LATE_SPLITS:
            yield split.reason, _broken(split, request)
    yield (
        "ep x etp does not divide dp x cp x tp",
        lambda m: (m.dp * m.cp * m.tp) % (m.ep * m.etp) != 0,
    )
    balanced = request.stack.balanced_context is True
    pieces, why = (2, " (twice, for a balanced causal mask)") if balanced else (1, "")
    yield (
        f"sequence of {sequence} does not split over cp{why}",
        lambda m: (m.cp > 1) & (sequence % (pieces * m.cp) != 0),
    )
    yield (
        f"sequence of {sequence} does not split over cp x tp (sequence parallelism)",
        lambda m: (m.sp == 1) & (sequence % (m.cp * m.tp) != 0),
    )
    yield (
        f"more pipeline stages than the {model.layer_count} layers can fill",
        lambda m: m.pp > model.layer_count + (2 if request.stack.uneven_stages else 0),
    )
    for split in splits:
        if split.rank >= LATE_SPLITS:
            yield split.reason, _broken(split, request)
    if not model.splits_sequence:
        yield (
            f"{model.name} does not split along a sequence",
            lambda m: (m.cp > 1) | (m.sp == 1),
        )
    if model.tensor_split is not None:
        yield f"{model.name} does not split over tp", _splits(model.tensor_split, lambda m: m.tp)


def _broken(split: Split, request: Request) -> Callable[[Meshes], Bools]:
    """Where a split's size is no multiple of its degree."""
    size = split.size
    match split.over:
        case "tp":
            return _splits(size, lambda m: m.tp)
        case "etp":
            return _splits(size, lambda m: m.etp)
        case "ep":
            return _splits(size, lambda m: m.ep)
        case "kv":
            return _splits_kv(size, replicates=_shares_kv_heads(request))
        case "exchange":
            return _exchanges(size, exchanging(request, size))
        case "tp_cp":
            return lambda m: (m.cp > 1) & (size % (m.tp * m.cp) != 0)


def _shares_kv_heads(request: Request) -> bool:
    whole = "muon_takes_whole_query_groups" in request.stack.rules
    return bool(request.stack.kv_head_replication) and not (
        whole and request.job.optimizer == "muon"
    )


def _splits(size: int, ways: Callable[[Meshes], Int64]) -> Callable[[Meshes], Bools]:
    return lambda meshes: size % ways(meshes) != 0


def _splits_kv(kv_heads: int, *, replicates: bool) -> Callable[[Meshes], Bools]:
    return lambda m: (kv_heads % m.tp != 0) & ((m.tp % kv_heads != 0) | (not replicates))


def _exchanges(heads: int, kinds: tuple[ContextKind | None, ...]) -> Callable[[Meshes], Bools]:
    def broken(m: Meshes) -> Bools:
        result = np.zeros(len(m), dtype=np.bool_)
        for kind in kinds:
            codes = m.cp_kind
            if kind is not None and kind not in TWO_LEVELS:
                codes = np.full_like(codes, cp_kind_code(kind))
            ways = exchange_ways(codes, m.cp)
            result |= (ways > 1) & (heads % (m.tp * ways) != 0)
        return result

    return broken


def _stack_rules(request: Request) -> Iterator[Rule]:
    stack = request.stack
    label = f"{stack.name} {stack.version}"
    if stack.sequence_parallel == "always" and request.model.splits_sequence:
        yield f"{label} has tp with sequence parallelism only", lambda m: (m.tp > 1) & (m.sp == 0)
    if stack.sequence_parallel == "never":
        yield f"{label} has no sequence parallelism", lambda m: m.sp == 1
    if not stack.expert_tensor_parallel:
        yield f"{label} does not split an expert over tp", lambda m: m.etp > 1
    elif stack.expert_tensor_parallel != "any":
        yield f"{label} shares an expert among ranks that tp joins", lambda m: m.tp % m.etp != 0
    if not stack.cp_kinds:
        yield f"{label} has no context parallelism", lambda m: m.cp > 1
    for sort, kinds in stack.cp_kinds_of.items():
        if sort in attention_sorts(request.model):
            words = " or ".join(kinds) or "missing"
            listed = contexts_of_sort(request, sort)
            broken = _outside(listed - {*kinds}) if listed else _other_context(kinds)
            yield f"{label}: context parallelism of {sort} is {words}", broken
    if stack.tensor_parallel_max is not None:
        most = stack.tensor_parallel_max
        limit = f"splits tensors at most {most} ways" if most > 1 else "has no tensor parallelism"
        yield f"{label} {limit}", lambda m: m.tp > most
    yield from job_rules(request)
    for name in stack.rules:
        if name in STACK_RULES:
            reason, broken = STACK_RULES[name]
            if reason is not None and concerns(name, request):
                yield f"{label}: {reason}", broken


def _other_context(kinds: tuple[ContextKind, ...]) -> Callable[[Meshes], Bools]:
    return lambda m: (m.cp > 1) & ~is_kind(m.cp_kind, *kinds)


def _outside(foreign: set[ContextKind]) -> Callable[[Meshes], Bools]:
    """Of kinds that layers have of their own."""
    return lambda m: (m.cp > 1) & bool(foreign)


def layout_rules(request: Request) -> Iterator[LayoutRule]:
    """Reasons why a layout cannot run. Meshes are already gathered to the layouts' length."""
    stack = request.stack
    label = f"{stack.name} {stack.version}"
    yield (
        "ep x etp does not divide dp_shard x cp x tp",
        lambda m, x: (
            (x.dp_shard * m.cp * m.tp) % (m.ep * m.etp) != 0
            if request.workload.expert_count
            else np.zeros(len(x), dtype=bool)
        ),
    )
    yield from _host_rules(request)
    yield from one_rank_rules(request)
    yield from _microbatch_rules(request)
    yield (
        "no even split into virtual stages, the first and last lighter at most",
        lambda m, x: np.isin(x.schedule, codes_of(LISTED)) & ~_even_enough(request, m, x),
    )
    least = request.least_zero_stage
    if least:
        where = " on the host" if request.job.optimizer_offload else ""
        stage = "under ZeRO only" if least == 1 else f"from ZeRO stage {least} on"
        yield (
            f"{label} runs {request.job.optimizer}{where} {stage}",
            lambda m, x: (x.zero_stage < least) & (m.dp * m.cp > 1),
        )
    yield from zero_rules(request)
    if not stack.uneven_stages:
        layers = request.model.layer_count
        yield (
            f"{label}: {layers} layers do not split evenly over the stages",
            lambda m, x: (layers - x.outside) % (m.pp * x.vpp) != 0,
        )
    yield from _pattern_rules(request)


def _pattern_rules(request: Request) -> Iterator[LayoutRule]:
    """Where stages are modules that hold whole patterns of layers of different kinds."""
    stack, most = request.stack, request.stack.longest_pattern
    if most is None or (pattern := pattern_of(request.workload.layers)) == 1:
        return
    label = f"{stack.name} {stack.version}"
    kinds = f"{request.model.name}'s layers repeat themselves after {pattern}"
    if pattern > most:
        yield f"{label}: pipelines hold patterns of up to {most}, {kinds}", lambda m, _: m.pp > 1
    else:
        layers = request.model.layer_count
        yield (
            f"{label}: each stage holds whole patterns, {kinds}",
            lambda m, x: (m.pp > 1) & ((layers - x.outside) // (m.pp * x.vpp) % pattern != 0),
        )


def _microbatch_rules(request: Request) -> Iterator[LayoutRule]:
    """Numbers of microbatches that a schedule cannot run."""
    stack, batch = request.stack, request.global_batch

    def count(m: Meshes) -> Int64:
        result: Int64 = np.maximum(batch // (m.dp * m.microbatch), 1)
        return result

    reason = {
        "pp": f"{stack.name} {stack.version}: interleaving needs a multiple of pp microbatches",
        "equal": "interleaving needs equal rounds of at least pp microbatches",
        "at_least_pp": f"{stack.name} {stack.version}: interleaving needs pp microbatches or more",
    }.get(stack.rounds)
    if reason is not None:
        in_rounds = codes_of(IN_ROUNDS)
        yield (
            reason,
            lambda m, x: np.isin(x.schedule, in_rounds) & ~runnable(stack.rounds, m.pp, count(m)),
        )
    if "pipeline_needs_multiple_of_pp" in stack.rules:
        yield (
            f"{stack.name} {stack.version}: a pipeline needs a multiple of pp microbatches",
            lambda m, x: (count(m) % m.pp != 0) & (x.vpp > 0),
        )
    if "whole_gradients_need_one_microbatch" in stack.rules:
        yield (
            f"{stack.name} {stack.version}: gradients that are not split are summed anew with each "
            "of several microbatches",
            lambda m, x: (x.zero_stage < 2) & (m.dp * m.cp > 1) & (count(m) > 1),
        )
    doubled = [name for name in ("dualpipev", *DELAYED) if name in stack.schedules]
    if doubled:
        yield (
            ("DualPipeV needs" if "dualpipev" in doubled else "delayed transfers need")
            + " at least 2 x pp microbatches",
            lambda m, x: np.isin(x.schedule, codes_of(doubled)) & (count(m) < 2 * m.pp),
        )


def _host_rules(request: Request) -> Iterator[LayoutRule]:
    """What the hosts cannot hold."""
    if not request.machine.offload.anything:
        return
    reason = cannot_offload(request)
    if reason is not None:
        yield reason, lambda m, x: (m.tp >= 1) & (x.vpp >= 1)
        return
    spec = request.stack.offload
    if request.job.optimizer_offload and spec and spec.takes_experts == "without_ep":
        yield (
            f"{request.stack.name} {request.stack.version} keeps mixtures under ep on the device",
            lambda m, _: m.ep > 1,
        )
    if request.machine.offload.optimizer_per_1000 < 1000:
        reason = "a share of the optimizer state is offloaded in ZeRO stage 3 only"
        yield reason, lambda _, x: x.zero_stage < 3
    if request.job.parameter_offload:
        least = offload_stage(request)
        reason = f"weights are offloaded from ZeRO stage {least} on"
        yield reason, lambda _, x: x.zero_stage < least
    batch = request.global_batch
    yield (
        overfilled(request),
        # The shortest rounds of any: those of a layout are chosen later (planner.rounds).
        lambda m, x: overfills(request, m, x, np.minimum(m.pp, batch // (m.dp * m.microbatch))),
    )


def overfills(request: Request, m: Meshes, x: Layouts, rounds: Int64) -> Bools:
    """Whether the hosts, evenly filled, do not hold what layouts offload, in such rounds."""
    once, capacity = least_bytes_per_node(request), host_capacity(request) or 0
    copies = x.dp_replicate * np.where(x.zero_stage > 0, 1, x.dp_shard * m.cp)
    held = copies * float(once)
    result: Bools = held + _input_bytes_per_node(request, m, x, rounds) > capacity
    return result


def _input_bytes_per_node(request: Request, m: Meshes, x: Layouts, rounds: Int64) -> Int64:
    """Bytes on each node of the inputs that the stack keeps there."""
    shard = Shard(
        sequence=request.sequence, microbatch=m.microbatch, tp=m.tp, cp=m.cp, ep=m.ep, etp=m.etp,
        sequence_parallel=m.sp.astype(bool), cp_kind=m.cp_kind,
        transposed=request.job.tensor_transpose,
    )  # fmt: skip
    microbatches = request.global_batch // (m.dp * m.microbatch)
    at_once = np.isin(x.schedule, codes_of(ALL_AT_ONCE))
    return input_bytes_per_node(
        request, shard, Pipelines(m.pp, x.vpp, microbatches, at_once, rounds)
    )


def _even_enough(request: Request, meshes: Meshes, layouts: Layouts) -> Bools:
    """Whether equal virtual stages with a lighter first and last one can hold the layers, or on a
    V equal ranks behind a lighter first one (``cost_models.partitions``)."""
    layers = request.model.layer_count - layouts.outside
    stages = meshes.pp * layouts.vpp
    height = -(-layers // stages)
    spare = stages * height - layers
    if not request.stack.uneven_stages:
        equal: Bools = spare == 0
        return equal
    on_ranks = (meshes.pp - 1) * np.maximum(2, -(-layers // meshes.pp)) <= layers
    turns = np.isin(layouts.schedule, codes_of(V_SHAPED))
    result: Bools = np.where(turns, on_ranks, spare <= 2 * height)
    return result | request.free_stages
