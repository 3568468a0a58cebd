"""CP-SAT on a leaf's program: the same formulation as ``planner.program``, stated to a solver.

``ortools`` costs about 0.4 s to import, so it is imported inside. One worker and a fixed seed make
runs repeat; the relative gap limit stays 0, because CP-SAT reports OPTIMAL within it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cost_models.layout import DELAYED, ONE_CHUNK_AT_ONCE
from cost_models.leaf import Completion, Leaf, RankCosts, Recompute
from planner.program import ProgramSolution, Rows, reaches

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

SEED = 7


class _Chain:
    """Builds the model; one method per constraint of the formulation."""

    def __init__(self, leaf: Leaf, options: tuple[Recompute, ...], rows: Rows) -> None:
        from ortools.sat.python import cp_model

        self.leaf, self.options, self.table = leaf, options, rows
        self.model: cp_model.CpModel = cp_model.CpModel()
        self.layers = len(leaf.sequence)
        self.horizon = self._horizon()
        self.boundary = [
            self.model.new_int_var(0, self.layers, f"x{s}") for s in range(leaf.pp + 1)
        ]
        self.option = [self.model.new_int_var(0, len(options) - 1, f"o{s}") for s in range(leaf.pp)]
        names = ("work", "forward", "backward", "gradient", "update", "late_on", "late_back")
        self.value = {name: [self._time(f"{name}{s}") for s in range(leaf.pp)] for name in names}
        self.nested = [self._time(f"nested{s}") for s in range(leaf.pp)]
        self.ends = [self._time(f"ends{s}") for s in range(leaf.pp)]
        self.update = self._time("update")

    def _horizon(self) -> int:
        slowest = self._row_or_none(0, 0, self.layers)
        work = slowest if slowest else 1
        extra = self.leaf.bucket_ns + 2 * self.leaf.tied_sync_ns
        return 4 * (self.leaf.microbatches + self.leaf.pp + 2) * work + extra + 1_000_000

    def _row_or_none(self, rank: int, first: int, last: int) -> int:
        """Time of everything on one rank, whatever it needs in memory."""
        from cost_models.leaf import chunk_costs

        total = 0
        latest = max((sum(cut) for cut in self.leaf.late), default=0)
        delayed = self.leaf.schedule in DELAYED
        for option in self.options:
            for stage in {0, self.leaf.stages - 1}:
                chunk = chunk_costs(self.leaf, stage, first, last, option)
                total = max(
                    total,
                    chunk.forward_ns + chunk.backward_ns + chunk.gradient_ns + chunk.update_ns
                    + 2 * self.leaf.pp * (self.leaf.hop_ns + latest + delayed * chunk.late_ns),
                )  # fmt: skip
        return 2 * total + rank

    def _time(self, name: str) -> cp_model.IntVar:
        return self.model.new_int_var(0, self.horizon, name)

    def boundaries(self) -> None:
        """0 = x_0 <= ... <= x_pp = L."""
        self.model.add(self.boundary[0] == 0)
        self.model.add(self.boundary[-1] == self.layers)

    def rows(self) -> None:
        """Each rank takes a row that fits in memory and holds at least its fewest layers."""
        for rank in range(self.leaf.pp):
            tuples = []
            for last in range(self.layers + 1):
                for first in self.table.firsts(rank, last):
                    for index, option in enumerate(self.options):
                        costs = self.table.get(rank, first, last, option)
                        if costs is not None:
                            tuples.append((first, last, index, *_values(costs)))
            columns = [self.boundary[rank], self.boundary[rank + 1], self.option[rank]]
            columns += [values[rank] for values in self.value.values()]
            self.model.add_allowed_assignments(columns, tuples)

    def nesting(self) -> None:
        """A rank's work, and the next rank's between its first forward and last backward."""
        leaf, value = self.leaf, self.value
        for s in range(leaf.pp):
            behind = leaf.deferral.total_ns if s == leaf.pp - 1 else 0
            self.model.add(self.nested[s] >= leaf.microbatches * value["work"][s] - behind)
            if s < leaf.pp - 1:
                self.model.add(
                    self.nested[s]
                    >= value["forward"][s] + value["backward"][s] + 2 * leaf.hop_ns
                    + value["late_on"][s] + value["late_back"][s] + self.nested[s + 1]
                )  # fmt: skip

    def round_trips(self) -> None:
        """1F1B: chains of round trips, short by what waits behind them."""
        leaf, work, waits = self.leaf, self.value["work"], self.leaf.deferral
        m = leaf.microbatches
        for s in range(leaf.pp):
            k = leaf.pp - s
            loops, rest = divmod(m - 1, k)
            trip = sum(work[s:]) + 2 * (k - 1) * leaf.hop_ns + self._late(s) - waits.each_ns
            if loops and k > 1:
                again = waits.in_trips_ns(1 + loops, k, rest)
                self.model.add(self.nested[s] >= (1 + loops) * trip + again + rest * work[s])
                again = waits.in_trips_ns(2, m - 1)
                self.model.add(self.nested[s] >= 2 * trip + again + (m - 1 - k) * work[s])
            elif k > 1:
                self.model.add(self.nested[s] >= trip + rest * self.value["backward"][s])
            if s == 0:
                tail: Any = 0
                if rest:
                    tail = sum(work[leaf.pp - rest :]) + 2 * (rest - 1) * leaf.hop_ns
                    tail += self._late(leaf.pp - rest) - waits.each_ns
                    tail += waits.in_trips_ns(2, m - 1)
                tail += waits.in_trips_ns(1 + loops, leaf.pp)
                self.model.add(self.nested[0] >= (1 + loops) * trip + tail)

    def _late(self, rank: int) -> Any:
        """What the transfers after ``rank`` and later ranks take beyond the least hop."""
        return sum(self.value["late_on"][rank:]) + sum(self.value["late_back"][rank:])

    def flow_shop(self) -> None:
        """GPipe: one trip and the widest rank for every other microbatch."""
        leaf, work = self.leaf, self.value["work"]
        for s in range(leaf.pp):
            trip = sum(work[s:]) + 2 * (leaf.pp - s - 1) * leaf.hop_ns + self._late(s)
            for j in range(s, leaf.pp):
                self.model.add(self.nested[s] >= trip + (leaf.microbatches - 1) * work[j])

    def finish(self) -> None:
        """Ends of the ranks with their gradients; the update; the objective."""
        leaf, value = self.leaf, self.value
        for s in range(leaf.pp):
            behind = leaf.deferral.total_ns if s == leaf.pp - 1 else 0
            self.model.add(self.ends[s] >= self.nested[s] + behind + value["gradient"][s])
            if s < leaf.pp - 1:
                self.model.add(
                    self.ends[s]
                    >= value["forward"][s] + leaf.hop_ns + value["late_on"][s] + self.ends[s + 1]
                )
            self.model.add(self.update >= value["update"][s])
        self.model.minimize(self.ends[0] + self.update)


def _values(costs: RankCosts) -> tuple[int, ...]:
    first = costs.chunks[0]
    return (
        costs.work_ns, first.forward_ns, first.backward_ns, costs.gradient_ns, costs.update_ns,
        first.late_on_ns, first.late_back_ns,
    )  # fmt: skip


def solve_cp_sat(
    leaf: Leaf, options: Iterable[Recompute], *, linked: bool, time_limit_s: float | None = None
) -> ProgramSolution:
    """Solve a chain leaf (one chunk per rank) with CP-SAT; ``linked`` ranks share one option."""
    from ortools.sat.python import cp_model

    choices, rows = tuple(options), Rows(leaf)
    chain = _Chain(leaf, choices, rows)
    if not reaches(rows, choices):
        return ProgramSolution("infeasible", None, None, "cp_sat")
    chain.boundaries()
    chain.rows()
    chain.nesting()
    if leaf.schedule in ONE_CHUNK_AT_ONCE:
        chain.flow_shop()
    else:
        chain.round_trips()
    chain.finish()
    if linked:
        for one, other in zip(chain.option, chain.option[1:], strict=False):
            chain.model.add(one == other)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = SEED
    if time_limit_s is not None:
        solver.parameters.max_time_in_seconds = time_limit_s
    status = solver.solve(chain.model)
    if status == cp_model.INFEASIBLE:
        return ProgramSolution("infeasible", None, None, "cp_sat")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ProgramSolution("limit", None, None, "cp_sat")
    objective = round(solver.objective_value)
    proved = round(solver.best_objective_bound)
    completion = Completion(
        tuple(solver.value(x) for x in chain.boundary),
        tuple(choices[solver.value(o)] for o in chain.option),
    )
    termination = "optimal" if proved == objective else "feasible"
    return ProgramSolution(termination, objective + leaf.sync_ns, completion, "cp_sat")
