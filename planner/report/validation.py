"""Predictions beside measurements: what all rows say first, single rows where they are few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from planner.report import parts, words

if TYPE_CHECKING:
    from rich.console import RenderableType

FEW_ROWS = 12
"""Up to so many priced rows are shown without being asked for."""
MOST_FILLED = 6
"""Columns named of those that the policies filled."""


def validation_table(document: dict[str, Any], *, every_row: bool = False) -> RenderableType:
    """The summary by source, the worst rows and why rows were skipped; each priced row where there
    are few, or with ``every_row``."""
    rows, summary = document["rows"], document["summary"]
    priced = [row for row in rows if row["status"] == "priced"]
    blocks: list[RenderableType] = [_share(summary)]
    if priced and (every_row or len(priced) <= FEW_ROWS):
        blocks += [Text(), _rows(priced)]
    if summary["step_time"]["overall"]:
        blocks += [Text(), parts.section("Step time, predicted over measured")]
        blocks += [_by_source(summary["step_time"], priced), *_overall(summary)]
    blocks += _memory_lines(summary["peak_memory"])
    blocks += _ranking(summary.get("ranking") or {})
    if summary["step_time"]["worst"] and not every_row and len(priced) > FEW_ROWS:
        blocks += [Text(), parts.section("Worst rows"), _worst(summary["step_time"]["worst"], rows)]
        blocks.append(Text("every row: --rows, or --format json", style="dim"))
    blocks += _skipped(summary["skipped"])
    return Group(*blocks)


def _share(summary: dict[str, Any]) -> Text:
    text = f"{summary['priced']} of {summary['rows']} rows priced"
    if summary["share_priced"] is not None:
        text += (
            f"; {100 * summary['share_priced']:.1f} % of the {summary['denominator']} that state "
            "devices, sequence, layers, hidden size, a batch and a figure"
        )
    filled = summary["policy_filled"]
    if filled:
        most = sorted(filled, key=lambda name: (-filled[name], name))
        shown = ", ".join(f"{name} in {filled[name]}" for name in most[:MOST_FILLED])
        more = f" and {len(most) - MOST_FILLED} more columns" if len(most) > MOST_FILLED else ""
        text += f". Filled by policy: {shown}{more}"
    return Text(text)


def _by_source(step_time: dict[str, Any], priced: list[dict[str, Any]]) -> RenderableType:
    table = parts.ruled(
        ("source", "left"), ("rows", "right"), ("median", "right"), ("mean", "right"),
        ("P90", "right"), ("bias", "right"), ("worst", "right"), ("in band", "right"),
    )  # fmt: skip
    groups = [(name or "(none)", name, each) for name, each in step_time["source"].items()]
    for title, name, each in groups:
        own = [row for row in priced if row["scored"] and row["source"] == name]
        inside = [_inside(row) for row in own if row["measured_step_time_s"]]
        table.add_row(title, *_statistics(each), _percent(_mean(inside)))
    if len(groups) > 1:
        each = step_time["overall"]
        table.add_row(
            Text("all rows", style="bold"), *_statistics(each), _percent(step_time["in_band"])
        )
    return table


def _statistics(each: dict[str, Any]) -> tuple[str | Text, ...]:
    numbers = (_percent(each[name]) for name in ("median", "mean", "p90"))
    return (str(each["n"]), *numbers, _error(each["bias"]), _percent(each["worst"]))


def _overall(summary: dict[str, Any]) -> list[RenderableType]:
    step_time, lines = summary["step_time"], []
    if len(step_time["family"]) > 1:
        lines.append(
            f"{len(step_time['family'])} families that count alike: median of their medians "
            f"{_percent(step_time['median_of_family_medians'])}, of their means "
            f"{_percent(step_time['median_of_family_means'])}"
        )
    lines.append("Median, mean and P90 are of absolute errors; bias is the median signed error.")
    if summary["priced_not_fitting"]:
        lines.append(
            f"{summary['priced_not_fitting']} rows that ran are predicted not to fit in memory"
        )
    return [Text(line, style="dim") for line in lines]


def _memory_lines(peak: dict[str, Any]) -> list[RenderableType]:
    found = peak["overall"]
    if not found:
        return []
    text = (
        f"{found['n']} readings: median {_percent(found['median'])}, P90 {_percent(found['p90'])}, "
        f"bias {100 * found['bias']:+.1f} %; {_percent(found['under'])} more than 5 % too low"
    )
    return [Text(), parts.section("Peak memory, predicted over measured"), Text(text)]


def _ranking(ranking: dict[str, dict[str, Any]]) -> list[RenderableType]:
    if not ranking:
        return []
    table = parts.ruled(
        ("source", "left"), ("sweeps", "right"), ("layouts", "right"), ("Kendall's tau", "right"),
        ("mean regret", "right"), ("worst", "right"),
    )  # fmt: skip
    for source, each in ranking.items():
        tau = "" if each["tau"] is None else f"{each['tau']:.2f}"
        regrets = (_percent(each["mean_regret"]), _percent(each["worst_regret"]))
        table.add_row(source or "(none)", str(each["sweeps"]), str(each["layouts"]), tau, *regrets)
    title = "Order of layouts that differ in nothing else"
    note = "Regret: what the layout predicted best took, over the best measured one."
    return [Text(), parts.section(title), table, Text(note, style="dim")]


def _worst(worst: dict[str, float], rows: list[dict[str, Any]]) -> RenderableType:
    by_id = {str(row["id"]): row for row in rows}
    return _rows([by_id[name] for name in worst])


def _rows(rows: list[dict[str, Any]]) -> RenderableType:
    table = parts.ruled(
        ("run", "left"), ("measured", "right"), ("predicted", "right"), ("error", "right"),
        ("in band", "left"), ("memory GiB", "right"),
    )  # fmt: skip
    for row in rows:
        measured, predicted = row["measured_step_time_s"], row["predicted_step_time_s"]
        table.add_row(
            str(row["id"]),
            _seconds(measured),
            _seconds(predicted),
            _error(predicted / measured - 1 if predicted and measured else None),
            "" if not measured else "yes" if _inside(row) else "no",
            _memory(row),
        )
    return table


def _skipped(skipped: dict[str, int]) -> list[RenderableType]:
    if not skipped:
        return []
    reasons = parts.grid(("", "right"), ("", "left"))
    for reason, count in skipped.items():
        reasons.add_row("", f"{count}", reason)
    return [Text(), parts.section(f"Skipped ({sum(skipped.values())} rows)"), reasons]


def _inside(row: dict[str, Any]) -> bool:
    low, high = row["band_s"]
    return bool(low <= row["measured_step_time_s"] <= high)


def _mean(values: list[bool]) -> float | None:
    return values.count(True) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    return "" if value is None else words.seconds(value)


def _error(error: float | None) -> Text:
    if error is None:
        return Text()
    style = "green" if abs(error) <= 0.1 else "yellow" if abs(error) <= 0.25 else "red"
    return Text(f"{error * 100:+.1f} %", style=style)


def _memory(row: dict[str, Any]) -> str:
    predicted, measured = row.get("predicted_peak_gib"), row.get("measured_peak_gib")
    if predicted is None:
        return ""
    return f"{predicted:.1f}" if measured is None else f"{predicted:.1f} / {measured:.1f}"
