"""Free virtual stages: which partitions are looked at, and that better ones are found."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cost_models.layout import V_SHAPED, Schedule
from cost_models.leaf import (
    Completion,
    stage_costs,
)
from cost_models.partitions import count_free_bounds, free_bounds, interleaved_bounds
from cost_models.step_time import simulate_step
from planner.free_stages import free_partitions, improve, is_listed
from planner.leaves import DEGREES_IN_ORDER, Candidate, Incumbent
from planner.program import ProgramSolution
from tests.rows import row
from tests.unit.test_program import LEAF

PIPELINE = replace(
    LEAF, schedule="interleaved", pp=4, vpp=2, microbatches=8, sequence=(0,) * 16,
    kinds=(row(FORWARD=10, BACKWARD=20),), head=row(FORWARD=8, BACKWARD=16),
)  # fmt: skip
"""Sixteen equal layers and a head that takes most of one."""


def test_all_of_few_and_the_likely_ones_of_many() -> None:
    few = replace(PIPELINE, sequence=(0,) * 7, pp=2)
    assert is_listed(few)
    assert len(free_partitions(few)) == count_free_bounds(7, 4) == len(set(free_bounds(7, 4)))
    assert not is_listed(PIPELINE)


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_the_likely_ones_are_partitions_and_hold_the_even_ones(schedule: Schedule) -> None:
    leaf = replace(PIPELINE, schedule=schedule, sequence=(0,) * 61, pp=8)
    found = {tuple(bounds) for bounds in free_partitions(leaf).tolist()}
    assert set(interleaved_bounds(leaf)) <= found
    assert len(found) > 50
    for bounds in found:
        sizes = [b - a for a, b in pairwise(bounds)]
        assert sum(sizes) == 61
        assert min(sizes) >= 0
        assert 0 not in sizes[1:-1]
    assert (schedule in V_SHAPED) == (leaf.held(0) == [0, 15])


def test_moving_layers_makes_a_pipeline_with_a_long_head_faster() -> None:
    """Brute force over all 19,448 partitions: in rounds of 4 (3 2 2 2 2 2 2 1) takes 1,224,
    the best of even stages 1,332."""
    leaf = replace(PIPELINE, round_size=4)
    even = Completion(tuple(range(0, 17, 2)), (("none", 0),) * 8)
    ranks = stage_costs(leaf, even)
    assert simulate_step(leaf, ranks).total_ns == 1332
    incumbent = Incumbent(0.0)
    program = ProgramSolution("optimal", 0, even, "enumeration")
    incumbent.best = Candidate(1332, 0, dict.fromkeys(DEGREES_IN_ORDER, 0), leaf, even, program)
    improve(incumbent, incumbent.best, lambda: None)
    assert incumbent.best.time_ns == 1224
