"""Named outputs of every layer that wait on the host between forward and backward.

What ``RecomputePolicy.offloads`` names leaves over the device's link beside the rest of the layer's
forward and comes back beside the backward of the layer before. What of the way is longer than the
layer's own pass is waited for, and one layer's outputs are on their way
(``jax.checkpoint_policies.save_and_offload_only_these_names``). Priced for one microbatch in
flight: a pipeline's hosts would hold one for each.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layout import RecomputePolicy
from cost_models.memory import offloaded_bytes
from cost_models.recompute import mode_rows
from cost_models.step import Field, Machine


def move_outputs(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...],
    bytes_per_s: float,
) -> None:  # fmt: skip
    """Add to a layer's backward what both passes wait for their transfers."""
    places = mode_rows(tuple(policy.name for policy in policies))
    for policy in policies:
        if policy.offloads:
            size, extra = offloaded_bytes(kind, shard, policy), places[policy.name].extra
            way = np.ceil(size / bytes_per_s * 1e9).astype(np.int64)
            waits = np.maximum(way - rows[Field.FORWARD], 0)
            waits += np.maximum(way - rows[Field.BACKWARD] - rows[extra], 0)
            rows[extra] += waits


def host_bytes(workload: WorkloadGraph, shard: Shard, policy: RecomputePolicy) -> Int64:
    """Bytes of all layers' outputs that one device keeps on its host, one microbatch."""
    total = np.zeros_like(shard.tp)
    for name, count in Counter(workload.layers).items():
        total += count * offloaded_bytes(workload.kinds[name], shard, policy)
    return total


def without_room(
    workload: WorkloadGraph, shard: Shard, pp: Int64, policy: RecomputePolicy, machine: Machine
) -> Bools:
    """Where the hosts cannot take what a policy sends: under a pipeline, or for lack of memory."""
    node = machine.cluster.groups[0].node
    room = 0 if node.host_memory is None else int(node.host_memory.si) // node.devices_per_node
    result: Bools = (pp > 1) | (host_bytes(workload, shard, policy) > room)
    return result


def refuse_without_room(
    tables: tuple[Int64, ...], workload: WorkloadGraph, shard: Shard, pp: Int64, machine: Machine,
    capacity_bytes: int,
) -> None:  # fmt: skip
    """Let a layer keep as much as the device has under a policy that a configuration cannot run, so
    that no layer of it fits."""
    places = mode_rows(tuple(policy.name for policy in workload.policies))
    for policy in workload.policies:
        if policy.offloads:
            refused = without_room(workload, shard, pp, policy, machine)
            for table in tables:
                table[places[policy.name].kept, refused] = capacity_bytes
