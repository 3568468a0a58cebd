"""Optimizer state that groups of the same shards split (``shard_optimizer_over_data``)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import InfeasibleError
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication

PARAMETERS = 8_030_261_248
VOCABULARY = 128_256 * 4096


def request(stack: str = "maxtext-gpu-sharded-optimizer", **overrides: object) -> Request:
    return read_request(
        "llama-3.1-8b", "dgx-h100:2", None,
        {"stack": stack, "sequence_length": 2048, "global_batch": 32} | overrides,
    )  # fmt: skip


def priced(stack: str, **layout: int) -> EvaluatedLayout:
    asked = {"dp_replicate": 4, "dp_shard": 4, "zero_stage": 3, "microbatch_size": 1} | layout
    return evaluate(request(stack), asked)


def memory(found: EvaluatedLayout) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}


def seconds(found: EvaluatedLayout) -> dict[str, float]:
    return {term.name: term.seconds or 0.0 for term in found.prediction.time}


def test_groups_split_the_state_and_keep_their_shards_in_16_bits() -> None:
    """4 groups of 4: fp32 weights and two moments over 16 ranks, beside a bf16 copy of a quarter;
    every first dimension of this model is a multiple of 16."""
    split, whole = memory(priced("maxtext-gpu-sharded-optimizer")), memory(priced("maxtext-gpu"))
    assert whole["weights"] == 4 * PARAMETERS // 4
    assert whole["optimizer"] == 8 * PARAMETERS // 4
    assert split["weights"] == 4 * PARAMETERS // 16 + 2 * PARAMETERS // 4
    assert split["optimizer"] == 8 * PARAMETERS // 16
    assert split["gradients"] == whole["gradients"]


def test_one_group_has_nothing_to_split() -> None:
    one = {"dp_replicate": 1, "dp_shard": 16}
    stacks = ("maxtext-gpu-sharded-optimizer", "maxtext-gpu")
    first, second = (priced(stack, **one).prediction for stack in stacks)
    assert (first.step_time_s, first.stages) == (second.step_time_s, second.stages)


def test_the_update_is_of_a_smaller_part_and_is_gathered_over_the_groups_once() -> None:
    """Moments, weights and gradients of a quarter pass through memory; a bf16 shard comes back."""
    split, whole = (
        seconds(priced(stack)) for stack in ("maxtext-gpu-sharded-optimizer", "maxtext-gpu")
    )
    update = whole["optimizer_and_gather"] / 4
    assert update < split["optimizer_and_gather"] < whole["optimizer_and_gather"]
    same = whole.keys() - {"optimizer_and_gather"}
    assert {name: split[name] for name in same} == {name: whole[name] for name in same}


def test_the_calls_of_a_step() -> None:
    """A layer's shard over 4 groups: in bf16 once per step, its gradients with every microbatch."""
    asked = request()
    layer = communication(asked, priced(asked.stack.name)).layers["decoder"]
    over = {call.name: call for call in layer if call.group == "dp_replicate"}
    shard = (PARAMETERS - 2 * VOCABULARY - 4096) // 32 // 4
    gathered, summed = over["decoder.parameter"], over["decoder.gradient"]
    assert (gathered.kind, gathered.ranks, gathered.phase) == ("all_gather", 4, "step")
    assert gathered.bytes == 2 * shard
    assert (summed.kind, summed.ranks, summed.phase) == ("all_reduce", 4, "backward")
    assert len(over) == 2


def test_the_search_finds_room_where_groups_alone_have_none() -> None:
    """Two groups of 8: 12 bytes of each parameter over 8 ranks, or over 16 beside 2 over 8, which
    is 4 GB less."""
    fix = {"dp_replicate": 2, "zero_stage": 3, "tp": 1, "cp": 1, "pp": 1}
    capacity = 22_000_000_000
    split, whole = (
        replace(request(stack, constraints={"fix": fix}), capacity_bytes=capacity)
        for stack in ("maxtext-gpu-sharded-optimizer", "maxtext-gpu")
    )
    with pytest.raises(InfeasibleError):
        plan(whole)
    found = plan(split)
    assert found.certificate.status == "optimal"
    assert found.layout.dp_replicate == 2
