"""Inputs of low-precision products that another op keeps in 16 bits anyway."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from hardware_profiles.loader import load_cluster, load_stack
from planner.models.reader import read_model
from planner.request import Request
from planner.specs import JobSpec

ONE = np.ones(1, dtype=np.int64)
TOKENS = 4096


def kept(stack: str, precision: str, kind: str = "moe", sp: int = 1) -> dict[str, int]:
    """Bytes of each tensor that a layer of DeepSeek-V3 keeps on ``sp`` tensor-parallel ranks."""
    job = JobSpec(sequence_length=TOKENS, global_batch=32, precision=precision)  # type: ignore[arg-type]
    request = Request(read_model("deepseek-v3"), load_cluster("dgx-h100:4"), job, load_stack(stack))
    shard = Shard(
        sequence=TOKENS, microbatch=ONE, tp=sp * ONE, cp=ONE, ep=ONE, etp=ONE,
        sequence_parallel=np.array([sp > 1]), cp_kind=0 * ONE,
    )  # fmt: skip
    layer = request.workload.kinds[kind]
    return {tensor.name: int(np.ravel(tensor.bytes)[0]) for tensor in layer.saved(shard)}


@pytest.mark.parametrize(
    ("stack", "precision", "expected"),
    [
        # One byte of each of 7,168 elements of a row: delayed scaling, and cores before 0.14.
        ("megatron-core", "fp8", 7168 * TOKENS),
        ("nemo-fp8", "fp8", 7168 * TOKENS),
        # set_save_original_input: what the router keeps serves for both.
        ("megatron-bridge-fp8", "fp8", 0),
        ("megatron-core", "bf16", 0),
    ],
)
def test_shared_experts_keep_a_copy_of_the_routers_input(
    stack: str, precision: str, expected: int
) -> None:
    assert kept(stack, precision).get("shared_input", 0) == expected


def test_the_copy_is_of_the_ranks_own_rows() -> None:
    assert kept("megatron-core", "fp8", sp=4)["shared_input"] == 7168 * TOKENS // 4


def test_the_output_projection_keeps_what_attention_keeps() -> None:
    output = 128 * 128 * TOKENS
    assert kept("megatron-core", "fp8")["projection_input"] == output
    assert "projection_input" not in kept("megatron-bridge-fp8", "fp8")
    assert kept("megatron-bridge-fp8", "fp8")["attention_output"] == 2 * output
