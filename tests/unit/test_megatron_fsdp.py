"""Megatron-FSDP in a pipeline, and PyTorch's FSDP2 under Megatron-Core."""

from __future__ import annotations

import pytest

from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication


def request(stack: str = "megatron-fsdp", model: str = "llama-3.1-8b", **more: object) -> Request:
    asked = {"stack": stack, "sequence_length": 2048, "global_batch": 32} | more
    return read_request(model, "dgx-h100:1", None, asked)


def test_units_of_a_pipeline_are_gathered_with_every_microbatch() -> None:
    """2 stages of 16 layers on 4 ranks each, 8 microbatches. Both passes gather every layer; the
    first stage's embedding too; the head is gathered once and stays for its backward."""
    layout = {"pp": 2, "dp_shard": 4, "zero_stage": 3}
    found = communication(request(), evaluate(request(), layout))
    counts = [
        {(c.phase, c.kind): c.count for c in stage if c.group == "dp_shard"}
        for stage in found.stages
    ]  # fmt: skip
    for stage, (forward, backward) in zip(counts, ((17, 17), (17, 16)), strict=True):
        assert stage["forward", "all_gather"] == 8 * forward
        assert stage["backward", "all_gather"] == 8 * backward
        assert stage["backward", "reduce_scatter"] == 8 * 17


def test_gradients_alone_are_not_split_under_a_pipeline() -> None:
    with pytest.raises(InputError, match="gradients alone are not split under a pipeline"):
        evaluate(request(), {"pp": 2, "dp_shard": 4, "zero_stage": 2})


def test_fsdp2_under_megatron_refuses_what_its_arguments_refuse() -> None:
    found = request("megatron-torch-fsdp2")
    with pytest.raises(InputError, match="no pipeline parallelism"):
        evaluate(found, {"pp": 2, "dp_shard": 4, "zero_stage": 3})
    tied = request("megatron-torch-fsdp2", "llama-3.2-1b")
    with pytest.raises(InputError, match="no tied embeddings"):
        evaluate(tied, {"dp_shard": 8, "zero_stage": 3})
    experts = request("megatron-torch-fsdp2", "mixtral-8x7b")
    with pytest.raises(InputError, match="no expert parallelism"):
        evaluate(experts, {"dp_shard": 8, "ep": 8, "zero_stage": 3})
    best = plan(found).layout
    assert (best.pp, best.dp_replicate, best.zero_stage) == (1, 1, 3)
