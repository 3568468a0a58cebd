"""A fused attention that has shapes but no kernel: what flash attention allocates, on fake tensors.

Neither of the attention kernels that torchtitan 0.3.0 offers to language models (flex, varlen) runs
on fake CPU tensors at the cost of the fused kernel, so this operator stands for it: the output in
the layout of the queries, one fp32 statistic per query and head, and in the backward one gradient
per input. Workspaces inside a CUDA kernel (fp32 accumulators, expanded KV gradients) are not here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.models.common.attention import FlexAttention


@torch.library.custom_op("traced::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, length, heads, dim) queries; keys and values of any length and fewer heads."""
    raise NotImplementedError("only shapes are known")


@attention.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("traced::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three inputs."""
    raise NotImplementedError("only shapes are known")


@attention_backward.register_fake
def _(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad: Tensor, _grad_of_statistics: Tensor | None):
    return attention_backward(grad, *ctx.saved_tensors)


attention.register_autograd(_differentiate, setup_context=_save)

KERNEL = torch.ops.traced.attention.default


class ShapeOnlyAttention(FlexAttention):
    """torchtitan's attention module with the stand-in kernel; context parallelism gathers keys and
    values around it as it does around FlexAttention."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """No settings of its own."""

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **_ignored: object) -> Tensor:
        """torchtitan finds the arguments' sharding by these names."""
        return attention(q_BLNH, k_BLNH, v_BLNH)[0]
