"""Distinct values of columns, and where each row has its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def distinct_values(values: Int64) -> tuple[Int64, NDArray[np.intp]]:
    """Distinct values in ascending order, and for each value the index of its distinct one.

    Degrees are small beside the number of configurations, so they are marked in a table; sorting
    them, as :func:`numpy.unique` does, took most of the time of a collective's law.
    """
    limit = int(values.max(initial=0)) + 1
    if limit > values.size or values.min(initial=0) < 0:
        distinct, where = np.unique(values, return_inverse=True)
        return distinct, where.reshape(values.shape)
    seen = np.zeros(limit, dtype=np.bool_)
    seen[values] = True
    found = np.flatnonzero(seen)
    index = np.empty(limit, dtype=np.intp)
    index[found] = np.arange(len(found))
    return found, index[values]


def unique_rows(columns: Sequence[Int64]) -> tuple[list[Int64], Int64]:
    """Distinct rows of equal-length columns, and for each row the index of its distinct one."""
    code, range_ = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        radix = int(column.max(initial=0)) + 1
        if range_ * radix >= 1 << 62:
            _, code = np.unique(code, return_inverse=True)
            range_ = len(code)
        code = code * radix + column
        range_ *= radix
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return [column[first] for column in columns], inverse.astype(np.int64)
