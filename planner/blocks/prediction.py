"""Multi-token-prediction modules, which run behind the last layer and share its embedding and head.

A module (DeepSeek-V3, arXiv 2412.19437, section 2.2; Megatron-Core,
core/transformer/multi_token_prediction.py) looks the next tokens up again, norms them and the
hidden states, projects the pair from 2 x hidden to hidden, and runs one block, a final norm and the
head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard
from cost_models.ops import Collective, MatMul, Op, SavedTensor
from planner.blocks import ends, routing
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    norm,
    norm_saved,
    product_input_bytes,
)
from planner.models.spec import BlockSpec, MoeSpec


def module_ops(kind: LayerKind, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """One module around a block of ``kind``, and its pass through the head."""
    return (
        *ends.embedding_ops(ctx, shard),
        norm("mtp_norm", replace(ctx, hidden=2 * ctx.hidden), shard),
        *_projection(ctx, shard),
        *kind.ops(shard),
        *ends.head_ops(ctx, shard),
    )


def _projection(ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """From the pair to one hidden state: of a rank's own rows, or columns of all rows, which are
    then gathered over tp; sequence parallelism cuts them into rows again and gathers the gradient.
    """
    wide, size = 2 * ctx.hidden, ctx.gathered_bytes(shard)
    if ctx.whole_prediction:
        return (MatMul("mtp_projection", shard.residual_tokens, ctx.hidden, wide),)
    sp = shard.sequence_parallel
    return (
        *enter_tensor_parallel("mtp_projection", replace(ctx, hidden=wide), shard),
        MatMul("mtp_projection", shard.tokens, ctx.hidden // shard.tp, wide),
        Collective("mtp_projection.columns", "tp", "all_gather", size, "all_gather", size,
                   active=sp),
        Collective("mtp_projection.all_columns", "tp", "all_gather", size, None, 0, active=~sp),
    )  # fmt: skip


def module_saved(kind: LayerKind, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """What a module keeps: two norms of the residual stream, the pair that they make, and what
    lookup, block and head keep.

    A gathered projection's rows of a rank are a view of all rows, and the norm that keeps its
    input keeps these (Megatron-Core, core/tensor_parallel/mappings.py, _split_along_first_dim;
    core/models/common/embeddings/language_model_embedding.py copies for that reason).
    """
    size = ctx.residual_bytes(shard)
    pair = 2 * (size if ctx.whole_prediction else product_input_bytes(ctx, shard))
    views = "norm" in ctx.fused and not ctx.whole_prediction
    others = ctx.gathered_bytes(shard) - size if views else np.zeros_like(size)
    rows = shard.residual_tokens
    elements = size // ctx.element_bytes
    return (
        *ends.embedding_saved(ctx, shard),
        *norm_saved("mtp_embedding_norm", elements, rows, ctx),
        *norm_saved("mtp_hidden_norm", elements, rows, ctx),
        SavedTensor("mtp_projection_input", ctx.saved_input(pair)),
        SavedTensor("mtp_projection_rows_of_others", others),
        *kind.saved(shard),
        *ends.head_saved(ctx, shard),
    )


def buffers(blocks: Iterable[BlockSpec], ctx: BlockContext, shard: Shard) -> Int64:
    """What the dispatchers of the modules' blocks hold from one microbatch to the next."""
    mixtures = (block.feed_forward for block in blocks if isinstance(block.feed_forward, MoeSpec))
    return sum((routing.stays(spec, ctx, shard) for spec in mixtures), np.zeros_like(shard.tp))


def working(kinds: tuple[LayerKind, ...], ctx: BlockContext, shard: Shard) -> Int64:
    """Largest short-lived buffers of head and modules: a block runs its backward when all that was
    kept of the logits is gone."""
    logits = sum((each.bytes for each in ends.head_saved(ctx, shard) if each.last), 0)
    gone = (1 + len(kinds)) * np.asarray(logits)
    blocks = [kind.working_bytes(shard) - gone for kind in kinds]
    found: Int64 = np.max([ends.head_working(ctx, shard), *blocks], axis=0)
    return found
