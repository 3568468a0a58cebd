"""The two ends of a decoder: token embedding, and final norm with LM head and loss."""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import Collective, Elementwise, MatMul, Op, Roofline, SavedTensor
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    norm,
    norm_saved,
    product_input_bytes,
    vocabulary_rows,
)
from planner.blocks.transposed import looked_up


def embedding_ops(ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Gather of rows, then the reduction over tp of a vocabulary-split table."""
    full = ctx.gathered_bytes(shard)
    sp = shard.sequence_parallel
    rows = Elementwise("embedding", 2.0 * full, 3.0 * full)
    if shard.transposed > 1:
        return (rows, *looked_up(full, shard))
    if ctx.whole_vocabulary:
        return (rows,)
    split = (shard.cp == 1) | (not ctx.whole_embedding_in_context)
    return (
        rows,
        Collective("embedding.scatter", "tp", "reduce_scatter", full, "all_gather", full,
                   active=sp & split),
        Collective("embedding.reduce", "tp", "all_reduce", full, None, 0, active=~sp & split),
    )  # fmt: skip


def embedding_saved(ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Token ids, and the dropout mask where the model has one."""
    result = [SavedTensor("token_ids", shard.tokens * 8)]
    if ctx.dropout:
        result.append(SavedTensor("embedding_mask", ctx.residual_bytes(shard) // ctx.element_bytes))
    return tuple(result)


def head_ops(ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Final norm, vocabulary-parallel logits, cross-entropy."""
    shard = ctx.vocabulary_shard(shard)
    x = shard.tokens
    vocab = vocabulary_rows(ctx, shard)
    logits = 1.0 * x * vocab
    fused = "cross_entropy" in ctx.fused
    # Unfused: cast to fp32, maximum, subtract, exponentiate, sum, divide; backward: scale, cast.
    forward, backward, launches = (4, 4, 2) if fused else (*ctx.loss_traffic, 8)
    scalar = 4 * x
    final = norm("final_norm", ctx, shard)
    product = MatMul("lm_head", x, vocab, ctx.hidden, low_precision=False)
    loss: tuple[Op, ...] = (
        Elementwise("cross_entropy", forward * logits, backward * logits, launches, 4),
    )
    if ctx.loss_again:
        loss += _again(ctx, x, vocab, forward)
    if ctx.whole_vocabulary:
        return (final, product, *loss)
    return (
        final,
        *enter_tensor_parallel("lm_head", ctx, shard, pipelined=False, quantised=False),
        product,
        *loss,
        Collective("cross_entropy.reduce", "tp", "all_reduce", scalar, None, 0, forward_count=3),
    )


def _again(ctx: BlockContext, tokens: Int64, vocab: Int64, loss_bytes: float) -> tuple[Op, ...]:
    """Logits and loss that the backward makes a second time, in large pieces."""
    moved = ctx.element_bytes * (tokens * ctx.hidden + ctx.loss_chunks * vocab * ctx.hidden)
    logits = 1.0 * tokens * vocab
    return (
        Roofline(
            "lm_head_again", 0.0, 0.0, 2.0 * ctx.hidden * logits,
            moved + ctx.element_bytes * logits, 0, ctx.loss_chunks,
        ),
        Elementwise("cross_entropy_again", 0.0, loss_bytes * logits, 0, ctx.loss_chunks),
    )  # fmt: skip


def head_saved(ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """The head's input and what the loss keeps per logit."""
    shard = ctx.vocabulary_shard(shard)
    elements = ctx.residual_bytes(shard) // ctx.element_bytes
    logits = shard.tokens * vocabulary_rows(ctx, shard)
    norms = norm_saved("final_norm", elements, shard.residual_tokens, ctx)
    if ctx.loss_again:
        return (*norms, SavedTensor("lm_head_input", product_input_bytes(ctx, shard)))
    if ctx.loss_chunks > 1:
        whole = ctx.gathered_bytes(shard)
        return (
            *norms,
            SavedTensor("lm_head_input", whole),
            SavedTensor("lm_head_input_gradients_of_chunks", whole),
            SavedTensor(
                "logits_of_a_chunk", logits // ctx.loss_chunks * ctx.element_bytes, last=True
            ),
        )
    return (
        *norms,
        SavedTensor("lm_head_input", product_input_bytes(ctx, shard)),
        SavedTensor("loss", _scaled(logits, ctx.logit_saved_bytes), last=True),
    )


def head_output(ctx: BlockContext, shard: Shard) -> Int64:
    """Logits of one microbatch on one device."""
    shard = ctx.vocabulary_shard(shard)
    return shard.tokens * vocabulary_rows(ctx, shard) * ctx.element_bytes


def head_buffers(ctx: BlockContext, shard: Shard) -> Int64:
    """The gradient of the head's input that a loss in pieces sums in fp32, and its 16-bit copy:
    both stay until the next step makes its own."""
    if ctx.loss_chunks == 1 or ctx.loss_again:
        return np.zeros_like(shard.tp)
    whole = ctx.gathered_bytes(shard)
    return whole // ctx.element_bytes * 4 + whole


def head_working(ctx: BlockContext, shard: Shard) -> Int64:
    """Short-lived logits and their gradient; of a chunk with its part of the input's gradient, and
    what a loss that makes the weights' gradient holds of it."""
    shard = ctx.vocabulary_shard(shard)
    rows = vocabulary_rows(ctx, shard)
    logits = shard.tokens * rows // ctx.loss_chunks
    kept = ctx.logit_saved_bytes if ctx.loss_again else 0.0
    each = _scaled(logits, kept + ctx.logit_working_bytes)
    if ctx.logit_working_bytes_split is not None:
        split = _scaled(logits, ctx.logit_working_bytes_split)
        each = np.where(shard.tp > 1, split, each)
    each = each + ctx.loss_gradient_bytes * rows * ctx.hidden
    if ctx.loss_again:
        each = each + ctx.residual_bytes(shard)  # the gradients of the pieces before
    if ctx.dtensor:
        return each
    return each + ctx.gathered_bytes(shard) // ctx.loss_chunks


def _scaled(elements: Int64, bytes_per_element: float) -> Int64:
    """Bytes of a buffer; per-element sizes are multiples of a half byte."""
    return elements * round(2 * bytes_per_element) // 2
