"""Bytes of inputs that wait on the hosts: of modules (``cost_models.activation_offload``), or of
layers that run again (``cost_models.recompute.move_checkpoints``)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from cost_models.activation_offload import moved_bytes
from cost_models.graph import Bools, Int64, Shard
from cost_models.host_room import checkpoint_bytes
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
    workload, offload = request.workload, request.machine.offload
    if not offload.inputs and not offload.checkpoints:
        return total
    for name, layers in Counter(workload.layers).items():
        kind = workload.kinds[name]
        sizes = moved_bytes(kind, shard, None, offload.inputs).values()
        checkpoint = checkpoint_bytes(kind, offload, shard, workload.policies)
        total = total + layers * sum(sizes, checkpoint)
    pp, vpp, microbatches, at_once, rounds = runs
    # cost_models.schedule.live_peaks of rank 0.
    chunks = np.where(vpp == 1, pp, 2 * (pp - 1) + (vpp - 1) * rounds + 1)
    chunks = np.where(at_once, microbatches * vpp, np.minimum(chunks, microbatches * vpp))
    each = -(-total * chunks // (pp * vpp))
    result: Int64 = each * request.cluster.groups[0].node.devices_per_node
    return result
