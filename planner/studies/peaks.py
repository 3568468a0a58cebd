"""Predicted beside published peak memory: errors, and how often the dangerous side is taken.

A reading is compared with the prediction of what was read (``conventions.yaml``: bytes in tensors,
bytes that the allocator holds, or what the driver shows). Figures that a paper computed from a
formula of its own stand apart: they measure nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from planner.studies.statistics import by, relative, statistics

DANGEROUS = 0.05
"""A prediction this much below a reading may run out of memory where it promised not to."""

Row = dict[str, Any]


def peak_errors(priced: Sequence[Row]) -> dict[str, Any]:
    """Errors of predicted over measured peak memory, minus one: all, by family, by source, and
    against formulas; ``under`` is the share of rows more than 5 % below the reading."""
    families = by(priced, "family", memory_error_of)
    return {
        "overall": _with_under([memory_error_of(row) for row in priced]),
        "median_of_family_medians": (
            median(each["median"] for each in families.values()) if families else None
        ),
        "family": _grouped(priced, "family", memory_error_of),
        "source": _grouped(priced, "source", memory_error_of),
        "formula": _grouped(priced, "source", formula_error_of),
    }


def memory_error_of(row: Row) -> float | None:
    """Signed relative error of the peak memory; None where either side is missing."""
    return relative(row["predicted_peak_gib"], row["measured_peak_gib"])


def formula_error_of(row: Row) -> float | None:
    """The same against a figure that the source computed."""
    return relative(row["predicted_peak_gib"], row["formula_peak_gib"])


def _grouped(
    rows: Sequence[Row], key: str, error: Callable[[Row], float | None]
) -> dict[str, dict[str, Any]]:
    names = sorted({str(row[key]) for row in rows})
    found = {name: _with_under(error(r) for r in rows if str(r[key]) == name) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _with_under(errors: Iterable[float | None]) -> dict[str, Any] | None:
    known = [error for error in errors if error is not None]
    found = statistics(known)
    if found is None:
        return None
    return {**found, "under": sum(error < -DANGEROUS for error in known) / len(known)}
