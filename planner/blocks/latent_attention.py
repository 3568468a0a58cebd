"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), training form.

Down-projections are replicated over tp (or split by columns, their outputs gathered),
up-projections split by head; the attention itself runs with expanded keys and values (no weight
absorption, which is an inference form).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, SavedTensor
from planner.blocks import splits as split
from planner.blocks.attention import (
    context_parallel,
    core_saved,
    exchange_working,
    gathered_context,
    last_queries,
    output_copy,
    output_projection,
    packed,
    unfused_core,
)
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    norm_saved,
    residual_add,
    within,
)
from planner.blocks.quantised import column, plain
from planner.blocks.ring import ring_passes
from planner.blocks.tensors import linear, norm
from planner.models.spec import LatentAttentionSpec


def weights(spec: LatentAttentionSpec, hidden: int) -> list[Weight]:
    """Down-projections whole on every rank, up-projections by column, out by row."""
    q_width = spec.heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
    kv_width = spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    bias = spec.qkv_bias
    if spec.q_lora_rank is None:
        result = linear("attention.q", q_width, hidden, "column")
    else:
        rank = spec.q_lora_rank
        result = [
            *linear("attention.q_down", rank, hidden, "replicated", bias=bias),
            *norm("attention.q_norm", rank, bias=False),
            *linear("attention.q_up", q_width, rank, "column"),
        ]
    kv_down = spec.kv_lora_rank + spec.qk_rope_head_dim
    out = spec.heads * spec.v_head_dim
    return [
        *result,
        *linear("attention.kv_down", kv_down, hidden, "replicated", bias=bias),
        *norm("attention.kv_norm", spec.kv_lora_rank, bias=False),
        *linear("attention.kv_up", kv_width, spec.kv_lora_rank, "column"),
        *linear("attention.out", hidden, out, "row", bias=spec.out_bias),
    ]


def as_split(weights: Iterable[Weight], ctx: BlockContext) -> tuple[Weight, ...]:
    """A layer's weights as the stack's tp splits them: the down-projections by columns, perhaps."""
    if not ctx.splits_latent_down:
        return tuple(weights)
    down = ("attention.q_down", "attention.kv_down")
    return tuple(
        replace(weight, sharding="column") if weight.name in down else weight for weight in weights
    )


def splits(spec: LatentAttentionSpec) -> tuple[split.Split, ...]:
    """Heads over tp, and over cp when exchanged."""
    return (split.heads(spec.heads), split.exchanged(spec.heads))


def flops_per_token(spec: LatentAttentionSpec, span: int) -> float:
    """Scores and weighted sum over half the span of keys: ``2 * heads * (qk + v)`` each."""
    return 2.0 * spec.heads * (_qk_dim(spec) + spec.v_head_dim) * span / 2


def assumptions(_spec: LatentAttentionSpec) -> tuple[str, ...]:
    """None."""
    return ()


def _qk_dim(spec: LatentAttentionSpec) -> int:
    return spec.qk_nope_head_dim + spec.qk_rope_head_dim


def ops(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    x, e = shard.tokens, ctx.element_bytes
    heads, qk, v = spec.heads // shard.tp, _qk_dim(spec), spec.v_head_dim
    up = spec.kv_lora_rank
    r = _down_rows(ctx, shard)
    result: list[Op] = [*enter_tensor_parallel("kv_down", ctx, shard)] if ctx.dtensor else []
    if spec.q_lora_rank is not None:
        result += _down("q_down", spec.q_lora_rank, 0, ctx, shard)
        latent_bytes = (spec.q_lora_rank + up) * r * e
    else:
        latent_bytes = up * r * e
    kv_down = _down("kv_down", up, spec.qk_rope_head_dim, ctx, shard)
    queries: tuple[Op, ...] = (
        *(() if ctx.dtensor else enter_tensor_parallel("q_up", latent_context(spec, ctx), shard)),
        _up("q_up", ctx, shard, heads * qk, spec.q_lora_rank or ctx.hidden),
    )
    q_up = within("mla_up_proj", queries)
    norm = Elementwise("latent_norm", 2.0 * latent_bytes, 3.0 * latent_bytes, 2, 2)
    # torchtitan's save list counts products in the order in which its model runs them.
    result += [norm, *q_up, *kv_down] if ctx.dtensor else [*kv_down, norm, *q_up]
    rotated = 2.0 * heads * qk * x * e
    up_project: tuple[Op, ...] = (
        _up(
            "kv_up",
            ctx,
            shard,
            heads * (spec.qk_nope_head_dim + v),
            up,
            pieces=(spec.qk_nope_head_dim, v),
        ),
        Elementwise("rope_concat", 2.0 * rotated, 2.0 * rotated, 3, 3),
    )
    result += within("mla_up_proj", up_project)
    kv_bytes = heads * (qk + v) * x * e
    result += context_parallel(kv_bytes, kv_bytes + heads * (qk + v) * x * e, ctx, shard)
    if ctx.attention_kernel == "unfused":
        result += unfused_core(ctx, shard, heads, qk, v)
    else:
        span = ctx.span(shard)
        result.append(
            Attention(
                "attention",
                packed(shard, span),
                span / shard.cp,
                span,
                heads,
                heads,
                qk,
                v,
                last=last_queries(ctx, shard, span),
                exchanged=shard.cp_exchange,
                blocks=shard.cp_ring,
            )
        )
    result += ring_passes(heads * qk * x * e, heads * v * x * e, kv_bytes, heads * x, ctx, shard)
    result.append(output_projection(ctx, shard, heads * v))
    result += leave_tensor_parallel("proj", ctx, shard)
    result.append(residual_add("attention_residual", ctx, shard))
    return tuple(result)


def _down(name: str, latent: int, rotated: int, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """A down-projection to ``latent`` columns and ``rotated`` ones.

    Split by columns it is a column-parallel layer of its own: it gathers what sequence parallelism
    split, and its outputs are gathered in turn. Sequence parallelism then cuts a rank's rows of the
    latent out again and gathers their gradient; the rotated part stays whole (Megatron-Core 0.13.1,
    core/transformer/multi_latent_attention.py, get_query_key_value_tensors: the backward of
    gather_from_tensor_model_parallel_region is a cut, that of scatter_to_sequence_parallel_region a
    gather).
    """
    width = latent + rotated
    if not ctx.splits_latent_down:
        rows = _down_rows(ctx, shard)
        own = plain(ctx.quantiser, rows, width, ctx.hidden)
        return (MatMul(name, rows, width, ctx.hidden, quantised=own),)
    columns = -(-np.int64(width) // shard.tp)
    size = shard.tokens * ctx.element_bytes
    sp = shard.sequence_parallel
    return (
        *enter_tensor_parallel(name, ctx, shard, pipelined=False),
        MatMul(
            name, shard.tokens, columns, ctx.hidden,
            quantised=column(ctx.quantiser, shard, columns, ctx.hidden, normed=False),
        ),
        Collective(f"{name}.columns", "tp", "all_gather", size * width, "all_gather",
                   size * latent, active=sp),
        Collective(f"{name}.all_columns", "tp", "all_gather", size * width, None, 0, active=~sp),
    )  # fmt: skip


def _up(
    name: str, ctx: BlockContext, shard: Shard, n: Int64, k: int, *, pieces: tuple[int, ...] = (1,)
) -> MatMul:
    """From a latent to this rank's heads, behind a norm of its own."""
    own = column(ctx.quantiser, shard, n, k, normed=ctx.fuses_norms)
    return MatMul(name, shard.tokens, n, k, pieces=pieces, quantised=own)


def _down_rows(ctx: BlockContext, shard: Shard) -> Int64:
    """Rows that a rank projects down.

    Megatron takes the rank's part of the sequence and gathers the latents; DTensor gathers the
    hidden states, and every tp rank has the latents of all rows (torchtitan,
    models/deepseek_v3/sharding.py: ``wq_a``, ``wkv_a`` and their norms are replicated).
    """
    return shard.tokens if ctx.dtensor else shard.residual_tokens


def latent_context(spec: LatentAttentionSpec, ctx: BlockContext) -> BlockContext:
    """A context whose gathered width is that of the latents, which are what tp gathers; with the
    keys' rotated part, unless split projections have it gathered already."""
    rotated = 0 if ctx.splits_latent_down else spec.qk_rope_head_dim
    width = (spec.q_lora_rank or ctx.hidden) + spec.kv_lora_rank + rotated
    return replace(ctx, hidden=width)


def saved(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors kept for the backward, after the norm's input and output."""
    x, e = shard.tokens, ctx.element_bytes
    heads, qk, v = spec.heads // shard.tp, _qk_dim(spec), spec.v_head_dim
    each = heads * x * e
    # A gather copies, and nothing else holds the product's output then.
    held = shard.cp_gather == 1 if ctx.values_are_views else np.zeros_like(shard.tp)
    return (
        *_latents(spec, ctx, shard),
        *within("mla_up_proj", (
            SavedTensor("qkv", (2 * qk + v) * each, input_of="core_attn"),
            SavedTensor("keys_beside_values", held * spec.qk_nope_head_dim * each),
            SavedTensor("gathered_kv", gathered_context((qk + v) * each, ctx, shard)),
            SavedTensor("rotated_keys", 0, instead=_rotated(spec, ctx, shard)),
        )),
        SavedTensor("attention_output", v * each, input_of="attn_proj"),
        *output_copy(v * each, ctx),
        *core_saved(ctx, shard, heads),
    )  # fmt: skip


def _latents(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """What the norms of the latents and the up-projections keep.

    A fused norm keeps its input, a view of the joined down-projection with the rotated part of the
    keys; op by op a norm casts it, and the projection's output is gone. Where split outputs were
    gathered, sequence parallelism cuts this rank's rows out again: the queries' are a view of all
    gathered rows, the keys' and values' a copy (Megatron-Core 0.13.1, core/tensor_parallel/
    mappings.py, ``_split_along_first_dim``: ``contiguous`` of what is so in one of them only).
    """
    rows = _down_rows(ctx, shard)
    query = spec.q_lora_rank or 0
    latent, norms = query + spec.kv_lora_rank, 2 if query else 1
    inputs = latent * rows
    if "norm" in ctx.fused:
        cut = (rows < shard.tokens) & ctx.splits_latent_down
        inputs += np.where(cut, query * (shard.tokens - rows), spec.qk_rope_head_dim * rows)
    normed = SavedTensor(
        "latent_normed", ctx.saved_input(latent * rows * ctx.element_bytes),
        modules=("mla_up_proj",), input_of="qkv_linear",
    )  # fmt: skip
    return (
        *norm_saved(
            "latent_norm", inputs, norms * rows, ctx, ("mla_up_proj",),
            input_of="qkv_linear",
        ),
        normed,
    )  # fmt: skip


def _rotated(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """What the keys' rotated part holds where the up-projections run again with it as an input.

    Gathered over tp under sequence parallelism: rows of the part alone, or, out of split
    projections, a view of all that was gathered. Elsewhere a view of what the norm's input holds.
    """
    rotated = spec.qk_rope_head_dim
    width = spec.kv_lora_rank + rotated if ctx.splits_latent_down else rotated
    cut = _down_rows(ctx, shard) < shard.tokens
    held: Int64 = np.where(cut, shard.tokens * width * ctx.element_bytes, 0)
    return held


def working(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Gradients of q, k, v and the output, and the gathered input."""
    heads = spec.heads // shard.tp
    each = heads * shard.tokens * ctx.element_bytes
    kv_bytes = each * (_qk_dim(spec) + spec.v_head_dim)
    return 2 * kv_bytes + ctx.gathered_bytes(shard) + exchange_working(kv_bytes, ctx, shard)
