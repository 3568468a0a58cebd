"""A layer from its sub-blocks: a norm before each (or one for both), further norms after them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard
from cost_models.ops import Op, SavedTensor
from cost_models.state import is_expert
from planner.blocks import routing
from planner.blocks.attention import local_kv_heads
from planner.blocks.context import BlockContext, norm, residual_saved
from planner.blocks.registry import kind_of, parts
from planner.blocks.ring import forward_buffers
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    FeedForward,
    LatentAttentionSpec,
    Mixer,
    MlpSpec,
    MoeSpec,
    SparseLatentAttentionSpec,
)

_READERS = {LatentAttentionSpec: 2, SparseLatentAttentionSpec: 2, MoeSpec: 0}
"""Low-precision products of the normalised input: two down-projections; a router is none."""

UNFUSED_NORMS = (LatentAttentionSpec, SparseLatentAttentionSpec, MoeSpec)
"""Parts that start with more than one product of the normalised input."""


def layer_ops(block: BlockSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of one layer of ``block``."""
    result: list[Op] = []
    for index, part in enumerate(parts(block)):
        if not (_one_norm(block) and index):
            modules, own = _norm_modules(part, ctx), not isinstance(part, UNFUSED_NORMS)
            result.append(
                norm(
                    f"norm{index}",
                    ctx,
                    shard,
                    modules,
                    shares_input=True,
                    quantised=own and ctx.fuses_norms,
                )
            )
        result += kind_of(part).ops(part, ctx, shard)
    for index in range(len(parts(block)), block.norms):
        result.append(norm(f"post_norm{index}", ctx, shard))
    return tuple(result)


def layer_saved(block: BlockSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors that one layer of ``block`` keeps for the backward."""
    result: list[SavedTensor] = []
    for index, part in enumerate(parts(block)):
        if not (_one_norm(block) and index):
            result += residual_saved(
                f"sub{index}",
                ctx,
                shard,
                _norm_modules(part, ctx),
                products=_READERS.get(type(part), 1),
                norm_module=_norm_name(part, ctx),
                product_module=_product_name(part),
                gathered=ctx.keeps_gathered and isinstance(part, AttentionSpec | MlpSpec),
            )
        result += kind_of(part).saved(part, ctx, shard)
    for index in range(len(parts(block)), block.norms):
        result.append(SavedTensor(f"post_norm{index}", ctx.residual_bytes(shard)))
    return tuple(result)


def layer_working(block: BlockSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Short-lived bytes at the peak of one layer's backward."""
    largest = ctx.residual_bytes(shard)
    for part in parts(block):
        largest = np.maximum(largest, kind_of(part).working(part, ctx, shard))
    around: Int64 = np.maximum(largest, _ring_working(block, ctx, shard))
    return around


def _ring_working(block: BlockSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """What a ring's forward holds for a moment beyond what the feed-forward part, not there yet,
    will keep of the layer; 0 where that is more."""
    mixer = block.mixer
    if not isinstance(mixer, AttentionSpec | LatentAttentionSpec) or not (shard.cp_ring > 1).any():
        return np.zeros_like(shard.tp)
    if isinstance(mixer, AttentionSpec):
        keys, value, heads = (
            mixer.head_dim,
            mixer.head_dim,
            local_kv_heads(mixer.kv_heads, shard.tp),
        )
    else:
        keys, value = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim, mixer.v_head_dim
        heads = mixer.heads // shard.tp
    each = shard.tokens * ctx.element_bytes
    kv, output = heads * (keys + value) * each, mixer.heads // shard.tp * value * each
    later = [kind_of(part).saved(part, ctx, shard) for part in parts(block) if part is not mixer]
    kept = sum((tensor.bytes for tensors in later for tensor in tensors), np.zeros_like(kv))
    beyond: Int64 = np.maximum(forward_buffers(kv, output, ctx, shard) - kept, 0)
    return beyond


def layer_buffers(block: BlockSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Rotary factors of every position, where each layer holds its own, and routing counts."""
    mixer, none = block.mixer, np.zeros_like(shard.tp)
    if isinstance(block.feed_forward, MoeSpec):
        none = none + block.feed_forward.experts * ctx.expert_buffer_bytes
        none = none + routing.stays(block.feed_forward, ctx, shard)
    if not ctx.rotary or not ctx.rotary_cache_bytes or mixer is None:
        return none
    if isinstance(mixer, LatentAttentionSpec):
        width = mixer.qk_rope_head_dim
    elif isinstance(mixer, AttentionSpec) and mixer.rotary and not mixer.alibi:
        width = mixer.head_dim
    else:
        return none
    return none + shard.sequence * width * ctx.rotary_cache_bytes


def with_scalars(kind: LayerKind, ctx: BlockContext) -> LayerKind:
    """``kind`` with what the optimizer keeps per parameter tensor among its buffers.

    A copy of another weight is no tensor of its own, and experts are one; projections that share
    their input are one unless they are separate.
    """
    tensors: dict[str, int] = {}
    for weight in kind.weights:
        if not weight.copy:
            tensors[_tensor(weight.name, ctx)] = 1 if is_expert(weight) else weight.count
    size = ctx.optimizer_scalar_bytes * sum(tensors.values())
    return replace(kind, buffer_bytes=lambda shard: kind.buffer_bytes(shard) + size)


_JOINED = {
    "qkv": ("attention.q", "attention.k", "attention.v"),
    "gate_up": ("mlp.gate", "mlp.up", "moe.shared.gate", "moe.shared.up"),
}
"""Weights that are one tensor where the stack joins the projections."""


def _tensor(name: str, ctx: BlockContext) -> str:
    for group, names in _JOINED.items():
        if name in names and group not in ctx.separate:
            return name.rpartition(".")[0] + "." + group
    return name


def _norm_modules(part: Mixer | FeedForward, ctx: BlockContext) -> tuple[str, ...]:
    """What runs the norm before ``part`` again: the part itself where the norm is fused into its
    first product, unless that is a latent's or a router's."""
    if "norm_linear" not in ctx.fused or isinstance(part, UNFUSED_NORMS):
        return ("layernorm",)
    return ("mlp",) if isinstance(part, MlpSpec) else ()


def _norm_name(part: Mixer | FeedForward, ctx: BlockContext) -> str | None:
    """Megatron-Core's name of the norm before ``part``, unless it is fused into a product."""
    if _norm_modules(part, ctx) != ("layernorm",):
        return None
    return "mlp_norm" if isinstance(part, MlpSpec | MoeSpec) else "attn_norm"


def _product_name(part: Mixer | FeedForward) -> str | None:
    """Megatron-Core's name of the products that make queries, keys and values, with all that they
    do in between (attention.py and multi_latent_attention.py, ``offload_qkv_linear``)."""
    return "qkv_linear" if isinstance(part, AttentionSpec | LatentAttentionSpec) else None


def _one_norm(block: BlockSpec) -> bool:
    return block.parallel and block.norms < 2
