"""Weights of which a layer's own calls bring together what fsdp splits, not the data-parallel side.

Beside an fsdp axis, XLA leaves most of a transposed feed-forward's weights where they are
(``planner.blocks.transposed_fsdp``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard
from cost_models.state import StateBytes, local_tensor
from cost_models.state_rules import StateRules


@dataclass(frozen=True)
class Placed:
    """Elements on a device before fsdp splits them."""

    weights: Int64
    """That are not gathered as a unit's."""
    gradients: Int64
    """Whose gradients are not reduced as a unit's."""
    whole: Int64
    """Elements of whole weights whose gradients each rank makes."""


def placed(kind: LayerKind, shard: Shard, vocab_divisor: int) -> Placed | None:
    """Those of a layer; None where nothing is transposed."""
    if shard.fsdp is None:
        return None
    none = np.zeros_like(shard.tp)
    local, whole = none, none
    for weight in kind.weights:
        if weight.name.startswith(("mlp.", "moe.shared.")) and weight.sharding in ("column", "row"):
            local = local + local_tensor(weight, shard, vocab_divisor).total
            whole = whole + weight.elements
    beside = shard.shards > 1
    moves = beside & (shard.straight > 1)
    return Placed(
        np.where(moves, local, 0),
        np.where(beside, local, 0),
        np.where(beside & ~moves, whole, 0),
    )


def without(held: StateBytes, apart: Placed | None, rules: StateRules) -> StateBytes:
    """What is unsharded of a layer while it runs, with whole gradients for those of a unit."""
    if apart is None:
        return held
    gathered = held.gathered - np.where(held.gathered > 0, apart.weights * rules.gather_bytes, 0)
    made = held.unsharded > 0
    unsharded = held.unsharded + np.where(made, apart.whole - apart.gradients, 0)
    return replace(held, gathered=gathered, unsharded=unsharded)
