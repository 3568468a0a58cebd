"""The order of work on each rank of a pipeline.

A rank runs passes of microbatches on its virtual stages ("chunks"): forwards (F) and backwards
(B), or, where a schedule splits them, the gradients of inputs (I) and later those of weights (W).

* GPipe: all forwards, then all backwards (Huang et al., arXiv 1811.06965).
* 1F1B (PipeDream-flush) and interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2):
  microbatches go through the chunks in rounds (``cost_models.rounds``).
* Breadth-first, looped BFS (Lamy-Poirier, arXiv 2211.05953): all microbatches through one chunk,
  then through the next; backwards the other way round.
* Interleaved zero bubble: ZB1P of Qi et al. (arXiv 2401.10241) over chunks. Half the warm-up of
  interleaved 1F1B, and rank ``r`` keeps ``r`` weight gradients for later.
* ZB-V (the same, section 6): two chunks on a V, as much in flight on every rank.
* DualPipeV (DeepSeek's DualPipe, cut in half): on the same V, forwards and backwards in pairs.

Orders are those that ``torch.distributed.pipelining`` builds: ``tests/unit/test_orders.py``
compares them with its own tables.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cost_models.given_order import GivenOrder
from cost_models.layout import ALL_AT_ONCE, IN_ROUNDS, LOOPED, SPLIT_BACKWARD, Schedule
from cost_models.passes import Pass as Pass
from cost_models.rounds import usual_round

Table = NDArray[np.int64]
Row = tuple[int, int, int]
"""Pass, chunk and microbatch."""


class Action(NamedTuple):
    """One pass of one microbatch on one chunk of a rank."""

    work: Pass
    chunk: int
    microbatch: int


def warmup_forwards(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int = 0
) -> int:
    """Forwards that a rank runs before it alternates; ``size`` is that of rounds, where the
    schedule has them (0: the usual one)."""
    total = microbatches * vpp
    if schedule in ALL_AT_ONCE:
        return total
    behind = pp - rank - 1
    if schedule == "1f1b":
        return min(behind, total)
    if schedule == "interleaved":
        behind *= 2
    return min(behind + (vpp - 1) * (size or usual_round(pp, microbatches)), total)


def rank_order(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int = 0
) -> tuple[Action, ...]:
    """The actions of ``rank`` in order."""
    rows = order_table(schedule, pp, vpp, microbatches, rank, size).tolist()
    return tuple([Action(Pass(work), chunk, microbatch) for work, chunk, microbatch in rows])


@lru_cache(maxsize=4096)
def order_table(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int = 0,
    given: GivenOrder | None = None,
) -> Table:  # fmt: skip
    """The same as rows of pass, chunk and microbatch; ``given`` is the user's own order."""
    if given is not None:
        return given.ranks[rank]
    if schedule == "zbv":
        return np.array(_zbv(pp, microbatches, rank))
    if schedule == "dualpipev":
        return np.array(_dualpipev(pp, microbatches, rank))
    if schedule not in IN_ROUNDS:
        size = microbatches
    size = size or usual_round(pp, microbatches)
    forwards, backwards = _streams(schedule, vpp, microbatches, size)
    warmup = warmup_forwards(schedule, pp, vpp, microbatches, rank, size)
    # In threes: a forward, the backward that it comes before, and what was put off by ``rank``.
    index = np.arange(len(forwards))
    parts = [(Pass.FORWARD, forwards, 3 * (index - warmup))]
    if schedule in SPLIT_BACKWARD:
        parts.append((Pass.INPUT, backwards, 3 * index + 1))
        parts.append((Pass.WEIGHT, backwards, 3 * (index + rank) + 2))
    else:
        parts.append((Pass.BACKWARD, backwards, 3 * index + 1))
    works = np.repeat([int(work) for work, _, _ in parts], len(index))
    rows = np.column_stack([works, np.concatenate([stream for _, stream, _ in parts])])
    return rows[np.argsort(np.concatenate([place for _, _, place in parts]), kind="stable")]


def _streams(schedule: Schedule, vpp: int, microbatches: int, size: int) -> tuple[Table, Table]:
    """Chunk and microbatch of every forward, and of every backward, in the order of each."""
    rounds, place = np.divmod(np.arange(microbatches * vpp), size * vpp)
    last = microbatches % size or size
    chunk, offset = np.divmod(place, np.where(rounds == (microbatches - 1) // size, last, size))
    forwards = np.column_stack([chunk, rounds * size + offset])
    if schedule in LOOPED:
        return forwards, forwards[::-1]
    return forwards, np.column_stack([vpp - 1 - chunk, forwards[:, 1]])


class _Counted:
    """A rank's order, written as which pass comes next on which chunk: microbatches count up."""

    def __init__(self) -> None:
        self.actions: list[Row] = []
        self.begun = [[0, 0] for _ in Pass]
        self.waiting: deque[int] = deque()
        """Chunks with gradients of weights still to come, oldest first."""

    def run(self, work: Pass, chunk: int) -> None:
        kind = Pass.INPUT if work == Pass.BACKWARD else work
        self.actions.append((work, chunk, self.begun[kind][chunk]))
        self.begun[kind][chunk] += 1
        if work == Pass.BACKWARD:
            self.begun[Pass.WEIGHT][chunk] += 1
        elif work == Pass.INPUT:
            self.waiting.append(chunk)

    def both(self, chunk: int) -> None:
        """Gradients of inputs, then at once those of weights."""
        self.run(Pass.INPUT, chunk)
        self.waiting.pop()
        self.run(Pass.WEIGHT, chunk)

    def oldest_weights(self) -> None:
        if self.waiting:
            self.run(Pass.WEIGHT, self.waiting.popleft())


def _zbv(pp: int, microbatches: int, rank: int) -> list[Row]:
    """Written for at least ``2 pp - 1`` microbatches; of fewer, the others are left out."""
    count = max(2 * pp - 1, microbatches)
    order = _Counted()
    begun = order.begun
    for _ in range(2 * (pp - rank) - 1):
        order.run(Pass.FORWARD, 0)
    for _ in range(rank):
        order.run(Pass.FORWARD, 1)
        order.run(Pass.FORWARD, 0)
    for _ in range(pp - rank):
        order.run(Pass.FORWARD, 1)
        order.both(1)
    while begun[Pass.FORWARD][1] < count:
        if begun[Pass.FORWARD][0] < count:
            order.run(Pass.FORWARD, 0)
        order.both(0)
        order.run(Pass.FORWARD, 1)
        order.both(1)
    for _ in range(rank):
        order.run(Pass.INPUT, 0)
        order.run(Pass.INPUT, 1)
    for _ in range(pp - rank):
        order.run(Pass.INPUT, 0)
        order.run(Pass.WEIGHT, 0)
    for chunk in (1, 0):
        while begun[Pass.WEIGHT][chunk] < begun[Pass.INPUT][chunk]:
            order.run(Pass.WEIGHT, chunk)
    return [action for action in order.actions if action[2] < microbatches]


def _dualpipev(pp: int, microbatches: int, rank: int) -> list[Row]:
    """Needs ``2 pp`` microbatches. A pair of a forward and a backward runs one after the other."""
    order = _Counted()
    behind = pp - rank - 1
    for _ in range(2 * behind):
        order.run(Pass.FORWARD, 0)
    for _ in range(rank + 1):
        order.run(Pass.FORWARD, 0)
        order.run(Pass.FORWARD, 1)
    for _ in range(behind):
        order.run(Pass.INPUT, 1)
        order.oldest_weights()
        order.run(Pass.FORWARD, 1)
    for _ in range(microbatches - 2 * pp + rank + 1):
        for forward, backward in ((0, 1), (1, 0)):
            order.run(Pass.FORWARD, forward)
            order.run(Pass.BACKWARD, backward)
    for _ in range(behind):
        order.run(Pass.BACKWARD, 1)
        order.run(Pass.FORWARD, 1)
        order.run(Pass.BACKWARD, 0)
    # The second half of the last backwards puts its weight gradients off.
    for index in range(2 * (rank + 1)):
        split = index > rank
        order.run(Pass.INPUT if split else Pass.BACKWARD, 1 - index % 2)
    for _ in range(behind):
        order.oldest_weights()
        order.run(Pass.INPUT, 0)
    while order.waiting:
        order.oldest_weights()
    return order.actions
