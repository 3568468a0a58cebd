"""Stacks that list full recomputation before other modes, with several virtual stages per rank."""

from __future__ import annotations

from dataclasses import replace

from planner.refute import better_layout
from planner.request import Request
from planner.specs import ConstraintSpec
from tests.oracle.brute_prices import price_all
from tests.oracle.compare import compare, differences
from tests.oracle.instances import _needs, _sizes, draw
from tests.oracle.layouts import every_layout


def only_full_fits(seed: int) -> Request | None:
    """An instance of MaxText's breadth-first pipelines with just the room for layers that run again
    as a whole; None where no pipeline has several virtual stages."""
    request = draw(seed, "maxtext-gpu")
    changes = {"schedules": ("looped_bfs",), "uneven_stages": True, "outside_layers": False}
    stack = request.stack.model_copy(update=changes)
    pipelined = ConstraintSpec(schedule="looped_bfs", fix={"pp": 2})
    job = request.job.model_copy(
        update={"constraints": pipelined, "allow_recompute": True, "memory_margin": 0.0}
    )
    request = replace(request, stack=stack, job=job, capacity_bytes=10**15)
    if request.unsupported is not None:
        return None
    layouts = list(every_layout(request))
    if not layouts:
        return None
    full = ("full", request.model.layer_count)
    prices = price_all(request, layouts)
    needs = [
        _needs(request, x, price, _sizes(request, x)[0], full)
        for x, price in zip(layouts, prices, strict=True)
    ]
    return replace(request, capacity_bytes=min(needs))


ENOUGH = 1
"""Instances whose optimum runs whole layers again; none of those before seed 60 does."""


def test_whole_layers_run_again_where_nothing_else_fits() -> None:
    found = 0
    for seed in range(60, 180):
        request = only_full_fits(seed)
        if request is None:
            continue
        compared = compare(seed, request=request)
        assert not differences(compared)
        answer = compared.answer
        if answer.time is not None and {mode for mode, _ in answer.options} == {"full"}:
            found += 1
            assert better_layout(request, answer.time) is None
            assert better_layout(request, answer.time + 1) is not None
        if found == ENOUGH:
            return
    raise AssertionError(f"only {found} of the instances need it")
