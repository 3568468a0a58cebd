"""Statistics of relative errors, and of rows in groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]


def relative(predicted: float | None, measured: float | None) -> float | None:
    """Predicted over measured, minus one; None where either is missing or zero."""
    return None if not predicted or not measured else predicted / measured - 1


def statistics(errors: Iterable[float | None]) -> dict[str, Any] | None:
    """``n``, median, mean and P90 of the absolute errors, and the median of the signed ones.

    P90 is the smallest error that at least 90 % of the rows do not exceed. None for no errors.
    """
    known = [error for error in errors if error is not None]
    if not known:
        return None
    sizes = sorted(abs(error) for error in known)
    return {
        "n": len(known),
        "median": median(sizes),
        "mean": sum(sizes) / len(sizes),
        "p90": sizes[math.ceil(0.9 * len(sizes)) - 1],
        "bias": median(known),
        "worst": sizes[-1],
    }


def by(
    rows: Sequence[Row], key: str, error: Callable[[Row], float | None]
) -> dict[str, dict[str, Any]]:
    """Statistics of the errors of each group of rows that has any."""
    groups: dict[str, list[float | None]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(error(row))
    known = {name: statistics(errors) for name, errors in sorted(groups.items())}
    return {name: each for name, each in known.items() if each is not None}
