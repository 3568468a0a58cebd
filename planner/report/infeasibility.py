"""Why no layout satisfies a request, and what would."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from hardware_profiles.units import format_bytes
from planner.report import parts, words
from planner.report.plan import certificate_words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.plan import Infeasibility


def infeasibility_table(diagnosis: Infeasibility) -> RenderableType:
    """The binding constraint, the fullest device by category, the proof and the ways out."""
    blocks: list[RenderableType] = [Padding(Text(diagnosis.binding, style="red"), (0, 0, 0, 2))]
    if diagnosis.closest_layout is not None:
        blocks += [
            Text(),
            parts.section("Closest layout"),
            Text("  " + words.degrees(diagnosis.closest_layout)),
            Text("  " + words.schedule(diagnosis.closest_layout)),
            Text("  " + words.recompute(diagnosis.closest_layout)),
        ]
    if diagnosis.memory and diagnosis.needed_bytes and diagnosis.usable_bytes:
        over = diagnosis.needed_bytes - diagnosis.usable_bytes
        blocks += [
            Text(),
            parts.section(
                f"Its fullest device: {format_bytes(diagnosis.needed_bytes)} of "
                f"{format_bytes(diagnosis.usable_bytes)}, {format_bytes(over)} too much"
            ),
            parts.breakdown(diagnosis.memory, diagnosis.needed_bytes),
        ]
    blocks += [
        Text(),
        parts.section("Proof"),
        certificate_words(diagnosis.certificate, diagnosis.target),
    ]
    if diagnosis.ways_out:
        table = parts.grid(("step time", "right"), ("change", "left"), ("effect", "left"))
        for way in diagnosis.ways_out:
            seconds = "" if way.step_time_s is None else words.seconds(way.step_time_s)
            table.add_row("", seconds, way.change, way.effect)
        blocks += [Text(), parts.section("Ways out"), table]
    return Group(*blocks)
