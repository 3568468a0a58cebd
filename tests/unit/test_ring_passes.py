"""A ring of keys and values: a kernel for each block, and the passes that join their results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.attention_passes import attention_passes
from cost_models.compute import AttentionStage, attention_time_s
from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import Shard
from cost_models.ops import Attention, Elementwise, Op
from hardware_profiles.loader import load_device
from planner.pipeline import read_request

TOKENS, HEADS, KV_HEADS, WIDTH = 8192, 64, 8, 128


def ops_of(stack: str, *, cp: int, kind: str = "p2p", precision: str = "bf16") -> dict[str, Op]:
    """Ops of one layer of Llama 3 70B on ``cp`` devices that share one sample."""
    request = read_request(
        "llama-3-70b", "dgx-h100:8",
        overrides={"stack": stack, "precision": precision, "sequence_length": TOKENS},
    )  # fmt: skip
    (name,) = {*request.workload.layers}
    one = np.ones(1, dtype=np.int64)
    code = np.full(1, cp_kind_code(kind))
    shard = Shard(TOKENS, one, one, cp * one, one, one, np.zeros(1, dtype=np.bool_), code)
    return {op.name: op for op in request.workload.kinds[name].ops(shard)}


def test_two_blocks_are_joined_as_transformer_engine_does() -> None:
    merge = ops_of("megatron-core", cp=2)["cp_ring_merge"]
    assert isinstance(merge, Elementwise)
    query = 2.0 * TOKENS / 2 * HEADS * WIDTH
    kv = 2 * query / (HEADS // KV_HEADS)
    rows = TOKENS // 2 * HEADS
    # Joined; zeros; two outputs added: two read and one written each. Statistics: copied (8), to
    # fp64 (12), corrected once (20), back (12), read beside each output (8).
    forward = 2 * kv + query + 2 * 3 * query + (8 + 12 + 20 + 12 + 2 * 8) * rows
    # Copied; dq copied and added; half of dk and dv copied, then all of them added.
    backward = 2 * kv + 2 * query + 3 * query + kv + 3 * kv
    assert np.asarray(merge.forward_bytes).item() == forward
    assert np.asarray(merge.backward_bytes).item() == backward
    assert np.asarray(merge.forward_launches).item() == 8
    assert np.asarray(merge.backward_launches).item() == 5


@pytest.mark.parametrize(("cp", "kind"), [(1, "p2p"), (2, "all_gather"), (2, "a2a")])
def test_without_a_ring_nothing_is_joined(cp: int, kind: str) -> None:
    merge = ops_of("megatron-core", cp=cp, kind=kind)["cp_ring_merge"]
    assert isinstance(merge, Elementwise)
    assert not np.any(merge.forward_bytes)
    assert not np.any(merge.backward_launches)


def test_gathered_keys_are_ordered_and_their_gradients_added() -> None:
    gather = ops_of("megatron-core", cp=2, kind="all_gather")["cp_gather_order"]
    assert isinstance(gather, Elementwise)
    query = 2.0 * TOKENS / 2 * HEADS * WIDTH
    whole = 2 * 2 * query / (HEADS // KV_HEADS)
    # Keys of the quarters 1 and 4, or 2 and 3, reach over 5 quarters: read twice, written once.
    backward = whole + 2 * whole + 2 * whole + 3 * 5 / 4 * whole + 2 * query
    assert np.asarray(gather.forward_bytes).item() == 2 * whole + 2 * query
    assert np.asarray(gather.backward_bytes).item() == backward
    ring = ops_of("megatron-core", cp=2)["cp_gather_order"]
    assert isinstance(ring, Elementwise)
    assert not np.any(ring.forward_bytes)


def test_a_ring_whose_source_was_not_read_has_no_passes() -> None:
    assert "cp_ring_merge" not in ops_of("pytorch-fsdp2", cp=2)


def _op(blocks: int, *, last: bool = False) -> Attention:
    return Attention(
        "attention", 1, TOKENS / blocks, TOKENS, HEADS, KV_HEADS, WIDTH, WIDTH, last=last,
        blocks=blocks,
    )  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
def test_each_block_is_a_kernel(last: bool) -> None:
    device = load_device("h100-sxm-80gb")
    block = TOKENS // 4
    stages: tuple[AttentionStage, ...] = ("forward", "backward")
    priced = attention_passes(_op(4, last=last), device, "bf16", "flash3")
    for seconds, stage in zip(priced, stages, strict=True):
        diagonal, other = (
            attention_time_s(
                device, "bf16", "flash3", batch=1, q_len=block, kv_len=keys, heads=HEADS,
                kv_heads=KV_HEADS, qk_head_dim=WIDTH, v_head_dim=WIDTH, causal=causal, stage=stage,
            ).item()
            for keys, causal in ((block, True), (block if last else block / 2, False))
        )  # fmt: skip
        assert np.asarray(seconds).item() == pytest.approx(diagonal + 3 * other)


def test_blocks_take_longer_than_one_kernel_for_the_same_pairs() -> None:
    device = load_device("h100-sxm-80gb")
    ring = attention_passes(_op(4), device, "bf16", "flash3")
    whole = attention_passes(replace(_op(4), blocks=1), device, "bf16", "flash3")
    for split, single in zip(ring, whole, strict=True):
        assert 1.02 < np.asarray(split).item() / np.asarray(single).item() < 1.6
