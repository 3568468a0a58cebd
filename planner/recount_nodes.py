"""What a layout's devices send to each node: the recheck's own sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, Weight
from cost_models.host_loops import HOST_LOOPS, HostLoop
from cost_models.host_room import bytes_there, holds_extra
from cost_models.leaf import Leaf
from cost_models.optimizers import LocalTensor
from cost_models.schedule import live_peaks
from cost_models.state import is_expert, local_tensor
from planner.hosting import host_capacity, on_drives
from planner.recount_host import layer_input_held, outputs_of_layer, padding_of, shard_of_mesh
from planner.request import Request

if TYPE_CHECKING:
    from planner.recount import Mesh

ON_A_V = ("zbv", "dualpipev", "given_v", "given_v_split")
"""Schedules whose first rank has the last virtual stage too."""
Ranges = Sequence[tuple[int, int]]
"""Layers ``first .. last - 1`` of each virtual stage of a rank, in the order of its chunks."""


class Nodes:
    """The bytes that the stages of one layout send to the hosts, and the room there.

    State is counted weight by weight, the inputs of modules tensor by tensor, and devices lie on
    the nodes one after the other, those of a rank together.
    """

    def __init__(self, request: Request, mesh: Mesh, ways: int, zero: int, leaf: Leaf) -> None:
        workload, offload = request.workload, request.machine.offload
        self.leaf, self.room = leaf, host_capacity(request)
        self.anything = request.stack.offload is not None and offload.anything
        self._most: dict[int, int] = {}
        self.per_rank = mesh.dp * mesh.cp * mesh.tp
        self.per_node = request.cluster.groups[0].node.devices_per_node
        shard = self.shard = shard_of_mesh(mesh, request, fsdp=ways if zero == 3 else 1)
        self.request, self._listed = request, dict[tuple[str, str], int]()
        self.waiting = leaf.microbatches if mesh.pp > 1 else 1
        self.passes = self.waiting * leaf.vpp + padding_of(leaf.schedule, mesh.pp, request)
        divisor = workload.vocab_divisor
        shares = (
            ways * mesh.cp if zero else 1,
            max(ways * mesh.cp * mesh.tp // (mesh.ep * mesh.etp), 1) if zero else 1,
        )
        job = request.job
        share = round(1000 * job.optimizer_offload_share) if job.optimizer_offload else 0
        each = bytes_there(request.machine)

        def state(kind: LayerKind) -> int:
            alone, rules = mesh.pp == 1, request.machine.rules
            there = rules.streams_extra or rules.hosts_extra
            there = there and holds_extra(request.machine)
            more = rules.optimizer.extra_bytes if there else None
            found = _state(kind, shard, divisor, shares, (*each, share), more, alone=alone)
            loop = _loop(request) if zero < 3 else None
            if loop is not None and loop.matrix_passes is None:
                made = (loop.working_bytes, 0, 1000)
                found += _state(kind, shard, divisor, shares, made, None, alone=alone)
            return found

        ends = state(workload.embedding), state(workload.head)
        spread = sum(ends) if leaf.shared is not None else 0
        self.ends = (0, 0) if leaf.shared is not None else ends
        kinds = {name: state(workload.kinds[name]) for name in set(workload.layers)}
        groups = zero == 3 or job.optimizer == "muon"
        grouped = _group_bytes(request, shard, shares) if groups else 0
        self.room = None if self.room is None else self.room - grouped * self.per_node
        own = layer_input_held(mesh, request)
        moved = {name: own + _inputs(workload.kinds[name], shard, offload.inputs) for name in kinds}
        names = self.names = list(dict.fromkeys(workload.layers))
        self.states = [kinds[names[kind]] for kind in leaf.sequence]
        self.inputs = [moved[names[kind]] for kind in leaf.sequence]
        self.everywhere = spread

    def sent(self, rank: int, ranges: Ranges, size: int = 0, mode: str = "none") -> int:
        """Bytes that one device of ``rank`` has on its host at most; ``size`` is that of rounds,
        ``mode`` how the layers are recomputed."""
        if not self.anything:
            return 0
        leaf = self.leaf
        state = sum(sum(self.states[first:last]) for first, last in ranges)
        last_rank = 0 if leaf.schedule in ON_A_V else leaf.pp - 1
        state += self.ends[0] * (rank == 0) + self.ends[1] * (rank == last_rank)
        held = [n for first, last in ranges for n in range(first, last)]
        state += sum(-(-self._outputs(n, mode) * self.passes // leaf.vpp) for n in held)
        if leaf.outside is not None:
            number, layers = leaf.outside.layers, len(leaf.sequence)
            apart = range(number) if leaf.outside.ahead else range(layers - number, layers)
            state += sum(self.states[n] for n in apart)
            state += sum(-(-self._outputs(n, mode) * self.waiting // leaf.pp) for n in apart)
        each = [sum(self.inputs[first:last]) for first, last in ranges]
        if not any(each):
            return state
        peaks = live_peaks(
            leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank, size, leaf.order
        )
        return state + max(
            sum(count * inputs for count, inputs in zip(peak, each, strict=False)) for peak in peaks
        )

    def _outputs(self, layer: int, mode: str) -> int:
        """Bytes of one microbatch that a layer's outputs take there."""
        name = self.names[self.leaf.sequence[layer]]
        if (name, mode) not in self._listed:
            workload = self.request.workload
            sending = [p for p in workload.policies if p.name == mode and p.offloads]
            self._listed[name, mode] = sum(
                outputs_of_layer(workload.kinds[name], self.shard, policy) for policy in sending
            )
        return self._listed[name, mode]

    def of_bounds(self, bounds: Sequence[int], size: int = 0, mode: str = "none") -> list[int]:
        """Bytes of one device of each rank where virtual stages end at ``bounds``."""
        leaf, found = self.leaf, []
        for rank in range(leaf.pp):
            stages = [chunk * leaf.pp + rank for chunk in range(leaf.vpp)]
            if leaf.schedule in ON_A_V:
                stages = [rank, 2 * leaf.pp - 1 - rank]
            ranges = [(bounds[stage], bounds[stage + 1]) for stage in stages]
            found.append(self.sent(rank, ranges, size, mode))
        return found

    def hold(self, sizes: Sequence[int]) -> bool:
        """Whether no node gets more than it has room for; ``sizes`` per rank."""
        if not self.anything or self.room is None:
            return True
        return all(total <= self.room for total in self._totals(sizes))

    def hold_alone(self, rank: int, size: int) -> bool:
        """The same of the nodes of one rank, where other ranks sent nothing."""
        if not self.anything or self.room is None:
            return True
        if rank not in self._most:
            first, last = rank * self.per_rank, (rank + 1) * self.per_rank
            self._most[rank] = max(
                min(last, start + self.per_node) - max(first, start)
                for start in range(first - first % self.per_node, last, self.per_node)
            )
        return self._most[rank] * size + self.everywhere * self.per_node <= self.room

    def _totals(self, sizes: Sequence[int]) -> Iterator[int]:
        """Bytes on each node, those that every device of a full one sends included."""
        devices = len(sizes) * self.per_rank
        for start in range(0, devices, self.per_node):
            end = min(start + self.per_node, devices)
            total = self.everywhere * self.per_node
            for rank in range(start // self.per_rank, -(-end // self.per_rank)):
                first, last = rank * self.per_rank, (rank + 1) * self.per_rank
                total += sizes[rank] * (min(end, last) - max(start, first))
            yield total


def _loop(request: Request) -> HostLoop | None:
    """The loop in which the hosts update, if they do and no drives hold anything: beside drives
    what it makes is among the buffers."""
    spec, job = request.stack.offload, request.job
    if spec is None or not job.optimizer_offload or job.optimizer not in spec.loops:
        return None
    if on_drives(request) is not None:
        return None
    return HOST_LOOPS[job.optimizer]


def _group_bytes(request: Request, shard: Shard, shares: tuple[int, int]) -> int:
    """Bytes of one device of the tensors that a loop makes of a group of its parameters."""
    workload, loop, spec = request.workload, _loop(request), request.stack.offload
    if loop is None or spec is None:
        return 0
    names = [workload.kinds[name] for name in workload.layers]
    elements = sum(
        _state(kind, shard, workload.vocab_divisor, shares, (1, 0, 1000), None, alone=True)
        for kind in (*names, workload.embedding, workload.head)
    )
    if loop.matrix_passes is not None:
        is_matrix = request.machine.rules.optimizer.matrices
        for kind in (*names, workload.embedding, workload.head):
            held = [0, 0]
            for weight in kind.weights:
                if is_matrix(weight) and not weight.frozen:
                    size = local_tensor(weight, shard, workload.vocab_divisor).total
                    held[is_expert(weight)] += int(np.ravel(size)[0])
            elements -= sum(count // ways for count, ways in zip(held, shares, strict=True))
    return loop.working_bytes * min(elements, spec.loop_elements)


def _state(
    kind: LayerKind, shard: Shard, divisor: int, shares: tuple[int, int],
    each: tuple[int, int, int], more: Callable[[Weight, LocalTensor], Int64] | None, *,
    alone: bool,
) -> int:  # fmt: skip
    """Bytes of one device's shard: ``shares`` of dense weights and experts, ``each`` parameter's
    optimizer state and weight, and of 1,000 parameters those whose state is there; ``more`` of some
    weights; ``alone``: embedding and head are on one rank, so tied ones once."""
    optimizer, weight_bytes, per_1000 = each
    extra = [0, 0]
    elements = {(frozen, expert): 0 for frozen in (False, True) for expert in (False, True)}
    for weight in kind.weights:
        if weight.copy and alone:
            continue
        tensor = local_tensor(weight, shard, divisor)
        elements[weight.frozen, is_expert(weight)] += int(np.ravel(tensor.total)[0])
        if more is not None and not weight.frozen:
            extra[is_expert(weight)] += int(np.ravel(more(weight, tensor))[0])
    total = sum(-(-extra[expert] // shares[expert]) for expert in (False, True))
    trained = 0
    for (frozen, expert), count in elements.items():
        held = -(-count // shares[expert])
        total += held * weight_bytes
        trained += 0 if frozen else held
    return total - -trained * optimizer * per_1000 // 1000


def _inputs(kind: LayerKind, shard: Shard, modules: Collection[str]) -> int:
    """Bytes of one microbatch that a layer sends."""
    return sum(
        int(np.broadcast_to(tensor.bytes, (1,))[0])
        for tensor in kind.saved(shard)
        if tensor.input_of in modules
    )
