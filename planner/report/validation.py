"""Predictions beside measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from planner.report import parts, words

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_ROWS = 60
"""Rows shown in full; JSON holds all of them."""


def step_time_errors(document: dict[str, Any]) -> list[tuple[str, float]]:
    """Row id and relative step-time error, predicted over measured minus one, where both exist."""
    errors = []
    for row in document.get("rows", ()):
        predicted, measured = row.get("predicted_step_time_s"), row.get("measured_step_time_s")
        if row.get("status") == "priced" and predicted and measured:
            errors.append((str(row["id"]), predicted / measured - 1))
    return errors


def validation_table(document: dict[str, Any]) -> RenderableType:
    """Each priced row with its error, the summary, and why rows were skipped."""
    rows = document["rows"]
    priced = [row for row in rows if row["status"] == "priced"]
    table = parts.ruled(
        ("run", "left"), ("measured", "right"), ("predicted", "right"), ("error", "right"),
        ("in band", "left"), ("memory GiB", "right"),
    )  # fmt: skip
    errors = dict(step_time_errors(document))
    for row in priced[:MOST_ROWS]:
        table.add_row(
            str(row["id"]),
            _seconds(row.get("measured_step_time_s")),
            _seconds(row.get("predicted_step_time_s")),
            _error(errors.get(str(row["id"]))),
            _in_band(row),
            _memory(row),
        )
    blocks: list[RenderableType] = [table]
    if len(priced) > MOST_ROWS:
        blocks.append(Text(f"{len(priced) - MOST_ROWS} more rows: see --format json", style="dim"))
    skipped: dict[str, int] = {}
    for row in rows:
        if row["status"] != "priced":
            reason = str(row.get("reason") or "no reason given")
            skipped[reason] = skipped.get(reason, 0) + 1
    blocks += [Text(), parts.section("Summary"), _summary(document.get("summary"))]
    if skipped:
        reasons = parts.grid(("", "right"), ("", "left"))
        for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
            reasons.add_row("", f"{count}", reason)
        blocks += [Text(), parts.section(f"Skipped ({sum(skipped.values())} rows)"), reasons]
    return Group(*blocks)


def _summary(summary: object) -> RenderableType:
    table = parts.grid(("", "left"), ("", "left"))
    for key, value in _flat(summary, ""):
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row("", key, shown)
    return table


def _flat(value: object, prefix: str) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [
            row for key, item in value.items() for row in _flat(item, f"{prefix} {key}".strip())
        ]
    return [(prefix, value)]


def _seconds(value: float | None) -> str:
    return "" if value is None else words.seconds(value)


def _error(error: float | None) -> Text:
    if error is None:
        return Text()
    style = "green" if abs(error) <= 0.1 else "yellow" if abs(error) <= 0.25 else "red"
    return Text(f"{error * 100:+.1f} %", style=style)


def _in_band(row: dict[str, Any]) -> str:
    band, measured = row.get("band_s"), row.get("measured_step_time_s")
    if not band or measured is None:
        return ""
    return "yes" if band[0] <= measured <= band[1] else "no"


def _memory(row: dict[str, Any]) -> str:
    predicted, measured = row.get("predicted_peak_gib"), row.get("measured_peak_gib")
    if predicted is None:
        return ""
    return f"{predicted:.1f}" if measured is None else f"{predicted:.1f} / {measured:.1f}"
