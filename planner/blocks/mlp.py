"""Dense feed-forward, gated or plain, tensor parallel."""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard, Weight
from cost_models.layer_offload import SWIGLU
from cost_models.ops import Elementwise, MatMul, Op, SavedTensor
from planner.blocks import transposed
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    leave_tensor_parallel,
    residual_add,
    within,
)
from planner.blocks.quantised import column, row
from planner.blocks.splits import Split
from planner.blocks.tensors import feed_forward
from planner.blocks.transposed_fsdp import Beside, alike, least_working
from planner.models.spec import MlpSpec


def weights(spec: MlpSpec, hidden: int) -> list[Weight]:
    """Inward matrices by column, the outward one by row."""
    return feed_forward(
        "mlp", hidden, spec.intermediate, gated=spec.gated, bias=spec.bias,
        shardings=("column", "row"),
    )  # fmt: skip


def splits(spec: MlpSpec) -> tuple[Split, ...]:
    """The inner width over tp."""
    width = spec.intermediate
    return (Split(2, width, f"feed-forward width {width} does not split over tp", "tp"),)


def flops_per_token(_spec: MlpSpec, _span: int) -> float:
    """Nothing beyond its matrices."""
    return 0.0


def assumptions(_spec: MlpSpec) -> tuple[str, ...]:
    """None."""
    return ()


def activation(name: str, ctx: BlockContext, rows: Int64, width: Int64, *, gated: bool,
               bias: bool) -> Elementwise:  # fmt: skip
    """Bias and activation of a feed-forward whose inner width on this rank is ``width``."""
    element = rows * width * ctx.element_bytes
    read = 2 if gated else 1
    fused = ("swiglu" if gated else "bias_gelu") in ctx.fused
    passes = 1 if fused else (2 if gated or not bias else 3)
    # The bias's gradient is a sum over rows in a kernel that autograd launches by itself.
    summed = read if bias and "gradient_sums" not in ctx.fused else 0
    return Elementwise(
        name, 1.0 * passes * (read + 1) * element,
        1.0 * (passes * (2 * read + 1) + summed) * element, passes, passes,
    )  # fmt: skip


def ops(spec: MlpSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    return (
        *within("mlp", products("", spec.intermediate, ctx, shard, gated=spec.gated,
                                bias=spec.bias)),
        residual_add("mlp_residual", ctx, shard, bias=spec.bias),
    )  # fmt: skip


def products(
    prefix: str, intermediate: int, ctx: BlockContext, shard: Shard, *, gated: bool, bias: bool
) -> tuple[Op, ...]:
    """The two products with their collectives; also the shared experts of a mixture."""
    x, width = shard.tokens, intermediate // shard.straight
    hidden, element = ctx.hidden // shard.transposed, x * width * ctx.element_bytes
    parts = (1, 1) if gated and "gate_up" in ctx.separate else (1,)
    inner, normed = (2 if gated else 1) * width, ctx.fuses_norms and not prefix
    enter: tuple[Op, ...] = enter_tensor_parallel(
        f"{prefix}fc1", ctx, shard, products=len(parts), kept=ctx.keeps_gathered and not prefix
    )
    leave: tuple[Op, ...] = leave_tensor_parallel(f"{prefix}fc2", ctx, shard)
    sums: tuple[Op, ...] = ()
    if shard.transposed > 1:
        whole = ctx.gathered_bytes(shard)
        inward = 2 if gated else 1
        weight = ctx.hidden * intermediate * ctx.element_bytes
        beside = Beside(prefix, shard, element, whole, weight, inward)
        enter = (transposed.reduced_gradient(f"{prefix}fc1", whole, shard), *beside.enter())
        sums = (*beside.sums(), transposed.first_sum(f"{prefix}fc1", inward * element))
        leave = (
            *beside.leave(),
            transposed.last_sum(f"{prefix}fc2", element),
            transposed.reduced(f"{prefix}fc2", whole, shard),
        )
    return (
        *enter,
        MatMul(
            f"{prefix}fc1", x, inner, hidden, parts=parts, pieces=(1, 1) if gated else (1,),
            quantised=column(ctx.quantiser, shard, inner, hidden, normed=normed),
            alike=alike(shard, inward=True),
        ),
        *sums,
        *within(
            "mlp_act", (activation(f"{prefix}activation", ctx, x, width, gated=gated, bias=bias),)
        ),
        MatMul(
            f"{prefix}fc2", x, hidden, width,
            quantised=row(ctx.quantiser, shard, hidden, width), alike=alike(shard, inward=False),
        ),
        *leave,
    )  # fmt: skip


def saved(spec: MlpSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors kept for the backward, after the norm's input and output."""
    return within("mlp", inner_saved("", spec.intermediate, ctx, shard, gated=spec.gated))


def inner_saved(
    prefix: str, intermediate: int, ctx: BlockContext, shard: Shard, *, gated: bool
) -> tuple[SavedTensor, ...]:
    """The first product's output and the activation's output, and what is between them."""
    element = shard.tokens * (intermediate // shard.straight) * ctx.element_bytes
    joined = SWIGLU if gated and "swiglu" in ctx.fused else None
    result = [
        SavedTensor(f"{prefix}fc1_output", (2 if gated else 1) * element, input_of=joined),
        SavedTensor(f"{prefix}activation", ctx.saved_input(element), modules=("mlp_act",)),
    ]
    if gated and "swiglu" not in ctx.fused:
        # The activated gate, a factor of the product that follows.
        result.append(SavedTensor(f"{prefix}gate_activation", element, modules=("mlp_act",)))
    return tuple(result)


def working(spec: MlpSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Gradients of both inner tensors and the gathered input, or what stands for that."""
    element = shard.tokens * (spec.intermediate // shard.straight) * ctx.element_bytes
    whole = ctx.gathered_bytes(shard) // shard.transposed
    usual = (3 if spec.gated else 2) * element + whole
    return (
        usual
        if shard.fsdp is None
        else np.maximum(usual, least_working(spec.gated, element, ctx.gathered_bytes(shard), shard))
    )
