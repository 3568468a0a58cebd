"""What recurrent, sparse and multimodal layers cost per shard: sums over their ops, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.memory import activation_bytes
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, Repeat
from cost_models.step import Machine, price_layer
from cost_models.traffic import layer_calls
from hardware_profiles.loader import load_cluster, load_stack
from planner.blocks import gated_delta_net, mamba, mamba2, sparse_attention
from planner.blocks.context import BlockContext
from planner.models.reader import read_model
from planner.models.spec import (
    GatedDeltaNetSpec,
    LatentAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    SparseLatentAttentionSpec,
)
from planner.specs import JobSpec
from planner.workload import build_workload

CONTEXT = BlockContext(
    hidden=64, element_bytes=2, attention_kernel="flash3", fused=frozenset(), dropout=False,
    vocab=100, vocab_divisor=1, logit_saved_bytes=4.0, logit_working_bytes=2.0,
)  # fmt: skip


def shard(sequence: int = 256, microbatch: int = 2, tp: int = 1, cp: int = 1) -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(
        sequence=sequence, microbatch=one * microbatch, tp=one * tp, cp=one * cp, ep=one, etp=one,
        sequence_parallel=np.array([False]), cp_kind=one * 0,
    )  # fmt: skip


def product_flops(ops: tuple[Op, ...]) -> float:
    """Forward FLOPs of all matrix products."""
    total = 0.0
    for op in ops:
        if isinstance(op, MatMul):
            total += float(np.sum(2.0 * np.asarray(op.batch) * op.m * op.n * op.k))
    return total


def by_name(ops: tuple[Op, ...]) -> dict[str, Any]:
    return {op.name: op for op in ops}


MAMBA2 = Mamba2Spec(heads=8, head_dim=16, state=32, groups=4, conv=4, chunk=64)


def test_mamba2_products() -> None:
    # Per token: in 64 x (128 + 384 + 8), out 64 x 128 (inner 128, channels 128 + 2*4*32 = 384).
    # Scan of 512 tokens: scores 4 groups x 64 x 32, within 8 heads x 64 x 16, states and before
    # 8 heads x 32 x 16 each, all times 2.
    tokens = 512
    per_token = 64 * 520 + 64 * 128 + 4 * 64 * 32 + 8 * 64 * 16 + 2 * 8 * 32 * 16
    assert product_flops(mamba2.ops(MAMBA2, CONTEXT, shard())) == 2 * tokens * per_token


def test_mamba2_splits_over_tp_and_cp() -> None:
    whole = product_flops(mamba2.ops(MAMBA2, CONTEXT, shard()))
    assert product_flops(mamba2.ops(MAMBA2, CONTEXT, shard(tp=4))) == whole / 4
    # Context parallelism divides tokens of the projections and heads of the scan alike.
    assert product_flops(mamba2.ops(MAMBA2, CONTEXT, shard(cp=4))) == whole / 4
    # Beyond the groups, ranks repeat B and C of the group that they share.
    scores = by_name(mamba2.ops(MAMBA2, CONTEXT, shard(cp=8)))["scan_scores"]
    assert scores.batch == 2 * 4 * 1


def test_recurrences_exchange_heads_for_sequence() -> None:
    ops = by_name(mamba2.ops(MAMBA2, CONTEXT, shard(cp=4)))
    into, back = ops["scan_exchange"], ops["scan_return"]
    assert (into.forward_kind, into.group) == ("all_to_all", "cp")
    assert into.forward_bytes == 128 * 520 * 2
    assert back.forward_bytes == 128 * 128 * 2
    assert not by_name(mamba2.ops(MAMBA2, CONTEXT, shard()))["scan_exchange"].active


def test_mamba_reduces_what_all_channels_select() -> None:
    spec = MambaSpec(inner=128, state=16, conv=4, dt_rank=8)
    ops = by_name(mamba.ops(spec, CONTEXT, shard(tp=2)))
    assert ops["mamba_select.reduce"].forward_bytes == 512 * (8 + 32) * 2
    scan = ops["mamba_scan"]
    assert isinstance(scan, Elementwise)
    # 64 channels on this rank: x, time step, gate, output of 2 bytes; 22 FLOPs per state.
    assert scan.forward_bytes == 4 * 64 * 512 * 2
    assert scan.forward_flops == 22 * 64 * 16 * 512


def test_gated_delta_products() -> None:
    spec = GatedDeltaNetSpec(key_heads=2, value_heads=4, key_dim=16, value_dim=32, conv=4, chunk=64)
    # in 64 x (2*32 + 128 + 128 + 8), out 64 x 128; per value head and token: K K^T and Q K^T
    # 64 x 16 each, W 64 x 16, U and within 64 x 32 each, recall, write and before 16 x 32 each.
    per_head = 2 * 64 * 16 + 64 * 16 + 2 * 64 * 32 + 3 * 16 * 32
    per_token = 64 * 328 + 64 * 128 + 4 * per_head
    whole = product_flops(gated_delta_net.ops(spec, CONTEXT, shard()))
    assert whole == 2 * 512 * per_token
    assert product_flops(gated_delta_net.ops(spec, CONTEXT, shard(tp=2))) == whole / 2
    assert product_flops(gated_delta_net.ops(spec, CONTEXT, shard(cp=2))) == whole / 2


SPARSE = SparseLatentAttentionSpec(
    latent=LatentAttentionSpec(
        heads=8, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    index_heads=4, index_head_dim=8, top_k=64,
)  # fmt: skip


def test_sparse_attention_attends_the_keys_picked() -> None:
    ops = by_name(sparse_attention.ops(SPARSE, CONTEXT, shard(tp=2)))
    attention = ops["attention"]
    assert isinstance(attention, Attention)
    assert (attention.kv_len, attention.causal) == (64, False)
    assert (attention.heads, attention.kv_heads) == (4, 1)
    assert (attention.qk_head_dim, attention.v_head_dim) == (20, 16)
    # Below top_k tokens everything visible is picked.
    short = by_name(sparse_attention.ops(SPARSE, CONTEXT, shard(sequence=32)))["attention"]
    assert (short.kv_len, short.causal) == (32, True)


def test_the_indexer_scores_all_keys_forward_and_learns_from_those_picked() -> None:
    ops = by_name(sparse_attention.ops(SPARSE, CONTEXT, shard(tp=2)))
    scores, loss = ops["index_scores"], ops["index_loss"]
    assert not scores.backward
    assert loss.backward
    # Half of 256 keys are visible on average; heads are not split over tp.
    assert (scores.m, scores.n, scores.k) == (256, 128, 32)
    assert (loss.n, loss.k) == (64, 32)


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        ("nemotron-3-nano-30b-a3b", "megatron-core"),
        ("mamba-2.8b", "nemo-automodel"),
        ("qwen3.5-27b", "megatron-bridge"),
        ("deepseek-v3.2", "megatron-bridge"),
    ],
)
def test_every_layer_takes_time_and_memory_that_tensor_parallelism_divides(
    model: str, stack: str
) -> None:
    cluster = load_cluster("dgx-h100")
    machine = Machine(cluster, load_stack(stack), "bf16", "adamw")
    job = JobSpec(sequence_length=4096, global_batch=8, stack=stack)
    workload = build_workload(read_model(model), job, machine.stack, machine.device)
    for kind in workload.kinds.values():
        one, two = (shard(4096, 1, tp) for tp in (1, 2))
        times = [price_layer(kind, each, machine).nanoseconds("forward")[0] for each in (one, two)]
        assert times[0] > 0
        (kept, working), (half, _) = (activation_bytes(kind, each, None) for each in (one, two))
        assert 0 < half[0] < kept[0]
        assert working[0] > 0


def test_images_run_the_tower_on_the_first_stage() -> None:
    cluster = load_cluster("dgx-h100")
    machine = Machine(cluster, load_stack("megatron-core"), "bf16", "adamw")
    model = read_model("qwen3-vl-8b")
    assert model.vision is not None

    def embedding(images: int) -> Any:
        job = JobSpec(
            sequence_length=4096, global_batch=8, images_per_sample=images,
            image_tokens=256 if images else None,
        )  # fmt: skip
        return build_workload(model, job, machine.stack, machine.device).embedding

    text, shown = embedding(0), embedding(4)
    assert text.weights == shown.weights
    assert any(weight.name.startswith("vision.") for weight in text.weights)
    at = shard(4096, 1)
    seconds = [price_layer(kind, at, machine).nanoseconds("forward")[0] for kind in (text, shown)]
    blocks = [op for op in shown.ops(at) if isinstance(op, Repeat)]
    assert blocks[0].count == 27
    inner = replace(shown, ops=lambda _: blocks[0].ops)
    once = price_layer(inner, at, machine).nanoseconds("forward")[0]
    # 27 equal blocks, and patch embedding, mergers and the embedding beside them.
    assert seconds[1] > 27 * once * 0.99
    assert seconds[0] < once
    kept = [int(activation_bytes(kind, at, None)[0][0]) for kind in (text, shown)]
    # Of each of 4 x 1024 patches at least the two inputs of 27 blocks of width 1152.
    assert kept[1] - kept[0] > 27 * 4 * 1024 * 2 * 1152 * 2


def test_collectives_of_recurrent_layers_have_their_adjoint() -> None:
    for ops in (
        mamba2.ops(MAMBA2, CONTEXT, shard(tp=2, cp=2)),
        sparse_attention.ops(SPARSE, CONTEXT, shard(tp=2, cp=2)),
    ):
        kinds = {
            op.name: (op.forward_kind, op.backward_kind)
            for op in ops
            if isinstance(op, Collective) and np.any(op.active)
        }
        adjoint = {"all_gather": "reduce_scatter", "all_to_all": "all_to_all"}
        for name in ("scan_exchange", "scan_return", "cp_gather"):
            if name in kinds:
                forward, backward = kinds[name]
                assert adjoint[str(forward)] == backward


def test_the_collectives_of_a_tower_are_counted_once_per_block() -> None:
    cluster = load_cluster("dgx-h100")
    machine = Machine(cluster, load_stack("megatron-core"), "bf16", "adamw")
    job = JobSpec(sequence_length=4096, global_batch=8, images_per_sample=2, image_tokens=256)
    workload = build_workload(read_model("qwen3-vl-8b"), job, machine.stack, machine.device)
    calls = layer_calls(workload.embedding, shard(4096, 1, tp=2), machine)
    reduced = {call.name: call for call in calls if call.phase == "forward"}
    # 27 blocks, each with one all-reduce after attention and one after the MLP, of 2 x 1024
    # patches of 1152 numbers of 2 bytes.
    assert reduced["proj.reduce"].count == reduced["fc2.reduce"].count == 27
    assert reduced["proj.reduce"].bytes == 27 * 2 * 1024 * 1152 * 2
