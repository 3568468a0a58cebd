"""Timelines of pipeline schedules, and the activations that are alive in them.

A rank runs its actions in a fixed order (``cost_models.orders``); an action starts when the rank is
free and its input has arrived, a transfer after the neighbour finished. Times are integers, so a
timeline is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.given_order import GivenOrder
from cost_models.layout import (
    ALL_AT_ONCE,
    DELAYED,
    OVER_PIPELINE,
    SPLIT_BACKWARD,
    V_SHAPED,
    Schedule,
    crosses_ranks,
    stage_of,
)
from cost_models.orders import Pass, order_table, warmup_forwards
from cost_models.rounds import usual_round
from cost_models.vocabulary_orders import most_alive

Vector = tuple[int, ...]


@lru_cache(maxsize=65536)
def live_peaks(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int = 0,
    given: GivenOrder | None = None,
) -> tuple[Vector, ...]:  # fmt: skip
    """Largest numbers of microbatches whose activations a rank holds, per chunk; where a schedule
    splits the backward, followed by those that only wait for their weight gradients, and by those
    (0 or 1) whose weight gradients wait for the next backward of the chunk. ``size`` is that of
    rounds (``cost_models.rounds``; 0: the usual one), ``given`` the user's own order.

    Each entry is a vector over chunks; no entry is dominated by another. The peak of any
    activation sizes is the maximum over the entries.
    """
    if schedule in ALL_AT_ONCE:
        return ((microbatches,) * vpp,)
    if schedule == "1f1b":
        return ((min(microbatches, pp - rank),),)
    if schedule in OVER_PIPELINE:
        return ((most_alive(schedule, pp, microbatches, rank),),)
    if given is not None or schedule in SPLIT_BACKWARD:
        order = order_table(schedule, pp, vpp, microbatches, rank, size, given)
        met = _walk(order, vpp)
        if schedule not in SPLIT_BACKWARD:
            met = {vector[:vpp] for vector in met}
        return _undominated(met)
    # Each forward after the warm-up follows a backward: the number alive stays at its most, the
    # warm-up's vectors are below the first of these, and the pattern repeats every round of every
    # chunk, but for a shorter last round.
    size = size or usual_round(pp, microbatches)
    total, period = microbatches * vpp, size * vpp
    warmup = warmup_forwards(schedule, pp, vpp, microbatches, rank, size)
    if warmup == total:
        return ((microbatches,) * vpp,)
    backwards = np.arange(min(total - warmup, total if microbatches % size else period))
    begun = _per_chunk(backwards + warmup + 1, vpp, microbatches, size)
    live = begun - _per_chunk(backwards, vpp, microbatches, size)[:, ::-1]
    return tuple(sorted(set(map(tuple, live.tolist()))))


@lru_cache(maxsize=65536)
def live_at_first_backward(
    pp: int, vpp: int, microbatches: int, rank: int, size: int
) -> tuple[int, ...]:
    """Microbatches alive per chunk of an interleaved rank when its first backward begins.

    In every entry at least that of shorter rounds: those of the first round, and what runs ahead
    on the first chunk.
    """
    warmup = warmup_forwards("interleaved", pp, vpp, microbatches, rank, size)
    if warmup == microbatches * vpp:
        return (microbatches,) * vpp
    return tuple(_per_chunk(np.array([warmup + 1]), vpp, microbatches, size)[0].tolist())


def _per_chunk(
    actions: NDArray[np.int64], vpp: int, microbatches: int, size: int
) -> NDArray[np.int64]:
    """How many of a rank's first actions of one direction are of each chunk, in their order."""
    rounds, rest = divmod(microbatches, size)
    full = np.minimum(actions // (size * vpp), rounds)
    position = (actions - full * size * vpp)[:, None]
    each = np.where(full == rounds, rest, size)[:, None]
    begun: NDArray[np.int64] = np.clip(position - each * np.arange(vpp), 0, each)
    begun += size * full[:, None]
    return begun


def _walk(order: NDArray[np.int64], vpp: int) -> set[Vector]:
    """What is alive, what of it only waits for its weight gradients, and whether the last of these
    have not been followed by a backward, per chunk after each action."""
    alive, waiting, late, met = [0] * vpp, [0] * vpp, [0] * vpp, set()
    for work, chunk, _ in order.tolist():
        alive[chunk] += (work == Pass.FORWARD) - (work in (Pass.BACKWARD, Pass.WEIGHT))
        waiting[chunk] += (work == Pass.INPUT) - (work == Pass.WEIGHT)
        if work != Pass.FORWARD:
            late[chunk] = int(work == Pass.WEIGHT)
        met.add((*alive, *waiting, *late))
    return met


def _undominated(vectors: Iterable[Vector]) -> tuple[Vector, ...]:
    """The vectors of which no other is at least as large in every entry."""
    kept: list[Vector] = []
    for vector in sorted(vectors, reverse=True):
        if not any(all(a >= b for a, b in zip(other, vector, strict=True)) for other in kept):
            kept.append(vector)
    return tuple(sorted(kept))


@dataclass(frozen=True, slots=True)
class Durations:
    """Times in ns, one entry per virtual stage."""

    forward: Sequence[int]
    backward: Sequence[int]
    """Gradients of inputs and weights together."""
    inputs: Sequence[int] = ()
    """Gradients of inputs alone, for the schedules that split the backward; likewise weights."""
    weights: Sequence[int] = ()


def beside_passes(
    schedule: Schedule, forward: int, backward: int, hop: int, late: tuple[int, int]
) -> tuple[int, int, tuple[int, int]]:
    """Passes of a stage, and what its output and the gradient that comes back to it take beyond
    ``hop``: in a delayed loop each is on its way for one of its passes, which is over when the
    transfer is."""
    if schedule not in DELAYED:
        return forward, backward, late
    forward, backward = max(forward, hop), max(backward, hop)
    return forward, backward, (forward - hop, backward - hop)


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
    times: Durations,
    hop_ns: int | Sequence[tuple[int, int]],
    size: int = 0,
    given: GivenOrder | None = None,
    put_off: tuple[int, int] = (0, 0),
) -> Timeline:
    """Run the schedule, in rounds of ``size`` microbatches where it has them (0: the usual ones),
    or the order that the user has ``given``.

    ``hop_ns`` is one transfer time for all, or per virtual stage that of its output to the next
    stage and that of the gradient back; what stays on a rank takes none. ``put_off``: in how many
    microbatches, the first ones, the last stage's backward is shorter by so much, which its rank
    (the last one) makes up for when all its passes are over. Raises
    :class:`ValueError` where the orders of the ranks wait for each other.
    """
    stages, count = pp * vpp, microbatches
    hops = [(hop_ns, hop_ns)] * stages if isinstance(hop_ns, int) else list(hop_ns)
    if schedule in V_SHAPED:
        hops = [h if crosses_ranks(schedule, pp, j) else (0, 0) for j, h in enumerate(hops)]
    arrives = [0, *(on for on, _ in hops)]
    returns = [back for _, back in hops]
    taken = [times.forward, times.backward, times.inputs, times.weights]
    forward, weight, unknown = times.forward, int(Pass.WEIGHT), -1
    forward_end = [unknown] * (stages * count)
    backward_end = [unknown] * (stages * count)
    orders = [_coded(schedule, pp, vpp, count, rank, size, given) for rank in range(pp)]
    position = [0] * pp
    clock = [0] * pp
    remaining = sum(len(works) for works, _ in orders)
    last = (stages - 1) * count
    waiting, each = last + put_off[0], put_off[1]
    while remaining:
        before = remaining
        for rank in range(pp):
            works, slots = orders[rank]
            index, now = position[rank], clock[rank]
            length = len(works)
            while index < length:
                work, slot = works[index], slots[index]
                stage = slot // count
                if not work:
                    if stage:
                        ready = forward_end[slot - count]
                        if ready < 0:
                            break
                        ready += arrives[stage]
                        if ready > now:
                            now = ready
                    now += forward[stage]
                    forward_end[slot] = now
                elif work == weight:
                    now += taken[work][stage]
                else:
                    if slot < last:
                        ready = backward_end[slot + count]
                        if ready < 0:
                            break
                        ready += returns[stage]
                    else:
                        ready = forward_end[slot]
                        if ready < 0:
                            break
                        if slot < waiting:
                            ready, now = ready - each, now - each
                    if ready > now:
                        now = ready
                    now += taken[work][stage]
                    backward_end[slot] = now
                index += 1
            remaining -= index - position[rank]
            position[rank], clock[rank] = index, now
        if remaining == before:
            raise ValueError(f"{schedule} with pp={pp}, vpp={vpp}, m={microbatches} deadlocks")
    clock[-1] += put_off[0] * each
    busy = [sum([taken[w][slot // count] for w, slot in zip(*o, strict=True)]) for o in orders]
    return Timeline(tuple(clock), tuple(busy))


@lru_cache(maxsize=4096)
def _coded(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int,
    given: GivenOrder | None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """A rank's order in numbers: passes, and ``virtual stage * microbatches + microbatch``."""
    works, chunks, numbers = order_table(schedule, pp, vpp, microbatches, rank, size, given).T
    stages = np.array([stage_of(schedule, pp, rank, chunk) for chunk in range(vpp)])
    return works.tolist(), (stages[chunks] * microbatches + numbers).tolist()
