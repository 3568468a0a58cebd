"""One layout with its price."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from planner.report import parts
from planner.report.plan import fullest_device, layout_words, stages_table, time_block

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.plan import Layout, Prediction


def evaluation_table(
    layout: Layout, prediction: Prediction, position: str = "token"
) -> RenderableType:
    """What ``planner evaluate`` shows of a layout on a terminal; ``position``: see
    :func:`planner.report.parts.headline`."""
    blocks: list[RenderableType] = [
        parts.headline(prediction, position),
        Text(),
        parts.section("Layout"),
        layout_words(layout),
        Text(),
        parts.section("Stages"),
        stages_table(layout, prediction),
        Text(),
        parts.Beside(time_block(prediction), fullest_device(prediction)),
    ]
    if prediction.assumptions:
        blocks += [
            Text(),
            parts.section("Assumptions"),
            parts.bullets(prediction.assumptions, style="yellow"),
        ]
    return Group(*blocks)
