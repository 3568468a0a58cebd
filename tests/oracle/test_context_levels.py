"""Context parallelism of two levels, and nothing else: the planner equals brute force."""

from __future__ import annotations

from dataclasses import replace

from planner.request import Request
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw


def two_levels(seed: int) -> Request | None:
    """The instance of ``seed`` with context parallelism of two levels over half of its devices or
    all, on a device that holds anything; None where the devices have no such divisor."""
    request = draw(seed)
    cp = max((n for n in (4, 6, 8) if request.devices % n == 0), default=None)
    if cp is None or request.stack.cp_kinds_of:
        return None
    kind = ("a2a_p2p", "a2a_all_gather")[seed % 2]
    stack = request.stack.model_copy(update={"cp_kinds": (kind,)})
    limits = request.job.constraints.model_copy(
        update={"fix": {"cp": cp}, "max": {}, "forbid": (), "sequence_parallel": None}
    )
    job = request.job.model_copy(update={"constraints": limits, "sequence_length": 96})
    return replace(request, stack=stack, job=job, capacity_bytes=10**15)


SEEDS = range(7000, 7190)


def test_the_planner_finds_the_best_split_of_two_levels() -> None:
    inner = set()
    for seed in SEEDS:
        request = two_levels(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        assert not differences(each)
        if each.answer.layout is not None:
            inner.add((each.answer.layout.cp, each.answer.layout.cp_inner))
    assert {(4, 2), (6, 2), (6, 3), (8, 2)} <= inner
