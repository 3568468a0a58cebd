"""Gated DeltaNet: linear attention whose state is corrected, not only added to.

Yang et al., arXiv 2412.06464, section 3.3: in chunks of C tokens, the WY form of the products of
Householder-like updates (K K^T, a triangular inverse, W and U), the recurrence of the state over
chunks (W S and K^T V), and the output (Q K^T, its product with V, Q S). The products inside chunks
are batched over chunks and heads; the recurrence runs over the chunks of a sample one after the
other, so it is priced as products whose reduction is the whole sample, batched over heads only.
"""

from __future__ import annotations

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Elementwise, MatMul, Op, SavedTensor
from planner.blocks import splits as split
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    residual_add,
)
from planner.blocks.quantised import column, row
from planner.blocks.recurrence import chunks, convolution, exchange, gated_norm, local
from planner.blocks.tensors import linear, norm
from planner.models.spec import GatedDeltaNetSpec


def _keys(spec: GatedDeltaNetSpec) -> int:
    return spec.key_heads * spec.key_dim


def _values(spec: GatedDeltaNetSpec) -> int:
    return spec.value_heads * spec.value_dim


def _convolved(spec: GatedDeltaNetSpec) -> int:
    """Channels of q, k and v."""
    return 2 * _keys(spec) + _values(spec)


def _projected(spec: GatedDeltaNetSpec) -> int:
    """Width of q, k, v, the output gate, and decay and write strength per value head."""
    return _convolved(spec) + _values(spec) + 2 * spec.value_heads


def weights(spec: GatedDeltaNetSpec, hidden: int) -> list[Weight]:
    """Projections, convolution, a norm of one head, decay and time-step bias per value head."""
    return [
        *linear("delta.in", _projected(spec), hidden, "column"),
        Weight("delta.conv", _convolved(spec), spec.conv, "column"),
        Weight("delta.heads", spec.value_heads, 1, "column", 2),
        *norm("delta.norm", spec.value_dim, bias=False),
        *linear("delta.out", hidden, _values(spec), "row"),
    ]


def splits(spec: GatedDeltaNetSpec) -> tuple[split.Split, ...]:
    """Key and value heads over tp and cp."""
    return (
        split.heads(spec.key_heads, "delta-rule key heads"),
        split.recurrent(spec.key_heads, "delta-rule key heads"),
    )


def flops_per_token(spec: GatedDeltaNetSpec, _span: int) -> float:
    """The recurrence itself: per value head and entry of its state one decay, and a multiply-add
    each to recall, to write and to read, 7 FLOPs."""
    return 7.0 * spec.value_heads * spec.key_dim * spec.value_dim


def assumptions(spec: GatedDeltaNetSpec) -> tuple[str, ...]:
    """How the recurrence is priced."""
    return (
        f"gated delta rule: priced as the batched products of chunks of {spec.chunk} tokens and a "
        "recurrence over them, at the efficiency of large products (arXiv 2412.06464, section "
        "3.3): not measured on this device",
    )


def ops(spec: GatedDeltaNetSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    x, e, tp = shard.tokens, ctx.element_bytes, shard.tp
    values, projected = _values(spec) // tp, _projected(spec) // tp
    into, back = exchange(projected, values, ctx, shard)
    # Keys and queries are normed per head and repeated for the value heads that share them.
    repeated = 2.0 * x * e * (spec.value_heads // tp) * spec.key_dim
    return (
        *enter_tensor_parallel("delta_in", ctx, shard),
        MatMul(
            "delta_in",
            x,
            projected,
            ctx.hidden,
            quantised=column(ctx.quantiser, shard, projected, ctx.hidden, normed=ctx.fuses_norms),
        ),
        into,
        convolution("delta_conv", _convolved(spec) // tp, ctx, shard),
        Elementwise("delta_qk_norm", 2.0 * repeated, 3.0 * repeated, 2, 2),
        *recurrence(spec, ctx, shard),
        gated_norm("delta_norm", values, ctx, shard),
        back,
        MatMul(
            "delta_out",
            x,
            ctx.hidden,
            values,
            quantised=row(ctx.quantiser, shard, ctx.hidden, values),
        ),
        *leave_tensor_parallel("delta_out", ctx, shard),
        residual_add("delta_residual", ctx, shard),
    )


def recurrence(spec: GatedDeltaNetSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """The chunked gated delta rule."""
    c, dk, dv = spec.chunk, spec.key_dim, spec.value_dim
    heads = local(spec.value_heads, shard)
    batch = chunks(shard, c) * heads
    samples = shard.microbatch * heads
    matrix = 1.0 * batch * c * c

    def product(name: str, m: int, n: int, k: int, times: Int64) -> MatMul:
        return MatMul(name, m, n, k, times, weight=False, low_precision=False)

    return (
        product("delta_kk", c, c, dk, batch),
        # Triangular inverse: fp32 in, 16 bits out; its backward is two small products' traffic.
        Elementwise("delta_inverse", (4.0 + ctx.element_bytes) * matrix, 12.0 * matrix),
        product("delta_w", c, dk, c, batch),
        product("delta_u", c, dv, c, batch),
        product("delta_recall", dk, dv, shard.sequence, samples),
        product("delta_write", dk, dv, shard.sequence, samples),
        product("delta_qk", c, c, dk, batch),
        product("delta_within", c, dv, c, batch),
        product("delta_before", c, dv, dk, batch),
    )


def saved(spec: GatedDeltaNetSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Projection, convolved and repeated q, k, v, the inverse of each chunk, both outputs."""
    token, tp = shard.tokens * ctx.element_bytes, shard.tp
    heads, values = spec.value_heads // tp, _values(spec) // tp
    return (
        SavedTensor("delta_projection", _projected(spec) // tp * token),
        SavedTensor("delta_convolved", _convolved(spec) // tp * token),
        SavedTensor("delta_queries_and_keys", 2 * heads * spec.key_dim * token),
        SavedTensor("delta_inverse", heads * spec.chunk * token),
        SavedTensor("delta_recurrence_output", values * token),
        SavedTensor("delta_output", values * token),
    )


def working(spec: GatedDeltaNetSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """W, U and states recomputed, gradients of q, k, v and of the projection."""
    token, tp = shard.tokens * ctx.element_bytes, shard.tp
    heads = spec.value_heads // tp
    rows = 3 * heads * (2 * spec.key_dim + spec.value_dim) + _projected(spec) // tp
    states = chunks(shard, spec.chunk) * local(spec.value_heads, shard)
    state_bytes = 2 * states * spec.key_dim * spec.value_dim * ctx.element_bytes
    return rows * token + state_bytes + ctx.gathered_bytes(shard)
