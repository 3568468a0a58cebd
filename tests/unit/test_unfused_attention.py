"""Attention as products and a softmax: which softmax runs, and what it moves and keeps."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.ops import Elementwise
from planner.pipeline import read_request


def softmax_and_kept(stack: str, microbatch: int, tp: int) -> tuple[Elementwise, int]:
    """The softmax of one layer of GPT-3 1.3B's 16 heads over 2,048 tokens, and what it keeps."""
    request = read_request(
        "gpt3-1.3b", "dgx-a100:1", overrides={"stack": stack, "precision": "fp16"}
    )
    (kind,) = {*request.workload.layers}
    layer, one = request.workload.kinds[kind], np.ones(1, dtype=np.int64)
    shard = Shard(
        2048, one * microbatch, one * tp, one, one, one, np.zeros(1, dtype=np.bool_), 0 * one
    )
    (op,) = (op for op in layer.ops(shard) if op.name == "softmax")
    (kept,) = (tensor.bytes for tensor in layer.saved(shard) if tensor.name == "softmax")
    assert isinstance(op, Elementwise)
    return op, int(np.asarray(kept).item())


@pytest.mark.parametrize(
    ("microbatch", "tp", "fused"), [(1, 1, True), (1, 4, True), (1, 8, False), (2, 8, True)]
)
def test_the_fused_softmax_takes_multiples_of_four_heads(
    microbatch: int, tp: int, fused: bool
) -> None:
    """16 heads over tp 8 are 2 a rank: with one sample too few for a block of four warps."""
    op, kept = softmax_and_kept("megatron-lm-2022", microbatch, tp)
    scores = microbatch * 16 // tp * 2048**2
    # Fused: the triangle read, the square written, in 16 bits. Op by op: five kernels, in 32 bits.
    assert np.asarray(op.forward_bytes).item() == (3 if fused else 37) * scores
    assert np.asarray(op.backward_bytes).item() == (4 if fused else 41) * scores
    assert np.asarray(op.forward_launches).item() == (1 if fused else 5)
    assert kept == (2 if fused else 4) * scores
