"""Collectives of modules that run piece by piece of the sequence.

Under tensor parallelism every piece of an MLP is a call of its linear layers, so it has reductions
of its own (DeepSpeed 0.19.3: ``TiledMLP`` of runtime/sequence_parallel/ulysses_sp.py calls the
module's forward for each piece, and again in the backward; module_inject/layers.py reduces in each
call). What the pieces take longer than one collective is waited for, beside whatever the whole one
hid behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cost_models import interconnect
from cost_models.communication import group_of
from cost_models.fabric import Fabric
from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layer_times import to_ns
from cost_models.layout import RecomputePolicy
from cost_models.memory import sequence_tiles
from cost_models.ops import Collective, Op
from cost_models.recompute import mode_rows


def in_pieces(ops: tuple[Op, ...], policy: RecomputePolicy) -> Iterator[Collective]:
    """The collectives that a policy cuts."""
    for op in ops:
        if isinstance(op, Collective) and policy.tiled.intersection(op.modules):
            yield op


def forwards(policy: RecomputePolicy) -> int:
    """How often the modules run forward: for the layer, where all of it runs again, and for their
    own backward."""
    return 2 if policy.keeps is None else 3


def cut_collectives(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...],
    fabric: Fabric,
) -> None:  # fmt: skip
    """Add to the extra backward time of each policy what its pieces take longer."""
    tiled = [policy for policy in policies if policy.tiled]
    if not tiled:
        return
    places = mode_rows(tuple(policy.name for policy in policies))
    ops, pieces = kind.ops(shard), sequence_tiles(kind, shard).astype(np.float64)
    for policy in tiled:
        seconds = np.zeros(len(shard.tp))
        for op in in_pieces(ops, policy):
            size, stride = group_of(op, kind.shard(shard))
            active = np.asarray(op.active) & (size > 1)
            for side, times in zip(op.sides(), (forwards(policy), 1), strict=True):
                if side is None or side.kind == "ring" or side.kind == "permute":
                    continue
                if not active.any():
                    continue
                whole = np.asarray(side.bytes, dtype=np.float64) + np.zeros(len(size))
                each, cut = (
                    interconnect.collective_time_s(
                        fabric, side.kind, payload, size=size, stride=stride
                    )
                    for payload in (whole, whole / pieces)
                )
                longer = np.maximum(pieces * cut - each, 0.0) * side.count * times
                seconds = seconds + np.where(active, longer, 0.0)
        rows[places[policy.name].extra] += to_ns(seconds)
