"""What all rows together say: shares, errors by source, family and stack, the worst rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from planner.studies.peaks import peak_errors
from planner.studies.statistics import by, relative, statistics

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
        "peak_memory": peak_errors(priced),
    }


def step_time_errors(scored: Sequence[Row]) -> dict[str, Any]:
    """Errors of predicted over measured step time, minus one."""
    families = by(scored, "family", error_of)
    worst = sorted(scored, key=lambda row: (-abs(error_of(row) or 0.0), str(row["id"])))[:WORST]
    return {
        "overall": statistics(error_of(row) for row in scored),
        "median_of_family_medians": _middle(each["median"] for each in families.values()),
        "median_of_family_means": _middle(each["mean"] for each in families.values()),
        "in_band": _share_in_band(scored),
        "family": families,
        "source": by(scored, "source", error_of),
        "stack": by(scored, "stack", error_of),
        "worst": {str(row["id"]): error_of(row) for row in worst},
    }


def error_of(row: Row) -> float | None:
    """Signed relative error of the step time; None where either side is missing."""
    return relative(row["predicted_step_time_s"], row["measured_step_time_s"])


def _middle(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def _share_in_band(rows: Sequence[Row]) -> float | None:
    if not rows:
        return None
    inside = [row["band_s"][0] <= row["measured_step_time_s"] <= row["band_s"][1] for row in rows]
    return inside.count(True) / len(rows)
