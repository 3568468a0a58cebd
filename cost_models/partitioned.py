"""Full recomputation whose kept inputs are split over tensor parallelism.

Without sequence parallelism every tensor-parallel rank keeps the same input of a layer. Megatron-LM
(``--distribute-checkpointed-activations``, megatron/mpu/random.py) and DeepSpeed
(``activation_checkpointing.partition_activations``, runtime/activation_checkpointing) keep a part
on each rank, a copy of its own, and gather the whole before the layer runs again; nothing else runs
meanwhile. Where several layers run again together (``--checkpoint-num-layers``,
``activation_checkpoint_interval``) they share one gather, of which each has its part; that of a
last group with fewer layers counts for those that it has.
"""

from __future__ import annotations

import numpy as np

from cost_models import interconnect
from cost_models.fabric import Fabric
from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layer_times import to_ns
from cost_models.layout import RecomputePolicy
from cost_models.recompute import mode_rows


def gather_parts(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...],
    fabric: Fabric,
) -> None:  # fmt: skip
    """Add the gather of the parts to the extra backward time of each policy that keeps them."""
    places = mode_rows(tuple(policy.name for policy in policies))
    for policy in policies:
        if policy.in_parts:
            seconds = interconnect.collective_time_s(
                fabric, "all_gather", kind.boundary_bytes(shard).astype(np.float64),
                size=shard.tp, stride=np.ones_like(shard.tp),
            )  # fmt: skip
            each = np.where(shard.input_parts > 1, seconds, 0.0) / policy.group
            rows[places[policy.name].extra] += to_ns(each)
