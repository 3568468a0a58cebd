"""Every shipped stack: its bounds are below every completion, and its optimum is brute force's."""

from __future__ import annotations

import pytest

from hardware_profiles.loader import catalog_names
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.test_bounds import check_bounds

SEEDS = range(5000, 5006)


@pytest.mark.parametrize("stack", catalog_names("stack"))
def test_the_planner_is_right_with_every_stack(stack: str) -> None:
    compared = 0
    for seed in SEEDS:
        if draw(seed, stack).unsupported is not None:
            continue  # no figures of the stack's attention kernel on this device
        compared += check_bounds(seed, stack)
        assert not differences(compare(seed, stack=stack))
    assert compared > 0
