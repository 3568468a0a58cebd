"""Stages that a stack does not have: refused where a user names them, found where a plan does."""

from __future__ import annotations

from typing import Any

import pytest

from planner.certify import _check_layout
from planner.errors import InputError
from planner.layouts import complete_layout
from planner.pipeline import evaluate, read_request
from planner.request import Request

KIND = "decoder"


def stages(sizes: tuple[int, ...], modes: tuple[str, ...], again: tuple[int, ...]) -> list[Any]:
    """Stages of so many layers, and what each recomputes in how many of them."""
    found, first = [], 0
    for size, mode, number in zip(sizes, modes, again, strict=True):
        part = [{"kind": KIND, "mode": mode, "layers": number}] if number else []
        found.append({"chunks": [{"layers": [first, first + size]}], "recompute": part})
        first += size
    return found


def request_of(stack: str) -> Request:
    job = {"stack": stack, "global_batch": 64, "sequence_length": 4096}
    return read_request("llama-3.1-8b", "dgx-h100:1", None, job)


FULL = ("full", "full")
WRONG = [
    ("maxtext-gpu", (10, 22), FULL, (10, 22), "equal ones only"),
    ("maxtext-gpu", (10, 20), FULL, (10, 20), "equal ones only"),
    ("maxtext-gpu", (16, 16), FULL, (16, 0), "unlike each other"),
    ("maxtext-gpu", (15, 15), FULL, (0, 15), "unlike each other"),
    ("maxtext-gpu", (16, 16), FULL, (3, 3), "all"),
    ("megatron-core", (16, 16), FULL, (3, 4), "unlike each other"),
    ("megatron-core", (10, 22), FULL, (10, 9), "unlike each other"),
]


@pytest.mark.parametrize(("stack", "sizes", "modes", "again", "reason"), WRONG)
def test_stages_that_the_stack_lacks_are_refused(
    stack: str, sizes: tuple[int, ...], modes: tuple[str, ...], again: tuple[int, ...], reason: str
) -> None:
    request = request_of(stack)
    schedule = "gpipe" if stack == "maxtext-gpu" else "1f1b"
    layout = {"pp": 2, "schedule": schedule, "stages": stages(sizes, modes, again)}
    with pytest.raises(InputError, match=reason):
        evaluate(request, layout)
    findings = list(_check_layout(complete_layout(layout, request), request))
    assert any(reason in finding for finding in findings), findings


@pytest.mark.parametrize(
    ("sizes", "again"),
    [((16, 16), (3, 3)), ((10, 22), (10, 10)), ((10, 22), (10, 15)), ((32, 0), (4, 0))],
)
def test_one_number_of_layers_may_be_more_than_a_stage_has(
    sizes: tuple[int, ...], again: tuple[int, ...]
) -> None:
    request = request_of("megatron-core")
    layout = {"pp": 2, "schedule": "1f1b", "stages": stages(sizes, FULL, again)}
    found = evaluate(request, layout)
    assert list(_check_layout(found.layout, request)) == []


def test_copies_of_shards_are_refused_where_the_stack_has_none() -> None:
    request = request_of("deepspeed-hf")
    for stage in (1, 3):
        layout = {"dp_replicate": 2, "dp_shard": 4, "zero_stage": stage}
        with pytest.raises(InputError, match="all 8 data-parallel ranks, not 4 in 2 copies"):
            evaluate(request, layout)
        findings = list(_check_layout(complete_layout(layout, request), request))
        assert findings == ["the stack splits over all of dp"]
    assert evaluate(request, {"dp_replicate": 8, "dp_shard": 1, "zero_stage": 0})
    hybrid = {"dp_replicate": 2, "dp_shard": 4, "zero_stage": 3}
    assert evaluate(request_of("torchtitan"), hybrid)
