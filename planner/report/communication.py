"""What a layout communicates, as tables: one layer of each kind, then a step of each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hardware_profiles.units import format_bytes
from planner.report import parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from cost_models.traffic import Calls


def communication_tables(
    layers: Mapping[str, Sequence[Calls]], stages: Sequence[Sequence[Calls]]
) -> RenderableType:
    """Calls and bytes of one device; bytes are of the whole buffer, summed over calls."""
    return Group(
        Text(),
        parts.section("Communication of one layer (one microbatch; step: once per step)"),
        _table({name: calls for name, calls in layers.items() if calls}, named=True),
        Text(),
        parts.section("Communication of a step (one device of each stage)"),
        _table({str(stage): calls for stage, calls in enumerate(stages) if calls}, named=False),
    )


def _table(groups: Mapping[str, Sequence[Calls]], *, named: bool) -> Table:
    """One row per call: below its layer where calls are ``named``, else beside its stage."""
    table = parts.grid(
        ("op" if named else "stage", "left"), ("pass", "left"), ("collective", "left"),
        ("group", "left"), ("ranks", "right"), ("calls", "right"), ("bytes", "right"),
    )  # fmt: skip
    for column in table.columns[2:]:
        column.no_wrap = True
    for owner, calls in groups.items():
        if named:
            table.add_row("", owner)
        for index, call in enumerate(calls):
            name = f"  {call.name.removeprefix(owner + '.')}"
            table.add_row(
                "", name if named else owner if index == 0 else "", call.phase, call.kind,
                call.group, str(call.ranks), f"{call.count:,}", format_bytes(call.bytes),
            )  # fmt: skip
    return table
