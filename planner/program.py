"""The integer program of a leaf: which layers each stage holds and what it recomputes.

For one layout (degrees, schedule, virtual stages all fixed), with layers ``0 .. L-1``, ranks
``s = 0 .. pp-1`` and options ``o`` of recomputation::

    minimise    ends + update + sync
    boundaries  0 = x_0 <= x_1 <= ... <= x_pp = L                    (boundaries)
    option      o_s in options, equal on all ranks unless the stack allows otherwise (options)
    memory      peak(s, x_s, x_{s+1}, o_s) <= capacity              (rows: absent if violated)
    size        x_{s+1} - x_s >= 1, or 0 on a rank with an end      (rows)
    work        (w, f, b, g, u)_s = row(s, x_s, x_{s+1}, o_s)        (rows)
    nesting     nested_s >= m w_s
                nested_s >= f_s + b_s + 2 hop + nested_{s+1}         (nesting)
    round trips nested_s >= (1+q_s) (S_s + 2 (k_s-1) hop) + r_s b_s  (round_trips, 1F1B)
                nested_0 >= (1+q_0) (S_0 + 2 (pp-1) hop) + S_{pp-r} + 2 (r-1) hop
    flow shop   nested_s >= S_s + 2 (k_s-1) hop + (m-1) max_{j>=s} w_j (flow_shop, GPipe)
    ends        ends_s >= nested_s + g_s
                ends_s >= f_s + hop + ends_{s+1},  ends = ends_0     (ends)
    update      update >= u_s                                        (update)

The objective is the *surrogate* of ``cost_models.leaf``, a proved lower bound on the simulated
time. Two solvers state it: an exact dynamic program over labels (here, :func:`solve_chain`) and
CP-SAT (``planner.solve``). The interleaved schedule has so few partitions (equal chunks, lighter
ends) that :func:`interleaved_candidates` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cost_models.leaf import (
    EMPTY_LABEL,
    Completion,
    Label,
    Leaf,
    RankCosts,
    Recompute,
    chunk_costs,
    extend_label,
    fits,
    interleaved_bounds,
    peak_bytes,
    rank_costs,
    stage_costs,
    surrogate_ns,
)
from cost_models.step import Field

UNLIMITED = 1 << 62


@dataclass
class Rows:
    """Costs of each rank for each range of layers and option, computed on demand."""

    leaf: Leaf
    cache: dict[tuple[int, int, int, Recompute], RankCosts | None] = field(default_factory=dict)

    def least(self, rank: int) -> int:
        """Fewest layers that a rank may hold."""
        return 0 if rank in (0, self.leaf.pp - 1) and self.leaf.pp > 1 else 1

    def get(self, rank: int, first: int, last: int, option: Recompute) -> RankCosts | None:
        """Costs of ``rank`` with layers ``first .. last - 1``; None where it does not fit."""
        key = (rank, first, last, option)
        if key not in self.cache:
            chunks = (chunk_costs(self.leaf, rank, first, last, option),)
            fits = peak_bytes(self.leaf, rank, chunks) <= self.leaf.capacity_bytes
            self.cache[key] = rank_costs(self.leaf, chunks) if fits else None
        return self.cache[key]


@dataclass(frozen=True)
class ProgramSolution:
    """An optimum of the program, or why there is none below the cutoff."""

    termination: str
    """``optimal``, ``infeasible`` (memory), or ``cutoff`` (nothing below it)."""
    objective_ns: int | None
    completion: Completion | None
    solver: str


def solve_chain(
    leaf: Leaf, options: Iterable[Recompute], *, cutoff_ns: int = UNLIMITED, rows: Rows | None = None
) -> ProgramSolution:
    """Exact optimum by dynamic programming over ranks, last to first; one option set per rank.

    Each state (rank, first layer) keeps the labels that no other dominates. With ``cutoff_ns``
    only solutions strictly below it are looked for.
    """
    rows, choices = rows or Rows(leaf), tuple(options)
    layers = len(leaf.sequence)
    if not any(reaches(rows, (choice,)) for choice in choices) and not reaches(rows, choices):
        return ProgramSolution("infeasible", None, None, "dynamic_program")
    least_work = _least_work(leaf, choices)
    states: dict[int, list[_Node]] = {layers: [_Node(EMPTY_LABEL, layers, ("none", 0), None)]}
    for rank in reversed(range(leaf.pp)):
        following: dict[int, list[_Node]] = {}
        for last, nodes in states.items():
            for first in _firsts(rank, last, rows):
                if leaf.microbatches * (least_work[last] - least_work[first]) >= cutoff_ns:
                    break
                for option in choices:
                    costs = rows.get(rank, first, last, option)
                    if costs is None:
                        continue
                    for node in nodes:
                        label = extend_label(leaf, node.label, rank, costs)
                        if _optimistic(leaf, label, rank, least_work[first]) < cutoff_ns:
                            _insert(
                                following.setdefault(first, []),
                                _Node(label, first, option, node),
                            )
        states = following
    best = min(states.get(0, []), key=lambda n: (n.label.objective_ns(leaf), n.key()), default=None)
    if best is None:
        return ProgramSolution("cutoff", None, None, "dynamic_program")
    return ProgramSolution(
        "optimal", best.label.objective_ns(leaf), best.completion(layers), "dynamic_program"
    )


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


def _firsts(rank: int, last: int, rows: Rows) -> Iterator[int]:
    """First layers for ``rank`` ending at ``last``, largest (smallest stage) first."""
    if rank == 0:
        if last >= rows.least(0):
            yield 0
        return
    before = sum(rows.least(r) for r in range(rank))
    yield from range(last - rows.least(rank), before - 1, -1)


def _least_work(leaf: Leaf, options: tuple[Recompute, ...]) -> list[int]:
    """``result[i]``: least forward plus backward of the first ``i`` layers over the options."""
    selective = all(mode == "selective" for mode, _ in options)
    total, result = 0, [0]
    for index in leaf.sequence:
        kind = leaf.kinds[index]
        total += kind[Field.FORWARD] + kind[Field.BACKWARD]
        total += kind[Field.SELECTIVE] if selective else 0
        result.append(total)
    return result


def _optimistic(leaf: Leaf, label: Label, rank: int, work_left: int) -> int:
    """A bound on every completion of a label: the layers left cost at least ``work_left``."""
    total = label.work + work_left
    bound = label.nested + work_left + 2 * rank * leaf.hop_ns
    if rank:
        bound = max(bound, -(-leaf.microbatches * work_left // rank))
    if leaf.schedule == "1f1b":
        loops = (leaf.microbatches - 1) // leaf.pp
        bound = max(bound, (1 + loops) * (total + 2 * (leaf.pp - 1) * leaf.hop_ns) + label.tail)
    return max(bound, label.ends) + label.update + leaf.sync_ns


def _insert(nodes: list[_Node], new: _Node) -> None:
    """Add ``new`` unless dominated, dropping what it dominates; ties keep the smaller key."""
    for node in nodes:
        if node.label.dominates(new.label) and (
            node.label != new.label or node.key() <= new.key()
        ):
            return
    nodes[:] = [node for node in nodes if not new.label.dominates(node.label)]
    nodes.append(new)


def reaches(rows: Rows, options: tuple[Recompute, ...]) -> bool:
    """Whether some partition fits: each rank takes as many layers as it can hold.

    Greedy is exact because a stage's peak never falls when it takes more layers.
    """
    layers, position = len(rows.leaf.sequence), 0
    for rank in range(rows.leaf.pp):
        reach = None
        for last in range(position + rows.least(rank), layers + 1):
            if all(rows.get(rank, position, last, option) is None for option in options):
                break
            reach = last
        if reach is None:
            # With fewer layers before it the rank may still fit empty.
            if position == layers and rows.least(rank) == 1:
                reach = layers
            else:
                return False
        position = reach
    return position == layers


def enumerate_chain(
    leaf: Leaf, options: Iterable[Recompute], *, cutoff_ns: int, rows: Rows | None = None
) -> Iterator[tuple[int, Completion]]:
    """Every completion that fits and whose surrogate is below ``cutoff_ns``, depth first."""
    rows, choices = rows or Rows(leaf), tuple(options)
    layers = len(leaf.sequence)
    least_work = _least_work(leaf, choices)

    def descend(node: _Node, last: int, rank: int) -> Iterator[_Node]:
        if rank < 0:
            if last == 0:
                yield node
            return
        for first in _firsts(rank, last, rows):
            if leaf.microbatches * (least_work[last] - least_work[first]) >= cutoff_ns:
                break
            for option in choices:
                costs = rows.get(rank, first, last, option)
                if costs is None:
                    continue
                label = extend_label(leaf, node.label, rank, costs)
                if _optimistic(leaf, label, rank, least_work[first]) < cutoff_ns:
                    yield from descend(_Node(label, first, option, node), first, rank - 1)

    root = _Node(EMPTY_LABEL, layers, ("none", 0), None)
    for node in descend(root, layers, leaf.pp - 1):
        objective = node.label.objective_ns(leaf)
        if objective < cutoff_ns:
            yield objective, node.completion(layers)


def interleaved_candidates(
    leaf: Leaf, options: Iterable[Recompute], *, cutoff_ns: int
) -> Iterator[tuple[int, Completion, tuple[RankCosts, ...]]]:
    """Completions of an interleaved leaf with their surrogates in ns, fitting or not.

    ``options`` come in the order of :func:`planner.tables.recompute_options`. For one partition
    each further one only adds time, so after the first at or above the cutoff, and after the first
    number of fully recomputed layers that fits, the rest of its kind cannot win and is left out.
    """
    choices = tuple(options)
    for bounds in interleaved_bounds(leaf):
        for option in choices:
            completion = Completion(bounds, (option,) * leaf.stages)
            ranks = stage_costs(leaf, completion)
            surrogate = surrogate_ns(leaf, ranks)
            yield surrogate, completion, ranks
            if surrogate >= cutoff_ns and option[0] != "selective":
                break
            if option[0] == "full" and fits(leaf, ranks):
                break
