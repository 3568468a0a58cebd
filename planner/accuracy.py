"""The error band printed beside a prediction."""

from __future__ import annotations

from planner.plan import Layout
from planner.request import Request

DEFAULT_BAND = 0.25
"""Half-width of the band, relative, until residuals of left-out measurements narrow it."""


def band(request: Request, layout: Layout, step_s: float) -> tuple[float, float, str]:
    """Low and high step time in seconds, and where the width is from."""
    return (
        step_s * (1 - DEFAULT_BAND),
        step_s * (1 + DEFAULT_BAND),
        "assumed +-25 %: not yet earned from left-out measurements",
    )
