"""Schedules whose ranks share the vocabulary, stated a second time: orders, longest path, memory.

Orders are derived step by step from offsets, as the authors' fork does; times are longest paths in
a graph with a node for each sum over the ranks and each output that the last rank sends to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cost_models.configs import PricedConfigs
from cost_models.step import Field

SHARED = ("1f1b_vocab_1", "1f1b_vocab_2", "1f1b_interlaced")
Step = tuple[str, int]


@lru_cache(maxsize=4096)
def order(schedule: str, pp: int, m: int, rank: int) -> list[Step]:
    """What ``rank`` does: F and B of its layers, S of its part of the head."""
    if schedule == "1f1b_interlaced":
        return _interlaced(pp, m, rank)
    one_more = int(schedule == "1f1b_vocab_1")
    # Offsets of a round's start against the last rank's, in forwards, a backward being two.
    kinds, offset = [True], 0
    while len(kinds) < pp:
        if offset > -2:
            offset -= 1
        else:
            kinds.append(False)
            offset += 1
        kinds.append(True)
    between = kinds[pp - 1 - rank]
    early, behind = 0, kinds[0]
    for kind in kinds[1 : pp - rank]:
        early += not (kind and not behind)
        behind = kind
    first = min(m, pp - rank)
    forwards, heads = [("F", i) for i in range(m)], [("S", i) for i in range(m + 1)]
    steps, forwards = forwards[:first], forwards[first:]
    for _ in range(1 + one_more):
        steps += [heads.pop(0), *forwards[:1]]
        forwards = forwards[1:]
    held_back = 0 if one_more else 1
    for _ in range(early):
        if len(heads) > held_back:
            steps.append(heads.pop(0))
    for i in range(m):
        steps.append(("B", i))
        forward, forwards = forwards[:1], forwards[1:]
        head = [heads.pop(0)] if len(heads) > held_back else []
        steps += head + forward if between else forward + head
    return steps + heads


def _interlaced(pp: int, m: int, rank: int) -> list[Step]:
    warm, cool = min(m, 3 * pp // 2 - rank), min(m, pp - rank)
    wait = max(0, warm - cool - (pp - rank - 1) // 2)
    steps = [("F", i) for i in range(warm)] + [("S", i) for i in range(cool)]
    b = 0
    for _ in range(wait):
        steps += [("B", b), ("S", b + cool)]
        b += 1
    for i in range(warm, m):
        turn = [("F", i), ("B", b)] if rank % 2 == pp % 2 else [("B", b), ("F", i)]
        steps += [*turn, ("S", b + cool)]
        b += 1
    for _ in range(warm - cool - wait):
        steps += [("B", b), ("S", b + cool)]
        b += 1
    return steps + [("B", i) for i in range(b, m)]


def most_live(schedule: str, pp: int, m: int, rank: int) -> int:
    """Most microbatches between their forward and their backward."""
    steps = order(schedule, pp, m, rank)
    return max(
        sum((work == "F") - (work == "B") for work, _ in steps[: n + 1]) for n in range(len(steps))
    )


@dataclass(frozen=True)
class Ends:
    """One rank's parts of embedding and head."""

    embedding: tuple[int, ...]
    head: tuple[int, ...]
    arrive: int
    arrive_wide: int
    gradient: int
    scalar: int
    hidden: int
    element: int
    rescale: int = 0
    cast: int = 0

    def both(self, field: Field) -> int:
        """A field of embedding and head."""
        return self.embedding[field] + self.head[field]

    def parts(self, schedule: str) -> tuple[int, int]:
        """Work of a microbatch's own pass, and what the next pass does for it."""
        forward, backward = self.head[Field.FORWARD], self.head[Field.BACKWARD]
        weights = self.head[Field.WEIGHT_BACKWARD]
        if schedule == "1f1b_vocab_1":
            return forward, backward + self.rescale
        if schedule == "1f1b_vocab_2":
            return forward + (backward - weights) + self.cast, weights + self.rescale
        return forward + (backward - weights), weights

    def kept(self, schedule: str, pp: int, m: int) -> int:
        """Bytes that stay: the softmax of a microbatch, ids, and copies of hidden states."""
        copies = {"1f1b_vocab_1": (3, 2), "1f1b_vocab_2": (4, 2), "1f1b_interlaced": (3, 0)}
        narrow, wide = copies[schedule]
        ids = self.embedding[Field.ACT_NONE] * most_live(schedule, pp, m, 0)
        return (
            self.head[Field.ACT_NONE] + ids
            + self.hidden * narrow * self.element + self.hidden * wide * 4
        )  # fmt: skip


def ends_of(tables: PricedConfigs, index: int) -> Ends | None:
    """The parts of a configuration, where its ranks share them."""
    shared = tables.vocabulary
    if shared is None or tables.configs.pp[index] == 1:
        return None
    return Ends(
        tuple(tables.embedding[:, index].tolist()), tuple(tables.head[:, index].tolist()),
        int(shared.arrive_ns[index]), int(shared.arrive_wide_ns[index]),
        int(shared.gradient_ns[index]), int(shared.scalar_ns[index]), int(shared.hidden[index]),
        shared.element_bytes, int(shared.rescale_ns[index]), int(shared.cast_ns[index]),
    )  # fmt: skip


def finish(
    schedule: str, pp: int, m: int, forward: Sequence[int], backward: Sequence[int],
    hops: Sequence[tuple[int, int]], ends: Ends,
) -> list[int]:  # fmt: skip
    """When each rank ends."""
    orders = [order(schedule, pp, m, rank) for rank in range(pp)]
    place = [{step: n for n, step in enumerate(steps)} for steps in orders]
    own, later = ends.parts(schedule)
    late, last = int(schedule == "1f1b_vocab_1"), pp - 1
    at_once = schedule == "1f1b_interlaced"
    sums = 3 * ends.scalar
    known: dict[tuple[str, int, int], int] = {}

    def before(rank: int, step: Step) -> int:
        n = place[rank][step]
        return end(rank, orders[rank][n - 1]) if n else 0

    def summed(i: int) -> int:
        return max(end(rank, ("S", i)) for rank in range(pp)) + sums + ends.gradient

    def start_of_last_backward(i: int) -> int:
        ready = 0 if at_once else summed(i + late)
        return max(before(last, ("B", i)), ready)

    def sent(i: int) -> int:
        if i == 0:
            return end(last, ("F", 0))
        if i <= late:
            return max(before(last, ("S", i)), summed(i - 1))
        if late == 0 and i == m:
            return end(last, ("B", m - 1))
        return start_of_last_backward(i - 1 - late)

    def head(rank: int, i: int) -> int:
        if at_once:
            free = max(before(r, ("S", i)) for r in range(pp))
            beside = max(ends.gradient - ends.head[Field.WEIGHT_BACKWARD], 0)
            return free + ends.arrive + sums + beside + own + later
        start = before(rank, ("S", i))
        if rank < last:
            start = max(start, sent(i) + ends.arrive_wide)
        elif 0 < i <= late:
            start = sent(i)
        return start + (own if i < m else 0) + (later if i else 0)

    def end(rank: int, step: Step) -> int:
        work, i = step
        key = (work, rank, i)
        if key not in known:
            if work == "S":
                known[key] = head(rank, i)
            elif work == "F":
                came = end(rank - 1, step) + hops[rank - 1][0] if rank else 0
                known[key] = max(before(rank, step), came) + forward[rank]
            elif rank == last:
                known[key] = start_of_last_backward(i) + backward[rank]
            else:
                came = end(rank + 1, step) + hops[rank][1]
                known[key] = max(before(rank, step), came) + backward[rank]
        return known[key]

    # In the order of microbatches, so that no path is long when it is first asked for.
    for i in range(m):
        for rank in range(pp):
            end(rank, ("F", i))
    return [end(rank, steps[-1]) for rank, steps in enumerate(orders)]
