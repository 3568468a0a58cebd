"""The integer program of a leaf: which layers each stage holds and what it recomputes.

For one layout (degrees, schedule, virtual stages all fixed), with layers ``0 .. L-1``, ranks
``s = 0 .. pp-1`` and options ``o`` of recomputation::

    minimise    ends + update + sync
    boundaries  0 = x_0 <= x_1 <= ... <= x_pp = L                    (boundaries)
    option      o_s in options, equal on all ranks unless the stack allows otherwise (options)
    memory      peak(s, x_s, x_{s+1}, o_s) <= capacity              (rows: absent if violated)
    size        x_{s+1} - x_s >= 1, or 0 on a rank with an end; all equal where the stack cannot
                split unevenly                                      (rows)
    work        (w, f, b, g, u)_s = row(s, x_s, x_{s+1}, o_s)        (rows)
    nesting     nested_s >= m w_s
                nested_s >= f_s + b_s + 2 hop + nested_{s+1}         (nesting)
    round trips nested_s >= (1+q_s) R_s + r_s w_s, 2 R_s + (m-1-k_s) w_s  where q_s > 0, else
                nested_s >= R_s + r_s b_s,  R_s = S_s + 2 (k_s-1) hop    (round_trips, 1F1B)
                nested_0 >= (1+q_0) (S_0 + 2 (pp-1) hop) + S_{pp-r} + 2 (r-1) hop
    flow shop   nested_s >= S_s + 2 (k_s-1) hop + (m-1) max_{j>=s} w_j (flow_shop, GPipe)
    ends        ends_s >= nested_s + g_s
                ends_s >= f_s + hop + ends_{s+1},  ends = ends_0     (ends)
                ends_s >= nested_s + n d + g_s on the last rank, where the first n microbatches put
                d of its backward off (cost_models.deferral); R, S and m w are short by it there
    update      update >= u_s                                        (update)

The objective is the *surrogate* (``cost_models.surrogate``), a proved lower bound on the simulated
time; where cuts carry different amounts, ``hop`` is the least and the rows add what their own cut
takes beyond it. Two solvers state it: an exact dynamic program over labels (here,
:func:`solve_chain`) and CP-SAT (``planner.solve``). The interleaved schedule has so few partitions
(equal chunks, lighter ends) that ``planner.interleaved`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cost_models.leaf import (
    Completion,
    Leaf,
    RankCosts,
    Recompute,
    chunk_costs,
    rank_costs,
)
from cost_models.surrogate import (
    EMPTY_LABEL,
    Label,
    extend_label,
    least_objective_ns,
    least_work,
)
from planner.cheapest import BEST, Cheapest
from planner.ranges import Ranges, Table

UNLIMITED = 1 << 62


@dataclass
class Rows:
    """Costs of each rank for each range of layers and option, computed on demand."""

    leaf: Leaf
    cache: dict[tuple[int, int, int, Recompute], RankCosts] = field(default_factory=dict)
    rooms: dict[tuple[int, Recompute], Table] = field(default_factory=dict)
    cheapest: Cheapest | None = None
    """What ``BEST`` stands for."""

    def least(self, rank: int) -> int:
        """Fewest layers that a rank may hold: a rank with an end may do without."""
        return 0 if rank in (0, self.leaf.pp - 1) and self.leaf.pp > 1 else 1

    def firsts(self, rank: int, last: int) -> range:
        """First layers of a rank that ends before layer ``last``, smallest stage first."""
        layers, pp = len(self.leaf.sequence), self.leaf.pp
        if not self.leaf.uneven:
            first, end = rank * layers // pp, (rank + 1) * layers // pp
            return range(first, first - 1, -1) if last == end else range(0)
        if rank == 0:
            return range(0, -1, -1) if last >= self.least(0) else range(0)
        return range(last - self.least(rank), rank - 2, -1)

    def get(self, rank: int, first: int, last: int, option: Recompute) -> RankCosts | None:
        """Costs of ``rank`` with layers ``first .. last - 1``; None where it does not fit."""
        if not self.room(rank, option)[first, last]:
            return None
        return self.costs(rank, first, last, option)

    def costs(self, rank: int, first: int, last: int, option: Recompute) -> RankCosts:
        """Costs of ``rank`` with layers ``first .. last - 1``, whatever they need."""
        key = (rank, first, last, option)
        costs = self.cache.get(key)
        if costs is None:
            chunk = chunk_costs(self.leaf, rank, first, last, self.meant(rank, first, last, option))
            costs = self.cache[key] = rank_costs(self.leaf, (chunk,))
        return costs

    def room(self, rank: int, option: Recompute) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``."""
        key = (rank, option)
        if key not in self.rooms:
            self.rooms[key] = (
                self.cheapest.table(rank, least=self.least(rank))
                if option is BEST and self.cheapest is not None
                else self._space.table(rank, option, least=self.least(rank))
            )
        return self.rooms[key]

    def meant(self, rank: int, first: int, last: int, option: Recompute) -> Recompute:
        """The option that ``option`` stands for on a rank with these layers."""
        if option is not BEST or self.cheapest is None:
            return option
        return self.cheapest.option(rank, first, last)

    def settled(self, completion: Completion) -> Completion:
        """The completion with the options that its own stand for."""
        if self.cheapest is None:
            return completion
        bounds = completion.bounds
        options = [
            self.meant(rank, bounds[rank], bounds[rank + 1], option)
            for rank, option in enumerate(completion.recompute)
        ]
        return Completion(bounds, tuple(options))

    @cached_property
    def _space(self) -> Ranges:
        return Ranges(self.leaf)


@dataclass(frozen=True)
class ProgramSolution:
    """An optimum of the program, or why there is none below the cutoff."""

    termination: str
    """``optimal``, ``infeasible`` (memory), or ``cutoff`` (nothing below it)."""
    objective_ns: int | None
    completion: Completion | None
    solver: str


def solve_chain(
    leaf: Leaf,
    options: Iterable[Recompute],
    *,
    cutoff_ns: int = UNLIMITED,
    rows: Rows | None = None,
    fits: bool = False,
    room: Recompute | None = None,
) -> ProgramSolution:
    """Exact optimum by dynamic programming over ranks, last to first; one option set per rank.

    Each state (rank, first layer) keeps the labels that no other dominates. With ``cutoff_ns``
    only solutions strictly below it are looked for. ``fits`` says that :func:`reaches` is known
    to hold. With ``room`` the memory is that of another option: a relaxation of all options
    between the two, since one recomputes least and the other keeps least.
    """
    rows, choices = rows or Rows(leaf), tuple(options)
    layers = len(leaf.sequence)
    if not fits and not reaches(rows, choices):
        return ProgramSolution("infeasible", None, None, "dynamic_program")
    least = least_work(leaf, _priced(choices), cutoff_ns)
    states: dict[int, list[_Node]] = {layers: [_Node(EMPTY_LABEL, layers, ("none", 0), None)]}
    for rank in reversed(range(leaf.pp)):
        following: dict[int, list[_Node]] = {}
        tables = [(option, rows.room(rank, room or option)) for option in choices]
        for last, nodes in states.items():
            for first in rows.firsts(rank, last):
                if leaf.microbatches * (least[last] - least[first]) >= cutoff_ns:
                    break
                for option, holds in tables:
                    if not holds[first, last]:
                        continue
                    costs = rows.costs(rank, first, last, option)
                    if leaf.microbatches * costs.work_ns >= cutoff_ns:
                        continue
                    for node in nodes:
                        label = extend_label(leaf, node.label, rank, costs)
                        if least_objective_ns(leaf, label, rank, least[first]) < cutoff_ns:
                            _insert(
                                following.setdefault(first, []),
                                _Node(label, first, option, node),
                            )
        states = following
    best = min(states.get(0, []), key=lambda n: (n.label.objective_ns(leaf), n.key()), default=None)
    if best is None:
        return ProgramSolution("cutoff", None, None, "dynamic_program")
    return ProgramSolution(
        "optimal", best.label.objective_ns(leaf), rows.settled(best.completion(layers)),
        "dynamic_program",
    )  # fmt: skip


def _priced(options: tuple[Recompute, ...]) -> tuple[Recompute, ...]:
    """``options``, none for what stands for others: those repeat no less."""
    return (("none", 0),) if BEST in options else options


@dataclass(frozen=True, slots=True)
class _Node:
    label: Label
    first: int
    option: Recompute
    next: _Node | None

    def key(self) -> tuple[tuple[int, Recompute], ...]:
        """Lexicographic tie-break."""
        node: _Node | None = self
        result = []
        while node is not None and node.next is not None:
            result.append((node.first, node.option))
            node = node.next
        return tuple(result)

    def completion(self, layers: int) -> Completion:
        key = self.key()
        return Completion((*(first for first, _ in key), layers), tuple(o for _, o in key))


def _insert(nodes: list[_Node], new: _Node) -> None:
    """Add ``new`` unless dominated, dropping what it dominates; ties keep the smaller key."""
    for node in nodes:
        if node.label.dominates(new.label) and (node.label != new.label or node.key() <= new.key()):
            return
    nodes[:] = [node for node in nodes if not new.label.dominates(node.label)]
    nodes.append(new)


def reaches(rows: Rows, options: tuple[Recompute, ...]) -> bool:
    """Whether some partition fits, each rank with any of ``options``."""
    layers = len(rows.leaf.sequence)
    starts = np.zeros(layers + 1, dtype=bool)
    starts[0] = True
    for rank in range(rows.leaf.pp):
        room = rows.room(rank, options[0])
        for option in options[1:]:
            room = room | rows.room(rank, option)
        starts = np.any(room[starts], axis=0)
        if not starts.any():
            return False
    return bool(starts[layers])


def enumerate_chain(
    leaf: Leaf,
    options: Iterable[Recompute],
    *,
    cutoff: Callable[[], int],
    rows: Rows | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Completion]]:
    """Every completion that fits and whose surrogate is below ``cutoff()``, depth first.

    ``tick`` is called at every node; it may raise to stop.
    """
    rows, choices = rows or Rows(leaf), tuple(options)
    layers = len(leaf.sequence)
    least = least_work(leaf, _priced(choices), cutoff())

    def descend(node: _Node, last: int, rank: int) -> Iterator[_Node]:
        tick()
        if rank < 0:
            if last == 0:
                yield node
            return
        for first in rows.firsts(rank, last):
            if leaf.microbatches * (least[last] - least[first]) >= cutoff():
                break
            for option in choices:
                costs = rows.get(rank, first, last, option)
                if costs is None:
                    continue
                label = extend_label(leaf, node.label, rank, costs)
                if least_objective_ns(leaf, label, rank, least[first]) < cutoff():
                    yield from descend(_Node(label, first, option, node), first, rank - 1)

    root = _Node(EMPTY_LABEL, layers, ("none", 0), None)
    for node in descend(root, layers, leaf.pp - 1):
        objective = node.label.objective_ns(leaf)
        if objective < cutoff():
            yield objective, rows.settled(node.completion(layers))
