"""Open one layout as a leaf: prove a bound on all its completions, simulate those that may win.

A leaf gives the exact optimum of its program (a lower bound on every completion), whose completion
is simulated. If the bound is not within the tolerance of the best simulated time, further
completions below the cutoff are listed and simulated, until the leaf can no longer win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from cost_models.layout import LISTED, ONE_CHUNK_AT_ONCE
from cost_models.leaf import Completion, Leaf, Recompute, stage_costs
from cost_models.peaks import hosts_hold, peaks
from cost_models.recompute import MIXED, group_of
from cost_models.split_backward import SPLIT_MODES
from cost_models.step import Field
from cost_models.step_time import simulate_step
from planner.cheapest import BEST, Cheapest
from planner.interleaved import Ints, even_partitions, interleaved_candidates
from planner.options import undominated, with_room
from planner.program import (
    UNLIMITED,
    ProgramSolution,
    Rows,
    enumerate_chain,
    reaches,
    solve_chain,
)

NODES_PER_LEAF = 300_000
"""Partial completions listed in one leaf before its program bound stands as it is."""
ACTIONS_PER_LEAF = 20_000_000
"""Likewise for simulated forwards and backwards."""
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
        order = tuple(self.degrees[name] for name in DEGREES_IN_ORDER)
        return (self.time_ns, self.peak_bytes, order, self.completion.bounds)


DEGREES_IN_ORDER = (
    "pp", "tp", "cp", "ep", "etp", "vpp", "dp_replicate", "microbatch_size", "zero_stage",
    "sequence_parallel", "cp_kind", "cp_inner", "reshard_after_forward", "schedule", "round_size",
    "layers_outside",
)  # fmt: skip


def within(time_ns: int, tolerance: float) -> int:
    """The least integer bound that proves ``time_ns`` optimal within ``tolerance``."""
    parts = 10**12
    return -(-time_ns * (parts - round(tolerance * parts)) // parts)


class Incumbent:
    """The best completion so far, the best of each layout, and what a bound must stay below."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.best: Candidate | None = None
        self.kept: list[Candidate] = []
        self.simulated = 0

    @property
    def cutoff(self) -> int:
        """A layout must have a bound below this to matter."""
        if self.best is None:
            return UNLIMITED
        return within(self.best.time_ns, self.tolerance)

    def simulate(
        self, leaf: Leaf, degrees: Degrees, completion: Completion, program: ProgramSolution
    ) -> int:
        """Time in ns of a completion, kept if best: endless where its hosts are too small."""
        self.simulated += 1
        ranks = stage_costs(leaf, completion)
        if not hosts_hold(leaf, ranks):
            return UNLIMITED
        time_ns, peak = simulate_step(leaf, ranks).total_ns, max(peaks(leaf, ranks))
        candidate = Candidate(time_ns, peak, degrees, leaf, completion, program)
        if self.best is None or candidate.key() < self.best.key():
            self.best = candidate
        self._keep(candidate)
        return time_ns

    def _keep(self, candidate: Candidate) -> None:
        """Remember the best completion of each of the best layouts."""
        for index, other in enumerate(self.kept):
            if other.degrees == candidate.degrees:
                if candidate.key() < other.key():
                    self.kept[index] = candidate
                return
        self.kept.append(candidate)


class Opening:
    """One leaf against the incumbent; ``check_deadline`` raises when the time is up.

    ``thorough``: whether completions are listed where the program's optimum does not settle it (if
    not, its bound stands). ``sizes`` are those of rounds of microbatches (``cost_models.rounds``),
    if any; ``partitions`` stand for those of even virtual stages.
    """

    def __init__(
        self,
        leaf: Leaf,
        degrees: Degrees,
        incumbent: Incumbent,
        check_deadline: Callable[[], None],
        *,
        sizes: Sequence[int] = (0,),
        partitions: Ints | None = None,
        thorough: bool = True,
    ) -> None:
        self.thorough = thorough
        self.sizes, self.partitions = sizes, partitions
        self.leaf, self.degrees, self.incumbent = leaf, degrees, incumbent
        self.check_deadline = check_deadline
        self.rows = Rows(leaf)

    @cached_property
    def _alone(self) -> _TimeAlone:
        return _TimeAlone(self.leaf)

    @property
    def cutoff(self) -> int:
        """A completion must have a bound below this to matter."""
        return self.incumbent.cutoff

    def close(self, options: tuple[Recompute, ...], *, per_stage: bool) -> int | None:
        """Raise the leaf's bound to the cutoff, or as far as it goes; None where nothing fits.

        ``per_stage`` says whether the ranks may differ in their recomputation.
        """
        if self.leaf.splits_backward:
            options = tuple(option for option in options if option[0] in SPLIT_MODES)
        if self.leaf.schedule in LISTED:
            options = tuple(option for option in options if MIXED not in option[0])
        options = undominated(self.leaf, with_room(self.leaf, options))
        if not options:
            return None
        if self.leaf.schedule in LISTED:
            return self._interleaved(options)
        return self._chain(options, per_stage=per_stage)

    def _simulate(self, completion: Completion, program: ProgramSolution) -> int:
        return self.incumbent.simulate(self.leaf, self.degrees, completion, program)

    def _interleaved(self, options: tuple[Recompute, ...]) -> int | None:
        """Simulate the few completions whose surrogate is below the cutoff."""
        leaf = self.leaf
        partitions = even_partitions(leaf) if self.partitions is None else self.partitions
        tallest = int(np.diff(partitions).max(initial=0))
        useful = [option for option in options if option[1] <= tallest or option == options[-1]]
        budget = _Budget(self.check_deadline)
        program: ProgramSolution | None = None
        reached: int | None = None
        for found in interleaved_candidates(
            leaf,
            partitions,
            useful,
            self.sizes,
            cutoff=lambda: self.cutoff,
            spent=lambda: budget.spent,
        ):
            bound, completion = found.surrogate_ns, found.completion
            if completion is not None:
                budget.simulate(leaf)
                program = program or ProgramSolution("optimal", bound, completion, "enumeration")
                bound = self._in_rounds(found.round_size, completion, program)
            reached = bound if reached is None else min(reached, bound)
        return reached

    def _in_rounds(self, size: int, completion: Completion, program: ProgramSolution) -> int:
        leaf, degrees = self.leaf, self.degrees
        if size:
            leaf, degrees = replace(leaf, round_size=size), {**degrees, "round_size": size}
        return self.incumbent.simulate(leaf, degrees, completion, program)

    def _chain(self, options: tuple[Recompute, ...], *, per_stage: bool) -> int | None:
        """Solve the program for each option (or all at once where ranks may differ)."""
        groups = [options] if per_stage else [(option,) for option in options]
        if per_stage and any(MIXED in mode for mode, _ in options):
            self.rows.cheapest, groups = Cheapest(self.leaf, options), [(BEST,)]
        reached: int | None = None
        fast = [g for g in groups if self._alone.bound(g, self.cutoff) < self.cutoff]
        if len(fast) < len(groups):
            # Above the cutoff whatever the memory; more recomputed layers only add to that.
            reached = self.cutoff
        fitting = _fitting(self.rows, fast)
        partial = [group for group in fitting if group[0][0] != "full" or len(group) > 1]
        full = fitting[len(partial) :]
        # Several layers at a time take as long as one by one: only where the latter do not fit.
        together = [group for group in partial if all(group_of(mode) > 1 for mode, _ in group)]
        alone = [group for group in partial if group not in together]
        bounds = [self._solve_group(group) for group in alone]
        bounds += [self._solve_range(full)] if full else []
        bounds += [self._solve_group(group) for group in together]
        return min([bound for bound in (reached, *bounds) if bound is not None], default=None)

    def _solve_range(self, groups: list[tuple[Recompute, ...]]) -> int:
        """Lower bound proved for consecutive numbers of fully recomputed layers.

        The time of the fewest with the memory of the most relaxes them all: where even that is not
        below the cutoff, one program closes the range; else it is halved.
        """
        first, last = groups[0][0], groups[-1][0]
        cutoff = self.cutoff
        if self._alone.bound(groups[0], cutoff) >= cutoff:
            return cutoff
        if len(groups) == 1:
            return self._solve_group(groups[0])
        if self.incumbent.best is None:
            bound = self._solve_group(groups[0])
            return min(bound, self._solve_range(groups[1:]))
        relaxed = solve_chain(
            self.leaf, (first,), cutoff_ns=cutoff, rows=self.rows, fits=True, room=last
        )
        if relaxed.completion is None:
            return cutoff
        half = len(groups) // 2
        return min(self._solve_range(groups[:half]), self._solve_range(groups[half:]))

    def _solve_group(self, group: tuple[Recompute, ...]) -> int:
        """Lower bound proved for all completions of ``group``; simulates what may win."""
        solution = self._program(group)
        if solution.completion is None or solution.objective_ns is None:
            return self.cutoff
        simulated = self._simulate(solution.completion, solution)
        bound = solution.objective_ns
        if bound >= self.cutoff or not self.thorough:
            return bound
        budget = _Budget(self.check_deadline)
        least = simulated
        try:
            for _, completion in enumerate_chain(
                self.leaf, group, cutoff=lambda: self.cutoff, rows=self.rows, tick=budget.spend
            ):
                budget.simulate(self.leaf)
                least = min(least, self._simulate(completion, solution))
        except _SpentError:
            return bound
        return min(least, self.cutoff)

    def _program(self, group: tuple[Recompute, ...]) -> ProgramSolution:
        """The program's optimum below the cutoff; without one, widen the cutoff until it shows."""
        leaf, rows = self.leaf, self.rows
        if self.incumbent.best is not None:
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
        if self.nodes > NODES_PER_LEAF or self.spent:
            raise _SpentError

    @property
    def spent(self) -> bool:
        """Whether enough was simulated."""
        return self.actions > ACTIONS_PER_LEAF

    def simulate(self, leaf: Leaf) -> None:
        """Count a simulation."""
        self.actions += 2 * leaf.stages * leaf.microbatches


class _SpentError(Exception):
    """A leaf has had its share of the search."""


class _TimeAlone:
    """Bounds for options of a leaf whatever the memory: recomputation adds at least this much work.

    With ``n`` layers recomputed at the front of each stage and no stage longer than ``most``
    layers (a longer one alone is above the cutoff), ``L n / max(n, most)`` layers are recomputed.
    """

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        self.kinds = [leaf.kinds[index] for index in leaf.sequence]
        plain = sorted(kind[Field.FORWARD] + kind[Field.BACKWARD] for kind in self.kinds)
        self.tall = -(-len(plain) // leaf.pp)
        self.cheapest, self.work, self.tallest = plain[0], sum(plain), sum(plain[: self.tall])
        for end in (leaf.embedding, leaf.head):
            self.work += end[Field.FORWARD] + end[Field.BACKWARD]
        if leaf.shared is not None:
            each = leaf.shared.total(Field.FORWARD, Field.BACKWARD)
            self.work, self.tallest = self.work + leaf.pp * each, self.tallest + each
        self._added: dict[str, list[int]] = {}

    def _least_added(self, mode: str) -> list[int]:
        """``[n]``: what recomputing some ``n`` layers adds at least; of two modes, the lesser."""
        if mode not in self._added:
            front, rest = (rows.extra for rows in self.leaf.parts(mode))
            rest = front if mode == "full" else rest
            extra = sorted(min(kind[front], kind[rest]) for kind in self.kinds)
            self._added[mode] = list(accumulate(extra, initial=0))
        return self._added[mode]

    def bound(self, group: tuple[Recompute, ...], cutoff_ns: int) -> int:
        """Lower bound on the step in ns for ``group``; 0 for several options or no cutoff."""
        if len(group) > 1 or cutoff_ns >= UNLIMITED or group[0] is BEST:
            return 0
        mode, count = group[0]
        work, tallest, layers = self.work, self.tallest, len(self.kinds)
        added = self._least_added(mode)
        m, pp = self.leaf.microbatches, self.leaf.pp
        if mode != "full":
            work += added[layers]
        else:
            most = min(layers, cutoff_ns // max(1, m * self.cheapest))
            work += added[layers * count // max(1, count, most)]
            tallest += added[min(count, self.tall)]
        if self.leaf.schedule in ONE_CHUNK_AT_ONCE:
            return max(m * work // pp, work + (m - 1) * tallest)
        if self.leaf.shared is not None:
            return m * max(work // pp, tallest)
        return max(m * work // pp, (1 + (m - 1) // pp) * work, work + max(m - pp, 0) * tallest)


def _fitting(rows: Rows, groups: list[tuple[Recompute, ...]]) -> list[tuple[Recompute, ...]]:
    """Groups for which some partition fits; counts of full recomputation by bisection."""
    fitting = _fastest_fitting(rows, [group for group in groups if group[0][0] != "full"])
    full = [g for g in groups if g[0][0] == "full"]
    low, high = 0, len(full)
    while low < high:
        middle = (low + high) // 2
        if reaches(rows, full[middle]):
            high = middle
        else:
            low = middle + 1
    return fitting + full[low:]


def _fastest_fitting(
    rows: Rows, groups: list[tuple[Recompute, ...]]
) -> list[tuple[Recompute, ...]]:
    """Of groups without numbers of layers, those for which some partition fits.
    Where there is but one partition, less those of one option than which another that fits sends no
    more to hosts with state and repeats no more in any kind of layer, less in some: it is faster.
    """
    leaf = rows.leaf
    if (leaf.uneven and leaf.pp > 1) or any(len(g) > 1 or g[0] is BEST for g in groups):
        return [group for group in groups if reaches(rows, group)]
    extras = {g: tuple(kind[leaf.modes[g[0][0]].extra] for kind in leaf.kinds) for g in groups}
    sent = {g: leaf.hosts.of_mode(g[0][0]) if leaf.hosts else () for g in groups}
    fitting: list[tuple[Recompute, ...]] = []
    for group in sorted(groups, key=lambda group: sum(extras[group])):
        slower = (
            extras[group] != extras[other]
            and all(a >= b for a, b in zip(extras[group], extras[other], strict=True))
            and all(a >= b for a, b in zip(sent[group], sent[other], strict=True))
            for other in fitting
        )
        if not any(slower) and reaches(rows, group):
            fitting.append(group)
    return fitting
