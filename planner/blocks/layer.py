"""A layer from its sub-blocks: a norm before each (or one for both), further norms after them."""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import Op, SavedTensor
from planner.blocks.context import BlockContext, norm, residual_saved
from planner.blocks.registry import kind_of, parts
from planner.models.spec import (
    BlockSpec,
    FeedForward,
    LatentAttentionSpec,
    Mixer,
    MlpSpec,
    MoeSpec,
    SparseLatentAttentionSpec,
)

UNFUSED_NORMS = (LatentAttentionSpec, SparseLatentAttentionSpec, MoeSpec)
"""Parts that start with more than one product of the normalised input."""


def layer_ops(block: BlockSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of one layer of ``block``."""
    result: list[Op] = []
    for index, part in enumerate(parts(block)):
        if not (_one_norm(block) and index):
            result.append(norm(f"norm{index}", ctx, shard, _norm_modules(part, ctx)))
        result += kind_of(part).ops(part, ctx, shard)
    for index in range(len(parts(block)), block.norms):
        result.append(norm(f"post_norm{index}", ctx, shard))
    return tuple(result)


def layer_saved(block: BlockSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors that one layer of ``block`` keeps for the backward."""
    result: list[SavedTensor] = []
    for index, part in enumerate(parts(block)):
        if not (_one_norm(block) and index):
            result += residual_saved(f"sub{index}", ctx, shard, _norm_modules(part, ctx))
        result += kind_of(part).saved(part, ctx, shard)
    for index in range(len(parts(block)), block.norms):
        result.append(SavedTensor(f"post_norm{index}", ctx.residual_bytes(shard)))
    return tuple(result)


def layer_working(block: BlockSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Short-lived bytes at the peak of one layer's backward."""
    largest = ctx.residual_bytes(shard)
    for part in parts(block):
        largest = np.maximum(largest, kind_of(part).working(part, ctx, shard))
    return largest


def _norm_modules(part: Mixer | FeedForward, ctx: BlockContext) -> tuple[str, ...]:
    """What runs the norm before ``part`` again: the part itself where the norm is fused into its
    first product, unless that is a latent's or a router's."""
    if "norm_linear" not in ctx.fused or isinstance(part, UNFUSED_NORMS):
        return ("layernorm",)
    return ("mlp",) if isinstance(part, MlpSpec) else ()


def _one_norm(block: BlockSpec) -> bool:
    return block.parallel and block.norms < 2
