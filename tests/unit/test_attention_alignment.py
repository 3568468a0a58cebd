"""Heads that tensor cores do not take, by the matrix library of a stack's years."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.ops import MatMul
from cost_models.step import Machine, price_layer
from hardware_profiles.loader import load_cluster, load_stack

ONE = np.ones(1, dtype=np.int64)
SHARD = Shard(
    sequence=2048, microbatch=ONE, tp=ONE, cp=ONE, ep=ONE, etp=ONE,
    sequence_parallel=np.zeros(1, dtype=bool), cp_kind=ONE * 0,
)  # fmt: skip


def forward_s(stack: str, head_dim: int, *, weight: bool) -> float:
    """Seconds of 32 products of 2048 queries with as many keys, each one head."""
    scores = MatMul("scores", 2048 * ONE, 2048 * ONE, head_dim * ONE, 32 * ONE, weight=weight)
    kind = LayerKind("core", (), lambda _: (scores,), lambda _: (), lambda _: ONE, lambda _: ONE)
    machine = Machine(load_cluster("dgx-a100"), load_stack(stack), "fp16", "adamw")
    return float(price_layer(kind, SHARD, machine).terms["matmul"]["forward"][0])


def test_libraries_of_2022_take_misaligned_heads_to_the_vector_units() -> None:
    # 2 * 32 * 2048^2 * 108 FLOPs at 0.626 of the A100's 19.5 TFLOP/s.
    expected = 2 * 32 * 2048**2 * 108 / (0.626 * 19.5e12)
    assert forward_s("megatron-deepspeed", 108, weight=False) == pytest.approx(expected)
    assert forward_s("megatron-core", 108, weight=False) < 0.3 * expected


def test_aligned_heads_and_weights_stay_on_the_tensor_cores() -> None:
    for head_dim, weight in ((112, False), (108, True)):
        old, new = (
            forward_s(stack, head_dim, weight=weight)
            for stack in ("megatron-deepspeed", "megatron-core")
        )
        assert old == new
