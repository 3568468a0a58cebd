"""Sizes of rounds that a user names: what a stack runs, and what of it reaches Megatron-Core."""

from __future__ import annotations

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.exports.megatron_stages import pipeline_flags
from planner.layouts import complete_layout
from planner.models.reader import read_model
from planner.plan import Layout
from planner.request import Request
from planner.specs import JobSpec

GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"


def completed(stack: str, microbatches: int, **layout: int | str) -> Layout:
    """A layout of 4 stages on 8 devices."""
    job = JobSpec(sequence_length=2048, global_batch=2 * microbatches, stack=stack)
    model, cluster = read_model("llama-3.1-8b"), load_cluster("dgx-h100:1")
    request = Request(model, cluster, job, load_stack(stack))
    return complete_layout({"pp": 4, "microbatch_size": 1, **layout}, request)


def test_the_shortest_rounds_are_the_default() -> None:
    assert completed("megatron-core", 10, vpp=2, schedule="interleaved").round_size == 5
    # 11 = 6 + 5; rounds of 4 would leave 3, of 5 would leave 1.
    assert completed("megatron-core", 11, vpp=2, schedule="interleaved").round_size == 6
    assert completed("megatron-core", 12, vpp=2, schedule="interleaved").round_size == 4
    assert completed("megatron-core", 12, vpp=1, schedule="1f1b").round_size == 0


@pytest.mark.parametrize(
    ("stack", "layout", "message"),
    [
        (
            "megatron-core",
            {"vpp": 2, "round_size": 5},
            "12 microbatches over pp = 4 in rounds of 4",
        ),
        ("nemo", {"vpp": 2, "round_size": 3}, "in rounds of"),
        ("megatron-core", {"vpp": 1, "schedule": "1f1b", "round_size": 4}, "1f1b has no rounds"),
        ("megatron-core", {"vpp": 2, "round_size": -4}, "round_size"),
    ],
)
def test_rounds_that_do_not_run(stack: str, layout: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        completed(stack, 12, **layout)
    assert refused.value.hint


def test_rounds_of_more_than_pp_are_a_flag() -> None:
    usual, longer = (
        completed("megatron-core", 12, vpp=2, schedule="interleaved", round_size=size)
        for size in (4, 6)
    )
    assert not [flag for flag in pipeline_flags(usual, mtp_layers=0)[0] if flag[0] == GROUP]
    assert (GROUP, "6") in pipeline_flags(longer, mtp_layers=0)[0]
