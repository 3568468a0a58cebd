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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layer_offload import hosted_bytes
from cost_models.layout import RecomputePolicy
from cost_models.memory import Activations
from cost_models.recompute import mode_rows
from cost_models.step import Field, Machine
from hardware_profiles.stack_words import LayerOffload

if TYPE_CHECKING:
    from cost_models.leaf import Leaf


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
    vpp: int = 1
    idle: int = 0
    """Passes of the bubble that keep theirs too (``cost_models.idle_passes``)."""

    def on_one_device(self, layer_bytes: Int64, outside: Int64 | int = 0) -> Int64:
        """What a device keeps of ``layer_bytes``, all layers' of one microbatch, with those of
        layers ``outside`` the pipeline; stages that hold several kinds of layer are taken to hold
        as much of each."""
        held = layer_bytes * np.where(self.pp > 1, self.microbatches, 1) * self.vpp
        held = held + (layer_bytes - outside) * self.idle
        result: Int64 = -(-held // (self.pp * self.vpp))
        return result


def host_bytes(
    workload: WorkloadGraph,
    shard: Shard,
    waiting: Waiting,
    policies: tuple[RecomputePolicy, ...],
    whole: LayerOffload | None = None,
    outside: Mapping[str, int] | None = None,
) -> Int64:
    """Bytes that one device keeps on its host, of shape (policies, configurations); so many layers
    of each kind are ``outside`` the pipeline."""
    total = np.zeros((len(policies), len(shard.tp)), dtype=np.int64)
    apart = np.zeros_like(total)
    for name, count in Counter(workload.layers).items():
        activations = Activations(workload.kinds[name], shard)
        for row, policy in enumerate(policies):
            each = activations.listed(policy, policy.offloads)
            total[row] += count * each
            apart[row] += (outside or {}).get(name, 0) * each
    for row, policy in enumerate(policies):
        if policy.hosted_layers and whole is not None:
            total[row] += hosted_bytes(workload, shard, policy, whole)
    return waiting.on_one_device(total, apart)


def without_room(
    workload: WorkloadGraph, shard: Shard, waiting: Waiting, machine: Machine,
    policies: tuple[RecomputePolicy, ...], outside: Mapping[str, int] | None = None,
) -> Bools:  # fmt: skip
    """Where the hosts have no memory for what policies send; (policies, configurations)."""
    spec = machine.stack.layer_offload
    held = host_bytes(workload, shard, waiting, policies, spec, outside)
    result: Bools = held > room_of_a_device(machine)
    return result


def room_of_a_device(machine: Machine) -> int:
    """Its share of its node's memory."""
    node = machine.cluster.groups[0].node
    return 0 if node.host_memory is None else int(node.host_memory.si) // node.devices_per_node


@dataclass(frozen=True, slots=True)
class Sent:
    """What a layer sends under each policy that sends something, where idle passes send too: how
    many there are depends on the schedule, which no table of configurations knows."""

    kept: tuple[int, ...]
    """Rows of what the policies keep."""
    kinds: tuple[Int64, ...]
    """Bytes of a layer of each kind and one microbatch; (policies, configurations)."""
    room: int

    def refuse(self, leaf: Leaf, index: int) -> Leaf:
        """A leaf of configuration ``index`` whose layers keep as much as the device has under the
        policies that the hosts have no room for."""
        kinds = range(len(leaf.kinds))
        apart = (0,) * len(kinds) if leaf.outside is None else leaf.outside.counts
        waiting = Waiting(
            np.array([leaf.pp]), np.array([leaf.microbatches]), leaf.vpp, leaf.idle_passes
        )
        every, outside = (
            np.sum([self.kinds[kind][:, index] * counts[kind] for kind in kinds], axis=0)
            for counts in ([leaf.sequence.count(kind) for kind in kinds], apart)
        )
        refused = np.flatnonzero(waiting.on_one_device(every, outside) > self.room)
        if not len(refused):
            return leaf
        rows = [list(kind) for kind in leaf.kinds]
        for policy in refused:
            for row in rows:
                row[self.kept[policy]] = leaf.capacity_bytes
        return replace(leaf, kinds=tuple(tuple(row) for row in rows))


def sent_by(workload: WorkloadGraph, shard: Shard, machine: Machine) -> Sent | None:
    """:class:`Sent` of a stack whose idle passes send; None where none does."""
    sending = [policy for policy in workload.policies if policy.offloads]
    if not sending or not machine.stack.idle_passes_stay:
        return None
    places = mode_rows(tuple(policy.name for policy in workload.policies))
    activations = [
        Activations(workload.kinds[name], shard) for name in dict.fromkeys(workload.layers)
    ]
    return Sent(
        tuple(places[policy.name].kept for policy in sending),
        tuple(np.stack([a.listed(p, p.offloads) for p in sending]) for a in activations),
        room_of_a_device(machine),
    )


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
