"""Layers outside the pipeline: all ranks run them, with the stages as data parallelism.

A stack whose pipeline is one loop over equal stages (MaxText, ``layers/decoders.py``) can leave
layers out of it. Those behind the pipeline start when its last forward is over, and their backward
ends before its first begins; where a model starts with layers of another kind than the rest, they
run ahead of it, and the other way round. Each rank runs them once per step, on an equal share of
the batch (``logical_axis_rules_pp_act_as_dp``: the batch is split over ``stage`` before ``data``,
which moves nothing, as the microbatches of the pipeline's input and output are dealt to the stages
already). Weights and their state are on every stage, split over tp, ep and the ranks that shard as
any layer's (no rule of ``logical_axis_rules`` splits the axis of the scanned layers); so gradients
are summed over the stages too.

So a step is that of the pipeline, of the layers that are left, and the time of these: the same on
every rank. Outputs that wait on the host take as much room wherever a layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cost_models.layout import ALL_AT_ONCE, Schedule
from cost_models.leaf import ChunkCosts, Leaf, Row, held_costs

if TYPE_CHECKING:
    from cost_models.configs import Configs


def leading(layers: Sequence[str]) -> int | None:
    """Layers ahead of the pipeline at least: the first ones, where all behind them are of another
    kind; None where kinds alternate, of which stages hold whole patterns."""
    if not layers:
        return 0
    first = next((i for i, kind in enumerate(layers) if kind != layers[0]), 0)
    return first if len({*layers[first:]}) == 1 else None


def pattern_of(layers: Sequence[str]) -> int:
    """Layers of the shortest pattern that kinds of layers repeat, 1 where a stage has one kind."""
    if leading(layers) is not None:
        return 1
    n = len(layers)
    return next(k for k in range(2, n + 1) if all(layers[i] == layers[i - k] for i in range(k, n)))


def outside_numbers(
    layers: Sequence[str], schedule: Schedule, stages: int, longest: int | None = None
) -> tuple[int, ...]:
    """How many layers may be outside a pipeline of ``stages`` equal virtual stages; the fewest
    first. Where its stages cannot be equal, the least that is outside anyhow. ``longest`` is the
    stack's ``longest_pattern``."""
    ahead, pattern = leading(layers), pattern_of(layers)
    if schedule not in ALL_AT_ONCE or (ahead is None and (longest is None or pattern > longest)):
        return (0,)
    ahead, block = ahead or 0, stages * pattern
    held = len(layers) - ahead
    return tuple(range(ahead + held % block, len(layers), block)) or (ahead,)


def outside_configs(configs: Configs, global_batch: int) -> Configs:
    """What layers outside run as: no pipeline, the stages as replicas, one microbatch."""
    stages = configs.pp
    ranks = configs.dp_replicate * configs.dp_shard * stages
    return replace(
        configs, microbatch=np.maximum(global_batch // ranks, 1), pp=np.ones_like(stages),
        dp_replicate=configs.dp_replicate * stages, stages=stages,
    )  # fmt: skip


@dataclass(frozen=True)
class Outside:
    """The layers outside of one leaf."""

    kinds: tuple[Row, ...]
    """Prices of a layer of each kind on a rank's share of the batch."""
    counts: tuple[int, ...]
    """Of each kind."""
    ahead: bool
    """Whether they come before the pipeline, not behind it."""
    costs: ChunkCosts | None = None
    """Of all of them, in the mode in which they are recomputed."""

    @property
    def layers(self) -> int:
        """Of all kinds."""
        return sum(self.counts)

    @property
    def in_mode(self) -> ChunkCosts:
        """Their costs, where a mode is chosen (:func:`recomputing`)."""
        assert self.costs is not None
        return self.costs

    @property
    def ns(self) -> int:
        """Their part of a step."""
        costs = self.in_mode
        return costs.forward_ns + costs.backward_ns + costs.gradient_ns + costs.update_ns


def outside_of(leaf: Leaf, rows: tuple[Row, ...], number: int) -> Outside:
    """``number`` layers outside of ``leaf``, whose ``sequence`` is that of the whole model."""
    distinct = tuple(str(kind) for kind in leaf.sequence)
    ahead = bool(leading(distinct))
    held = leaf.sequence[:number] if ahead else leaf.sequence[len(leaf.sequence) - number :]
    counts = tuple(held.count(kind) for kind in range(len(leaf.kinds)))
    return Outside(rows, counts, ahead)


def outside_bounds(leaf: Leaf) -> tuple[int, ...]:
    """The one partition of a leaf with layers outside: equal virtual stages of the others."""
    assert leaf.outside is not None
    held = len(leaf.sequence) - leaf.outside.layers
    first = leaf.outside.layers if leaf.outside.ahead else 0
    height = held // leaf.stages
    return tuple(range(first, first + held + 1, height))


def recomputing(leaf: Leaf, mode: str) -> Leaf:
    """``leaf`` with the layers outside recomputed as those of the pipeline are: one policy serves
    all layers. Their time is once per step on all ranks at once, as what the norm takes."""
    outside = leaf.outside
    if outside is None:
        return leaf
    hosts = None if leaf.hosts is None else leaf.hosts.outside(leaf.pp)
    alone = replace(leaf, kinds=outside.kinds, outside=None, hosts=hosts)
    none, counts = (0, 0), outside.counts
    outside = replace(
        outside, costs=held_costs(alone, False, False, mode, counts, (counts,), none, none)
    )
    return replace(leaf, outside=outside, sync_ns=leaf.sync_ns + outside.ns)
