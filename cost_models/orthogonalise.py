"""Muon's Newton-Schulz iterations under data parallelism: how often, on which ranks, what moves.

Once per step, whole matrices are dealt out to the ranks that share the state, as evenly as
elements; a rank may hold one matrix more. A stack that splits parameters itself (``dim0``,
``per_parameter``) brings each matrix together first, on all ranks or on its own (the package dion,
torchtitan's DistMuon: an all-to-all of the shards of as many matrices as ranks, and one of the
updates); one
that gives whole parameters to ranks reduces the gradient to its owner, which is no more traffic.

With ``muon.each_reduction`` (DeepSpeed, runtime/zero/stage3.py, ``_apply_distributed_muon_update``)
stage 3 iterates whenever a bucket of gradients has been summed, so with every microbatch: all ranks
gather the momentum of the bucket's matrices, take one matrix each, round by round, and send updates
and momentum to all. A round lasts as long as its largest matrix, and its gathers have a tensor of
every rank, one without a matrix sends an empty one of the same size.

Momentum on the host (``offload_optimizer``) comes for that and goes back each time, each rank's
part: cloned and put together there, then copied to the device, in 16 bits both ways. The host waits
for these copies, which wait for the reduction, and queues no kernel meanwhile: the backward hides
nothing of it. The memory is not pinned; copies are taken to reach the link's bandwidth.

Where it is on NVMe drives, in fp32, each bucket of gradients reads all of every group of a rank's
parameters (``sub_group_size``) that one of its matrices belongs to, master weights with momentum,
and writes both back before the next; in the last microbatch it reads the gradients of that group
that are there already (``swap_tensor/partitioned_optimizer_swapper.py``). It loses those of them
that were too small to be written, or the ends of parts that are no multiple of what one write
takes: layouts with such parts do not run (:func:`loses_gradients`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models import compute, interconnect
from cost_models.data_traffic import DataCall, DataParallel, Mesh, meshes, state_mesh
from cost_models.graph import Bools, Int64, LayerKind, Shard, Weight
from cost_models.offload import update_rate
from cost_models.optimizers import LocalTensor, newton_schulz_flops
from cost_models.repeat import Real
from cost_models.state import is_expert, local_tensor
from cost_models.step import Machine

_MASTER_BYTES = 4
_GRADIENT_BYTES = 4
"""Of an element, in fp32 on the drives (``swap_tensor/optimizer_utils.py``)."""


def iterates_each(zero_stage: Int64, machine: Machine) -> Bools:
    """Whether matrices are orthogonalised with every reduction, not once per step: one rank whose
    momentum is on the host runs as stage 3 too."""
    each: Bools = ((zero_stage == 3) & machine.sums_whole) | machine.momentum_on_host
    return each


@dataclass(frozen=True)
class _Matrices:
    """Hidden matrices of a layer, or of its experts, on one device before sharding."""

    tensors: tuple[tuple[Weight, LocalTensor], ...]
    mesh: Mesh

    def flops(self, machine: Machine) -> NDArray[np.float64]:
        return newton_schulz_flops(self.tensors, gram=machine.stack.muon.iterations == "gram")

    @property
    def elements(self) -> Real:
        result: Real = np.sum([1.0 * local.total for _, local in self.tensors], axis=0)
        return result

    def split(self, machine: Machine) -> Real:
        """Elements of those that no rank has whole: experts go to ranks one by one where there are
        enough (``dim0``, ``cost_models.state``)."""
        dealt = machine.rules.layout == "dim0" and is_expert(self.tensors[0][0])
        whole = [dealt & (self.mesh.ways <= local.count) for _, local in self.tensors]
        sizes = [1.0 * local.total for _, local in self.tensors]
        pairs = zip(whole, sizes, strict=True)
        result: Real = np.sum([np.where(each, 0.0, size) for each, size in pairs], axis=0)
        return result

    @property
    def number(self) -> Real:
        result: Real = np.sum([1.0 * local.count for _, local in self.tensors], axis=0)
        return result

    def rounds(self, bucket: int) -> Real:
        """Rounds of a layer's share of buckets of so many elements."""
        number = self.number
        together = np.maximum(number * bucket / np.maximum(self.elements, 1.0), 1.0)
        return number / together * np.ceil(together / self.mesh.ways)

    def largest_flops(self, machine: Machine) -> Real:
        gram = machine.stack.muon.iterations == "gram"
        each = [newton_schulz_flops([pair], gram=gram) / pair[1].count for pair in self.tensors]
        result: Real = np.max(each, axis=0)
        return result


def _matrices(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, vocab_divisor: int
) -> list[_Matrices]:
    found, is_matrix = [], machine.rules.optimizer.matrices
    own = meshes(shard, data, machine.stack.layers, machine.fabric.devices_per_node)
    for mesh, expert in zip(own, (False, True), strict=True):
        tensors = tuple(
            (weight, local_tensor(weight, shard, vocab_divisor))
            for weight in kind.weights
            if is_expert(weight) == expert and not weight.frozen and is_matrix(weight)
        )
        if tensors:
            deeper = state_mesh(mesh, data.zero_stage, machine.rules)
            found.append(_Matrices(tensors, deeper))
    return found


def step_seconds(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, vocab_divisor: int
) -> Real:
    """Iterations of a layer's matrices once per step, with the gather that they need."""
    total = np.zeros(len(shard.tp))
    once = ~iterates_each(data.zero_stage, machine)
    for part in _matrices(kind, shard, data, machine, vocab_divisor):
        mesh = part.mesh
        share = np.where(data.zero_stage >= 1, mesh.ways, 1)
        total += _seconds(part.flops(machine) / share, machine)
        if machine.rules.layout in ("dim0", "per_parameter") and not machine.sums_whole:
            total += np.where(
                (data.zero_stage >= 1) & (mesh.ways > 1), _together_s(part, machine), 0.0
            )
    return np.where(once, total, 0.0)


def _together_s(part: _Matrices, machine: Machine) -> Real:
    """Bringing split matrices together; with all-to-alls, and their updates back."""
    mesh, fabric = part.mesh, machine.fabric
    whole = machine.stack.muon.exchange_bytes * part.split(machine)
    if machine.stack.muon.exchange == "all_gather":
        return interconnect.collective_time_s(
            fabric, "all_gather", whole, size=mesh.ways, stride=mesh.stride
        )
    there: Real = interconnect.collective_time_s(
        fabric, "all_to_all", whole / mesh.ways, size=mesh.ways, stride=mesh.stride
    )
    return 2.0 * there


def microbatch_seconds(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, vocab_divisor: int
) -> Real:
    """Iterations of a layer's matrices with every microbatch."""
    total, each = np.zeros(len(shard.tp)), iterates_each(data.zero_stage, machine)
    if not each.any():
        return total
    for part in _matrices(kind, shard, data, machine, vocab_divisor):
        in_turn = part.rounds(machine.stack.state.reduction_elements) * part.largest_flops(machine)
        total += _seconds(np.minimum(part.flops(machine), in_turn), machine)
    return np.where(each, total, 0.0)


def held_elements(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, vocab_divisor: int
) -> Real:
    """Elements of a layer's matrices whose momentum one device's host has."""
    total = np.zeros(len(shard.tp))
    if machine.momentum_on_host:
        for part in _matrices(kind, shard, data, machine, vocab_divisor):
            total += part.elements / np.where(data.zero_stage >= 1, part.mesh.ways, 1)
    return total


def momentum_bytes(machine: Machine) -> int:
    """Bytes of a matrix's element that cross the link with each reduction: there in the type that
    is exchanged, and back in that of the momentum, to which the device converts."""
    if not machine.momentum_on_host:
        return 0
    return _exchanged_bytes(machine) + machine.rules.optimizer.moment_bytes


def momentum_seconds(elements: Real, ways: Int64, machine: Machine) -> Real:
    """The way of the momentum of so many elements of a device, one of ``ways`` that share them,
    with each reduction: two copies on the host, a third where it converts, then over the link and
    back; and what the drives read and write for it, one after the other."""
    spec, node = machine.stack.offload, machine.cluster.groups[0].node
    rate = None if spec is None else update_rate(node, spec)
    if rate is None:
        return np.zeros_like(elements)
    kept, sent = machine.rules.optimizer.moment_bytes, _exchanged_bytes(machine)
    copied = 4 * kept + (kept + sent if kept != sent else 0)
    result: Real = elements * (momentum_bytes(machine) / node.host_link.si + copied / rate)
    return result + elements * _swaps(ways, machine) * (_MASTER_BYTES + kept) * _drive_s(machine)


def gradients_again_seconds(elements: Real, ways: Int64, machine: Machine) -> Real:
    """What the drives read, once per step, of gradients of so many elements of a device that they
    have when a bucket has more of their group: on average half of them."""
    reads = machine.cluster.groups[0].node.drives_read_bandwidth
    if reads is None:
        return np.zeros_like(elements)
    again = np.maximum(_swaps(ways, machine) - 1.0, 0.0) / 2.0
    devices = machine.cluster.groups[0].node.devices_per_node
    result: Real = elements * again * (_GRADIENT_BYTES * devices / reads.si)
    return result


def loses_gradients(sizes: Iterable[int], ways: int, machine: Machine) -> bool:
    """Whether drives lose gradients of matrices of ``sizes`` elements that ``ways`` ranks share: of
    parts that are not written, if a group of them is read again in the same backward."""
    spec = machine.stack.offload
    if spec is None or spec.drives is None or _swaps(np.array([ways]), machine)[0] <= 1:
        return False
    parts, drives = [-(-size // ways) for size in sizes], spec.drives
    return any(part < drives.part_elements or part % drives.part_multiple for part in parts)


def _swaps(ways: Int64, machine: Machine) -> Real:
    """How often the drives read and write a group with each microbatch: once with each bucket that
    has matrices of it. Buckets follow each other through the groups."""
    spec, (trained, matrices) = machine.stack.offload, machine.offload.swapped
    if spec is None or spec.drives is None or not matrices:
        return np.zeros(len(ways))
    buckets = -(-trained // machine.stack.state.reduction_elements)
    groups = np.ceil(matrices / ways / spec.drives.buffer_elements)
    result: Real = (buckets + groups - 1.0) / groups
    return result


def _drive_s(machine: Machine) -> float:
    """Seconds in which a device's share of the drives reads a byte and writes it."""
    node = machine.cluster.groups[0].node
    reads, writes = node.drives_read_bandwidth, node.drives_write_bandwidth
    if reads is None or writes is None:
        return 0.0
    return node.devices_per_node * (1.0 / reads.si + 1.0 / writes.si)


def _exchanged_bytes(machine: Machine) -> int:
    """Per element of momentum that ranks exchange."""
    return machine.stack.muon.momentum_bytes.get(machine.precision, 4)


def exchanges(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, vocab_divisor: int,
    *, experts: bool,
) -> tuple[DataCall, ...]:  # fmt: skip
    """Gathers around the iterations of every microbatch: of the momentum, then of updates and
    momentum in rounds."""
    each = iterates_each(data.zero_stage, machine)
    if not each.any():
        return ()
    size, found = float(machine.rules.gradient_bytes), []
    for part in _matrices(kind, shard, data, machine, vocab_divisor):
        if is_expert(part.tensors[0][0]) == experts:
            mesh, one = part.mesh, part.elements / np.maximum(part.number, 1.0)
            rounds = part.rounds(machine.stack.state.reduction_elements)
            for payload, count in ((part.elements, 1), (rounds * mesh.ways * one, 2)):
                found.append(
                    DataCall(
                        "gradient", "all_gather", payload * size, mesh.ways, mesh.stride, each,
                        count,
                    )
                )  # fmt: skip
    return tuple(found)


def _seconds(flops: Real, machine: Machine) -> Real:
    dtype = machine.dtype(low_precision=False)
    return compute.roofline_time_s(machine.device, dtype, flops, np.zeros_like(flops))
