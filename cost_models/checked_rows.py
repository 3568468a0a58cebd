"""Rows of priced tables that a check of memory reads, layout by layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Bools, Int64
from cost_models.recompute import ModeRows


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Arrays of one length, an entry per layout: each may recompute in a mode of its own."""

    front: Int64
    """Activations of a layer that recomputes."""
    rest: Int64
    """The same beyond the number of layers that recompute."""
    working: Int64
    limit: NDArray[np.float64]
    """That number; infinity: all of them."""

    @staticmethod
    def alike(
        rows: ModeRows, size: int, rest: int | None = None, count: Int64 | None = None
    ) -> CheckedRows:
        """``size`` layouts of one mode; with ``count``, in as many layers, beyond which ``rest``
        holds."""
        limit = np.full(size, np.inf) if count is None else count.astype(np.float64)
        beyond = np.full(size, rows.kept if rest is None else rest)
        return CheckedRows(np.full(size, rows.kept), beyond, np.full(size, rows.working), limit)

    def take(self, index: Int64 | Bools) -> CheckedRows:
        """Those of some layouts."""
        return CheckedRows(
            self.front[index], self.rest[index], self.working[index], self.limit[index]
        )
