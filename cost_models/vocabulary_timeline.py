"""The timeline of a pipeline whose ranks share the vocabulary.

As in ``cost_models.schedule``, and besides: a pass of the head starts on a rank when the last
rank's output has arrived there, and the last rank's backward when the parts of all are summed. The
last rank sends an output on as soon as the sums of the one before are there, together with the
gradient of that one's loss. Transfers run on streams of their own, but those of the interlaced
schedule, in which all ranks run a pass of the head at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.layout import Schedule
from cost_models.schedule import Durations, Timeline
from cost_models.vocabulary_orders import lag_of, rank_steps


@dataclass(frozen=True, slots=True)
class HeadTimes:
    """A rank's part of the head, per microbatch; ns."""

    own: int
    """What its own pass takes."""
    later: int
    """What the pass of the next microbatch does for it."""
    arrive: int
    """From the last rank's output to all ranks."""
    reduce: int
    """Sums over the ranks behind a pass."""
    together: int = 0
    """Of the interlaced schedule: collectives for which all ranks wait in a pass."""


class _Heads:
    """Passes of the head by microbatch: when they may start, and when all ranks had them."""

    def __init__(self, schedule: Schedule, pp: int, microbatches: int, times: HeadTimes) -> None:
        self.pp, self.m, self.times = pp, microbatches, times
        self.lag, self.at_once = lag_of(schedule), schedule == "1f1b_interlaced"
        self.sent: dict[int, int] = {}
        self.met = [0] * (microbatches + 1)
        self.latest = [0] * (microbatches + 1)
        self.waiting: set[tuple[int, int]] = set()

    def lasts(self, index: int) -> int:
        """Work of a rank in the pass of microbatch ``index``."""
        if self.at_once:
            return self.times.own + self.times.later
        return (index > 0) * self.times.later + (index < self.m) * self.times.own

    def meet(self, index: int, now: int) -> None:
        self.met[index] += 1
        self.latest[index] = max(self.latest[index], now)

    def summed(self, index: int) -> int | None:
        """When the sums behind a pass are there; None while a rank has not had it."""
        if self.met[index] < self.pp:
            return None
        return self.latest[index] + (0 if self.at_once else self.times.reduce)

    def end(self, rank: int, index: int, now: int) -> int | None:
        """When ``rank``, free at ``now``, ends a pass; None where something is not known yet."""
        if self.at_once:
            if (rank, index) not in self.waiting:
                self.waiting.add((rank, index))
                self.meet(index, now)
            start = self.summed(index)
            return None if start is None else start + self.lasts(index) + self.times.together
        if rank == self.pp - 1:
            if 0 < index <= self.lag:
                ready = self.summed(index - 1)
                if ready is None:
                    return None
                now = self.sent[index] = max(now, ready)
        elif index not in self.sent:
            return None
        else:
            now = max(now, self.sent[index] + self.times.arrive)
        now += self.lasts(index)
        self.meet(index, now)
        return now

    def turn(self, index: int, now: int) -> int | None:
        """When the last rank, free at ``now``, begins a backward; it sends the next output first,
        but nothing is left to send with the last."""
        if self.at_once:
            return now
        ready = self.summed(index + self.lag)
        if ready is None:
            return None
        now = max(now, ready)
        if index + self.lag + 1 < self.m + self.lag:
            self.sent[index + self.lag + 1] = now
        return now


def simulate(
    schedule: Schedule, pp: int, microbatches: int, times: Durations, head: HeadTimes,
    hops: Sequence[tuple[int, int]],
) -> Timeline:  # fmt: skip
    """Run the schedule; ``hops`` are transfers of each stage's output on and of its gradient back.

    Raises :class:`ValueError` where the orders of the ranks wait for each other.
    """
    m, last = microbatches, pp - 1
    orders = [rank_steps(schedule, pp, m, rank) for rank in range(pp)]
    heads = _Heads(schedule, pp, m, head)
    done: dict[tuple[str, int, int], int] = {}
    position, clock = [0] * pp, [0] * pp

    def end(rank: int, work: str, i: int) -> int | None:
        """When a rank's next step ends; None where it waits for what is not known yet."""
        now = clock[rank]
        if work == "S":
            return heads.end(rank, i, now)
        if work == "F":
            arrived = done.get(("F", rank - 1, i)) if rank else 0
            if arrived is None:
                return None
            now = max(now, arrived + hops[rank - 1][0] if rank else 0) + times.forward[rank]
            if rank == last and i == 0:
                heads.sent[0] = now
        else:
            arrived = done.get(("B", rank + 1, i)) if rank < last else heads.turn(i, now)
            if arrived is None:
                return None
            now = max(now, arrived + (hops[rank][1] if rank < last else 0)) + times.backward[rank]
            if rank == last and i == m - 1:
                heads.sent.setdefault(m, now)
        done[work, rank, i] = now
        return now

    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                now = end(rank, *order[position[rank]])
                if now is None:
                    break
                clock[rank] = now
                position[rank] += 1
                left -= 1
        if left == before:
            raise ValueError(f"{schedule} with pp={pp}, m={m} deadlocks")
    heads_ns = m * (head.own + head.later)
    busy = [m * (times.forward[r] + times.backward[r]) + heads_ns for r in range(pp)]
    return Timeline(tuple(clock), tuple(busy))
