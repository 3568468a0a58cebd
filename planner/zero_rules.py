"""What of a step a stack's version can shard over data parallelism, and beside which degrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cost_models.graph import Bools
from cost_models.layout import SPLIT_BACKWARD, codes_of
from planner.meshes import Layouts, Meshes
from planner.request import Request

LayoutRule = tuple[str, Callable[[Meshes, Layouts], Bools]]


def zero_rules(request: Request) -> Iterator[LayoutRule]:
    """ZeRO stages and groups of ranks that cannot be combined with other degrees."""
    stack = request.stack
    label = f"{stack.name} {stack.version}"
    if "zero_0_is_replicate_only" in stack.rules:
        yield (
            f"{label}: replication alone (DDP) does not combine with tp, cp or pp",
            lambda m, x: (x.zero_stage == 0) & (m.tp * m.cp * m.pp > 1) & (m.dp > 1),
        )
    if "zero_1_shards_over_all" in stack.rules:
        yield (
            f"{label}: the optimizer's state alone is split over all of dp or not at all",
            lambda _, x: (x.zero_stage == 1) & (x.dp_replicate > 1),
        )
    if "no_zero_2_with_pipeline" in stack.rules:
        yield (
            f"{label}: gradients alone are not split under a pipeline",
            lambda m, x: (x.zero_stage == 2) & (m.pp > 1),
        )
    if "zero_2_needs_pipeline" in stack.rules:
        yield (
            f"{label}: weights stay gathered for a step under a pipeline only",
            lambda m, x: (x.zero_stage == 2) & (m.pp == 1),
        )
    if "no_zero_3_with_pipeline" in stack.rules:
        yield (
            f"{label}: parameters stay gathered under a pipeline",
            lambda m, x: (x.zero_stage == 3) & (m.pp > 1),
        )
    if "no_zero_3_with_split_backward" in stack.rules:
        yield (
            f"{label}: a backward in two halves loses weight gradients where its forward gave the "
            "weights back",
            lambda m, x: (
                (x.zero_stage == 3) & (m.pp > 1) & np.isin(x.schedule, codes_of(SPLIT_BACKWARD))
            ),
        )
    if "zero_2_needs_expert_parallelism" in stack.rules:
        yield (
            f"{label}: layers whose experts no rank shares out give their weights back after each "
            "forward",
            lambda m, x: (x.zero_stage == 2) & (m.ep == 1),
        )
    if "no_zero_3_with_context" in stack.rules:
        yield (
            f"{label}: parameters are split without context parallelism only",
            lambda m, x: (x.zero_stage == 3) & (m.cp > 1),
        )
    if "shards_fill_nodes" in stack.rules:
        node = request.cluster.groups[0].node.devices_per_node
        yield (
            f"{label}: dp_shard x cp does not fill several nodes of {node} devices",
            lambda m, x: (x.dp_shard * m.cp <= node) | ((x.dp_shard * m.cp) % node != 0),
        )
    if "hybrid_shards_are_nodes" in stack.rules:
        each = request.cluster.groups[0].node.devices_per_node
        yield (
            f"{label}: groups that share weights are nodes of {each} devices, or all devices",
            lambda _, x: (x.zero_stage > 0) & (x.dp_replicate > 1) & (x.dp_shard != each),
        )
    if "replicas_share_weights" in stack.rules:
        yield (
            f"{label}: replicas are of weights that several data-parallel ranks share",
            lambda _, x: (x.zero_stage > 0) & (x.dp_replicate > 1) & (x.dp_shard == 1),
        )
    group = request.machine.reshard_group
    if group is not None:
        yield (
            f"{label}: dp_shard x cp is no multiple of the {group} ranks that keep weights for the "
            "backward",
            lambda m, x: (
                (x.zero_stage == 3)
                & (x.dp_shard * m.cp > group)
                & ((x.dp_shard * m.cp) % group != 0)
            ),
        )


def one_rank_rules(request: Request) -> Iterator[LayoutRule]:
    """What weights that no data-parallel rank shares are called."""
    stack = request.stack
    if 0 not in request.zero_stages:
        return
    wraps = "shards_over_one_rank" in stack.rules

    def wrapped(m: Meshes) -> Bools:
        """Where the software shards over one rank: not on a device by itself."""
        result: Bools = wraps & (m.tp * m.pp > 1)
        return result

    yield (
        "sharding over one rank is ZeRO stage 0",
        lambda m, x: (x.zero_stage > 0) & (x.dp_shard * m.cp == 1) & ~wrapped(m),
    )
    if wraps:
        yield (
            f"{stack.name} {stack.version}: weights that no rank shares are sharded over one",
            lambda m, x: (x.zero_stage == 0) & (m.dp * m.cp == 1) & wrapped(m),
        )
