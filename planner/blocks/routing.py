"""What Megatron-Core's router and all-to-all dispatcher keep of who goes where.

Router in fp32 with a balancing loss, permutation not fused: megatron-core 0.13.1, 0.14.0, 0.15.0
and 0.16.1 keep the same (``benchmarks/memory/megatron_router.py`` asks them). Of each token and
expert, the two fp32 numbers that ``planner.blocks.moe`` counts (scores of the loss, and what
``permute`` transposes) and the mask that it selects by; of each choice, the expert, its score
and the row's place. An expert's activation keeps the probability of every row that arrives. A
router of sigmoids keeps these beside those of the loss, and the sums that both are divided by.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import SavedTensor
from planner.blocks.context import BlockContext
from planner.models.spec import MoeSpec

_MASK, _PROBABILITY, _INDEX = 1, 4, 8
"""Bytes of a truth value, an fp32 number and a 64-bit index."""


def known(ctx: BlockContext) -> bool:
    """Whether this router and dispatcher are those that run."""
    return ctx.maps_routing and ctx.moe_dispatcher == "alltoall"


def saved(
    spec: MoeSpec, ctx: BlockContext, shard: Shard, arrived: Int64
) -> tuple[SavedTensor, ...]:
    """Beside the two fp32 numbers, where ``arrived`` rows reach a rank's experts."""
    if not known(ctx):
        return ()
    tokens = shard.residual_tokens
    choices = (_INDEX + _PROBABILITY + _INDEX) * spec.top_k
    sigmoids = _PROBABILITY * (spec.experts + 2) if ctx.sigmoid_router else 0
    return (
        SavedTensor("routing_map", tokens * (_MASK * spec.experts + choices + sigmoids)),
        SavedTensor("arrived_probabilities", _PROBABILITY * arrived),
    )


def stays(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Bytes that a layer's dispatcher holds from one microbatch to the next: its attributes
    ``probs`` and ``routing_map``, whatever is run again
    (core/transformer/moe/token_dispatcher.py, dispatch_preprocess)."""
    if not known(ctx):
        return np.zeros_like(shard.tp)
    return shard.residual_tokens * spec.experts * (_PROBABILITY + _MASK)
