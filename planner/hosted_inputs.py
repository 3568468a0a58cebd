"""Bytes of modules' inputs that wait on the hosts (``cost_models.activation_offload``)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from cost_models.activation_offload import moved_bytes
from cost_models.graph import Bools, Int64, Shard
from planner.request import Request


class Pipelines(NamedTuple):
    """What decides how many microbatches are alive, one entry per layout."""

    pp: Int64
    vpp: Int64
    microbatches: Int64
    at_once: Bools
    """Whether all forwards come before the first backward."""
    rounds: Int64
    """Microbatches of a round, where virtual stages take them in rounds."""


def input_bytes_per_node(request: Request, shard: Shard, runs: Pipelines) -> Int64:
    """Bytes on each node whose devices are a first stage with as many layers as any: they hold most
    microbatches. Room for them is needed whatever is run again instead.

    Exact where a rank fills its nodes and stages are even; where ranks share a node or the first
    stage is shorter, the rule leaves out layouts that would have room (``cost_models.host_room``
    has the bytes of given stages)."""
    total = np.zeros_like(shard.tp)
    modules = request.machine.offload.inputs
    if not modules:
        return total
    for name, layers in Counter(request.workload.layers).items():
        for size in moved_bytes(request.workload.kinds[name], shard, None, modules).values():
            total = total + layers * size
    pp, vpp, microbatches, at_once, rounds = runs
    # cost_models.schedule.live_peaks of rank 0.
    chunks = np.where(vpp == 1, pp, 2 * (pp - 1) + (vpp - 1) * rounds + 1)
    chunks = np.where(at_once, microbatches * vpp, np.minimum(chunks, microbatches * vpp))
    each = -(-total * chunks // (pp * vpp))
    result: Int64 = each * request.cluster.groups[0].node.devices_per_node
    return result
