"""Mamba-2: state-space duality, computed in chunks (Dao and Gu, arXiv 2405.21060, section 6).

Heads are split over tp with their groups of B and C; the projections in and out are a column and a
row layer. A chunk of Q tokens takes four batched products: C B^T within each group, its masked
product with X, the chunk's state B^T X, and C times the state before the chunk. The states between
chunks are a short recurrence in fp32. The kernels keep the projection and recompute the rest.
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
from planner.models.spec import Mamba2Spec

STATE_BYTES = 4
"""States are fp32."""


def _inner(spec: Mamba2Spec) -> int:
    return spec.heads * spec.head_dim


def _convolved(spec: Mamba2Spec) -> int:
    """Channels of x, B and C."""
    return _inner(spec) + 2 * spec.groups * spec.state


def _projected(spec: Mamba2Spec) -> int:
    """Width of z, x, B, C and the time steps together."""
    return _inner(spec) + _convolved(spec) + spec.heads


def weights(spec: Mamba2Spec, hidden: int) -> list[Weight]:
    """Projections, convolution, and per head a decay, a skip and a time-step bias."""
    inner, channels = _inner(spec), _convolved(spec)
    result = [
        *linear("mamba.in", _projected(spec), hidden, "column", bias=spec.bias),
        Weight("mamba.conv", channels, spec.conv, "column"),
        Weight("mamba.heads", spec.heads, 1, "column", 3),
        *norm("mamba.norm", inner, bias=False),
        *linear("mamba.out", hidden, inner, "row", bias=spec.bias),
    ]
    if spec.conv_bias:
        result.append(Weight("mamba.conv.bias", channels, 1, "column"))
    return result


def splits(spec: Mamba2Spec) -> tuple[split.Split, ...]:
    """Heads and their groups over tp; heads also over cp."""
    return (
        split.heads(spec.heads, "Mamba heads"),
        split.heads(spec.groups, "Mamba groups"),
        split.recurrent(spec.heads, "Mamba heads"),
    )


def flops_per_token(spec: Mamba2Spec, _span: int) -> float:
    """The recurrence itself, whatever the chunks: per channel and state one decay, one
    multiply-add in and one out, 5 FLOPs."""
    return 5.0 * _inner(spec) * spec.state


def assumptions(_spec: Mamba2Spec) -> tuple[str, ...]:
    """How the scan is priced."""
    return (
        "Mamba-2 scans are priced as the batched products of their chunks, at the efficiency of "
        "large products (arXiv 2405.21060, section 6): not measured on this device",
    )


def ops(spec: Mamba2Spec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    x, tp, q = shard.tokens, shard.tp, spec.chunk
    inner, projected = _inner(spec) // tp, _projected(spec) // tp
    into, back = exchange(projected, inner, ctx, shard)
    return (
        *enter_tensor_parallel("mamba_in", ctx, shard),
        MatMul(
            "mamba_in",
            x,
            projected,
            ctx.hidden,
            quantised=column(ctx.quantiser, shard, projected, ctx.hidden, normed=ctx.fuses_norms),
        ),
        into,
        convolution("mamba_conv", _convolved(spec) // tp, ctx, shard),
        # Time steps: softplus and the running sum of the decay, 16 bits in and fp32 out.
        Elementwise("mamba_decay", 10.0 * x * (spec.heads // tp), 14.0 * x * (spec.heads // tp)),
        *scan(spec, shard, q),
        gated_norm("mamba_norm", inner, ctx, shard),
        back,
        MatMul(
            "mamba_out",
            x,
            ctx.hidden,
            inner,
            quantised=row(ctx.quantiser, shard, ctx.hidden, inner),
        ),
        *leave_tensor_parallel("mamba_out", ctx, shard),
        residual_add("mamba_residual", ctx, shard),
    )


def scan(spec: Mamba2Spec, shard: Shard, q: int) -> tuple[Op, ...]:
    """The four products of a chunk of ``q`` tokens, and the recurrence over chunks."""
    per_group = chunks(shard, q) * local(spec.groups, shard)
    per_head = chunks(shard, q) * local(spec.heads, shard)
    n, p = spec.state, spec.head_dim
    states = 1.0 * per_head * n * p * STATE_BYTES

    def product(name: str, m: int, width: int, k: int, batch: Int64) -> MatMul:
        return MatMul(name, m, width, k, batch, weight=False, low_precision=False)

    return (
        product("scan_scores", q, q, n, per_group),
        product("scan_within", q, p, q, per_head),
        product("scan_states", n, p, q, per_head),
        Elementwise("scan_between", 2.0 * states, 3.0 * states),
        product("scan_before", q, p, n, per_head),
    )


def saved(spec: Mamba2Spec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """The projection, the scan's output and the normed output; the rest is recomputed."""
    token, tp = shard.tokens * ctx.element_bytes, shard.tp
    inner = _inner(spec) // tp * token
    return (
        SavedTensor("mamba_projection", _projected(spec) // tp * token),
        SavedTensor("mamba_scan_output", inner),
        SavedTensor("mamba_output", inner),
    )


def working(spec: Mamba2Spec, ctx: BlockContext, shard: Shard) -> Int64:
    """Recomputed convolution, gradients of the projection, the states and theirs."""
    token = shard.tokens * ctx.element_bytes
    per_token = (_projected(spec) + 2 * _convolved(spec) + _inner(spec)) // shard.tp
    states = chunks(shard, spec.chunk) * local(spec.heads, shard) * spec.state * spec.head_dim
    return per_token * token + 2 * STATE_BYTES * states + ctx.gathered_bytes(shard)
