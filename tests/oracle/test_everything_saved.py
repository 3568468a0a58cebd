"""Pipelines without a recomputation policy: the planner equals brute force, with weights that each
pass of several virtual stages keeps, and with layers outside, which have a policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest

from hardware_profiles.stack_words import EVERYTHING
from planner.request import Request
from tests.oracle.amount import of
from tests.oracle.compare import agreed
from tests.oracle.instances import capacity_of, draw
from tests.oracle.layouts import every_layout
from tests.oracle.test_bounds import check_bounds

PRECISIONS = ("bf16", "fp32", "int8", "fp8")
SEEDS = range(8000, 8000 + of(40, 24))


@lru_cache(maxsize=256)
def piped(seed: int) -> Request | None:
    """The instance of a seed in a pipeline whose layers have no policy or, every third time, any;
    None where it has no such layout."""
    try:
        request = draw(seed, "maxtext-gpu")
    except ValueError:
        return None  # no figures of the stack's attention kernel on this device
    rng = Random(f"everything {seed}")
    stages = [n for n in range(2, request.devices + 1) if request.devices % n == 0]
    if not stages or len(request.workload.layers) < 2:
        return None
    limits = request.job.constraints.model_copy(
        update={
            "fix": {"pp": rng.choice(stages)}, "max": {}, "forbid": (), "schedule": None,
            "recompute": EVERYTHING if seed % 3 else None,
        }
    )  # fmt: skip
    changes = {
        "constraints": limits, "global_batch": request.devices * rng.choice((1, 2)),
        "precision": rng.choice(PRECISIONS), "dropout": rng.random() < 0.5, "allow_recompute": True,
    }  # fmt: skip
    job = request.job.model_copy(update=changes)
    request = replace(request, job=job)
    if request.unsupported is not None:
        return None
    layouts = list(every_layout(request)) if request.workload.policies else []
    if not layouts or len(layouts) > 60:
        return None
    return replace(request, capacity_bytes=capacity_of(request, layouts, rng))


def test_the_planner_finds_the_best_pipeline_without_a_policy() -> None:
    found = Counter[str]()
    for seed in SEEDS:
        request = piped(seed)
        if request is None:
            continue
        answer = agreed(seed, request)
        x = answer.layout
        if x is None:
            continue
        if answer.options[0][0] == EVERYTHING:
            found["mode"] += 1
            found["chunks"] += x.vpp > 1
            found["outside"] += x.outside > 0
            found[request.job.precision] += 1
            found["dropout"] += bool(request.job.dropout)
    assert found["mode"] > 2
    assert found["chunks"]
    assert found["outside"]
    assert found["dropout"]
    assert all(found[precision] for precision in PRECISIONS)


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_bounds_stay_below_pipelines_without_a_policy(seed: int) -> None:
    request = piped(seed)
    if request is not None:
        check_bounds(seed, request=request)
