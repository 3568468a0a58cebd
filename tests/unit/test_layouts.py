"""What a layout that says little means."""

from __future__ import annotations

import pytest

from planner.errors import InputError
from planner.layouts import complete_layout
from planner.pipeline import read_request


@pytest.mark.parametrize(
    ("stack", "layout", "schedule"),
    [
        ("megatron-core", {"pp": 2}, "1f1b"),
        ("megatron-core", {"pp": 2, "vpp": 2}, "interleaved"),
        ("maxtext-gpu", {"pp": 2}, "gpipe"),
        ("maxtext-gpu", {"pp": 2, "vpp": 2}, "looped_bfs"),
        ("maxtext-gpu", {}, "1f1b"),
    ],
)
def test_the_schedule_is_the_usual_one_that_the_stack_has(
    stack: str, layout: dict[str, int], schedule: str
) -> None:
    request = read_request("llama-3.1-8b", "dgx-h100", None, {"stack": stack, "global_batch": 32})
    assert complete_layout(layout, request).schedule == schedule


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"pp": 2, "round_size": 4}, "schedule 1f1b has no rounds"),
        ({"round_size": 4}, "pp = 1 has no rounds"),
        ({"pp": 2, "vpp": 2, "round_size": "4"}, "round_size = '4' is not a whole number"),
    ],
)
def test_rounds_that_nothing_would_run_are_refused(layout: dict[str, object], message: str) -> None:
    request = read_request("llama-3.1-8b", "dgx-h100", None, {"global_batch": 32})
    with pytest.raises(InputError, match=message):
        complete_layout(layout, request)


def test_sequence_parallelism_stays_off_unasked_where_the_stack_has_none_with_context() -> None:
    flags = {"stack": "mindformers", "global_batch": 32}
    request = read_request("llama-3.1-8b", "atlas-910b:2", None, flags)
    assert complete_layout({"tp": 2}, request).sequence_parallel
    assert not complete_layout({"tp": 2, "cp": 4}, request).sequence_parallel
