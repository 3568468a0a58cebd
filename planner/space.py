"""The space: every layout that the target stack could be asked for, and why some are removed.

Meshes are enumerated first, then expanded into layouts (``planner.meshes`` says what each fixes).
Partition and recompute complete a layout; they are chosen inside its leaf. Degrees are divisors,
not powers of two only.

Nothing is dropped in silence: a mesh that breaks a rule takes all its layouts with it, and they
are counted under the rule's reason, so ``space_size = sum(removed) + priced``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd

import numpy as np

from cost_models.cp_kinds import TWO_LEVELS, cp_kind_code
from cost_models.given_order import GivenOrder
from cost_models.graph import Bools, Int64
from cost_models.layout import CHUNKED, SCHEDULES, V_SHAPED, RecomputeMode, Schedule
from cost_models.outside import outside_numbers
from cost_models.recompute import MIXED
from planner import rules
from planner.blocks.registry import model_splits
from planner.layer_contexts import column_kind, exchanging
from planner.meshes import Layouts, Meshes, joined
from planner.request import Request
from planner.rounds import round_limits
from planner.rules import Rule
from planner.specs import LEAST
from planner.zero_rules import LayoutRule


@dataclass
class Space:
    """Meshes that survive the rules, and the layouts removed so far by reason."""

    meshes: Meshes
    size: int
    removed: Counter[str] = field(default_factory=Counter)


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors of a positive integer in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def virtual_stage_options(request: Request, pp: int) -> tuple[tuple[Schedule, int], ...]:
    """Schedules with their numbers of virtual stages per rank for a pipeline of ``pp``."""
    if pp == 1:
        return (("1f1b", 1),)
    if request.order is not None:
        return ((request.order.schedule, request.order.vpp),)
    options: list[tuple[Schedule, int]] = []
    for schedule in request.stack.schedules:
        if schedule not in CHUNKED:
            options.append((schedule, 1))
            continue
        layers = request.model.layer_count
        most = (layers + 2) // pp if request.stack.uneven_stages else layers // pp
        most = min(most, 2) if schedule in V_SHAPED else most
        options += ((schedule, vpp) for vpp in range(2, most + 1))
    return tuple(options)


def pipeline_options(request: Request, pp: int) -> tuple[tuple[Schedule, int, int], ...]:
    """The same with how many layers are outside the pipeline."""
    options = virtual_stage_options(request, pp)
    if pp == 1 or not request.stack.outside_layers:
        return tuple((*option, 0) for option in options)
    layers = request.workload.layers
    return tuple(
        (schedule, vpp, number)
        for schedule, vpp in options
        for number in outside_numbers(layers, schedule, pp * vpp, request.stack.longest_pattern)
    )


def data_parallel_options(
    request: Request, dp: int, cp: int
) -> tuple[tuple[int, int, int, int], ...]:
    """``(dp_replicate, dp_shard, zero_stage, reshard)`` for ``dp`` data-parallel ranks.

    Stage 0 shards nothing, so all ranks replicate. The other stages shard over every divisor
    where the stack can do hybrid sharding, else over all ranks.
    """
    options: list[tuple[int, int, int]] = []
    for stage in request.zero_stages:
        if stage == 0:
            options.append((dp, 1, 0))
        elif request.stack.hybrid_sharding:
            options += ((dp // shard, shard, stage) for shard in divisors(dp))
        else:
            options.append((1, dp, stage))
    return tuple(
        (*option, keep)
        for option in options
        for keep in request.reshard_options(option[2], option[1] * cp)
    )


def enumerate_meshes(request: Request) -> Iterator[Meshes]:
    """All meshes of the space, before any rule, in tables of a size that fits a cache."""
    devices, stack = request.devices, request.stack
    experts = request.workload.expert_count
    sp_options = {"optional": (0, 1), "always": (1,), "never": (0,)}[stack.sequence_parallel]
    weights: dict[tuple[int, int, int], int] = {}
    eps = divisors(experts) if experts else (1,)
    for tp in divisors(devices):
        for cp in divisors(devices // tp):
            kinds = context_options(request, tp, cp)
            blocks: list[Int64] = []
            for pp in divisors(devices // tp // cp):
                dp = devices // (tp * cp * pp)
                key = (dp, pp, _context_matters(request, cp))
                if key not in weights:
                    weights[key] = len(data_parallel_options(request, dp, cp)) * len(
                        pipeline_options(request, pp)
                    )
                batch, rest = divmod(request.global_batch, dp)
                microbatches = divisors(batch) if batch and not rest else (1,)
                blocks.append(
                    _product(
                        (tp,), sp_options if tp > 1 else (0,), (cp,),
                        kinds, (pp,), eps, expert_tp_options(request, tp, devices // pp),
                        microbatches, (dp,),
                        (weights[key],),
                    )
                )  # fmt: skip
            yield Meshes(*np.ascontiguousarray(np.concatenate(blocks).T))


def expert_tp_options(request: Request, tp: int, ranks: int) -> tuple[int, ...]:
    """Ranks that may share an expert, of the ``ranks`` of a pipeline stage."""
    shared = request.stack.expert_tensor_parallel if request.workload.expert_count else False
    return divisors(ranks if shared == "any" else tp) if shared else (1,)


def _context_matters(request: Request, cp: int) -> int:
    """cp, where the ways to shard depend on it: who may keep weights; else 1."""
    return cp if request.stack.reshard_group == "any" else 1


def context_options(request: Request, tp: int, cp: int) -> tuple[int, ...]:
    """Codes of the kinds of context parallelism of cp ranks. The inner groups of two levels deal
    out what heads tp leaves, as ep deals out experts."""
    kinds = request.stack.cp_kinds or ("p2p",)
    if cp == 1:
        return (cp_kind_code(kinds[0]),)
    if request.job.cp_kinds:
        kinds = (column_kind(request.job.cp_kinds),)
    dealt = {s.size for s in model_splits(request.model) if s.over == "exchange"}
    heads = gcd(*(size for size in dealt if {None, *kinds} & {*exchanging(request, size)}))
    most = gcd(cp, heads // tp) if heads % tp == 0 else 1
    inner = [size for size in divisors(most) if 1 < size < cp]
    codes = [cp_kind_code(kind) for kind in kinds if kind not in TWO_LEVELS]
    codes += [cp_kind_code(kind, n) for kind in kinds if kind in TWO_LEVELS for n in inner]
    return tuple(codes)


def _product(*axes: Sequence[int]) -> Int64:
    """All combinations of the axes' values as rows, the last axis fastest."""
    grids = np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    return np.stack([grid.ravel() for grid in grids], axis=1)


def build_space(request: Request) -> Space:
    """Enumerate, apply every rule of the request, and count what each removes."""
    rules_, size = list(mesh_rules(request)), 0
    removed: Counter[str] = Counter({reason: 0 for reason, _ in rules_})
    kept: list[Meshes] = []
    for meshes in enumerate_meshes(request):
        size += int(meshes.weight.sum())
        for reason, broken in rules_:
            bad = broken(meshes)
            if bad.any():
                removed[reason] += int(meshes.weight[bad].sum())
                meshes = meshes.take(~bad)
        kept.append(meshes)
    return Space(joined(kept), size, +removed)


def mesh_rules(request: Request) -> Iterator[Rule]:
    """Reasons to remove a mesh, in the order in which they are counted."""
    yield from _constraint_rules(request)
    yield from rules.mesh_rules(request)


def recompute_modes(request: Request) -> tuple[RecomputeMode, ...]:
    """Modes that the stack has and the job allows."""
    plain = ("none",) if "none" in request.stack.recompute else ()
    asked = request.job.constraints.recompute
    return (
        *(plain if asked in (None, "none") else ()),
        *(policy.name for policy in request.workload.policies),
    )


def mixed_modes(request: Request) -> tuple[RecomputeMode, ...]:
    """Pairs of modes that may share a virtual stage, the one at its front first: it runs again all
    that the other does."""
    if not request.stack.recompute_mixed:
        return ()
    modes = recompute_modes(request)
    again = {"none": frozenset[str]()}
    again |= {p.name: p.modules for p in request.workload.policies if p.keeps is None}
    parts = [mode for mode in modes if mode in again]
    whole = "full" in modes and request.stack.recompute_layer_count
    return tuple(
        f"{front}{MIXED}{rest}"
        for rest in parts
        for front in (*parts, *(("full",) if whole and rest != "none" else ()))
        if front == "full" or again[front] > again[rest]
    )


def _constraint_rules(request: Request) -> Iterator[Rule]:
    limits = request.job.constraints
    if not recompute_modes(request):
        asked = f"recompute {limits.recompute}" if limits.recompute else "no recomputation"
        yield f"{request.stack.name} cannot do {asked} under this job", lambda m: m.tp >= 1
    for name in ("tp", "cp", "pp", "ep", "etp", "microbatch_size"):
        column = "microbatch" if name == "microbatch_size" else name
        for reason, broken in degree_limits(limits.fix, limits.max, limits.forbid, name):
            yield reason, _on(column, broken)
    if request.order is not None:
        yield from _order_rules(request.order, request.global_batch)
    if limits.sequence_parallel is not None:
        wanted = int(limits.sequence_parallel)
        yield (
            f"asked for sequence_parallel = {bool(wanted)}",
            lambda m: (m.tp > 1) & (m.sp != wanted),
        )


def _order_rules(order: GivenOrder, batch: int) -> Iterator[Rule]:
    """The user's own order is one of so many ranks and microbatches."""
    yield f"the given order has pp = {order.pp}", lambda m: m.pp != order.pp
    yield (
        f"the given order has {order.microbatches} microbatches",
        lambda m: m.dp * m.microbatch * order.microbatches != batch,
    )


def _on(column: str, broken: Callable[[Int64], Bools]) -> Callable[[Meshes], Bools]:
    return lambda meshes: broken(getattr(meshes, column))


def degree_limits(
    fix: dict[str, int], most: dict[str, int], forbid: tuple[str, ...], name: str
) -> Iterator[tuple[str, Callable[[Int64], Bools]]]:
    """The user's limits on one degree as rules over its values."""
    if name in fix:
        value = fix[name]
        yield f"asked for {name} = {value}", lambda x: x != value
    if name in most:
        limit = most[name]
        yield f"asked for {name} <= {limit}", lambda x: x > limit
    if name in forbid:
        yield f"asked for no {name}", lambda x: x > LEAST.get(name, 1)


def expand(request: Request, meshes: Meshes) -> Layouts:
    """All layouts of ``meshes``, before any rule."""
    data: dict[tuple[int, int], Int64] = {}
    stages: dict[int, Int64] = {}
    blocks: list[Int64] = []
    context = meshes.cp if _context_matters(request, 2) > 1 else np.ones_like(meshes.cp)
    found = zip(meshes.dp.tolist(), meshes.pp.tolist(), context.tolist(), strict=True)
    for dp, pp, cp in set(found):
        if (dp, cp) not in data:
            data[dp, cp] = _in_order(data_parallel_options(request, dp, cp), 4)
        if pp not in stages:
            coded = ((SCHEDULES.index(s), v, n) for s, v, n in pipeline_options(request, pp))
            stages[pp] = _in_order(tuple(coded), 3)
        index = np.flatnonzero((meshes.dp == dp) & (meshes.pp == pp) & (context == cp))
        left, right = data[dp, cp], stages[pp]
        shape = (len(index), len(left), len(right))
        block = np.empty((*shape, 8), dtype=np.int64)
        block[..., 0] = index[:, None, None]
        block[..., 1:5] = left[None, :, None, :]
        block[..., 5:8] = right[None, None, :, :]
        blocks.append(block.reshape(-1, 8))
    table = np.concatenate(blocks) if blocks else np.empty((0, 8), dtype=np.int64)
    # A mesh's rows lie in one block, in their order: blocks are runs, which a stable sort merges.
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Layouts(*(np.ascontiguousarray(table[:, i]) for i in range(8)))


def _in_order(rows: Sequence[tuple[int, ...]], width: int) -> Int64:
    """``rows`` as a table, sorted by their first column, then the next."""
    return np.array(sorted(rows), dtype=np.int64).reshape(-1, width)


def layout_rules(request: Request) -> Iterator[LayoutRule]:
    """Reasons to remove a layout. Meshes are already gathered to the layouts' length."""
    yield from _layout_constraint_rules(request)
    yield from rules.layout_rules(request)


def _layout_constraint_rules(request: Request) -> Iterator[LayoutRule]:
    limits = request.job.constraints
    for name in ("dp_replicate", "dp_shard", "zero_stage", "vpp", "layers_outside"):
        for reason, broken in degree_limits(limits.fix, limits.max, limits.forbid, name):
            yield reason, _on_layout(name.removeprefix("layers_"), broken)
    if limits.schedule is not None:
        wanted = SCHEDULES.index(limits.schedule)
        yield (
            f"asked for schedule {limits.schedule}",
            lambda m, x: (m.pp > 1) & (x.schedule != wanted),
        )
    yield from round_limits(request)


def _on_layout(column: str, broken: Callable[[Int64], Bools]) -> Callable[[Meshes, Layouts], Bools]:
    return lambda _, layouts: broken(getattr(layouts, column))
