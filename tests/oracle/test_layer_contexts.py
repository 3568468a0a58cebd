"""A kind of context parallelism for each layer: the planner equals brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from planner.refute import better_layout
from planner.request import Request
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw

LISTS = (
    ("p2p", "a2a"), ("all_gather", "p2p", "p2p"), ("a2a", "a2a_p2p"), ("a2a_p2p", "all_gather"),
    ("p2p",),
)  # fmt: skip


def by_layer(seed: int) -> Request | None:
    """The instance of ``seed`` whose job lists kinds and keeps cp above 1; None where the list does
    not repeat evenly over its layers, or no devices are left to split a sequence."""
    request, listed = draw(seed), LISTS[seed % len(LISTS)]
    two_levels = any(kind == "a2a_p2p" for kind in listed)
    cp = max((n for n in (2, 3, 4, 6, 8) if request.devices % n == 0), default=None)
    if cp is None or (two_levels and cp < 4) or request.model.layer_count % len(listed):
        return None
    kinds = ("p2p", "all_gather", "a2a", "a2a_p2p")
    stack = request.stack.model_copy(
        update={"cp_kinds": kinds, "cp_kinds_of": {}, "cp_kinds_by_layer": True}
    )
    limits = request.job.constraints.model_copy(
        update={"fix": {"cp": cp}, "max": {}, "forbid": (), "sequence_parallel": None}
    )
    changes = {"constraints": limits, "sequence_length": 96, "cp_kinds": listed}
    return replace(
        request, stack=stack, job=request.job.model_copy(update=changes), capacity_bytes=10**15
    )


SEEDS = (*range(7200, 7240), *range(7251, 7290, 5), *range(7253, 7290, 5), 7347, 7707, 7742)
"""The last ones have heads for exchanges among all ranks and among inner groups."""


def test_the_planner_finds_the_best_layout_around_a_list() -> None:
    found = Counter[tuple[str, ...]]()
    for seed in SEEDS:
        request = by_layer(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        assert not differences(each)
        if each.answer.time is not None:
            assert better_layout(request, each.answer.time) is None
            assert better_layout(request, each.answer.time + 1) is not None
            found[request.job.cp_kinds] += 1
    assert set(found) == set(LISTS), found
