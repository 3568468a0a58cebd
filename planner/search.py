"""Best-first branch and bound over layouts; every leaf is solved, simulated, and accounted for.

Meshes wait in the order of their bounds. The most promising are expanded into layouts, which wait
in the order of theirs; the first layout in the queue is opened as a leaf. A leaf gives the exact
optimum of its program (a lower bound on every completion), whose completion is simulated. If the
bound is not within the tolerance of the best simulated time, further completions below the cutoff
are listed and simulated, until the leaf can no longer win.

The search ends when nothing left has a bound below ``(1 - tolerance) * best``; then the least
bound of everything, opened or not, is the proved lower bound.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cost_models.leaf import (
    Completion,
    Leaf,
    Recompute,
    peaks,
    simulate_step,
    stage_costs,
)
from cost_models.step import Field
from planner.program import (
    UNLIMITED,
    ProgramSolution,
    Rows,
    enumerate_chain,
    interleaved_candidates,
    reaches,
    solve_chain,
)
from planner.request import Request
from planner.space import SCHEDULE_NAMES, Meshes, build_space, expand, layout_rules
from planner.tables import (
    PricedLayouts,
    mesh_bounds,
    price_layouts,
    recompute_options,
)

FIRST_BATCH = 48
"""Meshes expanded at first; each following batch is larger, up to :data:`LARGEST_BATCH`."""
LARGEST_BATCH = 4096
NODES_PER_LEAF = 300_000
"""Partial completions listed in one leaf before its program bound stands as it is."""
ACTIONS_PER_LEAF = 20_000_000
"""Likewise for simulated forwards and backwards."""
OUT_OF_MEMORY = "does not fit in memory, whatever is recomputed"
SPARES = 256
"""Layouts per batch looked at for alternatives."""

Degrees = dict[str, int | str | bool]


@dataclass(frozen=True)
class Candidate:
    """A simulated layout."""

    time_ns: int
    peak_bytes: int
    degrees: Degrees
    leaf: Leaf
    completion: Completion
    program: ProgramSolution

    def key(self) -> tuple[object, ...]:
        """Order of preference: time, then memory, then the simpler layout."""
        order = tuple(self.degrees[name] for name in _ORDER)
        return (self.time_ns, self.peak_bytes, order, self.completion.bounds)


_ORDER = (
    "pp", "tp", "cp", "ep", "etp", "vpp", "dp_replicate", "microbatch_size", "zero_stage",
    "sequence_parallel", "cp_kind", "schedule",
)  # fmt: skip


@dataclass
class SearchResult:
    """What the search found and proved."""

    best: Candidate | None
    bound_ns: int | None
    complete: bool
    """Whether the search ended by itself: nothing left could win."""
    size: int
    removed: Counter[str]
    pruned: int
    leaves: int
    simulated: int
    kept: list[Candidate] = field(default_factory=list)


class Search:
    """One search; :meth:`run` returns the result, also after an interruption."""

    def __init__(
        self,
        request: Request,
        *,
        time_limit_s: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.request = request
        self.tolerance = request.job.tolerance
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.progress = progress
        self.best: Candidate | None = None
        self.kept: list[Candidate] = []
        self.proved = UNLIMITED
        """Least bound of everything that was closed without being the best."""
        self.leaves = self.simulated = self.pruned = 0
        self.queue: list[tuple[float, int, int, PricedLayouts]] = []
        self.spares: dict[tuple[int, ...], tuple[float, int, PricedLayouts]] = {}
        """Best bound of each kind of mesh, hopeless ones too: where alternatives come from."""
        self.batches = 0

    @property
    def cutoff(self) -> int:
        """A layout must have a bound below this to matter."""
        if self.best is None:
            return UNLIMITED
        return within(self.best.time_ns, self.tolerance)

    def run(self) -> SearchResult:
        """Search to the end, the limit, or an interruption."""
        space = build_space(self.request)
        complete, meshes = False, space.meshes
        order: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)
        bounds = np.zeros(0)
        position = 0
        try:
            if len(meshes):
                bounds = mesh_bounds(self.request, meshes)
                self._count_memory(space.removed, meshes, np.isinf(bounds))
                meshes = meshes.take(np.isfinite(bounds))
                bounds = bounds[np.isfinite(bounds)]
                order = np.argsort(bounds, kind="stable")
            size = FIRST_BATCH
            while True:
                next_mesh = bounds[order[position]] if position < len(order) else np.inf
                next_leaf = self.queue[0][0] if self.queue else np.inf
                least = min(next_mesh, next_leaf)
                if least >= self.cutoff or np.isinf(least):
                    break
                self._check_deadline()
                if next_mesh <= next_leaf:
                    chunk = order[position : position + size]
                    chunk = chunk[bounds[chunk] < self.cutoff]
                    self._expand(meshes.take(chunk), space.removed)
                    position += len(chunk)
                    size = min(size * 2, LARGEST_BATCH)
                else:
                    bound, _, index, layouts = heapq.heappop(self.queue)
                    self._open(layouts, index, int(bound), space.removed)
            complete = True
        except (_DeadlineError, KeyboardInterrupt) as stop:
            if isinstance(stop, KeyboardInterrupt) and self.best is None:
                raise
        waiting = order[position:]
        self.pruned += len(self.queue) + int(meshes.weight[waiting].sum())
        left = [int(entry[0]) for entry in self.queue[:1]]
        left += [int(bounds[waiting[0]])] if len(waiting) else []
        bound_ns = None
        if self.best is not None:
            bound_ns = min([self.proved, self.best.time_ns, *left])
        return SearchResult(
            best=self.best,
            bound_ns=bound_ns,
            complete=complete,
            size=space.size,
            removed=space.removed,
            pruned=self.pruned,
            leaves=self.leaves,
            simulated=self.simulated,
            kept=sorted(self.kept, key=Candidate.key),
        )

    def _count_memory(
        self, removed: Counter[str], meshes: Meshes,
        bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    ) -> None:  # fmt: skip
        if bad.any():
            removed[OUT_OF_MEMORY] += int(meshes.weight[bad].sum())

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _DeadlineError

    def _expand(self, meshes: Meshes, removed: Counter[str]) -> None:
        """Turn meshes into layouts, apply the layout rules, price, and queue what may win."""
        layouts = expand(self.request, meshes)
        for reason, broken in layout_rules(self.request):
            bad = broken(meshes.take(layouts.mesh), layouts)
            if bad.any():
                removed[reason] += int(bad.sum())
                layouts = layouts.take(~bad)
        if not len(layouts):
            return
        priced = price_layouts(self.request, meshes, layouts, cutoff_ns=float(self.cutoff))
        infinite = np.isinf(priced.bound_ns)
        if infinite.any():
            removed[OUT_OF_MEMORY] += int(infinite.sum())
        self.batches += 1
        hopeless = ~infinite & (priced.bound_ns >= self.cutoff)
        if hopeless.any():
            self.pruned += int(hopeless.sum())
            self._close(int(priced.bound_ns[hopeless].min()))
        self._remember_spares(priced)
        for index in np.flatnonzero(~infinite & ~hopeless).tolist():
            entry = (float(priced.bound_ns[index]), self.batches * (1 << 40) + index, index, priced)
            heapq.heappush(self.queue, entry)
        self._say(f"{self.batches} batches, {len(self.queue):,} layouts waiting")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            best = f"best {self.best.time_ns / 1e9:.4g} s, " if self.best else ""
            self.progress(f"{best}{self.leaves:,} leaves opened, {text}")

    def _remember_spares(self, priced: PricedLayouts) -> None:
        meshes, own = priced.meshes, priced.layouts.mesh
        order = np.argsort(priced.bound_ns, kind="stable")[:SPARES]
        for index in order.tolist():
            bound = float(priced.bound_ns[index])
            if np.isinf(bound):
                break
            mesh = int(own[index])
            key = tuple(int(getattr(meshes, name)[mesh]) for name in ("tp", "cp", "pp", "ep"))
            if key not in self.spares or bound < self.spares[key][0]:
                self.spares[key] = (bound, index, priced)

    def alternatives(self, count: int) -> list[Candidate]:
        """The best layouts with other (tp, cp, pp, ep) than the winner, about by time.

        Some were simulated on the way; for the rest the kinds of mesh with the least bounds are
        opened, whatever the cutoff.
        """
        if self.best is None:
            return []
        by_preference = sorted(self.kept, key=Candidate.key, reverse=True)
        chosen = {_mesh_key(c.degrees): c for c in by_preference}
        chosen.pop(_mesh_key(self.best.degrees), None)
        winner, tolerance = self.best, self.tolerance
        spares = sorted(self.spares.items(), key=lambda item: (item[1][0], item[0]))
        for key, (_, index, priced) in spares[: 4 * count]:
            if key in chosen or key == _mesh_key(winner.degrees):
                continue
            self.best, before = None, len(self.kept)
            self._open(priced, index, 0, Counter())
            found = sorted(self.kept[before:], key=Candidate.key)
            if self.best is not None and found:
                chosen[key] = found[0]
        self.best, self.tolerance = winner, tolerance
        return sorted(chosen.values(), key=Candidate.key)[:count]

    def _close(self, bound_ns: int) -> None:
        self.proved = min(self.proved, bound_ns)

    def _open(
        self, layouts: PricedLayouts, index: int, bound_ns: int, removed: Counter[str]
    ) -> None:
        """Solve a leaf: raise its bound to the cutoff, or find out that nothing of it fits."""
        if bound_ns >= self.cutoff:
            self.pruned += 1
            self._close(bound_ns)
            return
        self.leaves += 1
        if self.leaves % 64 == 0:
            self._say(f"{len(self.queue):,} layouts waiting")
        leaf = layouts.leaf(index)
        degrees = _degrees(layouts, index, leaf)
        options = recompute_options(self.request, len(leaf.sequence))
        if leaf.vpp > 1:
            reached = self._open_interleaved(leaf, degrees, options)
        else:
            reached = self._open_chain(leaf, degrees, options)
        if reached is None:
            removed[OUT_OF_MEMORY] += 1
        else:
            self._close(reached)

    def _open_interleaved(
        self, leaf: Leaf, degrees: Degrees, options: tuple[Recompute, ...]
    ) -> int | None:
        """Simulate the few completions whose surrogate is below the cutoff."""
        tallest = len(leaf.sequence) // max(1, leaf.stages - 2)
        useful = [option for option in options if option[1] <= tallest or option == options[-1]]
        program: ProgramSolution | None = None
        reached: int | None = None
        for surrogate, completion in interleaved_candidates(
            leaf, useful, cutoff=lambda: self.cutoff
        ):
            bound = surrogate
            if completion is not None:
                program = program or ProgramSolution(
                    "optimal", surrogate, completion, "enumeration"
                )
                bound = self._simulate(leaf, degrees, completion, program)
            reached = bound if reached is None else min(reached, bound)
        return reached

    def _open_chain(
        self, leaf: Leaf, degrees: Degrees, options: tuple[Recompute, ...]
    ) -> int | None:
        """Solve the program for each option (or all at once where ranks may differ)."""
        rows = Rows(leaf)
        groups: list[tuple[Recompute, ...]]
        if self.request.stack.recompute_per_stage:
            groups = [options]
        else:
            # In ascending order of time: nothing, attention, then more and more layers.
            groups = [(option,) for option in options]
        reached: int | None = None
        slow = [g for g in groups if _time_alone(leaf, g, self.cutoff) >= self.cutoff]
        if slow:
            # Above the cutoff whatever the memory; more recomputed layers only add to that.
            reached = self.cutoff
        for group in _fitting(rows, groups[: len(groups) - len(slow)]):
            bound = self.cutoff
            if _time_alone(leaf, group, bound) < bound:
                bound = self._solve_group(leaf, degrees, group, rows)
            reached = bound if reached is None else min(reached, bound)
        return reached

    def _solve_group(
        self, leaf: Leaf, degrees: Degrees, group: tuple[Recompute, ...], rows: Rows
    ) -> int:
        """Lower bound proved for all completions of ``group``; simulates what may win."""
        solution = self._program(leaf, group, rows)
        if solution.completion is None or solution.objective_ns is None:
            return self.cutoff
        simulated = self._simulate(leaf, degrees, solution.completion, solution)
        bound = solution.objective_ns
        if bound >= self.cutoff:
            return bound
        budget = _Budget(self._check_deadline)
        least = simulated
        try:
            for _, completion in enumerate_chain(
                leaf, group, cutoff=lambda: self.cutoff, rows=rows, tick=budget.spend
            ):
                budget.simulate(leaf)
                least = min(least, self._simulate(leaf, degrees, completion, solution))
        except _SpentError:
            return bound
        return min(least, self.cutoff)

    def _program(self, leaf: Leaf, group: tuple[Recompute, ...], rows: Rows) -> ProgramSolution:
        """The program's optimum below the cutoff; without one, widen the cutoff until it shows."""
        if self.best is not None:
            return solve_chain(leaf, group, cutoff_ns=self.cutoff, rows=rows, fits=True)
        share = sum(
            leaf.microbatches * work
            for work in (
                sum(kind[0] + kind[1] for kind in (leaf.kinds[i] for i in leaf.sequence)),
                leaf.embedding[0] + leaf.embedding[1],
                leaf.head[0] + leaf.head[1],
            )
        )
        guess = max(share // leaf.pp, 1)
        for factor in (1.25, 1.6, 2.5, 6.0):
            solution = solve_chain(leaf, group, cutoff_ns=int(guess * factor), rows=rows, fits=True)
            if solution.termination != "cutoff":
                return solution
        return solve_chain(leaf, group, rows=rows, fits=True)

    def _simulate(
        self, leaf: Leaf, degrees: Degrees, completion: Completion, program: ProgramSolution
    ) -> int:
        """Simulate a completion and keep it if it is the best so far."""
        self.simulated += 1
        ranks = stage_costs(leaf, completion)
        step = simulate_step(leaf, ranks)
        peak = max(peaks(leaf, ranks))
        candidate = Candidate(step.total_ns, peak, degrees, leaf, completion, program)
        if self.best is None or candidate.key() < self.best.key():
            self.best = candidate
        self._keep(candidate)
        return step.total_ns

    def _keep(self, candidate: Candidate) -> None:
        """Remember the best completion of each of the best layouts."""
        for index, other in enumerate(self.kept):
            if other.degrees == candidate.degrees:
                if candidate.key() < other.key():
                    self.kept[index] = candidate
                return
        self.kept.append(candidate)


def within(time_ns: int, tolerance: float) -> int:
    """The least integer bound that proves ``time_ns`` optimal within ``tolerance``."""
    parts = 10**12
    return -(-time_ns * (parts - round(tolerance * parts)) // parts)


class _Budget:
    """What may be spent on listing and simulating the completions of one leaf."""

    def __init__(self, check_deadline: Callable[[], None]) -> None:
        self.check_deadline = check_deadline
        self.nodes = self.actions = 0

    def spend(self) -> None:
        """Count a node; raises when the leaf has had its share, or the time is up."""
        self.nodes += 1
        if self.nodes % 1024 == 0:
            self.check_deadline()
        if self.nodes > NODES_PER_LEAF or self.actions > ACTIONS_PER_LEAF:
            raise _SpentError

    def simulate(self, leaf: Leaf) -> None:
        """Count a simulation."""
        self.actions += 2 * leaf.stages * leaf.microbatches


class _SpentError(Exception):
    """A leaf has had its share of the search."""


class _DeadlineError(Exception):
    """The time limit was reached."""


def _mesh_key(degrees: Degrees) -> tuple[int, ...]:
    return tuple(int(degrees[name]) for name in ("tp", "cp", "pp", "ep"))


def _time_alone(leaf: Leaf, group: tuple[Recompute, ...], cutoff_ns: int) -> int:
    """A bound for ``group`` whatever the memory: its recomputation adds at least this much work.

    With ``n`` layers recomputed at the front of each stage and no stage longer than ``most``
    layers (a longer one alone is above the cutoff), ``L n / max(n, most)`` layers are recomputed.
    """
    if len(group) > 1 or cutoff_ns >= UNLIMITED:
        return 0
    mode, count = group[0]
    kinds = [leaf.kinds[index] for index in leaf.sequence]
    work = sum(kind[Field.FORWARD] + kind[Field.BACKWARD] for kind in kinds)
    for end in (leaf.embedding, leaf.head):
        work += end[Field.FORWARD] + end[Field.BACKWARD]
    if mode == "selective":
        work += sum(kind[Field.SELECTIVE] for kind in kinds)
    elif mode == "full":
        cheapest = min(kind[Field.FORWARD] + kind[Field.BACKWARD] for kind in kinds)
        most = min(len(kinds), cutoff_ns // max(1, leaf.microbatches * cheapest))
        share = len(kinds) * count // max(1, count, most)
        work += share * min(kind[Field.FULL] for kind in kinds)
    loops = 0 if leaf.schedule == "gpipe" else (leaf.microbatches - 1) // leaf.pp
    return max(leaf.microbatches * work // leaf.pp, (1 + loops) * work)


def _fitting(rows: Rows, groups: list[tuple[Recompute, ...]]) -> list[tuple[Recompute, ...]]:
    """Groups for which some partition fits; counts of full recomputation by bisection."""
    fitting = [g for g in groups if g[0][0] != "full" and reaches(rows, g)]
    full = [g for g in groups if g[0][0] == "full"]
    low, high = 0, len(full)
    while low < high:
        middle = (low + high) // 2
        if reaches(rows, full[middle]):
            high = middle
        else:
            low = middle + 1
    return fitting + full[low:]


def _degrees(layouts: PricedLayouts, index: int, leaf: Leaf) -> Degrees:
    from planner.space import cp_kind_name

    meshes, own = layouts.meshes, layouts.layouts
    mesh = int(own.mesh[index])
    zero = int(own.zero_stage[index])
    ranks = int(meshes.dp[mesh] * meshes.cp[mesh] * meshes.tp[mesh])
    return {
        "dp_replicate": int(own.dp_replicate[index]),
        "dp_shard": int(own.dp_shard[index]),
        "cp": int(meshes.cp[mesh]),
        "cp_kind": cp_kind_name(int(meshes.cp_kind[mesh])),
        "tp": int(meshes.tp[mesh]),
        "sequence_parallel": bool(meshes.sp[mesh]),
        "pp": int(meshes.pp[mesh]),
        "vpp": int(own.vpp[index]),
        "ep": int(meshes.ep[mesh]),
        "etp": int(meshes.etp[mesh]),
        "expert_dp": ranks // int(meshes.ep[mesh] * meshes.etp[mesh]),
        "microbatch_size": int(meshes.microbatch[mesh]),
        "num_microbatches": leaf.microbatches,
        "zero_stage": zero,
        "reshard_after_forward": zero == 3,
        "schedule": SCHEDULE_NAMES[int(own.schedule[index])],
    }
