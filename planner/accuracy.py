"""The error band printed beside a prediction."""

from __future__ import annotations

HALF_WIDTH = 0.25
"""Relative half-width of the band, until residuals of left-out measurements earn a narrower one."""
SOURCE = "assumed +-25 %: not yet earned from left-out measurements"


def band(step_s: float) -> tuple[float, float, str]:
    """Low and high step time in seconds, and where the width is from."""
    return (step_s * (1 - HALF_WIDTH), step_s * (1 + HALF_WIDTH), SOURCE)
