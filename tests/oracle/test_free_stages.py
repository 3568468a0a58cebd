"""Free virtual stages of which there are too many to list: what is claimed as a bound is one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import free_stages
from planner.claims import certificate
from planner.refute import better_layout
from planner.request import Request
from planner.search import Search
from tests.oracle.brute import brute_force
from tests.oracle.instances import draw


def with_free_stages(seed: int) -> Request:
    """The instance of a seed on interleaved pipelines alone, its stages free."""
    request = draw(seed)
    stack = request.stack.model_copy(
        update={
            "schedules": ("interleaved", "looped_bfs", "zbv", "interleaved_zero_bubble"),
            "rules": tuple(rule for rule in request.stack.rules if rule != "no_pipeline"),
            "free_virtual_stages": True,
            "uneven_stages": True,
        }
    )
    free = request.job.constraints.model_copy(
        update={"virtual_stages": "free", "fix": {}, "max": {}, "forbid": (), "schedule": None}
    )
    job = request.job.model_copy(update={"constraints": free, "sequence_length": 64})
    return replace(request, job=job, stack=stack, capacity_bytes=None)


def test_what_is_not_listed_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_stages, "EVERY", 0)
    apart = interleaved = 0
    for seed in range(4_000_000, 4_000_120):
        request = with_free_stages(seed)
        if request.devices > 4 or request.global_batch > 8 or request.model.layer_count > 6:
            continue
        answer, result = brute_force(request), Search(request).run()
        if answer.time is None:
            assert result.best is None
            continue
        assert answer.layout is not None
        assert result.best is not None
        assert result.bound_ns is not None
        assert result.bound_ns <= answer.time <= result.best.time_ns
        proof = certificate(request, result, result.best)
        assert (proof.status == "optimal") == (result.bound_ns == result.best.time_ns)
        assert better_layout(request, result.bound_ns) is None
        apart += result.bound_ns < result.best.time_ns
        interleaved += answer.layout.vpp > 1
    assert apart >= 3
    assert interleaved >= 5
