"""What passes of a pipeline's bubble keep, where the pipeline is one differentiated loop.

MaxText's (0.1.0, ``layers/pipeline.py``, ``total_iterations``) runs ``m`` microbatches times ``v``
repeats and a bubble of ``pp - 1`` iterations, twice as many with delayed transfers. In each of them
every rank runs a stage, on padding where it has no microbatch, and the scan stacks what the policy
keeps of each. Ranks behind the first idle before their first pass, on their first chunk; the others
behind their last one, on the last. ``jax.jit(grad).lower().compile().memory_analysis()`` of such a
loop (jax 0.10.2) grows by as much with an iteration of the bubble as with any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cost_models.graph import Int64
from cost_models.layout import ALL_AT_ONCE, DELAYED, Schedule, codes_of
from cost_models.step import Field

if TYPE_CHECKING:
    from cost_models.leaf import ChunkCosts, Leaf


def bubble_passes(schedule: Schedule, pp: int) -> int:
    """Iterations of a loop beyond those that a rank has microbatches for."""
    if schedule not in ALL_AT_ONCE:
        return 0
    return (pp - 1) * (2 if schedule in DELAYED else 1)


def bubbles(schedule: Int64, pp: Int64) -> Int64:
    """The same of many layouts."""
    delayed = np.isin(schedule, codes_of(DELAYED))
    result: Int64 = np.where(np.isin(schedule, codes_of(ALL_AT_ONCE)), (pp - 1) * (1 + delayed), 0)
    return result


def on_ends(leaf: Leaf, rank: int) -> tuple[int, int]:
    """Idle passes that a rank's first chunk keeps, and its last."""
    early = leaf.idle_passes * rank // max(leaf.pp - 1, 1)
    return early, leaf.idle_passes - early


def idle_bytes_by_rank(leaf: Leaf, kept: Int64) -> Int64:
    """What the idle passes of each rank keep, of many partitions, where layers keep ``kept`` of one
    pass; shapes (partitions, ranks) and (partitions, chunks, ranks)."""
    ends = np.array([on_ends(leaf, rank) for rank in range(leaf.pp)])
    result: Int64 = kept[:, 0] * ends[:, 0] + kept[:, -1] * ends[:, 1]
    return result


def idle_bytes(leaf: Leaf, rank: int, chunks: Sequence[ChunkCosts]) -> int:
    """What a rank's idle passes keep of its layers; embedding and head are outside the loop."""
    if not leaf.idle_passes:
        return 0
    stages = leaf.held(rank)
    sizes = [
        chunk.activation_bytes
        - sum([end[Field.ACT_NONE] for end in leaf.ends_on(stage) if end is not None])
        for stage, chunk in zip(stages, chunks, strict=True)
    ]
    early, late = on_ends(leaf, rank)
    return early * sizes[0] + late * sizes[-1]
