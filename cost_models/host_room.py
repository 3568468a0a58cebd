"""What waits in the memory of a node's hosts (or on their drives), and whether it has room there.

Every device of a pipeline rank sends the same: its share of the state of the rank's layers, the
inputs of modules of the microbatches in flight, the layer inputs of full recomputation, the outputs
of layers that a mode sends there (``cost_models.host_outputs``). Ranks lie
on the nodes in order, tensor parallelism first and the pipeline last, so a node's devices are of
one pipeline rank, of several, or of the end of one and the start of the next; the fullest counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from cost_models.activation_offload import moved_bytes
from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.host_loops import loop_of, working_bytes
from cost_models.layout import RecomputeMode, RecomputePolicy
from cost_models.memory import Activations
from cost_models.offload import Offload
from cost_models.optimizers import OPTIMIZERS
from cost_models.state import ceil_div, is_expert, local_parameters, local_tensor
from cost_models.state_rules import StateRules

if TYPE_CHECKING:
    from cost_models.configs import Configs
    from cost_models.step import Machine


@dataclass(frozen=True, slots=True)
class HostRoom:
    """Bytes that one device of a leaf sends to its host, by layer kind, and the room there."""

    kinds: tuple[int, ...]
    """State of a layer of each kind."""
    embedding: int
    head: int
    inputs: tuple[int, ...]
    """Inputs of a layer of each kind, its own or its modules', and one microbatch."""
    room: int
    """Bytes of a node, less what all its devices send there whatever layers they hold."""
    rank_devices: int
    """Devices of a pipeline rank; neighbours."""
    node_devices: int
    outputs: Mapping[RecomputeMode, tuple[int, ...]] = field(default_factory=dict)
    """Per mode that sends outputs there, those of a layer of each kind and of all microbatches that
    wait: one, or all under a pipeline, which runs all forwards first."""
    passes: tuple[int, int] = (1, 1)
    """By how much more is there than of the microbatches: passes of a rank whose outputs wait over
    those of microbatches (``cost_models.idle_passes``), spread over its layers."""

    def of_layers(
        self, held: Sequence[int], mode: RecomputeMode, *, at_start: bool, at_end: bool
    ) -> tuple[int, int]:
        """State and outputs of ``held`` layers per kind, with the ends of the model where they are,
        and modules' inputs of one microbatch."""
        state = sum([n * size for n, size in zip(held, self.kinds, strict=False)])
        state += self.embedding * at_start + self.head * at_end
        state += sum([n * size for n, size in zip(held, self.of_mode(mode), strict=False)])
        return state, sum([n * size for n, size in zip(held, self.inputs, strict=False)])

    def of_mode(self, mode: RecomputeMode) -> tuple[int, ...]:
        """Outputs that a layer of each kind sends there in a mode."""
        sizes = self.outputs.get(mode, (0,) * len(self.kinds))
        run, real = self.passes
        return sizes if run == real else tuple([-(-size * run // real) for size in sizes])

    def outside(self, pp: int) -> HostRoom:
        """The same for layers outside the pipeline: each of ``pp`` ranks has its share of the
        batch."""
        shares = {
            mode: tuple(-(-size // pp) for size in sizes) for mode, sizes in self.outputs.items()
        }
        return replace(self, outputs=shares, passes=(1, 1))

    def most_on_node(self, rank: int) -> int:
        """Most devices of a pipeline rank that share a node."""
        return max(devices[rank] for devices in self._nodes(rank, rank + 1) if rank in devices)

    def fullest(self, sizes: Sequence[int]) -> int:
        """Most bytes on any node where a device of each pipeline rank sends ``sizes``."""
        return max(
            sum(sizes[rank] * count for rank, count in devices.items())
            for devices in self._nodes(0, len(sizes))
        )

    def _nodes(self, first: int, last: int) -> list[dict[int, int]]:
        """Devices of each pipeline rank on the distinct nodes of ranks ``first .. last - 1``."""
        of_rank, of_node = self.rank_devices, self.node_devices
        if of_rank % of_node == 0:
            return [{rank: of_node} for rank in range(first, last)]
        nodes = []
        for node in range(first * of_rank // of_node, -(-last * of_rank // of_node)):
            start, end = node * of_node, (node + 1) * of_node
            ranks = range(start // of_rank, min(last, -(-end // of_rank)))
            nodes.append({r: min(end, (r + 1) * of_rank) - max(start, r * of_rank) for r in ranks})
        return nodes


NOWHERE = HostRoom((), 0, 0, (), 0, 1, 1)
"""Of devices that send nothing to their hosts."""


@dataclass(frozen=True)
class HostTables:
    """:class:`HostRoom` of every configuration."""

    kinds: tuple[Int64, ...]
    embedding: Int64
    head: Int64
    inputs: tuple[Int64, ...]
    room: Int64
    rank_devices: Int64
    node_devices: int
    outputs: Mapping[RecomputeMode, tuple[Int64, ...]] = field(default_factory=dict)

    def of(self, index: int, *, shared_ends: bool) -> HostRoom:
        """That of configuration ``index``; ``shared_ends``: every pipeline rank holds its part of
        embedding and head."""
        ends = int(self.embedding[index]), int(self.head[index])
        everywhere = sum(ends) * self.node_devices if shared_ends else 0
        return HostRoom(
            tuple(int(table[index]) for table in self.kinds),
            *((0, 0) if shared_ends else ends),
            tuple(int(table[index]) for table in self.inputs),
            int(self.room[index]) - everywhere,
            int(self.rank_devices[index]),
            self.node_devices,
            {
                mode: tuple(int(table[index]) for table in tables)
                for mode, tables in self.outputs.items()
            },
        )


def host_tables(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> HostTables | None:
    """What the devices of every configuration send to the hosts; None where nothing leaves them or
    nobody says what a host holds."""
    spec, node = machine.stack.offload, machine.cluster.groups[0].node
    if spec is None or not machine.offload.anything:
        return None
    capacity = node.host_memory if not fills_drives(machine) else node.drives
    if capacity is None:
        return None
    kinds = [workload.kinds[name] for name in dict.fromkeys(workload.layers)]
    modules = machine.offload.inputs
    optimizer, weights = bytes_there(machine)

    share = machine.offload.optimizer_per_1000
    each, group = _loop_bytes(workload, machine, shard, configs)

    def state(kind: LayerKind) -> Int64:
        trained, frozen = shard_elements(kind, shard, configs, workload.vocab_divisor)
        there = ceil_div(trained * (optimizer * share), np.array(1000)) + trained * each
        more = np.zeros_like(shard.tp)
        if holds_extra(machine):
            more = extra_bytes(kind, shard, configs, machine.rules, workload.vocab_divisor)
        found: Int64 = there + (trained + frozen) * weights + more
        return found

    return HostTables(
        kinds=tuple(state(kind) for kind in kinds),
        embedding=state(workload.embedding),
        head=state(workload.head),
        inputs=tuple(
            sum(
                moved_bytes(kind, shard, None, modules).values(),
                checkpoint_bytes(kind, machine.offload, shard, workload.policies),
            )
            for kind in kinds
        ),
        room=np.full_like(shard.tp, int(capacity.si)) - group * node.devices_per_node,
        rank_devices=configs.world // configs.pp,
        node_devices=node.devices_per_node,
        outputs=_outputs(workload, shard, configs),
    )


def _loop_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> tuple[Int64, Int64]:
    """Bytes of what loops on the host make where its memory holds all that leaves the devices: per
    trained element of a shard, and of a device. Beside drives they are among the buffers."""
    name, spec = machine.rules.optimizer.name, machine.stack.offload
    here = machine.offload.optimizer and not fills_drives(machine)
    if not here or loop_of(name, spec) is None:
        return np.zeros_like(shard.tp), np.zeros_like(shard.tp)
    counts = Counter(workload.layers)
    held = [(workload.kinds[kind], count) for kind, count in counts.items()]
    elements = np.zeros_like(shard.tp)
    for kind, count in (*held, (workload.embedding, 1), (workload.head, 1)):
        trained, _ = shard_elements(kind, shard, configs, workload.vocab_divisor)
        matrices = matrix_elements(kind, shard, configs, machine.rules, workload.vocab_divisor)
        elements = elements + count * (trained - matrices)
    return working_bytes(name, spec, elements, configs.zero_stage)


def _outputs(
    workload: WorkloadGraph, shard: Shard, configs: Configs
) -> dict[RecomputeMode, tuple[Int64, ...]]:
    """What :class:`HostRoom` calls outputs, of every configuration."""
    sending = [policy for policy in workload.policies if policy.offloads]
    if not sending or workload.global_batch is None:
        return {}
    waiting = np.where(configs.pp > 1, configs.microbatches(workload.global_batch), 1)
    activations = [
        Activations(workload.kinds[name], shard) for name in dict.fromkeys(workload.layers)
    ]
    return {
        policy.name: tuple(each.listed(policy, policy.offloads) * waiting for each in activations)
        for policy in sending
    }


def shard_elements(
    kind: LayerKind, shard: Shard, configs: Configs, vocab_divisor: int
) -> tuple[Int64, Int64]:
    """Elements of one device's shard of a layer's weights: trained, and not trained."""
    local = local_parameters(kind, shard, vocab_divisor, drop_tied=configs.pp == 1)
    ranks = configs.dp_shard * configs.cp
    split = configs.zero_stage > 0
    dense = np.where(split, ranks, 1)
    expert = np.where(split, np.maximum(ranks * configs.tp // (configs.ep * configs.etp), 1), 1)
    trained = ceil_div(local.dense, dense) + ceil_div(local.expert, expert)
    return trained, ceil_div(local.frozen_dense, dense) + ceil_div(local.frozen_expert, expert)


def extra_bytes(
    kind: LayerKind, shard: Shard, configs: Configs, rules: StateRules, vocab_divisor: int
) -> Int64:
    """Bytes of one device's shard that some of a layer's tensors have more than others, where they
    leave the device (Muon: second moments of what is no hidden matrix, and first ones where those
    of matrices take less)."""
    found = np.zeros_like(shard.tp)
    rule = rules.optimizer.extra_bytes
    if rule is None or not (rules.streams_extra or rules.hosts_extra):
        return found
    ranks = configs.dp_shard * configs.cp
    experts = np.maximum(ranks * configs.tp // (configs.ep * configs.etp), 1)
    for mesh, expert in ((ranks, False), (experts, True)):
        more = np.zeros_like(shard.tp)
        for weight in kind.weights:
            if is_expert(weight) == expert and not weight.frozen:
                each = rule(weight, local_tensor(weight, shard, vocab_divisor))
                more = more + np.where((configs.pp == 1) & weight.copy, 0, each)
        found = found + ceil_div(more, np.where(configs.zero_stage > 0, mesh, 1))
    return found


def matrix_elements(
    kind: LayerKind, shard: Shard, configs: Configs, rules: StateRules, vocab_divisor: int
) -> Int64:
    """Elements of one device's shard of a layer's matrices that Muon orthogonalises, if the job's
    optimizer is that."""
    found = np.zeros_like(shard.tp)
    if not rules.optimizer.orthogonalises:
        return found
    ranks = configs.dp_shard * configs.cp
    experts = np.maximum(ranks * configs.tp // (configs.ep * configs.etp), 1)
    for mesh, expert in ((ranks, False), (experts, True)):
        tensors = [
            local_tensor(weight, shard, vocab_divisor).total
            for weight in kind.weights
            if is_expert(weight) == expert
            and not weight.frozen
            and rules.optimizer.matrices(weight)
        ]
        held = np.sum(tensors, axis=0) if tensors else np.zeros_like(shard.tp)
        found = found + held // np.where(configs.zero_stage > 0, mesh, 1)
    return found


def leaving(machine: Machine) -> dict[str, int]:
    """Bytes per parameter of what leaves the devices, by the names of ``DrivesSpec.holds``."""
    spec, offload = machine.stack.offload, machine.offload
    if spec is None:
        return {}
    weights = {"parameters": spec.parameter_bytes or 0} if offload.parameters else {}
    # What the device updates is what it has on it for the update, weights included.
    rules = machine.rules
    if spec.optimizer_bytes is None:
        state = rules.streamed_bytes - sum(weights.values())
    else:
        state = spec.optimizer_bytes - OPTIMIZERS["adamw"].moment_bytes
        state += rules.optimizer.moment_bytes
    return ({"optimizer": state} if offload.optimizer else {}) | weights


def fills_drives(machine: Machine) -> bool:
    """Whether some of what leaves the devices goes on to NVMe drives."""
    spec = machine.stack.offload
    if spec is None or spec.drives is None:
        return False
    return not leaving(machine).keys().isdisjoint(spec.drives.holds)


def holds_extra(machine: Machine) -> bool:
    """Whether what :func:`extra_bytes` counts is where :func:`bytes_there` is: not in the memory
    beside drives that hold weights alone."""
    spec = machine.stack.offload
    if spec is None or spec.drives is None or not fills_drives(machine):
        return True
    return "optimizer" in spec.drives.holds


def bytes_there(machine: Machine) -> tuple[int, int]:
    """Bytes per parameter of optimizer state (of those whose state is there) and of weights where
    the stack fills the drives, else in memory."""
    spec, parts = machine.stack.offload, leaving(machine)
    if spec is not None and spec.drives is not None and fills_drives(machine):
        parts = {name: size for name, size in parts.items() if name in spec.drives.holds}
    return parts.get("optimizer", 0), parts.get("parameters", 0)


def checkpoint_bytes(
    kind: LayerKind, offload: Offload, shard: Shard, policies: Sequence[RecomputePolicy]
) -> Int64:
    """Bytes of a layer's input of one microbatch that a device has room for on its host: a part of
    it where every mode keeps parts, whatever runs again together."""
    if not offload.checkpoints:
        return np.zeros_like(shard.tp)
    whole = kind.boundary_bytes(shard)
    if policies and all(policy.in_parts for policy in policies):
        return -(-whole // shard.input_parts)
    return whole
