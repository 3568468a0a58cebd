"""Named outputs of every layer that wait on the host between forward and backward.

What ``RecomputePolicy.offloads`` names leaves over the device's link beside the rest of the layer's
forward and comes back beside the backward of the layer before. What of the way is longer than the
layer's own pass is waited for, where weights come over the same link beside the backward of what
both take, and one layer's outputs are on their way
(``jax.checkpoint_policies.save_and_offload_only_these_names``). Where copies are the compute
stream's own (``torch.autograd.graph.save_on_cpu``) both passes wait for all of the way. A host
holds those of one microbatch, and under a pipeline those of all: what sends them there (MaxText)
runs all forwards first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layer_offload import hosted_bytes
from cost_models.layout import RecomputePolicy
from cost_models.memory import Activations
from cost_models.recompute import mode_rows
from cost_models.step import Field, Machine
from hardware_profiles.stack_words import LayerOffload


def move_outputs(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...],
    bytes_per_s: float, fetched_ns: Int64,
) -> None:  # fmt: skip
    """Add to a layer's backward what both passes wait for their transfers; ``fetched_ns``: what
    weights that come from the host beside the backward take."""
    places = mode_rows(tuple(policy.name for policy in policies))
    activations = Activations(kind, shard)
    for policy in policies:
        if policy.offloads:
            size = activations.listed(policy, policy.offloads)
            extra = places[policy.name].extra
            way = np.ceil(size / bytes_per_s * 1e9).astype(np.int64)
            beside = np.zeros_like(way), fetched_ns
            passes = rows[Field.FORWARD], rows[Field.BACKWARD] + rows[extra]
            rows[extra] += sum(
                way if policy.in_turn else np.maximum(way + other - each, 0)
                for other, each in zip(beside, passes, strict=True)
            )


@dataclass(frozen=True, slots=True)
class Waiting:
    """Pipeline stages of each configuration, and microbatches of a step on one rank."""

    pp: Int64
    microbatches: Int64

    def on_one_device(self, layer_bytes: Int64) -> Int64:
        """What a device keeps of ``layer_bytes``, all layers' of one microbatch; stages that hold
        several kinds of layer are taken to hold as much of each."""
        held = layer_bytes * np.where(self.pp > 1, self.microbatches, 1)
        result: Int64 = -(-held // self.pp)
        return result


def host_bytes(
    workload: WorkloadGraph,
    shard: Shard,
    waiting: Waiting,
    policies: tuple[RecomputePolicy, ...],
    whole: LayerOffload | None = None,
) -> Int64:
    """Bytes that one device keeps on its host, of shape (policies, configurations)."""
    total = np.zeros((len(policies), len(shard.tp)), dtype=np.int64)
    for name, count in Counter(workload.layers).items():
        activations = Activations(workload.kinds[name], shard)
        for row, policy in enumerate(policies):
            total[row] += count * activations.listed(policy, policy.offloads)
    for row, policy in enumerate(policies):
        if policy.hosted_layers and whole is not None:
            total[row] += hosted_bytes(workload, shard, policy, whole)
    return waiting.on_one_device(total)


def without_room(
    workload: WorkloadGraph, shard: Shard, waiting: Waiting, machine: Machine,
    policies: tuple[RecomputePolicy, ...],
) -> Bools:  # fmt: skip
    """Where the hosts have no memory for what policies send; (policies, configurations)."""
    node = machine.cluster.groups[0].node
    room = 0 if node.host_memory is None else int(node.host_memory.si) // node.devices_per_node
    spec = machine.stack.layer_offload
    result: Bools = host_bytes(workload, shard, waiting, policies, spec) > room
    return result


def refuse_without_room(
    tables: tuple[Int64, ...], workload: WorkloadGraph, shard: Shard, waiting: Waiting,
    machine: Machine, capacity_bytes: int,
) -> None:  # fmt: skip
    """Let a layer keep as much as the device has under a policy that a configuration cannot run, so
    that no layer of it fits."""
    sending = tuple(policy for policy in workload.policies if policy.sends)
    if not sending:
        return
    places = mode_rows(tuple(policy.name for policy in workload.policies))
    refused = without_room(workload, shard, waiting, machine, sending)
    for policy, where in zip(sending, refused, strict=True):
        for table in tables:
            table[places[policy.name].kept, where] = capacity_bytes
