"""What all rows together say: shares, errors by source, family and stack, the worst rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

WORST = 10
Row = dict[str, Any]


def summarise(rows: Sequence[Row], *, denominator: Sequence[bool]) -> dict[str, Any]:
    """The summary of a validation.

    ``denominator`` marks the rows that state devices, sequence, layers, hidden size, a batch and a
    metric: the share priced is of these.
    """
    priced = [row for row in rows if row["status"] == "priced"]
    skipped = Counter(row["reason"] for row in rows if row["status"] == "skipped")
    eligible = sum(denominator)
    covered = sum(
        row["status"] == "priced" for row, counts in zip(rows, denominator, strict=True) if counts
    )
    scored = [row for row in priced if row["scored"] and error_of(row) is not None]
    return {
        "rows": len(rows),
        "priced": len(priced),
        "skipped": dict(sorted(skipped.items(), key=lambda item: (-item[1], item[0]))),
        "denominator": eligible,
        "denominator_priced": covered,
        "share_priced": covered / eligible if eligible else None,
        "priced_not_fitting": sum(row["fits"] is False for row in priced),
        "policy_filled": dict(
            sorted(Counter(name for row in priced for name in row["policy_filled"]).items())
        ),
        "step_time": step_time_errors(scored),
        "peak_memory": _by(priced, "source", memory_error_of),
    }


def step_time_errors(scored: Sequence[Row]) -> dict[str, Any]:
    """Errors of predicted over measured step time, minus one."""
    families = _by(scored, "family", error_of)
    worst = sorted(scored, key=lambda row: (-abs(error_of(row) or 0.0), str(row["id"])))[:WORST]
    return {
        "overall": statistics(error_of(row) for row in scored),
        "median_of_family_medians": _middle(each["median"] for each in families.values()),
        "median_of_family_means": _middle(each["mean"] for each in families.values()),
        "in_band": _share_in_band(scored),
        "family": families,
        "source": _by(scored, "source", error_of),
        "stack": _by(scored, "stack", error_of),
        "worst": {str(row["id"]): error_of(row) for row in worst},
    }


def error_of(row: Row) -> float | None:
    """Signed relative error of the step time; None where either side is missing."""
    return _relative(row["predicted_step_time_s"], row["measured_step_time_s"])


def memory_error_of(row: Row) -> float | None:
    """Signed relative error of the peak memory; None where either side is missing."""
    return _relative(row["predicted_peak_gib"], row["measured_peak_gib"])


def _relative(predicted: float | None, measured: float | None) -> float | None:
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


def _by(
    rows: Sequence[Row], key: str, error: Callable[[Row], float | None]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float | None]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(error(row))
    known = {name: statistics(errors) for name, errors in sorted(groups.items())}
    return {name: each for name, each in known.items() if each is not None}


def _middle(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def _share_in_band(rows: Sequence[Row]) -> float | None:
    if not rows:
        return None
    inside = [row["band_s"][0] <= row["measured_step_time_s"] <= row["band_s"][1] for row in rows]
    return inside.count(True) / len(rows)
