"""Look for a completion that beats a claimed lower bound.

Every layout of the space whose relaxed bound is below the claimed one is taken apart, partition by
partition, until its own bound or its simulated time is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from cost_models.configs import Configs, price_configs
from cost_models.cp_kinds import cp_kind_code
from cost_models.layout import SCHEDULES
from cost_models.leaf import (
    Completion,
    Leaf,
    RankCosts,
    Recompute,
    chunk_costs,
    rank_costs,
    stage_costs,
)
from cost_models.outside import outside_bounds, recomputing
from cost_models.outside_bounds import OutsideLayouts, outside_step_bounds
from cost_models.partitions import count_free_bounds, free_bounds, interleaved_bounds
from cost_models.peaks import peak_bytes
from cost_models.recompute import is_counted
from cost_models.relaxation import Relaxation
from cost_models.step_time import simulate_step
from cost_models.surrogate import (
    EMPTY_LABEL,
    Label,
    extend_label,
    least_objective_ns,
    least_work,
    surrogate_ns,
)
from planner.errors import LimitReachedError
from planner.recount import (
    SPLIT,
    Mesh,
    every_layout,
    every_mesh,
    impossible_layout,
    rounds_of,
    wanted,
    wanted_round,
)
from planner.recount_modes import mixed_modes, recompute_modes
from planner.recount_nodes import Nodes
from planner.request import Request

BATCH = 20_000
"""Layouts priced at once."""
LARGEST_LEAF = 2_000_000
"""Partial completions that one leaf may take; beyond it the bound is unchecked there."""
MOST_PARTITIONS = 20_000
"""Likewise partitions of a leaf whose virtual stages may hold any numbers of layers."""
MOST_ACTIONS = 100_000_000
"""Likewise passes that are simulated in a leaf whose rounds may have several sizes."""


class _TooLargeError(Exception):
    """A leaf takes more than ``LARGEST_LEAF`` or ``MOST_ACTIONS``."""


def better_layout(request: Request, least_ns: int) -> str | None:
    """A layout of the space that simulates below ``least_ns``, in words, or None.

    Raises :class:`LimitReachedError` if none was found and one was too large to take apart.
    """
    unchecked: list[str] = []
    found = _better_layout(request, least_ns, unchecked)
    if found is None and unchecked:
        more = f" (and {len(unchecked) - 1:,} other layouts)" if len(unchecked) > 1 else ""
        raise LimitReachedError(
            f"certificate.lower_bound_s is neither confirmed nor refuted: {unchecked[0]}{more} may "
            f"be completed in more than {LARGEST_LEAF:,} ways that the bound does not exclude",
            hint="everything else in the plan holds; a job whose constraints leave fewer degrees "
            "open leaves less to check",
        )
    return found


def _better_layout(request: Request, least_ns: int, unchecked: list[str]) -> str | None:
    batch: list[tuple[int, ...]] = []
    meshes: list[Mesh] = []
    for mesh in every_mesh(request):
        degrees = (
            mesh.tp, int(mesh.sp), mesh.cp, cp_kind_code(mesh.cp_kind, mesh.cp_inner), mesh.pp,
            mesh.ep, mesh.etp, mesh.mbs,
        )  # fmt: skip
        layouts = every_layout(mesh, request)
        found = [(*degrees, *entry) for entry in layouts if wanted(mesh, entry, request)]
        batch += found
        meshes += [mesh] * len(found)
        if len(batch) >= BATCH:
            rows = np.array(batch, dtype=np.int64)
            finding = _refute(rows, meshes, least_ns, request, unchecked)
            batch.clear()
            meshes.clear()
            if finding:
                return finding
    if not batch:
        return None
    return _refute(np.array(batch, dtype=np.int64), meshes, least_ns, request, unchecked)


def _refute(
    rows: np.ndarray[Any, np.dtype[np.int64]], meshes: Sequence[Mesh], least: int,
    request: Request, unchecked: list[str],
) -> str | None:  # fmt: skip
    """A layout among ``rows`` that beats the claimed bound, in words; what is too large to tell is
    added to ``unchecked``."""
    tp, sp, cp, kind, pp, ep, etp, mbs, replicate, shard, zero, schedule, vpp, keep, out = rows.T
    tables = price_configs(
        request.workload, request.machine,
        Configs(mbs, tp, cp, kind, ep, etp, sp.astype(bool), replicate, shard, pp, zero, keep),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
    )  # fmt: skip
    m = request.global_batch // (replicate * shard * mbs)
    modes, inside, column = recompute_modes(request), out == 0, np.arange(len(rows))
    bounds = np.zeros(len(rows))
    bounds[inside] = Relaxation(
        tables,
        config=column[inside],
        schedule=schedule[inside],
        vpp=vpp[inside],
        microbatches=m[inside],
        modes=modes,
        counted=request.stack.recompute_layer_count,
        per_stage=request.stack.recompute_per_stage,
        free=request.free_stages,
        order=request.order,
    ).bounds(float(least))
    if not inside.all():
        others = OutsideLayouts(column, schedule, vpp, m, out).take(column[~inside])
        bounds[~inside] = outside_step_bounds(tables, others, modes, float(least))
    for index in np.flatnonzero(bounds < least).tolist():
        leaf = tables.leaf(
            index,
            schedule=SCHEDULES[int(schedule[index])],
            vpp=int(vpp[index]),
            microbatches=int(m[index]),
            uneven=request.stack.uneven_stages,
            order=request.order,
            outside=int(out[index]),
        )
        name = (
            f"tp {tp[index]} cp {cp[index]} pp {pp[index]} ep {ep[index]} vpp {vpp[index]} "
            f"microbatch {mbs[index]}" + (f" layers_outside {out[index]}" if out[index] else "")
        )
        mesh, data = meshes[index], (int(shard[index]), int(zero[index]))
        sizes = [
            size
            for size in rounds_of(leaf.schedule, mesh, request)
            if wanted_round(size, request)
            and not impossible_layout(
                *data, leaf.schedule, leaf.vpp, mesh, request, size, int(out[index])
            )
        ]
        try:
            nodes = Nodes(request, mesh, *data, leaf)
            better = _better_completion(leaf, least, request, sizes, nodes)
        except _TooLargeError:
            unchecked.append(name)
            continue
        if better is not None:
            return f"{name} {better}"
    return None


def _better_completion(
    leaf: Leaf, least: int, request: Request, sizes: Sequence[int], nodes: Nodes
) -> str | None:
    """A completion that fits and simulates below ``least`` ns, in words, or None. ``sizes`` are
    those of rounds of microbatches, ``nodes`` counts what leaves for the hosts."""
    options: list[Recompute] = []
    for mode in recompute_modes(request):
        if mode == "full":
            counts = range(1, len(leaf.sequence) + 1)
            if not request.stack.recompute_layer_count:
                counts = range(len(leaf.sequence), len(leaf.sequence) + 1)
            options += [("full", count) for count in counts]
        else:
            options.append((mode, 0))
    layers = len(leaf.sequence)
    if leaf.vpp == 1 and leaf.order is None:
        options += [(mode, n) for mode in mixed_modes(request) for n in range(1, layers)]
    # Numbers of whole layers last: where one takes too long, so do those that follow.
    options.sort(key=lambda option: option[0] == "full")
    if leaf.outside is not None:
        return _better_with_outside(leaf, least, options, nodes)
    if leaf.schedule in SPLIT:
        options = [option for option in options if option[0] in ("none", "full")]
    if leaf.vpp > 1 or leaf.order is not None:
        partitions = interleaved_bounds(leaf)
        if request.free_stages:
            if count_free_bounds(len(leaf.sequence), leaf.stages) > MOST_PARTITIONS:
                raise _TooLargeError
            partitions = free_bounds(len(leaf.sequence), leaf.stages)
        return _better_interleaved(leaf, least, partitions, options, sizes, nodes)
    groups = [options] if request.stack.recompute_per_stage else [[option] for option in options]
    budget = [LARGEST_LEAF]
    for group in groups:
        found = _Chain(leaf, least, group, budget, nodes).better()
        if found is not None:
            return found
    return None


def _fits(
    leaf: Leaf, ranks: tuple[RankCosts, ...], nodes: Nodes, bounds: Sequence[int], mode: str
) -> bool:
    """Whether every device has room, and every node for what its devices send there."""
    for rank, costs in enumerate(ranks):
        if peak_bytes(leaf, rank, costs.chunks) > leaf.capacity_bytes:
            return False
    return nodes.hold(nodes.of_bounds(bounds, leaf.round_size, mode))


def _better_with_outside(
    leaf: Leaf, least: int, options: list[Recompute], nodes: Nodes
) -> str | None:
    """The same with layers outside the pipeline: the stages are equal, one mode serves all."""
    for option in options:
        variant = recomputing(leaf, option[0])
        bounds = outside_bounds(leaf)
        ranks = stage_costs(variant, Completion(bounds, (option,) * leaf.stages))
        if surrogate_ns(variant, ranks) < least and _fits(variant, ranks, nodes, bounds, option[0]):
            total = simulate_step(variant, ranks).total_ns
            if total < least:
                return f"with {option} takes {total / 1e9:.6g} s"
    return None


def _better_interleaved(
    leaf: Leaf, least: int, partitions: Iterator[tuple[int, ...]], options: list[Recompute],
    sizes: Sequence[int], nodes: Nodes,
) -> str | None:  # fmt: skip
    variants = [replace(leaf, round_size=size) for size in sizes]
    actions = 0
    for bounds in partitions:
        tallest = max(b - a for a, b in pairwise(bounds))
        for option in options:
            if option[0] == "full" and option[1] > tallest and option != options[-1]:
                continue
            completion = Completion(bounds, (option,) * leaf.stages)
            ranks = stage_costs(leaf, completion)
            if surrogate_ns(leaf, ranks) >= least:
                if option[0] == "full":
                    break
                continue
            for variant in variants:
                if not _fits(variant, ranks, nodes, bounds, option[0]):
                    continue
                total = simulate_step(variant, ranks).total_ns
                if total < least:
                    return f"with {option} takes {total / 1e9:.6g} s"
                actions += 2 * leaf.stages * leaf.microbatches
                if actions > MOST_ACTIONS:
                    raise _TooLargeError
    return None


class _Chain:
    """All partitions of a leaf under one group of options: depth first, last rank first, while a
    bound stays below ``least`` ns.

    Where no partition was reached from a partial one, none is from one that is dominated by it:
    bounds grow with the label, and what fits does not depend on it.
    """

    def __init__(
        self, leaf: Leaf, least: int, options: Sequence[Recompute], budget: list[int], nodes: Nodes
    ) -> None:
        self.leaf, self.least, self.options, self.budget = leaf, least, options, budget
        self.nodes = nodes
        self.work = least_work(leaf, options, least)
        self.reached = 0
        self._closed: dict[tuple[int, int], list[Label]] = {}
        self._stages: dict[tuple[int, int, int, Recompute], tuple[RankCosts, bool]] = {}
        self.mixes = any("/" in mode for mode, _ in options)
        self._best: dict[tuple[int, int, int], tuple[Recompute, ...]] = {}

    def better(self) -> str | None:
        """A completion that simulates below ``least``, in words."""
        return self._descend(self.leaf.pp - 1, len(self.leaf.sequence), EMPTY_LABEL, (), ())

    def _descend(
        self, rank: int, last: int, label: Label, chosen: tuple[RankCosts, ...],
        sent: tuple[int, ...],
    ) -> str | None:  # fmt: skip
        leaf = self.leaf
        self.budget[0] -= 1
        if self.budget[0] <= 0:
            raise _TooLargeError
        if rank < 0:
            self.reached += 1
            if not self.nodes.hold(sent):
                return None
            total = simulate_step(leaf, chosen).total_ns
            return f"takes {total / 1e9:.6g} s" if total < self.least else None
        closed = self._closed.setdefault((rank, last), [])
        if any(other.dominates(label) for other in closed):
            return None
        before = self.reached
        for first in self._firsts(rank, last):
            slow = True
            for option in self._offered(rank, first, last):
                costs, holds = self._stage(rank, first, last, option)
                if leaf.microbatches * costs.work_ns >= self.least:
                    continue
                slow = False
                if not holds:
                    continue
                extended = extend_label(leaf, label, rank, costs)
                if least_objective_ns(leaf, extended, rank, self.work[first]) >= self.least:
                    continue
                more = self.nodes.sent(rank, [(first, last)], leaf.round_size, option[0])
                there = (more, *sent)
                found = self._descend(rank - 1, first, extended, (costs, *chosen), there)
                if found is not None:
                    return found
            if slow:
                break
        if self.reached == before:
            closed.append(label)
        return None

    def _firsts(self, rank: int, last: int) -> range:
        """First layers of a rank that ends before layer ``last``, smallest stage first."""
        leaf, layers = self.leaf, len(self.leaf.sequence)
        fewest = 0 if leaf.pp > 1 and rank in (0, leaf.pp - 1) else 1
        if not leaf.uneven:
            first = rank * layers // leaf.pp
            return range(first, first - 1, -1) if first <= last - fewest else range(0)
        if rank:
            return range(last - fewest, -1, -1)
        return range(0, -1, -1) if last >= fewest else range(0)

    def _offered(self, rank: int, first: int, last: int) -> Sequence[Recompute]:
        """All options; of many, the one that repeats least among those that fit, which the others
        can only take longer than, or the fastest where none does."""
        if not self.mixes:
            return self.options
        key = rank, first, last
        if key not in self._best:
            ordered = self._by_time(first, last)
            fits = (o for o in ordered if self._stage(rank, first, last, o)[1])
            self._best[key] = (next(fits, ordered[0]),)
        return self._best[key]

    def _by_time(self, first: int, last: int) -> list[Recompute]:
        """Options by what they add to the backward of layers ``first .. last - 1``."""
        counts, kinds = self.leaf.counts, range(len(self.leaf.kinds))

        def added(option: Recompute) -> int:
            front, rest = (rows.extra for rows in self.leaf.parts(option[0]))
            split = min(last, first + option[1]) if is_counted(option[0]) else last
            return sum(
                (counts[split][k] - counts[first][k]) * self.leaf.kinds[k][front]
                + (counts[last][k] - counts[split][k]) * self.leaf.kinds[k][rest]
                for k in kinds
            )

        return sorted(self.options, key=added)

    def _stage(self, rank: int, first: int, last: int, option: Recompute) -> tuple[RankCosts, bool]:
        """Costs of a stage, and whether it fits."""
        key = (rank, first, last, option)
        known = self._stages.get(key)
        if known is None:
            chunk = chunk_costs(self.leaf, rank, first, last, option)
            holds = peak_bytes(self.leaf, rank, (chunk,)) <= self.leaf.capacity_bytes
            sent = self.nodes.sent(rank, [(first, last)], self.leaf.round_size, option[0])
            holds = holds and self.nodes.hold_alone(rank, sent)
            known = self._stages[key] = rank_costs(self.leaf, (chunk,)), holds
        return known
