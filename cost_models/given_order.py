"""An order of work that a user gives: the actions of each rank, one after the other.

``planner.schedule_csv`` reads it and says what cannot run. Two orders are equal where their ``key``
is, so that what follows from one is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import GivenSchedule
from cost_models.passes import Pass

Table = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GivenOrder:
    """Actions of every rank of a pipeline, rows of pass, chunk and microbatch."""

    key: str
    """A digest of the actions."""
    schedule: GivenSchedule = field(compare=False)
    pp: int = field(compare=False)
    vpp: int = field(compare=False)
    microbatches: int = field(compare=False)
    ranks: tuple[Table, ...] = field(compare=False, repr=False)
    """One table per rank; shape (actions, 3)."""


@lru_cache(maxsize=1024)
def alive_after(order: GivenOrder, rank: int) -> Table:
    """Microbatches with activations on a rank after each of its actions; (actions, chunks)."""
    works, chunks, _ = order.ranks[rank].T
    change = (works == Pass.FORWARD).astype(np.int64)
    change -= np.isin(works, (Pass.BACKWARD, Pass.WEIGHT))
    result: Table = np.cumsum(change[:, None] * (chunks[:, None] == np.arange(order.vpp)), axis=0)
    return result


def most_alive_beside(order: GivenOrder, rank: int, chunks: Sequence[int]) -> int:
    """Most microbatches alive at once on all chunks but ``chunks`` of a rank, together, while these
    have one too: as they have when the last chunk's first forward ends."""
    alive, beside = alive_after(order, rank), list(chunks)
    there = (alive[:, beside] > 0).all(axis=1)
    return int((alive.sum(axis=1) - alive[:, beside].sum(axis=1))[there].max())


def alive_on_every_chunk(order: GivenOrder, rank: int) -> int:
    """Most microbatches that every chunk of a rank has alive at one moment."""
    return int(alive_after(order, rank).min(axis=1).max())
