"""Pipeline schedules stated a second time: order of work, longest path, live activations.

The step's pipeline is a graph: one node per pass of a microbatch on a virtual
stage, an edge from each action to the next on its rank, and an edge with the transfer's lag from
each action to the one that consumes its result. A rank finishes at the longest path to its last
action.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cost_models.layout import Schedule
from cost_models.orders import rank_order

Action = tuple[str, int, int]
"""F, B (or its halves: I for inputs, then W for weights), virtual stage, microbatch."""
WORKS = "FBIW"
SPLIT = ("interleaved_zero_bubble", "zbv", "dualpipev")
GIVEN = "given;"
"""Begins a schedule that is the user's own order: then its rows, a rank each."""


@lru_cache(maxsize=256)
def given_rows(schedule: str) -> list[list[Action]]:
    """The actions of every rank of a user's own order."""
    rows = schedule.removeprefix(GIVEN).split(";")
    found = [re.findall(r"(\d+)([A-Z])(\d+)", row) for row in rows]
    return [[(work, int(stage), int(i)) for stage, work, i in row] for row in found]


def splits(schedule: str) -> bool:
    """Whether backwards have halves."""
    return schedule in SPLIT or (schedule.startswith(GIVEN) and "I" in schedule)


def turns(schedule: str) -> bool:
    """Whether virtual stages lie there and back."""
    if not schedule.startswith(GIVEN):
        return schedule in ("zbv", "dualpipev")
    on_first = {stage for _, stage, _ in given_rows(schedule)[0]}
    return on_first == {0, 2 * len(given_rows(schedule)) - 1}


def homes(schedule: Schedule | str, pp: int, vpp: int) -> list[int]:
    """The rank of every virtual stage: round and round, or there and back."""
    if schedule.startswith(GIVEN):
        stages = range(pp * vpp)
        rows = [{stage for _, stage, _ in row} for row in given_rows(schedule)]
        return [next(rank for rank in range(pp) if stage in rows[rank]) for stage in stages]
    row = list(range(pp))
    if schedule in ("zbv", "dualpipev"):
        return row + row[::-1]
    return row * vpp


def held(schedule: Schedule, pp: int, vpp: int, rank: int) -> list[int]:
    """The virtual stages of a rank."""
    return [stage for stage, home in enumerate(homes(schedule, pp, vpp)) if home == rank]


@lru_cache(maxsize=4096)
def rank_actions(
    schedule: Schedule, pp: int, vpp: int, m: int, rank: int, size: int = 0
) -> list[Action]:
    """What ``rank`` runs, in order, in rounds of ``size`` (0: the usual ones)."""
    if schedule.startswith(GIVEN):
        return given_rows(schedule)[rank]
    if schedule in ("zbv", "dualpipev"):
        # tests/unit/test_orders.py compares these with PyTorch's own tables.
        own = held(schedule, pp, vpp, rank)
        order = rank_order(schedule, pp, vpp, m, rank)
        return [(WORKS[work], own[chunk], i) for work, chunk, i in order]
    forwards: list[Action] = []
    backwards: list[Action] = []
    if schedule.startswith("looped_bfs"):
        forwards = [("F", chunk * pp + rank, i) for chunk in range(vpp) for i in range(m)]
        return forwards + [("B", stage, i) for _, stage, i in reversed(forwards)]
    if "interleaved" in schedule:
        # Microbatches go in groups of pp or more; a group passes through chunk after chunk.
        size = size or m // (m // pp or 1)
        for group in range(0, m, size):
            round_of = range(group, min(group + size, m))
            for chunk in range(vpp):
                forwards += [("F", chunk * pp + rank, i) for i in round_of]
            for chunk in reversed(range(vpp)):
                backwards += [("B", chunk * pp + rank, i) for i in round_of]
        hops = 1 if schedule in SPLIT else 2
        ahead = hops * (pp - 1 - rank) + (vpp - 1) * size
    else:
        forwards = [("F", rank, i) for i in range(m)]
        backwards = [("B", rank, i) for i in range(m)]
        ahead = m if schedule.startswith("gpipe") else pp - 1 - rank
    waiting_f, waiting_b = deque(forwards), deque(backwards)
    actions = [waiting_f.popleft() for _ in range(min(ahead, len(forwards)))]
    while waiting_f:
        actions.append(waiting_f.popleft())
        actions.append(waiting_b.popleft())
    actions.extend(waiting_b)
    return _late_weights(actions, rank) if schedule in SPLIT else actions


def _late_weights(actions: list[Action], most: int) -> list[Action]:
    """The same with backwards in halves, of which at most ``most`` second ones are put off."""
    result: list[Action] = []
    put_off: deque[Action] = deque()
    for work, stage, i in actions:
        result.append(("I" if work == "B" else work, stage, i))
        if work == "B":
            put_off.append(("W", stage, i))
            if len(put_off) > most:
                result.append(put_off.popleft())
    return result + list(put_off)


@lru_cache(maxsize=4096)
def live_vectors(
    schedule: Schedule, pp: int, vpp: int, m: int, rank: int, size: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Every combination of live microbatches per chunk that the walk of a rank's order meets; where
    the backward has two halves, followed by those of them that wait for their second, and whether a
    chunk's last action but forwards was a second half."""
    live, waiting, ended = [0] * vpp, [0] * vpp, [0] * vpp
    own = held(schedule, pp, vpp, rank)
    met = set()
    for work, stage, _ in rank_actions(schedule, pp, vpp, m, rank, size):
        chunk = own.index(stage)
        live[chunk] += {"F": 1, "B": -1, "I": 0, "W": -1}[work]
        waiting[chunk] += {"F": 0, "B": 0, "I": 1, "W": -1}[work]
        ended[chunk] = {"F": ended[chunk], "B": 0, "I": 0, "W": 1}[work]
        met.add((*live, *waiting, *ended) if splits(schedule) else tuple(live))
    return tuple(sorted(met))


def most_live_bytes(
    schedule: Schedule, pp: int, vpp: int, m: int, rank: int, sizes: Sequence[int], size: int = 0
) -> int:
    """Largest sum of live activations over the walk, ``sizes`` bytes per microbatch and chunk (and
    of what waits beside them)."""
    return max(
        sum(count * size for count, size in zip(vector, sizes, strict=True))
        for vector in live_vectors(schedule, pp, vpp, m, rank, size)
    )


def padded(schedule: str, pp: int, vpp: int, m: int, rank: int) -> list[int]:
    """Iterations of a loop over all microbatches and repeats in which ``rank`` has none of them, by
    the chunk that it runs: its first before it begins, then its last."""
    found = [0] * vpp
    if schedule.startswith(("gpipe", "looped_bfs")):
        behind = 2 if schedule.endswith("delayed") else 1
        for iteration in range(m * vpp + behind * (pp - 1)):
            own = iteration - behind * rank
            if own < 0:
                found[0] += 1
            elif own >= m * vpp:
                found[-1] += 1
    return found


def most_with_weights(
    schedule: Schedule, pp: int, vpp: int, m: int, rank: int, sizes: Sequence[int],
    weights: Sequence[int], size: int = 0,
) -> int:  # fmt: skip
    """Largest sum of live activations and of gathered weights of the stages that do not work.

    A forward gives its stage's weights back, a backward leaves them. Where a rank has several
    stages, those that work next are gathered, three at most, and all others given back.
    """
    own = held(schedule, pp, vpp, rank)
    actions = rank_actions(schedule, pp, vpp, m, rank, size)
    alive, there, near = dict.fromkeys(own, 0), dict.fromkeys(own, False), set[int]()
    most = 0
    for index, (work, stage, _) in enumerate(actions):
        soon = list(dict.fromkeys(next_one for _, next_one, _ in actions[index:]))[:3]
        for other in own:
            if other not in soon:
                there[other] = False
            elif other not in near:
                there[other] = True
        near = set(soon)
        if work == "F":
            alive[stage] += 1
        total = sum(alive[one] * each for one, each in zip(own, sizes, strict=True))
        if vpp > 1:
            beside = zip(own, weights, strict=True)
            total += sum(each for one, each in beside if there[one] and one != stage)
        most = max(most, total)
        if work == "B":
            alive[stage] -= 1
        there[stage] = work == "B"
    return most


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order: (duration slot, microbatch, predecessors without
    lag, with lag)."""

    nodes: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...]
    last: tuple[int, ...]
    """Position of each rank's last action."""


@lru_cache(maxsize=4096)
def graph(schedule: Schedule, pp: int, vpp: int, m: int, size: int = 0) -> Graph:
    """The graph of a schedule; slot ``4 j + k`` is pass ``WORKS[k]`` of virtual stage ``j``."""
    stages, home = pp * vpp, homes(schedule, pp, vpp)
    before: dict[Action, list[tuple[Action, bool]]] = {}
    finals: list[Action] = []
    exist = {a for rank in range(pp) for a in rank_actions(schedule, pp, vpp, m, rank, size)}
    for rank in range(pp):
        previous: Action | None = None
        for action in rank_actions(schedule, pp, vpp, m, rank, size):
            work, stage, i = action
            needs: list[tuple[Action, bool]] = [(previous, False)] if previous else []
            if work == "F" and stage > 0:
                needs.append((("F", stage - 1, i), home[stage - 1] != rank))
            elif work in "BI" and stage < stages - 1:
                arriving = "B" if ("B", stage + 1, i) in exist else "I"
                needs.append(((arriving, stage + 1, i), home[stage + 1] != rank))
            elif work in "BI":
                needs.append((("F", stage, i), False))
            before[action] = needs
            previous = action
        assert previous is not None
        finals.append(previous)
    after: dict[Action, list[Action]] = {action: [] for action in before}
    missing = {action: len(needs) for action, needs in before.items()}
    for action, needs in before.items():
        for need, _ in needs:
            after[need].append(action)
    ready = deque(action for action, count in missing.items() if count == 0)
    position: dict[Action, int] = {}
    nodes = []
    while ready:
        action = ready.popleft()
        position[action] = len(nodes)
        nodes.append(
            (
                4 * action[1] + WORKS.index(action[0]),
                action[2],
                tuple(position[need] for need, lag in before[action] if not lag),
                tuple(position[need] for need, lag in before[action] if lag),
            )
        )
        for follower in after[action]:
            missing[follower] -= 1
            if missing[follower] == 0:
                ready.append(follower)
    if len(nodes) != len(before):
        raise ValueError(f"{schedule} with pp={pp}, vpp={vpp}, m={m} has a cycle")
    return Graph(tuple(nodes), tuple(position[action] for action in finals))


def finish_times(
    schedule: Schedule, pp: int, vpp: int, m: int, durations: Sequence[int],
    hop: int | Sequence[tuple[int, int]], size: int = 0, put_off: tuple[int, int] = (0, 0),
) -> list[int]:  # fmt: skip
    """When each rank ends, in the unit of ``durations`` (of each pass, per virtual stage).

    ``hop`` is one transfer time, or one per virtual stage for its output and for the gradient that
    comes back. ``put_off``: in so many microbatches the last stage's backward is shorter by so
    much, and its rank, the last, ends later by all of it.
    """
    if schedule.endswith("_delayed"):
        # A pass is over when the transfer beside it is.
        passes = range(len(durations) - 4)
        least = [(hop, hop)] * len(durations) if isinstance(hop, int) else hop
        longer = [max(durations[p], least[p // 4][p % 4] if p % 4 < 2 else 0) for p in passes]
        durations = [*longer, *durations[-4:]]
    plan = graph(schedule, pp, vpp, m, size)
    lag = [0] * len(durations)
    for stage in range(len(durations) // 4):
        on, back = (hop, hop) if isinstance(hop, int) else hop[stage]
        if schedule.endswith("_delayed"):
            # On the way for one pass of the stage that sends on, or to which a gradient comes back.
            on, back = max(on, durations[4 * stage]), max(back, durations[4 * stage + 1])
        lag[4 * stage + 1] = lag[4 * stage + 2] = back
        if 4 * stage + 4 < len(lag):
            lag[4 * stage + 4] = on
    end: list[int] = []
    count, each = put_off
    for slot, microbatch, direct, lagged in plan.nodes:
        start = 0
        for need in direct:
            if end[need] > start:
                start = end[need]
        for need in lagged:
            if end[need] + lag[slot] > start:
                start = end[need] + lag[slot]
        waits = slot == len(durations) - 3 and microbatch < count
        end.append(start + durations[slot] - each * waits)
    return [end[index] + count * each * (index == plan.last[-1]) for index in plan.last]
