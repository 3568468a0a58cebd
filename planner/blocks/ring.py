"""What rings and gathers of keys and values move in a device's own memory, beside attention."""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import Elementwise
from planner.blocks.context import BlockContext

CORE = ("core_attn",)


def ring_passes(
    query: Int64, output: Int64, kv: Int64, rows: Int64, ctx: BlockContext, shard: Shard
) -> tuple[Elementwise, ...]:
    """Passes beside attention, of a stack whose source was read.

    ``query``, ``output`` and ``kv`` (both together) are this rank's bytes, ``rows`` its queries
    times heads. Transformer Engine 2.1 (pytorch/attention.py, ``AttnFuncWithCPAndKVP2P``; 1.13
    alike), of the rank with the last piece of the sequence, for which all others wait. Forward: K
    and V are joined; a zeroed output; each block's output, scaled, is added to it; the logarithms
    of the softmax's sums are copied, taken to fp64, corrected by each block's and taken back.
    Backward: K and V are copied; the first block's gradients are copied and the others' added: of
    the queries all, of keys and values half a block but on the diagonal, which comes last.

    Gathered keys and values (``AttnFuncWithCPAndKVAllGather``) are put in order, in both passes,
    and two pieces of queries see them one after the other: each one's output and gradient is
    copied, and its keys' gradients, up to its own place, added to zeros, which go back in order.
    """
    if not ctx.merges_ring:
        return ()
    blocks = shard.cp_ring
    around = blocks > 1
    statistics = (32 + 20 * (blocks - 1) + 8 * blocks) * rows
    forward = 2.0 * kv + output + 3.0 * blocks * output + statistics
    keys = (1.0 + 1.5 * (blocks - 2) + 3.0) * kv
    backward = 2.0 * kv + (2.0 + 3.0 * (blocks - 1)) * query + keys
    return (
        Elementwise(
            "cp_ring_merge", np.where(around, forward, 0.0), np.where(around, backward, 0.0),
            np.where(around, 4 + 2 * blocks, 0), np.where(around, 1 + 2 * blocks, 0),
            modules=CORE,
        ),
        *((_gathered(query, output, kv, shard),) if ctx.orders_gathered else ()),
    )  # fmt: skip


def forward_buffers(kv: Int64, output: Int64, ctx: BlockContext, shard: Shard) -> Int64:
    """Bytes of a ring's forward beside queries, keys, values and the joined output: a buffer for
    the keys and values of each block and each block's output, all of which stay until the last one
    is added (Transformer Engine 2.4, context_parallel.py, ``AttnFuncWithCPAndKVP2P.forward``:
    ``p2p_comm_buffers`` and ``out_per_step``). ``kv`` (both together) and ``output`` are this
    rank's; of the rank with the last piece of the sequence, whose outputs all have every query."""
    blocks = shard.cp_ring
    return np.where((blocks > 1) & ctx.merges_ring, blocks * (kv + output), 0)


def _gathered(query: Int64, output: Int64, kv: Int64, shard: Shard) -> Elementwise:
    ways = shard.cp_gather
    whole, gathers = kv * ways, ways > 1
    added = 3.0 * (1.0 + 0.5 / ways)
    forward, backward = 2.0 * whole + 2.0 * output, (5.0 + added) * whole + 2.0 * query
    return Elementwise(
        "cp_gather_order", np.where(gathers, forward, 0.0), np.where(gathers, backward, 0.0),
        np.where(gathers, 4, 0), np.where(gathers, 12, 0), modules=CORE,
    )  # fmt: skip
