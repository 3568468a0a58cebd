"""Every shipped stack: its bounds are below every completion, and its optimum is brute force's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_profiles.loader import catalog_names
from tests.oracle.amount import of
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.test_bounds import check_bounds

SEEDS = range(5000, 5020)
ENOUGH = of(6, 2)
"""Instances of each stack: the first of :data:`SEEDS` that it has kernels for, and some layout."""


@pytest.mark.parametrize("stack", catalog_names("stack"))
def test_the_planner_is_right_with_every_stack(stack: str) -> None:
    tried = compared = 0
    for seed in SEEDS:
        if draw(seed, stack).unsupported is not None:
            continue  # no figures of the stack's attention kernel on this device
        compared += check_bounds(seed, stack)
        assert not differences(compare(seed, stack=stack))
        tried += 1
        if tried >= ENOUGH and compared > 0:
            return
    raise AssertionError(f"{compared} bounds in {tried} instances")


def test_the_planner_is_right_with_muon_in_a_pipeline_of_deepspeed() -> None:
    """In fp16, in stage 1, on matrices that no tensor-parallel rank has a part of."""
    feasible = 0
    for seed in range(5000, 5012):
        request = draw(seed, "deepspeed-pipe")
        changes = {"optimizer": "muon", "precision": "fp16"}
        request = replace(request, job=request.job.model_copy(update=changes))
        if request.unsupported is not None:
            continue
        each = compare(seed, request=request)
        assert not differences(each)
        if each.answer.layout is not None:
            feasible += 1
            x = each.answer.layout
            assert x.tp == 1
            assert x.zero == 1 or x.dp_replicate * x.dp_shard * x.cp == 1
    assert feasible
