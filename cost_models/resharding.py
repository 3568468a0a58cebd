"""Gathered weights of a pipeline whose stages give them back behind a forward, not a backward.

Under FSDP2 a stage of PyTorch's pipelines reshards a unit after its forward, if it is asked to, but
after no backward before the step's end (2.13.0: distributed/pipelining/stage.py,
``backward_maybe_with_nosync``; fsdp/_fully_shard/_fsdp_param_group.py, ``reshard``). So

* a pass of a stage that follows one of its forwards gathers its units one by one, and any other
  finds them gathered;
* while a backward runs, the weights of the layers behind have come where activations of their
  microbatch have gone; while a forward runs that follows a backward, the reverse;
* stages that the rank holds besides are gathered if their last pass was a backward. PyTorch's
  runtime of several stages gathers those among the next ``ACTIVE`` ahead, and gives others back
  (distributed/pipelining/schedules.py, ``_add_unshard_reshard``).

Memory follows layer by layer: with ``A`` the activations of one microbatch and ``G`` the gathered
weights of a layer, a stage holds at its layer ``l`` the ``A`` up to ``l`` and the ``G`` from there
on, which is never more than all of both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.given_order import GivenOrder
from cost_models.layout import Schedule
from cost_models.orders import Pass, order_table
from cost_models.schedule import live_peaks
from cost_models.step import Field

if TYPE_CHECKING:
    from cost_models.leaf import Leaf

ACTIVE = 3
"""Stages of a rank that PyTorch's runtime keeps gathered (``max_active_stages``)."""

Vector: TypeAlias = tuple[int, ...]
Ints: TypeAlias = NDArray[np.int64]


def beyond_activations(leaf: Leaf, stage: int, first: int, last: int, mode: str) -> int:
    """By how many bytes the activations up to a layer of ``first .. last - 1`` and the weights from
    there on exceed the activations of all these layers, at most.

    A backward has the weights of the layer before gathered too (``Leaf.ahead``), before the first
    layer the embedding's.
    """
    kept = leaf.parts(mode)[0].kept
    rows = [leaf.kinds[index] for index in leaf.sequence[first:last]]
    most = gone = 0
    behind = sum([row[Field.GATHERED] for row in rows])
    before = leaf.embedding[Field.GATHERED] if stage == 0 else 0
    gone = sum([row[kept] for row in rows])
    for place, row in enumerate(rows):
        gone -= row[kept]
        if place > leaf.ahead:
            behind -= rows[place - leaf.ahead - 1][Field.GATHERED]
        most = max(most, behind + (before if place < leaf.ahead else 0) - gone)
    return most


def beyond_of_ranges(leaf: Leaf, mode: str) -> Ints:
    """The same of all ranges, ``[first, last]``, of stages behind the first."""
    kept, rows = leaf.parts(mode)[0].kept, np.array(leaf.kinds, dtype=np.int64)
    each = rows[list(leaf.sequence)]
    layers = len(each)
    kept_so_far, gathered = (
        np.concatenate([[0], np.cumsum(each[:, field])]) for field in (kept, Field.GATHERED)
    )
    result = np.zeros((layers + 1, layers + 1), dtype=np.int64)
    for first in range(layers):
        from_there = np.maximum(np.arange(first, layers) - leaf.ahead, first)
        highest = np.maximum.accumulate(kept_so_far[first + 1 :] - gathered[from_there])
        result[first, first + 1 :] = highest + (gathered - kept_so_far)[first + 1 :]
    return np.maximum(result, 0)


def beyond_at_start(leaf: Leaf, mode: str, beyond: Ints, gathered: Ints, kept: Ints) -> Ints:
    """``beyond`` of the first stage, whose layers have so much in ``gathered`` weights and ``kept``
    activations."""
    if not leaf.ahead:
        return beyond
    first = leaf.kinds[leaf.sequence[0]][leaf.parts(mode)[0].kept]
    most: Ints = np.maximum(beyond, gathered + leaf.embedding[Field.GATHERED] - (kept - first))
    return np.where(gathered > 0, most, beyond)


@lru_cache(maxsize=65536)
def resharded_peaks(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int = 0,
    given: GivenOrder | None = None,
) -> tuple[Vector, ...]:  # fmt: skip
    """As ``live_peaks``, followed by which of a rank's other chunks are gathered beside (0 or 1).

    Each entry is of one pass: microbatches alive at its end where it is a forward, at its start
    else.
    """
    if vpp == 1:
        known = live_peaks(schedule, pp, vpp, microbatches, rank, size, given)
        return tuple((*vector, 0) for vector in known)
    order = [
        (work == Pass.FORWARD, chunk)
        for work, chunk, _ in order_table(
            schedule, pp, vpp, microbatches, rank, size, given
        ).tolist()
    ]
    windows = _windows([chunk for _, chunk in order])
    alive, gathered, active, met = [0] * vpp, [False] * vpp, set[int](), set[Vector]()
    for (forward, chunk), window in zip(order, windows, strict=True):
        for other in range(vpp):
            if other not in window:
                gathered[other] = False
            elif other not in active:
                gathered[other] = True
        active = set(window)
        alive[chunk] += forward
        beside = [int(on and other != chunk) for other, on in enumerate(gathered)]
        met.add((*alive, *beside))
        alive[chunk] -= not forward
        gathered[chunk] = not forward
    return tuple(sorted(met))


def _windows(chunks: list[int]) -> list[tuple[int, ...]]:
    """The next ``ACTIVE`` distinct chunks from each pass on."""
    result: list[tuple[int, ...]] = []
    window: tuple[int, ...] = ()
    for chunk in reversed(chunks):
        window = (chunk, *(other for other in window if other != chunk))
        result.append(window[:ACTIVE])
    return result[::-1]


def held_at_peaks(leaf: Leaf, rank: int) -> tuple[Vector, ...]:
    """What a rank holds at each candidate for the peak: ``live_peaks``, or the above."""
    peaks = resharded_peaks if leaf.reshards else live_peaks
    return peaks(
        leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank, leaf.round_size, leaf.order
    )


@lru_cache(maxsize=16384)
def held_columns(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int, size: int,
    given: GivenOrder | None, reshards: bool,
) -> Ints:  # fmt: skip
    """The same as an array with a column for each candidate."""
    peaks = resharded_peaks if reshards else live_peaks
    vectors = peaks(schedule, pp, vpp, microbatches, rank, size, given)
    return np.ascontiguousarray(np.array(vectors, dtype=np.int64).T)
