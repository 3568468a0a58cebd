"""A calibration as tables: what moved, and what the fit is worth on what it did not see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from planner.report import parts

if TYPE_CHECKING:
    from rich.console import RenderableType


def calibration_table(document: dict[str, Any], folder: Path | None) -> RenderableType:
    """Constants before and after, errors before, after and left out, and the files."""
    blocks: list[RenderableType] = []
    for fit in document["fits"]:
        blocks += [parts.section(fit["title"]), _constants(fit["constants"]), Text()]
        blocks += [_errors(fit["errors"]), Text()]
    where = f"{folder}/" if folder else ""
    names = ", ".join(f"{where}{name}" for name in document["profiles"])
    blocks.append(
        Text(f"profiles written: {names}" if folder else f"--profiles FOLDER writes {names}")
    )
    return Group(*blocks)


def _constants(rows: list[dict[str, Any]]) -> RenderableType:
    table = parts.ruled(
        ("constant", "left"), ("before", "right"), ("after", "right"), ("bounds", "left"),
        ("without a family", "left"), ("from", "right"),
    )  # fmt: skip
    for row in rows:
        low, high = row["left_out_range"]
        after = Text(f"{row['after']:.4g}", style="yellow" if row["at_bound"] else "")
        table.add_row(
            row["name"], f"{row['before']:.4g}", after, f"{row['low']:.3g} to {row['high']:.3g}",
            f"{low:.4g} to {high:.4g}", str(row["measurements"]),
        )  # fmt: skip
    return table


def _errors(errors: dict[str, Any]) -> RenderableType:
    table = parts.ruled(
        ("error", "left"), ("n", "right"), ("median", "right"), ("mean", "right"),
        ("P90", "right"), ("bias", "right"),
    )  # fmt: skip
    for name, title in (
        ("before", "as shipped"), ("after", "fitted"), ("left_out", "fitted without its family"),
    ):  # fmt: skip
        found = errors[name]
        table.add_row(
            title, str(found["n"]),
            *(f"{100 * found[key]:.1f} %" for key in ("median", "mean", "p90")),
            f"{100 * found['bias']:+.1f} %",
        )  # fmt: skip
    return table
