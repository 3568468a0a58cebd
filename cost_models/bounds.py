"""Lower bounds on the step time of a layout, valid for every partition of its layers.

Array versions of ``cost_models.surrogate`` with the partition relaxed: ``W`` is the work of one
microbatch through all stages and only its total is known. All times are float64 nanoseconds;
results are shrunk by one part in 1e9 so that rounding cannot lift them above the integers they
bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import ONE_CHUNK_AT_ONCE, OVER_PIPELINE, SPLIT_BACKWARD, V_SHAPED, codes_of

Real: TypeAlias = NDArray[np.float64]
Int64: TypeAlias = NDArray[np.int64]

SAFETY = 1.0 - 1e-9


@dataclass(frozen=True)
class Totals:
    """Sums over the whole model for each layout; ns."""

    work: Real
    """Forward and backward of one microbatch, with the least recomputation."""
    tallest_work: Real
    """The ``ceil(layers / pp)`` cheapest layers: some rank holds at least as many (1F1B, GPipe)."""
    gradient: Real
    update: Real
    layer_work: Real
    """Forward and backward of the cheapest layer."""
    rank_work: Real
    """The ``vpp * height`` cheapest layers: what a rank of full virtual stages holds at least."""
    first_work: Real
    """The ``(pp - 2) * height - lighter`` cheapest layers: in the first chunks of the ranks before
    the last but one, whose very first may be lighter."""
    embedding_work: Real
    hop: Real
    """Least transfer that delays its receiver alone."""
    bucket: Real
    sync: Real
    send: Real
    """Least transfer for which its sender waits too; of this and ``hop`` one is 0."""
    end_work: Real
    """Of the lighter of embedding and head."""
    every_work: Real | float = 0.0
    """What every rank works for the ends, where the ranks share them."""
    waits: tuple[Real | float, Int64 | int] = (0.0, 0)
    """What the last stage's backward puts off behind all its passes (1F1B, interleaved), and in how
    many microbatches."""


@dataclass(frozen=True)
class Shape:
    """Pipeline shape of each layout."""

    pp: Int64
    vpp: Int64
    microbatches: Int64
    height: Int64
    """Layers of a full virtual stage where ranks hold several: ``ceil(layers / stages)``."""
    spare: Int64
    """Layers by which the first and last virtual stages fall short of ``height``, together."""
    free: bool = False
    """Whether virtual stages hold any numbers of layers: 1 at least, but for the first and last."""


def least_sum(count: Int64, values: Real, of_kinds: Sequence[int]) -> Real:
    """Sum of ``values`` (kinds, layouts) over the ``count`` layers in which they are least, of so
    many layers of each kind."""
    order = np.argsort(values, axis=0)
    available = np.array(of_kinds)[order]
    ascending = np.take_along_axis(values, order, axis=0)
    left, total = count.astype(np.int64), np.zeros(len(count))
    for layers, each in zip(available, ascending, strict=True):
        taken = np.minimum(left, layers)
        total += taken * each
        left = left - taken
    return total


def one_f_one_b(shape: Shape, totals: Totals) -> Real:
    """1F1B: round trips of the whole pipeline, and the remainder of the microbatches.

    With ``q = (m-1) // pp`` and ``r = (m-1) mod pp``, time is at least ``(1+q) W + S`` for ``S``
    the work of the last ``r`` ranks, and, from the ranks before them, at least ``(W - S) g`` with
    ``g = 1 / (1 - (1 - 1/m)^(pp-r))``: no split of ``W - S`` over those ranks ends their own work,
    each starting after the ones before it, sooner. The least of the larger of the two over ``S``.
    """
    m, pp = shape.microbatches.astype(np.float64), shape.pp.astype(np.float64)
    loops, rest = np.divmod(shape.microbatches - 1, shape.pp)
    # What waits is in no path before the last stage's end: of its own work n of m products, of the
    # trips' those of every pp-th microbatch.
    each, count = totals.waits
    waiting = np.minimum(-(-count // shape.pp), 1 + loops) / (1 + loops)
    less = each * np.maximum(count / m, waiting)
    totals, late = replace(totals, work=totals.work - less), each - less
    trips = (1.0 + loops) * (totals.work + 2 * (pp - 1) * totals.hop)
    ranks = np.where(rest > 0, pp - rest, pp)
    growth = geometric(m, ranks)
    lifted = trips + (growth * totals.work - trips) / (1.0 + growth)
    lifted = np.clip(lifted, trips, trips + totals.work)
    relaxed = np.maximum(np.where(rest > 0, lifted, trips), geometric(m, pp) * totals.work)
    # Layers are whole: with the tallest rank of work w, two trips and its own work between them are
    # at least W + (m - pp) w (cost_models.surrogate, bound 3 with a = 1 and k <= pp).
    whole = totals.work - late + (m - pp) * totals.tallest_work
    return np.maximum(relaxed, np.where(m > pp, whole, 0.0))


def geometric(m: Real, ranks: Real) -> Real:
    """``1 / (1 - (1 - 1/m)^ranks)``: the least time of ranks in sequence per unit of their work."""
    return 1.0 / -np.expm1(ranks * np.log1p(-1.0 / np.maximum(m, 1.0 + 1e-12)))


def gpipe(shape: Shape, totals: Totals) -> Real:
    """GPipe: one trip, and the widest rank for every other microbatch: at least the average."""
    pp = shape.pp
    widest = np.maximum(totals.work / pp, totals.tallest_work)
    return totals.work + 2 * (pp - 1) * totals.hop + (shape.microbatches - 1) * widest


def interleaved(shape: Shape, totals: Totals) -> Real:
    """Interleaved 1F1B, or breadth-first, with equal virtual stages, the first and last lighter at
    most.

    A rank works ``m`` times its chunks after the first chunks of the ranks before it. Averaged over
    ranks this needs no partition; for the last-but-one rank, whose chunks are all full, it is
    known too. Of free stages each holds a layer, but for the first and last.
    """
    m, pp = shape.microbatches, shape.pp
    full = totals.layer_work * (1 if shape.free else shape.height)
    fill = full * (pp - 1) * (pp - 2) / 2 / pp + (pp - 1) * totals.hop
    # Rank s waits for s first forwards and s first backwards, of which rank 0's sends nothing.
    fill = fill + totals.send * (pp - 1) ** 2 / pp
    average = (m * totals.work - totals.waits[0] * totals.waits[1]) / pp + fill
    hops = 2 * (pp - 2) * totals.hop
    rank = m * totals.rank_work + totals.first_work + totals.embedding_work + hops
    return np.maximum(average, _fullest(shape, totals, rank))


def _fullest(shape: Shape, totals: Totals, rank: Real) -> Real:
    """The bound of one rank: ``rank`` of three or more; of free stages, that of the most layers."""
    if shape.free:
        return shape.microbatches * totals.tallest_work
    return np.where(shape.pp >= 3, rank, 0.0)


def split(shape: Shape, totals: Totals) -> Real:
    """A schedule that splits the backward or lies on a V: each rank's own work, after transfers
    through the ranks before it. Where three ranks or more have chunks, one of them has full chunks
    only."""
    m, pp = shape.microbatches, shape.pp
    average = m * totals.work / pp + (pp - 1) / 2 * totals.hop
    rank = m * totals.rank_work + (pp - 2) * totals.hop
    return np.maximum(average, _fullest(shape, totals, rank))


def shared_ends(shape: Shape, totals: Totals) -> Real:
    """A schedule whose ranks share embedding and head: each rank's own work, after transfers
    through the ranks before it; of the average rank, and of one with the most layers."""
    m, pp = shape.microbatches, shape.pp
    average = m * totals.work / pp + (pp - 1) / 2 * totals.hop
    return np.maximum(average, m * (totals.tallest_work + totals.every_work))


def occupied(shape: Shape, totals: Totals, turns: NDArray[np.bool_]) -> Totals:
    """The same layouts with the transfers that a rank waits for counted as its work.

    Every virtual stage but the last sends on and every one but the first sends back, so the whole
    pipeline has ``2 (stages - 1)`` sends a microbatch. The tallest rank sends twice, or is an end,
    which sends once and holds embedding or head too. The last-but-one rank of an interleaved
    pipeline (of three ranks or more) has no end and sends twice per chunk; of the first chunks of
    the ``pp - 2`` ranks before it all send on and all but the very first send back. Where virtual
    stages lie on a V (``turns``), the two at the turn share a rank, at worst the one that counts.
    """
    pp, vpp = shape.pp, shape.vpp
    send = np.where(pp > 1, totals.send, 0.0)
    return replace(
        totals,
        work=totals.work + 2 * (pp * vpp - 1 - turns) * send,
        tallest_work=totals.tallest_work + send + np.minimum(send, totals.end_work),
        rank_work=totals.rank_work + 2 * (vpp - turns) * send,
        first_work=totals.first_work + np.maximum(2 * pp - 5, 0) * send,
    )


def step_bound(schedule: Int64, shape: Shape, totals: Totals) -> Real:
    """Lower bound on the step by schedule code (``cost_models.layout.SCHEDULES``)."""
    totals = occupied(shape, totals, turns=np.isin(schedule, codes_of(V_SHAPED)))
    pipeline = np.select(
        [np.isin(schedule, codes_of(names)) for names in (ONE_CHUNK_AT_ONCE, ("1f1b",))]
        + [
            np.isin(schedule, codes_of(names))
            for names in ((*SPLIT_BACKWARD, *V_SHAPED), OVER_PIPELINE)
        ],
        [
            gpipe(shape, totals),
            one_f_one_b(shape, totals),
            split(shape, totals),
            shared_ends(shape, totals),
        ],
        interleaved(shape, totals),
    )
    average = (shape.microbatches * totals.work + totals.gradient) / shape.pp
    ends = np.maximum(pipeline, average) + totals.bucket
    result: Real = (ends + totals.update / shape.pp + totals.sync) * SAFETY
    return result
