"""DeepSeek sparse attention: an indexer picks the keys that each query attends.

DeepSeek-V3.2 (arXiv 2512.02556, section 2.1). The indexer scores every visible key with a few small
heads shared by all of the attention's; the ``top_k`` best are attended in the multi-query form of
latent attention (queries absorb the key up-projection, the output the value's), so that a key
picked once serves all heads. In training the indexer learns from the attention's distribution over
the keys picked. It is whole on every tensor-parallel rank, as in Megatron-Core.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, SavedTensor
from planner.blocks import latent_attention
from planner.blocks import splits as split
from planner.blocks.attention import (
    CORE,
    core_saved,
    last_queries,
    output_projection,
    packed,
    unfused_core,
)
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    residual_add,
)
from planner.blocks.tensors import linear, norm
from planner.models.spec import SparseLatentAttentionSpec


def _rank(spec: SparseLatentAttentionSpec) -> int:
    assert spec.latent.q_lora_rank is not None, "checked by the spec"
    return spec.latent.q_lora_rank


def _key(spec: SparseLatentAttentionSpec) -> int:
    """Width of a shared key: the latent and the rotated part."""
    return spec.latent.kv_lora_rank + spec.latent.qk_rope_head_dim


def _index(spec: SparseLatentAttentionSpec) -> int:
    return spec.index_heads * spec.index_head_dim


def weights(spec: SparseLatentAttentionSpec, hidden: int) -> list[Weight]:
    """Those of latent attention, and the indexer's, whole on every rank."""
    return [
        *latent_attention.weights(spec.latent, hidden),
        *linear("indexer.q", _index(spec), _rank(spec), "replicated"),
        *linear("indexer.k", spec.index_head_dim, hidden, "replicated"),
        *norm("indexer.k_norm", spec.index_head_dim, bias=True),
        *linear("indexer.head_weights", spec.index_heads, hidden, "replicated"),
    ]


def splits(spec: SparseLatentAttentionSpec) -> tuple[split.Split, ...]:
    """Heads over tp; keys are gathered under any context parallelism, nothing is exchanged."""
    return (split.heads(spec.heads),)


def flops_per_token(spec: SparseLatentAttentionSpec, span: int) -> float:
    """Attention over the keys picked, in its multi-query form, and index scores of all visible
    keys: ``2 * heads * (2 * latent + rope) * keys + 2 * index heads * index dim * span / 2``."""
    keys = span / 2 if span <= spec.top_k else float(spec.top_k)
    width = _key(spec) + spec.latent.kv_lora_rank
    return 2.0 * spec.heads * width * keys + 2.0 * _index(spec) * span / 2


def assumptions(spec: SparseLatentAttentionSpec) -> tuple[str, ...]:
    """How the sparse attention is priced."""
    return (
        f"sparse attention: every query is priced with {spec.top_k} keys in multi-query form, at "
        "the efficiency of dense attention kernels; the indexer trains on the keys picked "
        "(arXiv 2512.02556, section 2.1), is whole on every tp rank, and cp gathers its keys",
    )


def ops(spec: SparseLatentAttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    mla = spec.latent
    x, r, e = shard.tokens, shard.residual_tokens, ctx.element_bytes
    heads, latent = mla.heads // shard.tp, mla.kv_lora_rank
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    latents = 1.0 * (_rank(spec) + latent) * r * e
    gathered = latent_attention.latent_context(mla, ctx)
    rotated = 1.0 * (heads * qk + _index(spec)) * x * e
    shared = (_key(spec) + spec.index_head_dim) * x * shard.cp * e
    return (
        MatMul("q_down", r, _rank(spec), ctx.hidden),
        MatMul("kv_down", r, _key(spec), ctx.hidden),
        Elementwise("latent_norm", 2.0 * latents, 3.0 * latents, 2, 2),
        MatMul("index_k", r, spec.index_head_dim + spec.index_heads, ctx.hidden),
        *enter_tensor_parallel("q_up", gathered, shard),
        MatMul("q_up", x, heads * qk, _rank(spec)),
        MatMul("index_q", x, _index(spec), _rank(spec)),
        Elementwise("rope", 2.0 * rotated, 2.0 * rotated, 3, 3),
        MatMul("q_absorb", x, latent, mla.qk_nope_head_dim, heads),
        Collective("cp_gather", "cp", "all_gather", shared, "reduce_scatter", shared, modules=CORE),
        *_indexer(spec, ctx, shard, heads),
        *_core(spec, ctx, shard, heads),
        MatMul("value_up", x, mla.v_head_dim, latent, heads),
        output_projection(ctx, shard, heads * mla.v_head_dim),
        *leave_tensor_parallel("proj", ctx, shard),
        residual_add("attention_residual", ctx, shard),
    )


def _indexer(
    spec: SparseLatentAttentionSpec, ctx: BlockContext, shard: Shard, heads: Int64
) -> tuple[Op, ...]:
    """Scores of all visible keys (forward only), the choice, and the loss on the keys chosen."""
    span = ctx.span(shard)
    keys, visible = min(spec.top_k, span), (span + 1) // 2
    x, batch = shard.tokens, packed(shard, span)
    rows = span / shard.cp
    scores, chosen = 4.0 * x * visible, x * keys * 4
    return (
        # A fused kernel sums over its heads: one reduction of heads x width per query and key.
        MatMul("index_scores", rows, visible, _index(spec), batch, weight=False, backward=False),
        Elementwise("index_top_k", 2.0 * scores + chosen, 0.0, 2, 0),
        MatMul("index_loss", rows, keys, _index(spec), batch, weight=False),
        MatMul("index_target", rows, keys, heads * _key(spec), batch, weight=False, backward=False),
        Collective("index_target.reduce", "tp", "all_reduce", chosen, None, 0),
        Elementwise("index_divergence", 3.0 * chosen, 2.0 * chosen, 2, 1),
    )


def _core(
    spec: SparseLatentAttentionSpec, ctx: BlockContext, shard: Shard, heads: Int64
) -> tuple[Op, ...]:
    latent = spec.latent.kv_lora_rank
    if ctx.attention_kernel == "unfused":
        return unfused_core(ctx, shard, heads, _key(spec), latent)
    span = ctx.span(shard)
    keys = min(spec.top_k, span)
    return (
        Attention(
            "attention", packed(shard, span), span / shard.cp, keys, heads, np.ones_like(heads),
            _key(spec), latent, causal=keys >= span, last=last_queries(ctx, shard, span),
        ),
    )  # fmt: skip


def saved(
    spec: SparseLatentAttentionSpec, ctx: BlockContext, shard: Shard
) -> tuple[SavedTensor, ...]:
    """Latents, queries before and after absorption, output before and after, keys picked."""
    mla = spec.latent
    x, r, e = shard.tokens, shard.residual_tokens, ctx.element_bytes
    heads = mla.heads // shard.tp
    keys = min(spec.top_k, ctx.span(shard))
    per_head = mla.qk_nope_head_dim + _key(spec) + mla.kv_lora_rank + mla.v_head_dim
    latent = 2 * (_rank(spec) + mla.kv_lora_rank) + mla.qk_rope_head_dim + spec.index_head_dim
    return (
        SavedTensor("latent", latent * r * e),
        # Of the norms of both latents, and of the indexer's layer norm of its key.
        SavedTensor("latent_statistics", 4 * (2 * ctx.norm_statistics + 2) * r),
        SavedTensor("index_queries", _index(spec) * x * e),
        SavedTensor("picked_keys", 2 * keys * x * 4),
        SavedTensor("queries_and_output", heads * per_head * x * e),
        *core_saved(ctx, shard, heads),
    )


def working(spec: SparseLatentAttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Index scores of a microbatch in fp32, or the attention's gradients, whichever is more."""
    heads = spec.latent.heads // shard.tp
    gradients = heads * 2 * (_key(spec) + spec.latent.kv_lora_rank)
    gradient_bytes = gradients * shard.tokens * ctx.element_bytes
    scores = 4 * shard.tokens * ctx.span(shard)
    largest: Int64 = np.maximum(gradient_bytes, scores)
    return largest + ctx.gathered_bytes(shard)
