"""The law of the memory margins: families count alike, whatever the number of their runs."""

from __future__ import annotations

import pytest

from benchmarks.memory.margins import coverage, quantile


def test_a_large_family_does_not_speak_for_a_small_one() -> None:
    large = [0.0] * 1000
    assert quantile({"large": large, "small": [0.2, 0.01]}) == 0.2
    assert quantile({"large": large, "small": [0.2] + [0.01] * 39}) == 0.01


def test_never_below_none() -> None:
    assert quantile({"a": [-0.3, -0.1], "b": [-0.2]}) == 0.0


def test_what_the_others_cover() -> None:
    assert coverage({"a": [0.0, 0.1], "b": [0.05], "c": [0.02]}) == pytest.approx((0.5 + 1 + 1) / 3)
