"""The check of a bound finds what is below it, and nothing where the bound is the optimum."""

from __future__ import annotations

import pytest

from planner import refute
from planner.errors import LimitReachedError
from planner.refute import better_layout
from tests.oracle.amount import of
from tests.oracle.brute import brute_force
from tests.oracle.instances import draw


@pytest.mark.parametrize("start", range(7000, 7120, 20))
def test_a_bound_holds_up_to_the_optimum(start: int) -> None:
    feasible = 0
    for seed in range(start, start + of(20, 6)):
        request = draw(seed)
        optimum = brute_force(request).time
        if optimum is None:
            assert better_layout(request, 1 << 60) is None, f"seed {seed}"
            continue
        feasible += 1
        assert better_layout(request, optimum) is None, f"seed {seed}"
        assert better_layout(request, optimum + 1) is not None, f"seed {seed}"
    assert feasible > 0


def test_a_bound_that_takes_too_long_is_not_called_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the optimum there is nothing to find, only layouts that were not looked at."""
    monkeypatch.setattr(refute, "LARGEST_LEAF", 1)
    solved = ((r, brute_force(r).time) for r in map(draw, range(7000, 7040)))
    request, optimum = next((r, time) for r, time in solved if time is not None)
    with pytest.raises(LimitReachedError, match="neither confirmed nor refuted"):
        better_layout(request, optimum)
    monkeypatch.undo()
    assert better_layout(request, optimum) is None
