"""Pipeline schedules stated a second time: order of work, longest path, live activations.

The step's pipeline is a graph: one node per forward or backward of a microbatch on a virtual
stage, an edge from each action to the next on its rank, and an edge with the transfer's lag from
each action to the one that consumes its result. A rank finishes at the longest path to its last
action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Action = tuple[bool, int, int]
"""Forward?, virtual stage, microbatch."""


def rank_actions(schedule: str, pp: int, vpp: int, m: int, rank: int) -> list[Action]:
    """What ``rank`` runs, in order."""
    forwards: list[Action] = []
    backwards: list[Action] = []
    if schedule == "interleaved":
        # Microbatches go in groups of pp; a group passes through chunk after chunk.
        for group in range(0, m, pp):
            for chunk in range(vpp):
                forwards += [(True, chunk * pp + rank, i) for i in range(group, group + pp)]
            for chunk in reversed(range(vpp)):
                backwards += [(False, chunk * pp + rank, i) for i in range(group, group + pp)]
        ahead = 2 * (pp - 1 - rank) + (vpp - 1) * pp
    else:
        forwards = [(True, rank, i) for i in range(m)]
        backwards = [(False, rank, i) for i in range(m)]
        ahead = m if schedule == "gpipe" else pp - 1 - rank
    waiting_f, waiting_b = deque(forwards), deque(backwards)
    actions = [waiting_f.popleft() for _ in range(min(ahead, len(forwards)))]
    while waiting_f:
        actions.append(waiting_f.popleft())
        actions.append(waiting_b.popleft())
    actions.extend(waiting_b)
    return actions


@lru_cache(maxsize=4096)
def live_vectors(
    schedule: str, pp: int, vpp: int, m: int, rank: int
) -> tuple[tuple[int, ...], ...]:
    """Every combination of live microbatches per chunk that the walk of a rank's order meets."""
    live = [0] * vpp
    met = set()
    for forward, stage, _ in rank_actions(schedule, pp, vpp, m, rank):
        live[stage // pp] += 1 if forward else -1
        met.add(tuple(live))
    return tuple(sorted(met))


def most_live_bytes(
    schedule: str, pp: int, vpp: int, m: int, rank: int, sizes: Sequence[int]
) -> int:
    """Largest sum of live activations over the walk, ``sizes`` bytes per microbatch and chunk."""
    return max(
        sum(count * size for count, size in zip(vector, sizes, strict=True))
        for vector in live_vectors(schedule, pp, vpp, m, rank)
    )


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order: (duration slot, predecessors without lag, with lag)."""

    nodes: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    last: tuple[int, ...]
    """Position of each rank's last action."""


@lru_cache(maxsize=4096)
def graph(schedule: str, pp: int, vpp: int, m: int) -> Graph:
    """The graph of a schedule; slot ``2 j`` is the forward of virtual stage ``j``, ``2 j + 1`` its
    backward."""
    stages = pp * vpp
    before: dict[Action, list[tuple[Action, bool]]] = {}
    finals: list[Action] = []
    for rank in range(pp):
        previous: Action | None = None
        for action in rank_actions(schedule, pp, vpp, m, rank):
            forward, stage, i = action
            needs: list[tuple[Action, bool]] = [(previous, False)] if previous else []
            if forward and stage > 0:
                needs.append(((True, stage - 1, i), True))
            elif not forward and stage < stages - 1:
                needs.append(((False, stage + 1, i), True))
            elif not forward:
                needs.append(((True, stage, i), False))
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
                2 * action[1] + (not action[0]),
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
    schedule: str, pp: int, vpp: int, m: int, durations: Sequence[int],
    hop: int | Sequence[tuple[int, int]],
) -> list[int]:  # fmt: skip
    """When each rank ends, in the unit of ``durations`` (two per virtual stage).

    ``hop`` is one transfer time, or one per virtual stage for its output and for the gradient that
    comes back.
    """
    plan = graph(schedule, pp, vpp, m)
    lag = [0] * len(durations)
    for stage in range(len(durations) // 2):
        on, back = (hop, hop) if isinstance(hop, int) else hop[stage]
        lag[2 * stage + 1] = back
        if 2 * stage + 2 < len(lag):
            lag[2 * stage + 2] = on
    end: list[int] = []
    for slot, direct, lagged in plan.nodes:
        start = 0
        for need in direct:
            if end[need] > start:
                start = end[need]
        for need in lagged:
            if end[need] + lag[slot] > start:
                start = end[need] + lag[slot]
        end.append(start + durations[slot])
    return [end[index] for index in plan.last]
