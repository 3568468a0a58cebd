"""Pipeline schedules: the order of work on each rank, exact timelines, live activations.

A virtual stage ``j`` of ``pp * vpp`` sits on rank ``j % pp`` as its chunk ``j // pp``. Each rank
runs its forward (F) and backward (B) actions in a fixed order; an action starts when the rank is
free and its input has arrived, a transfer after the neighbour finished. Times are integers, so a
timeline is exact.

Orders: GPipe (Huang et al., arXiv 1811.06965), 1F1B (PipeDream-flush) and interleaved 1F1B
(Narayanan et al., arXiv 2104.04473, section 2.2), the last two as Megatron-Core and PyTorch run
them: ``tests/unit/test_schedule.py`` compares them with tables that PyTorch builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cost_models.layout import Schedule


class Action(NamedTuple):
    """One forward or backward of one microbatch on one chunk of a rank."""

    forward: bool
    chunk: int
    microbatch: int


def warmup_forwards(schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int) -> int:
    """Forwards that a rank runs before it alternates."""
    total = microbatches * vpp
    if schedule == "gpipe":
        return total
    if schedule == "1f1b":
        return min(pp - rank - 1, total)
    return min(2 * (pp - rank - 1) + (vpp - 1) * pp, total)


@lru_cache(maxsize=4096)
def rank_order(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int
) -> tuple[Action, ...]:
    """The actions of ``rank`` in order; interleaving needs ``microbatches % pp == 0``."""
    total = microbatches * vpp
    if schedule == "gpipe" or (schedule == "1f1b" and vpp == 1):
        forwards = [Action(True, 0, i) for i in range(microbatches)]
        backwards = [Action(False, 0, i) for i in range(microbatches)]
    else:
        forwards, backwards = [], []
        for index in range(total):
            group, position = divmod(index, pp * vpp)
            chunk, offset = divmod(position, pp)
            microbatch = group * pp + offset
            forwards.append(Action(True, chunk, microbatch))
            backwards.append(Action(False, vpp - 1 - chunk, microbatch))
    warmup = warmup_forwards(schedule, pp, vpp, microbatches, rank)
    order = forwards[:warmup]
    for index in range(warmup, total):
        order += (forwards[index], backwards[index - warmup])
    order += backwards[total - warmup :]
    return tuple(order)


@lru_cache(maxsize=65536)
def live_peaks(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int
) -> tuple[tuple[int, ...], ...]:
    """Largest numbers of microbatches whose activations a rank holds, per chunk.

    Each entry is a vector over chunks; no entry is dominated by another. The peak of any
    activation sizes is the maximum over the entries.
    """
    if schedule == "gpipe":
        return ((microbatches,),)
    if schedule == "1f1b":
        return ((min(microbatches, pp - rank),),)
    # Live microbatches grow during the warm-up and then stay at their most: one more forward
    # follows each backward. The pattern repeats every pp microbatches of every chunk.
    shortened = min(microbatches, (vpp + 4) * pp // vpp // pp * pp + 4 * pp)
    live = [0] * vpp
    seen: dict[tuple[int, ...], None] = {}
    for action in rank_order(schedule, pp, vpp, shortened, rank):
        live[action.chunk] += 1 if action.forward else -1
        if action.forward:
            seen[tuple(live)] = None
    most = max(sum(vector) for vector in seen)
    full = [vector for vector in seen if sum(vector) == most]
    others = [v for v in seen if sum(v) < most and not any(_dominates(o, v) for o in full)]
    kept = [v for v in others if not any(_dominates(o, v) for o in others)]
    return tuple(sorted(full + kept))


def _dominates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each rank's last action ends, and how long it computed, in ns."""

    finish_ns: tuple[int, ...]
    busy_ns: tuple[int, ...]


@lru_cache(maxsize=256)
def _slots(
    schedule: Schedule, pp: int, vpp: int, microbatches: int
) -> tuple[tuple[tuple[bool, int], ...], ...]:
    """Each rank's order as (forward?, virtual stage * microbatches + microbatch)."""
    return tuple(
        tuple(
            (action.forward, (action.chunk * pp + rank) * microbatches + action.microbatch)
            for action in rank_order(schedule, pp, vpp, microbatches, rank)
        )
        for rank in range(pp)
    )


def simulate(
    schedule: Schedule,
    pp: int,
    vpp: int,
    microbatches: int,
    forward_ns: Sequence[int],
    backward_ns: Sequence[int],
    hop_ns: int | Sequence[tuple[int, int]],
) -> Timeline:
    """Run the schedule; ``forward_ns[j]`` and ``backward_ns[j]`` are of virtual stage ``j``.

    ``hop_ns`` is one transfer time for all, or per virtual stage that of its output to the next
    stage and that of the gradient back.
    """
    stages = pp * vpp
    hops = [(hop_ns, hop_ns)] * stages if isinstance(hop_ns, int) else hop_ns
    arrives = [0, *(on for on, _ in hops)]
    returns = [back for _, back in hops]
    count = microbatches
    unknown = -1
    forward_end = [unknown] * (stages * count)
    backward_end = [unknown] * (stages * count)
    orders = _slots(schedule, pp, vpp, microbatches)
    position = [0] * pp
    clock = [0] * pp
    remaining = sum(len(order) for order in orders)
    last = (stages - 1) * count
    while remaining:
        before = remaining
        for rank in range(pp):
            order, index, now = orders[rank], position[rank], clock[rank]
            length = len(order)
            while index < length:
                is_forward, slot = order[index]
                if is_forward:
                    if slot >= count:
                        ready = forward_end[slot - count]
                        if ready < 0:
                            break
                        ready += arrives[slot // count]
                        if ready > now:
                            now = ready
                    now += forward_ns[slot // count]
                    forward_end[slot] = now
                else:
                    if slot < last:
                        ready = backward_end[slot + count]
                        if ready < 0:
                            break
                        ready += returns[slot // count]
                    else:
                        ready = forward_end[slot]
                        if ready < 0:
                            break
                    if ready > now:
                        now = ready
                    now += backward_ns[slot // count]
                    backward_end[slot] = now
                index += 1
            remaining -= index - position[rank]
            position[rank], clock[rank] = index, now
        if remaining == before:
            raise ValueError(f"{schedule} with pp={pp}, vpp={vpp}, m={microbatches} deadlocks")
    busy = tuple(
        count * sum(forward_ns[j] + backward_ns[j] for j in range(rank, stages, pp))
        for rank in range(pp)
    )
    return Timeline(tuple(clock), busy)
