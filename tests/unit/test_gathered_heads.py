"""Tensor parallelism above the KV heads, as Megatron-Core runs it from 0.16 on, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.ops import Collective, Elementwise, MatMul
from cost_models.state import local_tensor
from planner.errors import InputError
from planner.pipeline import evaluate, read_request

TOKENS, HEAD = 2048, 128


def shard(*tp: int) -> Shard:
    ranks = np.array(tp)
    one = np.ones_like(ranks)
    return Shard(TOKENS, one, ranks, one, one, one, ranks > 1, 0 * one)


def test_ranks_hold_parts_of_a_head_and_gather_all_columns() -> None:
    """Llama 3.1 8B: 32 query and 8 KV heads of 128; tp 8 splits them, tp 16 does not."""
    request = read_request(
        "llama-3.1-8b", "dgx-h100:2", overrides={"stack": "megatron-core-offload"}
    )
    (kind,) = request.workload.kinds.values()
    place = shard(8, 16)
    ops = {op.name: op for op in kind.ops(place)}
    product, gather, order = ops["qkv"], ops["qkv.columns"], ops["qkv_order"]
    assert isinstance(product, MatMul)
    assert isinstance(gather, Collective)
    assert isinstance(order, Elementwise)
    assert np.asarray(product.n).tolist() == [48 * HEAD // 8, 48 * HEAD // 16]
    assert np.asarray(gather.active).tolist() == [False, True]
    full = TOKENS * 48 * HEAD * 2
    assert (gather.forward_kind, gather.backward_kind) == ("all_gather", "reduce_scatter")
    assert np.asarray(gather.forward_bytes).tolist() == [0, full]
    assert np.asarray(gather.backward_bytes).tolist() == [0, full]
    group, queries, own = full // 8, 4 * HEAD * TOKENS * 2, 2 * HEAD * TOKENS * 2
    assert np.asarray(order.forward_bytes).tolist() == [0, 2 * full]
    assert np.asarray(order.backward_bytes).tolist() == [
        0, 2 * full + full + 2 * group + queries + 2 * own
    ]  # fmt: skip
    for name in ("attention.k", "attention.v"):
        (weight,) = (w for w in kind.weights if w.name == name)
        local = local_tensor(weight, place, 1)
        assert np.asarray(local.elements).tolist() == [128 * 4096, 64 * 4096]
    saved = {tensor.name: tensor for tensor in kind.saved(place)}
    assert np.asarray(saved["qkv"].bytes).tolist() == [
        (4 + 2) * HEAD * TOKENS * 2, (2 + 2) * HEAD * TOKENS * 2
    ]  # fmt: skip


def test_only_cores_that_gather_take_tp_above_the_kv_heads() -> None:
    asked = {"sequence_length": 1024, "stack": "megatron-core-offload"}
    layout = {"tp": 16, "sequence_parallel": True}
    priced = evaluate(read_request("llama-3.1-8b", "dgx-h100:2", overrides=asked), layout)
    assert priced.layout.tp == 16
    asked["stack"] = "megatron-core"
    with pytest.raises(InputError, match="8 KV heads do not split over tp"):
        evaluate(read_request("llama-3.1-8b", "dgx-h100:2", overrides=asked), layout)
