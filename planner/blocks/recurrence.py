"""What recurrent mixers share: a causal convolution, a gated norm, and context parallelism.

A recurrence needs the whole sequence in order. Under context parallelism the ranks exchange heads
(or channels) for sequence before it and back after it, as Megatron-Core's Mamba and Gated DeltaNet
layers do: each rank then scans whole samples with ``1 / cp`` of its heads, whatever kind of
context parallelism the attention layers use.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import Collective, Elementwise, Op, Reals
from planner.blocks.context import BlockContext


def convolution(name: str, channels: Int64, ctx: BlockContext, shard: Shard) -> Elementwise:
    """A causal convolution of a few taps per channel, its activation fused: read and write
    forward; read input and gradient, write gradient backward."""
    size = 1.0 * channels * shard.tokens * ctx.element_bytes
    return Elementwise(name, 2.0 * size, 3.0 * size)


def gated_norm(name: str, width: Int64, ctx: BlockContext, shard: Shard) -> Elementwise:
    """A norm of the output times an activated gate: read two, write one forward; read three,
    write two backward."""
    size = 1.0 * width * shard.tokens * ctx.element_bytes
    return Elementwise(name, 3.0 * size, 5.0 * size)


def exchange(inward: Int64, outward: Int64, ctx: BlockContext, shard: Shard) -> tuple[Op, Op]:
    """Heads for sequence before the recurrence, and back: ``inward`` and ``outward`` are elements
    per token."""

    def all_to_all(name: str, width: Int64) -> Collective:
        size: Reals = width * shard.tokens * ctx.element_bytes
        return Collective(name, "cp", "all_to_all", size, "all_to_all", size, active=shard.cp > 1)

    return all_to_all("scan_exchange", inward), all_to_all("scan_return", outward)


def local(count: int, shard: Shard) -> Int64:
    """Heads, groups or channels that one rank scans, at least one (shared groups are repeated)."""
    each: Int64 = np.maximum(1, count // (shard.tp * shard.cp))
    return each


def chunks(shard: Shard, chunk: int) -> Int64:
    """Chunks of whole samples that one rank scans per microbatch."""
    return shard.microbatch * -(-shard.sequence // chunk)
