"""Activations that ranks hold at once at least, whatever the partition; arrays of layouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cost_models import given_order
from cost_models.given_order import GivenOrder
from cost_models.graph import Bools, Int64
from cost_models.idle_passes import bubbles
from cost_models.layout import ALL_AT_ONCE, LOOPED, SPLIT_BACKWARD, V_SHAPED, Schedule, codes_of


@dataclass(frozen=True)
class Pipelines:
    """Shapes of pipelines, one entry per layout."""

    pp: Int64
    vpp: Int64
    microbatches: Int64
    schedule: Int64
    """As code."""
    order: GivenOrder | None
    """What all of them run, where the user gave it."""
    bubbles: bool = False
    """Whether passes of the bubble keep as much (``cost_models.idle_passes``)."""

    def runs(self, names: tuple[Schedule, ...]) -> Bools:
        """Which layouts have one of these schedules."""
        result: Bools = np.isin(self.schedule, codes_of(names))
        return result

    @cached_property
    def idle(self) -> Int64:
        """Passes of the bubble that keep something."""
        return bubbles(self.schedule, self.pp) * self.bubbles

    @cached_property
    def in_flight(self) -> tuple[Int64, Int64]:
        """Chunks times microbatches that the first rank has in flight at least, of enough
        microbatches, and how many fewer each next one has
        (``cost_models.orders.warmup_forwards``, and one more)."""
        pp, vpp, m = self.pp, self.vpp, self.microbatches
        fewer = np.where(self.runs(SPLIT_BACKWARD), 1, 2)
        each_round = m // np.maximum(m // pp, 1)
        begun = fewer * (pp - 1) + (vpp - 1) * each_round + 1
        on_v, at_once = self.runs(V_SHAPED), self.runs(LOOPED)
        begun = np.where(on_v, np.where(m >= 2 * pp - 1, 2 * pp, m), begun)
        return np.where(at_once, m * vpp, begun), np.where(on_v | at_once, 0, fewer)


def alive_on_every_chunk(runs: Pipelines, rank: int) -> Int64:
    """Microbatches of which a layer of ``rank`` holds activations at once, at least: of the last
    of several chunks, when the first backward begins (``cost_models.orders``)."""
    if runs.order is not None:
        return np.full_like(runs.pp, given_order.alive_on_every_chunk(runs.order, rank))
    behind, several = runs.pp - rank, runs.vpp > 1
    ahead = np.where(runs.runs(SPLIT_BACKWARD), behind, 2 * behind - 1)
    alive = np.where(several, np.minimum(ahead, runs.pp), behind)
    alive = np.where(runs.runs(V_SHAPED), 1, alive)
    m = runs.microbatches
    once = m + np.where(several, 0, runs.idle)
    alive = np.where(runs.runs(ALL_AT_ONCE), once, np.minimum(alive, m))
    return np.maximum(alive, 1)


def alive_on_full_chunks(runs: Pipelines, has: slice, rank: int, lighter: Int64) -> Int64:
    """Chunks times microbatches that ``rank`` has in flight at least in the layouts that ``has``
    it, without its ``lighter`` chunks: the first, the last, or on the first rank of a V both."""
    if runs.order is not None:
        # All layouts have its shape, so as many lighter chunks.
        count = int(lighter.max(initial=0))
        ends = [0, -1][:count] if rank == 0 else [-1][:count]
        return np.full_like(lighter, given_order.most_alive_beside(runs.order, rank, ends))
    begun, fewer = runs.in_flight
    m, vpp = runs.microbatches[has], runs.vpp[has]
    alive = np.minimum(begun[has] - rank * fewer[has], m * vpp)
    # Of loops the first rank idles on its last chunk, the last one on its first.
    least: Int64 = np.maximum(alive - lighter * m, 0) + runs.idle[has]
    return least
