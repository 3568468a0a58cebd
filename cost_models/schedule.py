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

import numpy as np
from numpy.typing import NDArray

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


def rank_order(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int
) -> tuple[Action, ...]:
    """The actions of ``rank`` in order; interleaving needs ``microbatches % pp == 0``."""
    actions = []
    for code in _order(schedule, pp, vpp, microbatches, rank):
        stage, microbatch = divmod(code if code >= 0 else ~code, microbatches)
        actions.append(Action(code >= 0, stage // pp, microbatch))
    return tuple(actions)


@lru_cache(maxsize=4096)
def _order(schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int) -> tuple[int, ...]:
    """A rank's order in numbers: ``virtual stage * microbatches + microbatch`` of a forward, the
    complement of that of a backward."""
    total = microbatches * vpp
    group, position = np.divmod(np.arange(total), pp * vpp)
    chunk, offset = np.divmod(position, pp)
    if vpp == 1:
        chunk, microbatch = np.zeros_like(chunk), np.arange(total)
    else:
        microbatch = group * pp + offset
    forwards = (chunk * pp + rank) * microbatches + microbatch
    backwards = ~(((vpp - 1 - chunk) * pp + rank) * microbatches + microbatch)
    warmup = warmup_forwards(schedule, pp, vpp, microbatches, rank)
    steady = np.stack([forwards[warmup:], backwards[: total - warmup]], axis=1).ravel()
    order = np.concatenate([forwards[:warmup], steady, backwards[total - warmup :]])
    return tuple(order.tolist())


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
    # Each forward after the warm-up follows a backward: the number alive stays at its most, the
    # warm-up's vectors are below the first of these, and the pattern repeats every pp microbatches
    # of every chunk.
    total, period = microbatches * vpp, pp * vpp
    warmup = warmup_forwards(schedule, pp, vpp, microbatches, rank)
    if warmup == total:
        return ((microbatches,) * vpp,)
    backwards = np.arange(min(total - warmup, period))
    begun = _per_chunk(backwards + warmup + 1, pp, vpp)
    live = begun - _per_chunk(backwards, pp, vpp)[:, ::-1]
    return tuple(sorted(set(map(tuple, live.tolist()))))


def _per_chunk(actions: NDArray[np.int64], pp: int, vpp: int) -> NDArray[np.int64]:
    """How many of a rank's first actions of one direction are of each chunk, in their order."""
    periods, position = np.divmod(actions, pp * vpp)
    begun: NDArray[np.int64] = np.clip(position[:, None] - pp * np.arange(vpp), 0, pp)
    begun += pp * periods[:, None]
    return begun


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each rank's last action ends, and how long it computed, in ns."""

    finish_ns: tuple[int, ...]
    busy_ns: tuple[int, ...]


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
    orders = [_order(schedule, pp, vpp, count, rank) for rank in range(pp)]
    position = [0] * pp
    clock = [0] * pp
    remaining = 2 * stages * count
    last = (stages - 1) * count
    while remaining:
        before = remaining
        for rank in range(pp):
            order, index, now = orders[rank], position[rank], clock[rank]
            length = len(order)
            while index < length:
                slot = order[index]
                if slot >= 0:
                    stage = slot // count
                    if stage:
                        ready = forward_end[slot - count]
                        if ready < 0:
                            break
                        ready += arrives[stage]
                        if ready > now:
                            now = ready
                    now += forward_ns[stage]
                    forward_end[slot] = now
                else:
                    slot = ~slot
                    stage = slot // count
                    if slot < last:
                        ready = backward_end[slot + count]
                        if ready < 0:
                            break
                        ready += returns[stage]
                    else:
                        ready = forward_end[slot]
                        if ready < 0:
                            break
                    if ready > now:
                        now = ready
                    now += backward_ns[stage]
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
