"""Mamba: a selective state space with one decay per channel and state (arXiv 2312.00752).

Channels are split over tp. The time step, B and C are projected from all channels, so their
projection is a row layer with a reduction of its own. The scan is one fused kernel (section 3.3.2):
it reads its inputs, keeps the state on chip, and recomputes it in the backward.
"""

from __future__ import annotations

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Collective, Elementwise, MatMul, Op, SavedTensor
from planner.blocks import splits as split
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    residual_add,
)
from planner.blocks.quantised import column, row
from planner.blocks.recurrence import convolution, exchange
from planner.blocks.tensors import linear, norm
from planner.models.spec import MambaSpec

EXPONENTIAL_FLOPS = 16
"""fp32 FLOPs in the time of one exponential: an SM does 256 of the former (128 multiply-adds) and
16 of the latter per clock (CUDA C++ Programming Guide, throughput of native arithmetic)."""
FORWARD_FLOPS = 6 + EXPONENTIAL_FLOPS
"""Per channel and state: time step times decay, its exponential, decay, input, output."""
BACKWARD_FLOPS = FORWARD_FLOPS + 12
"""The forward again, then two products per product (no further exponential)."""


def _selected(spec: MambaSpec) -> int:
    """Width of time step, B and C."""
    return spec.dt_rank + 2 * spec.state


def weights(spec: MambaSpec, hidden: int) -> list[Weight]:
    """Projections, convolution, the decays (no matrix of a product) and skips of each channel."""
    inner = spec.inner
    result = [
        *linear("mamba.in", 2 * inner, hidden, "column", bias=spec.bias),
        Weight("mamba.conv", inner, spec.conv, "column"),
        *linear("mamba.select", _selected(spec), inner, "row"),
        *linear("mamba.dt", inner, spec.dt_rank, "column", bias=True),
        Weight("mamba.decay", inner * spec.state, 1, "column"),
        Weight("mamba.skip", inner, 1, "column"),
        *linear("mamba.out", hidden, inner, "row", bias=spec.bias),
    ]
    if spec.conv_bias:
        result.append(Weight("mamba.conv.bias", inner, 1, "column"))
    if spec.inner_norms:
        result += norm("mamba.norms", _selected(spec), bias=False)
    return result


def splits(spec: MambaSpec) -> tuple[split.Split, ...]:
    """Channels over tp and cp."""
    return (
        split.heads(spec.inner, "Mamba channels"),
        split.recurrent(spec.inner, "Mamba channels"),
    )


def flops_per_token(spec: MambaSpec, _span: int) -> float:
    """The recurrence: per channel and state one decay, one multiply-add in and one out, 5 FLOPs."""
    return 5.0 * spec.inner * spec.state


def assumptions(_spec: MambaSpec) -> tuple[str, ...]:
    """How the scan is priced."""
    return (
        "Mamba scans are priced as one fused kernel at the device's fp32 vector rate, exponentials "
        "at a sixteenth of it, or at its memory bandwidth if that is slower: not measured",
    )


def ops(spec: MambaSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    x, e = shard.tokens, ctx.element_bytes
    inner, selected = spec.inner // shard.tp, _selected(spec)
    into, back = exchange(2 * inner, inner, ctx, shard)
    reduced = x * selected * e
    channel = 1.0 * inner * x * e
    pairs = 1.0 * inner * spec.state * x
    result: list[Op] = [
        *enter_tensor_parallel("mamba_in", ctx, shard),
        MatMul(
            "mamba_in",
            x,
            2 * inner,
            ctx.hidden,
            quantised=column(ctx.quantiser, shard, 2 * inner, ctx.hidden, normed=ctx.fuses_norms),
        ),
        into,
        convolution("mamba_conv", inner, ctx, shard),
        MatMul("mamba_select", x, selected, inner),
        Collective("mamba_select.reduce", "tp", "all_reduce", reduced, "all_reduce", reduced),
    ]
    if spec.inner_norms:
        result.append(Elementwise("mamba_norms", 2.0 * reduced, 3.0 * reduced, 3, 3))
    result += [
        MatMul("mamba_dt", x, inner, spec.dt_rank),
        # Forward reads x, time step and gate and writes the output; backward reads those and the
        # gradient and writes three gradients.
        Elementwise(
            "mamba_scan", 4.0 * channel, 8.0 * channel,
            forward_flops=FORWARD_FLOPS * pairs, backward_flops=BACKWARD_FLOPS * pairs,
        ),
        back,
        MatMul(
            "mamba_out", x, ctx.hidden, inner,
            quantised=row(ctx.quantiser, shard, ctx.hidden, inner),
        ),
        *leave_tensor_parallel("mamba_out", ctx, shard),
        residual_add("mamba_residual", ctx, shard),
    ]  # fmt: skip
    return tuple(result)


def saved(spec: MambaSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Projection, selection, scan output; convolution and time step are recomputed by the fused
    kernel, and kept where norms stand between them and the scan."""
    token, inner = shard.tokens * ctx.element_bytes, spec.inner // shard.tp
    result = [
        SavedTensor("mamba_projection", 2 * inner * token),
        SavedTensor("mamba_selection", _selected(spec) * token),
        SavedTensor("mamba_scan_output", inner * token),
    ]
    if spec.inner_norms:
        result.append(SavedTensor("mamba_scan_input", (3 * inner + _selected(spec)) * token))
    return tuple(result)


def working(spec: MambaSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Recomputed convolution and time step, and gradients of both and of the projection."""
    inner = spec.inner // shard.tp
    return 6 * inner * shard.tokens * ctx.element_bytes + ctx.gathered_bytes(shard)
