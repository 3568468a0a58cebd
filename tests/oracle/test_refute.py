"""The check of a bound finds what is below it, and nothing where the bound is the optimum."""

from __future__ import annotations

import pytest

from planner.refute import better_layout
from tests.oracle.brute import brute_force
from tests.oracle.instances import draw


@pytest.mark.parametrize("start", range(7000, 7120, 20))
def test_a_bound_holds_up_to_the_optimum(start: int) -> None:
    feasible = 0
    for seed in range(start, start + 20):
        request = draw(seed)
        optimum = brute_force(request).time
        if optimum is None:
            assert better_layout(request, 1 << 60) is None, f"seed {seed}"
            continue
        feasible += 1
        assert better_layout(request, optimum) is None, f"seed {seed}"
        assert better_layout(request, optimum + 1) is not None, f"seed {seed}"
    assert feasible > 0
