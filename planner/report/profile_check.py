"""The result of ``planner catalog check`` as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from planner.report import parts

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.studies.profile_check import ProfileReport

_STYLES = {"measured": "green", "borrowed": "yellow", "assumed": "red"}


def check_table(report: ProfileReport) -> RenderableType:
    """Problems first, then each efficiency with how it is known."""
    blocks: list[RenderableType] = [parts.section(f"{report.kind} {report.name}")]
    if report.problems:
        blocks += [Text(f"  implausible: {problem}", style="red") for problem in report.problems]
    else:
        blocks.append(Text("  reads well; no number contradicts another"))
    if not report.efficiencies:
        return Group(*blocks)
    counts = ", ".join(f"{count} {basis}" for basis, count in report.counts().items() if count)
    blocks += [Text(), parts.section(f"efficiencies: {counts}")]
    table = parts.grid(("part", "left"), ("of", "left"), ("", "right"), ("known", "left"))
    for each in report.efficiencies:
        basis = f"borrowed from {each.lender}" if each.basis == "borrowed" else each.basis
        table.add_row(
            "", each.part, each.what, f"{each.value:.4g}", Text(basis, style=_STYLES[each.basis]),
        )  # fmt: skip
    return Group(*blocks, table)
