"""Experts folded over tensor parallelism: ranks with the same tokens share the sending of them.

Every tensor-parallel rank routes all tokens of its group. It keeps each tp-th of their copies,
sends those to the ranks that hold their experts, and gathers the outputs of all copies again, which
it weighs and sums by token (DeepSpeed, module_inject/auto_ep_layer.py and moe/ep_tp_dispatch.py:
``partition_assignments``, ``restore_combined``). The gather's backward sums each rank's rows over
the group, one all-reduce after the other, and takes its own; the input's gradient is averaged.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Bools, Int64, Shard
from cost_models.ops import Collective, Elementwise, Op
from planner.blocks.context import BlockContext

INDEX_BYTES = 8
"""A row's token, expert and place among the rows of its expert are 64-bit integers each."""
INDICES = 3
GATHERS = 5
"""Tensors that are gathered: outputs, their weights and three indices; the rows of each rank are
counted before each."""
DEAL_LAUNCHES = 15
"""Kernels that find a rank's copies and pick their columns (``partition_assignments``, ``_take``),
in addition to the one that copies the rows."""


def folds(ctx: BlockContext, shard: Shard) -> Bools:
    """Where tokens' copies are dealt out over tp."""
    result: Bools = (shard.tp > 1) & ctx.folded_experts
    return result


def dealt(ctx: BlockContext, shard: Shard, rows: Int64) -> Int64:
    """Rows that one rank sends, of ``rows`` that its tensor-parallel group has alike, rounded
    up."""
    return -(-rows // np.where(folds(ctx, shard), shard.tp, 1))


def around(
    ctx: BlockContext, shard: Shard, copies: Int64, row_bytes: int
) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Ops before the copies are sent and after the outputs are back."""
    if not ctx.folded_experts:
        return (), ()
    active = folds(ctx, shard)
    whole = copies * row_bytes
    weights = copies * ctx.element_bytes
    indices = INDICES * INDEX_BYTES * np.where(active, copies, 0)
    moved = np.where(active, 1.0 * whole, 0.0)

    def gather(name: str, size: Int64) -> Collective:
        return Collective(
            name, "tp", "all_gather", size, "all_reduce", -(-size // shard.tp),
            backward_count=shard.tp, active=active,
        )  # fmt: skip

    deal = (
        Collective(
            "experts.average", "tp", None, 0, "all_reduce", ctx.gathered_bytes(shard),
            active=active,
        ),
        Elementwise("deal", 3.0 * indices, 0.0, np.where(active, DEAL_LAUNCHES, 0), 0),
    )  # fmt: skip
    restore = (
        Collective(
            "restore.counts", "tp", "all_gather", INDEX_BYTES * shard.tp, None, 0,
            forward_count=GATHERS, active=active,
        ),
        gather("restore.outputs", whole),
        gather("restore.weights", weights),
        Collective(
            "restore.indices", "tp", "all_gather", INDEX_BYTES * copies, None, 0,
            forward_count=INDICES, active=active,
        ),
        # Forward: joined from the ranks' parts, weighed, added to the tokens' rows; backward:
        # picked by token, times the weights, times the outputs and summed, put apart for the sums.
        Elementwise(
            "restore", 7.0 * moved, 11.0 * moved,
            np.where(active, GATHERS + 3, 0), np.where(active, 4, 0),
        ),
    )  # fmt: skip
    return deal, restore
