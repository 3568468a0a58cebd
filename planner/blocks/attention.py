"""Softmax attention: multi-head, grouped-query, sliding-window; fused or unfused kernels."""

from __future__ import annotations

import numpy as np

from cost_models.cp_kinds import TWO_LEVELS, is_kind
from cost_models.graph import Bools, Int64, Shard, Weight
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, Reals, SavedTensor
from planner.blocks import splits as split
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    norm_saved,
    residual_add,
)
from planner.blocks.quantised import column, row
from planner.blocks.ring import ring_passes
from planner.blocks.tensors import linear, norm
from planner.models.spec import AttentionSpec

CORE = ("core_attn",)
ROTARY = {True: (2.0, 2), False: (10.0, 6)}
"""Bytes moved per byte of queries and keys, and kernels, by whether one kernel rotates both.

Op by op: cast to fp32, product with complex factors, cast back, each for queries and for keys
(torchtitan, models/llama3/model/model.py, ``apply_rotary_emb``; two halves times sines and cosines
move as much)."""


def weights(spec: AttentionSpec, hidden: int) -> list[Weight]:
    """q, k, v by column, out by row; what is per head stays with its head."""
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    gate = 2 if spec.output_gate else 1
    result = [
        *linear("attention.q", gate * q_width, hidden, "column", bias=spec.qkv_bias),
        *(
            weight
            for name in (("attention.k",) if spec.tied_kv else ("attention.k", "attention.v"))
            for weight in linear(
                name, kv_width, hidden, "column", bias=spec.qkv_bias, kv_heads=spec.kv_heads
            )
        ),
        *linear("attention.out", hidden, q_width, "row", bias=spec.out_bias),
    ]
    if spec.qk_norm == "per_head":
        result += norm("attention.qk_norm", spec.head_dim, bias=False, count=2)
    elif spec.qk_norm == "full":
        result += norm("attention.q_norm", q_width, bias=False)
        result += norm("attention.k_norm", kv_width, bias=False)
    if spec.sinks:
        result.append(Weight("attention.sinks", spec.heads, 1, "column"))
    return result


def splits(spec: AttentionSpec) -> tuple[split.Split, ...]:
    """Query heads over tp; KV heads over tp unless replicated, and over cp when exchanged."""
    return (
        split.heads(spec.heads),
        split.kv_heads(spec.kv_heads, gated=spec.output_gate),
        split.exchanged(spec.kv_heads),
    )


def flops_per_token(spec: AttentionSpec, span: int) -> float:
    """Scores and weighted sum: ``2 * heads * 2 * head_dim`` per key; on average half the span of
    keys under a causal mask, a whole window where one binds."""
    span = min(span, spec.chunk or span)
    windowed = spec.window is not None and spec.window < span
    keys = float(spec.window or 0) if windowed else span / 2 if spec.causal else float(span)
    return 2.0 * spec.heads * 2 * spec.head_dim * keys


def assumptions(spec: AttentionSpec) -> tuple[str, ...]:
    """A window is priced whole, a tied value by its missing matrix only; what changes scores on
    their way to the softmax is free."""
    notes = []
    if spec.alibi:
        notes.append("ALiBi: the bias that scores get is not priced, nor are its slopes")
    if spec.softcap:
        notes.append("softcapped scores: the tanh inside the attention kernel is not priced")
    if spec.sinks:
        notes.append("attention sinks: their logit in each softmax is not priced")
    if spec.window is not None:
        notes.append(
            "sliding windows: every query is priced with a whole window of keys, also the first "
            "ones; context parallelism still passes all keys and values round"
        )
    if spec.chunk is not None:
        notes.append(
            "chunked attention is priced as causal attention inside chunks; context parallelism "
            "still passes all keys and values round"
        )
    return tuple(notes)


def local_kv_heads(kv_heads: int, tp: Int64) -> Int64:
    """KV heads on one tensor-parallel rank; with more ranks than heads they are replicated."""
    return np.maximum(1, kv_heads // tp)


def ops(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the attention sub-block after its norm, up to and including the residual add."""
    x, e, hd = shard.tokens, ctx.element_bytes, spec.head_dim
    heads = spec.heads // shard.tp
    kv = local_kv_heads(spec.kv_heads, shard.tp)
    width = (2 if spec.output_gate else 1) * heads + (1 if spec.tied_kv else 2) * kv
    rotated = (heads + kv) * hd * x * e
    parts = (heads, kv, kv) if "qkv" in ctx.separate else (1,)
    pieces = (width - (1 if spec.tied_kv else 2) * kv, *((kv,) if spec.tied_kv else (kv, kv)))
    result: list[Op] = [
        *enter_tensor_parallel("qkv", ctx, shard, products=len(parts), kept=ctx.keeps_gathered)
    ]
    columns = width * hd
    if ctx.gathers_heads:
        columns = -(-_joined_heads(spec) * hd // shard.tp)
    own = column(ctx.quantiser, shard, columns, ctx.hidden, normed=ctx.fuses_norms)
    result.append(MatMul("qkv", x, columns, ctx.hidden, parts=parts, pieces=pieces, quantised=own))
    if spec.qkv_bias:
        # Added in the product's epilogue; its gradient is a sum over rows in a kernel of its own.
        result.append(Elementwise("qkv_bias", 0.0, 1.0 * columns * x * e, forward_launches=0))
    if ctx.gathers_heads:
        result += _gathered_heads(spec, ctx, shard)
    if spec.qk_norm != "none":
        result.append(Elementwise("qk_norm", 2.0 * rotated, 3.0 * rotated, 2, 2))
    if ctx.rotary and spec.rotary and not spec.alibi:
        passes, launches = ROTARY["rope" in ctx.fused]
        moved = passes * rotated
        result.append(Elementwise("rope", moved, moved, launches, launches))
    result += context_parallel(kv * hd * x * e * 2, (heads + kv) * 2 * hd * x * e, ctx, shard)
    result += core(spec, ctx, shard, heads, kv)
    query = heads * hd * x * e
    result += ring_passes(query, query, 2 * kv * hd * x * e, heads * x, ctx, shard)
    if spec.output_gate:
        gated = heads * hd * x * e
        # Forward reads the gate and the output; backward reads both and the gradient, writes two.
        result.append(Elementwise("output_gate", 3.0 * gated, 5.0 * gated))
    result.append(output_projection(ctx, shard, heads * hd))
    result += leave_tensor_parallel("proj", ctx, shard)
    result.append(residual_add("attention_residual", ctx, shard, bias=spec.out_bias))
    return tuple(result)


def output_projection(ctx: BlockContext, shard: Shard, width: Int64) -> MatMul:
    """Back from ``width`` columns of this rank's heads."""
    original = "attn_proj" in ctx.original_inputs
    own = row(ctx.quantiser, shard, ctx.hidden, width, original=original)
    return MatMul("proj", shard.tokens, ctx.hidden, width, quantised=own)


def _joined_heads(spec: AttentionSpec) -> int:
    """Heads whose columns the joined product makes on all ranks together."""
    gate, shared = 2 if spec.output_gate else 1, 1 if spec.tied_kv else 2
    return gate * spec.heads + shared * spec.kv_heads


def _joined_bytes(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """What the joined product makes on all ranks together, where tp exceeds the KV heads."""
    size = _joined_heads(spec) * spec.head_dim * shard.tokens * ctx.element_bytes
    return np.where(shard.tp > spec.kv_heads, size, 0)


def _gathered_heads(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Where tp exceeds the KV heads, all columns of the joined product are gathered and the group
    of one KV head, then a rank's queries, taken out (megatron-core 0.16.1, attention.py,
    ``get_query_key_value_tensors``).

    Gathering along the last dimension puts the ranks' parts in order, one copy each way
    (tensor_parallel/mappings.py); the backward of taking a part out fills zeros and copies.
    """
    above = shard.tp > spec.kv_heads
    full = _joined_bytes(spec, ctx, shard)
    unit = spec.head_dim * shard.tokens * ctx.element_bytes
    queries = np.where(above, spec.heads // spec.kv_heads * unit, 0)
    own = np.where(above, spec.heads // shard.tp * unit, 0)
    group = full // spec.kv_heads
    backward = 2.0 * full + (full + 2.0 * group) + (queries + 2.0 * own)
    return (
        Collective(
            "qkv.columns", "tp", "all_gather", full, "reduce_scatter", full, active=above
        ),
        Elementwise(
            "qkv_order", 2.0 * full, backward, np.where(above, 1, 0), np.where(above, 5, 0)
        ),
    )  # fmt: skip


def core(
    spec: AttentionSpec, ctx: BlockContext, shard: Shard, heads: Int64, kv: Int64
) -> tuple[Op, ...]:
    """Scores, softmax and weighted sum."""
    if ctx.attention_kernel != "unfused":
        span = ctx.span(shard, spec.chunk)
        windowed = spec.window is not None and spec.window < span
        return (
            Attention(
                "attention", packed(shard, span), span / shard.cp,
                min(span, spec.window) if spec.window else span, heads, kv,
                spec.head_dim, spec.head_dim, causal=spec.causal and not windowed,
                last=last_queries(ctx, shard, span), exchanged=shard.cp_exchange,
                blocks=shard.cp_ring,
            ),
        )  # fmt: skip
    return unfused_core(ctx, shard, heads, spec.head_dim, spec.head_dim)


def packed(shard: Shard, span: int) -> Reals:
    """Pieces of ``span`` tokens in a microbatch: each is a sample of its own to the kernel."""
    return shard.microbatch * (shard.sequence / span) if span < shard.sequence else shard.microbatch


def last_queries(ctx: BlockContext, shard: Shard, span: int) -> bool | Bools:
    """Where the rank that all others wait for has the last queries of the sequence: it was dealt
    out in order and not exchanged for heads. Documents and chunks within which tokens see each
    other are taken as spread over the ranks."""
    if ctx.balanced_context is True or span < shard.sequence:
        return False
    result: Bools = ~is_kind(shard.cp_kind, "a2a")
    if ctx.balanced_context == "where_it_splits":
        result = result & (shard.cp > 1) & (shard.sequence % (2 * shard.cp) != 0)
    return result


def unfused_core(
    ctx: BlockContext, shard: Shard, heads: Int64, qk_dim: int, v_dim: int
) -> tuple[Op, ...]:
    """Batched products with a masked softmax between: full, not causal, FLOPs."""
    q_len, kv_len = shard.sequence // shard.cp, shard.sequence
    batch = shard.microbatch * heads
    scores = 1.0 * batch * q_len * kv_len
    result: list[Op] = [
        MatMul("scores", q_len, kv_len, qk_dim, batch, weight=False, low_precision=False,
               modules=CORE),
        _softmax(ctx, batch, scores),
    ]  # fmt: skip
    if ctx.dropout:
        size = (2 * ctx.element_bytes + 1) * scores
        result.append(Elementwise("attention_dropout", size, size, modules=CORE))
    result.append(
        MatMul("context", q_len, v_dim, kv_len, batch, weight=False, low_precision=False,
               modules=CORE)
    )  # fmt: skip
    return tuple(result)


def _softmax(ctx: BlockContext, batch: Int64, scores: Reals) -> Elementwise:
    """The masked softmax of ``scores`` elements of ``batch`` samples and heads.

    The fused causal kernel reads the triangle and writes the square, zeros included.
    """
    e = ctx.element_bytes
    if "masked_softmax" not in ctx.fused:
        return Elementwise("softmax", 6.0 * e * scores, 9.0 * e * scores, 3, 3, modules=CORE)
    apart = op_by_op_softmax(ctx, batch)
    forward, backward = (
        np.where(apart, slow, fast * e) * scores
        for slow, fast in zip(OP_BY_OP, (1.5, 2.0), strict=True)
    )
    launches = np.where(apart, 5, 1)
    return Elementwise("softmax", forward, backward, launches, launches, modules=CORE)


SOFTMAX_BATCH = 4
"""Samples times heads of a rank that the fused kernel takes are multiples of this, one per warp of
a block: Megatron-LM, megatron/model/fused_softmax.py, ``is_kernel_available``."""
OP_BY_OP = (37.0, 41.0)
"""Bytes per score of the five kernels that stand in for it (same file, ``forward_torch_softmax``):
to fp32, times a scale, mask, softmax, back to 16 bits; and of their backwards."""


def op_by_op_softmax(ctx: BlockContext, batch: Int64) -> Bools:
    """Where a stack with Megatron's fused softmax has to do without it."""
    if "masked_softmax" not in ctx.fused:
        return np.zeros(np.shape(batch), dtype=np.bool_)
    result: Bools = batch % SOFTMAX_BATCH != 0
    return result


def context_parallel(
    kv_bytes: Int64, qkvo_bytes: Int64, ctx: BlockContext, shard: Shard
) -> list[Op]:
    """Communication of context parallelism around the attention core.

    ``kv_bytes`` are K and V of this rank, ``qkvo_bytes`` Q, K, V and output together; gathered or
    exchanged, each is a call of its own, and they are priced at their mean size. ``p2p``
    passes K and V around the ring behind the attention of each block, and their gradients back
    (Liu et al., arXiv 2310.01889); ``all_gather`` gathers K and V before the attention (Llama 3,
    arXiv 2407.21783, section 3.3.2); ``a2a`` exchanges heads for sequence (Ulysses, arXiv
    2309.14509). ``a2a_p2p`` exchanges inside its inner groups; what then goes round the ring is as
    many bytes, more tokens of fewer heads (Transformer Engine, ``AttnFuncWithCPAndKVP2P``, whose
    backward exchanges the output too, kept as it left the forward). ``a2a_all_gather`` gathers what
    was exchanged instead.
    """
    again = is_kind(shard.cp_kind, *TWO_LEVELS) & ctx.exchanges_output_again
    size = qkvo_bytes // 4
    return [
        Collective(
            "cp_ring", "cp_ring", "ring", kv_bytes, "ring", 2 * kv_bytes,
            forward_hidden="attention:fprop", backward_hidden="attention:dgrad", modules=CORE,
        ),
        Collective(
            "cp_gather", "cp_gather", "all_gather", kv_bytes * shard.cp_gather // 2,
            "reduce_scatter", kv_bytes * shard.cp_gather // 2, forward_count=2, backward_count=2,
            modules=CORE,
        ),
        Collective(
            "cp_exchange", "cp_exchange", "all_to_all", size, "all_to_all", size,
            forward_count=4, backward_count=4, modules=CORE,
        ),
        Collective(
            "cp_exchange_output", "cp_exchange", None, 0, "all_to_all", size,
            active=again, modules=CORE,
        ),
    ]  # fmt: skip


def saved(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors kept for the backward, after the norm's input and output."""
    x, e, hd = shard.tokens, ctx.element_bytes, spec.head_dim
    heads = spec.heads // shard.tp
    kv = local_kv_heads(spec.kv_heads, shard.tp)
    own = kv * hd * x * e
    result = [
        SavedTensor("qkv", heads * hd * x * e + 2 * own, input_of="core_attn"),
        SavedTensor("gathered_kv", gathered_context(2 * own, ctx, shard)),
        SavedTensor("attention_output", heads * hd * x * e, input_of="attn_proj"),
        *output_copy(heads * hd * x * e, ctx),
        *_output_of_halves(heads * hd * x * e, ctx, shard),
    ]
    if spec.qk_norm != "none":
        rows = (heads + kv) * x if spec.qk_norm == "per_head" else 2 * x
        result += norm_saved("qk_norm", (heads + kv) * hd * x, rows, ctx, input_of="qkv_linear")
    if spec.output_gate:
        result.append(SavedTensor("gate_and_gated_output", 2 * heads * hd * x * e))
    result += core_saved(ctx, shard, heads)
    return tuple(result)


def output_copy(size: Int64, ctx: BlockContext) -> tuple[SavedTensor, ...]:
    """What the output projection keeps of its input beside the core, which keeps it in 16 bits."""
    if ctx.saved_input_bytes_per_64 is None or "attn_proj" in ctx.original_inputs:
        return ()
    return (SavedTensor("projection_input", ctx.saved_input(size)),)


def _output_of_halves(size: Int64, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """What attention over gathered keys and values keeps of its output, where that is not what the
    output projection keeps: the outputs of both halves of the queries (Transformer Engine 2.4,
    pytorch/attention/dot_product_attention/context_parallel.py, ``out_per_step`` and ``out``)."""
    if not ctx.copies_context_output or output_copy(size, ctx):
        return ()
    return (SavedTensor("outputs_of_halves", np.where(shard.cp_gather > 1, size, 0), modules=CORE),)


def gathered_context(kv_bytes: Int64, ctx: BlockContext, shard: Shard) -> Int64:
    """Bytes of keys and values of other ranks that wait for the backward, where ``kv_bytes`` are
    this rank's."""
    return kv_bytes * (shard.cp_gather - 1) if ctx.keeps_gathered_context else 0 * kv_bytes


def exchange_working(kv_bytes: Int64, ctx: BlockContext, shard: Shard) -> Int64:
    """Buffers of context parallelism beside the tensors of this rank.

    A ring receives the keys and values of the next block, and their gradients, while it sends
    those at hand; ``all_gather`` holds all of them, unless they were kept, and their gradients
    before they are scattered.
    """
    ring = np.where(shard.cp_ring > 1, 4 * kv_bytes, 0)
    copies = 1 if ctx.keeps_gathered_context else 2
    return np.where(shard.cp_gather > 1, copies * kv_bytes * shard.cp_gather, ring)


def core_saved(ctx: BlockContext, shard: Shard, heads: Int64) -> list[SavedTensor]:
    """What the attention core keeps: softmax statistics, or whole score matrices if unfused."""
    if ctx.attention_kernel != "unfused":
        return [SavedTensor("softmax_statistics", heads * shard.tokens * 4, modules=CORE)]
    scores = heads * shard.tokens * shard.sequence
    kept = np.where(op_by_op_softmax(ctx, shard.microbatch * heads), 4, ctx.element_bytes)
    result = [SavedTensor("softmax", scores * kept, modules=CORE)]
    if ctx.dropout:
        result.append(SavedTensor("attention_dropout", scores * ctx.element_bytes, modules=CORE))
        result.append(SavedTensor("attention_mask", scores, modules=CORE))
    return result


def working(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Gradients of q, k, v and the output, and the gathered input."""
    heads = spec.heads // shard.tp
    kv = local_kv_heads(spec.kv_heads, shard.tp)
    gradients = (2 * heads + 2 * kv) * spec.head_dim * shard.tokens * ctx.element_bytes
    kv_bytes = 2 * kv * spec.head_dim * shard.tokens * ctx.element_bytes
    gathered = ctx.gathered_bytes(shard)
    if ctx.gathers_heads:
        # Their gradient and its copy in the order of ranks are gone when the input is gathered.
        gathered = np.maximum(gathered, 2 * _joined_bytes(spec, ctx, shard))
    return gradients + gathered + exchange_working(kv_bytes, ctx, shard)
