"""Optimizer state and weights on the host: bytes there, and the time that they cost.

The host's Adam reads and writes the fp32 master weight and moments and reads the gradient: 28 bytes
per parameter with AdamW, at the host memory bandwidth that the devices of a node share
(ZeRO-Offload, arXiv 2101.06840, section 5.1); optimizers of PyTorch's take more passes
(``cost_models.host_loops``), assumed to reach the same share of that bandwidth. Gradients leave and
weights come back over each device's own link, in 16 bits each or as the stack says, beside the
arithmetic: the slower of the two counts. Weights that live on the host come over the link before
each gather.

Where the device updates (MaxText: ``jax.device_put`` of the state between host and device around
``apply_gradients``) the state crosses the link twice in turn with the update.

State on NVMe drives (ZeRO-Infinity, arXiv 2104.07857) is read group by group before the arithmetic
and written after it, one after the other; gradients are written when they are reduced. The devices
of a node share its drives. Weights are read from them before each gather, ahead of the link, and
written once per step.

Where a share of the state stays on the device (DeepSpeed's Twin-Flow, ``offload_optimizer.ratio``),
its kernels run beside the host's arithmetic, which begins when they are launched; all gradients
leave, and come back for their groups in the backward.

With ``pipeline_read`` and ``pipeline_write`` the next group is read, the one before written, beside
the arithmetic of a group (DeepSpeed, ``pipelined_optimizer_swapper.py``): all reads but the first
and all writes but the last. The drives do one or the other at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.host_loops import loop_of
from cost_models.optimizers import OPTIMIZERS, OptimizerRule
from hardware_profiles.holdings import DrivesSpec, OffloadSpec
from hardware_profiles.schema import NodeSpec

Real: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Offload:
    """What a layout keeps on the host."""

    optimizer: bool = False
    parameters: bool = False
    checkpoints: bool = False
    """The layer inputs that full recomputation keeps."""
    inputs: frozenset[str] = frozenset()
    """Modules whose inputs the stack keeps there (``cost_models.activation_offload``)."""
    optimizer_per_1000: int = 1000
    """Of 1,000 elements, those whose optimizer state the host holds and updates; the device has the
    rest (Twin-Flow)."""
    swapped: tuple[int, int] = (0, 0)
    """Elements of the whole model that are trained, and those that Muon takes, where drives swap
    groups of them with each reduction (``cost_models.orthogonalise``)."""

    @property
    def state(self) -> bool:
        """Whether the host holds optimizer state or weights."""
        return self.optimizer or self.parameters

    @property
    def anything(self) -> bool:
        """Whether the host holds something."""
        return self.optimizer or self.parameters or self.checkpoints or bool(self.inputs)


def update_seconds(
    elements: Real, rule: OptimizerRule, node: NodeSpec, spec: OffloadSpec, *,
    weight_bytes: int = 0, per_1000: int = 1000, matrices: Real | float = 0.0,
) -> Real:  # fmt: skip
    """The optimizer step of ``per_1000`` of 1,000 of ``elements`` parameters of each device on the
    host, ``matrices`` of them in matrices that were orthogonalised before; ``weight_bytes`` each go
    back to where weights live.

    Nothing on a node whose host memory (or drives) has no stated bandwidth: rules refuse every
    layout there.
    """
    rate = update_rate(node, spec)
    if rate is None:
        return np.zeros_like(elements)
    loop = loop_of(rule.name, spec)
    spared = matrices * float(0 if loop is None else loop.spared_bytes)
    arithmetic = (elements * (per_1000 / 1000 * moved_bytes(rule, spec)) - spared) / rate
    link: Real = elements * (spec.link_bytes * crossing_share(per_1000)) / node.host_link.si
    result: Real = np.maximum(arithmetic, link)
    if spec.drives is None:
        return result
    together = elements * float(node.devices_per_node)
    more = 0.0 * elements
    if rule.orthogonalises:
        # Two moments of what is no hidden matrix.
        others = together - matrices * float(node.devices_per_node)
        more = others * float(OPTIMIZERS["adamw"].moment_bytes - rule.moment_bytes)
    return _swapped(result, together, rule, node, spec.drives, weight_bytes, more)


def update_rate(node: NodeSpec, spec: OffloadSpec) -> float | None:
    """Bytes per second of the host's memory that what it does for one device moves, if known."""
    if node.host_memory_bandwidth is None or spec.adam_efficiency is None:
        return None
    return node.host_memory_bandwidth.si * spec.adam_efficiency.si / node.devices_per_node


def moved_bytes(rule: OptimizerRule, spec: OffloadSpec) -> float:
    """Bytes per parameter through the host's memory in a step there: master weight and moments
    read and written and the gradient read, or as many passes as loops take."""
    loop = loop_of(rule.name, spec)
    return 12.0 + rule.step_bytes if loop is None else float(loop.moved_bytes)


def crossing_share(per_1000: int) -> float:
    """How much of a step's bytes cross the link: all gradients, and the weights that come back of
    what the host updates, as many bytes each."""
    return (1000 + per_1000) / 2000


def _swapped(
    update: Real, elements: Real, rule: OptimizerRule, node: NodeSpec, drives: DrivesSpec,
    weight_bytes: int, more: Real,
) -> Real:  # fmt: skip
    """Seconds of an ``update``, with what it waits for of the drives, which swap the state of
    ``elements`` parameters: less of it where an optimizer keeps less than AdamW, and ``more`` bytes
    of those of which it keeps more."""
    reads, writes = node.drives_read_bandwidth, node.drives_write_bandwidth
    if reads is None or writes is None:
        return update
    alone = weight_bytes if "parameters" in drives.holds else 0
    if "optimizer" not in drives.holds:
        return update + elements * alone / writes.si
    alone += drives.gradient_bytes
    fewer = OPTIMIZERS["adamw"].moment_bytes - rule.moment_bytes
    read = (elements * (drives.read_bytes - fewer) + more) / reads.si
    write = (elements * (drives.write_bytes - fewer - drives.gradient_bytes) + more) / writes.si
    hidden = "reads" in drives.overlaps, "writes" in drives.overlaps
    beside = read * hidden[0] + write * hidden[1]
    cycle = read * (not hidden[0]) + write * (not hidden[1]) + np.maximum(update, beside)
    last: Real = read + update + write
    result: Real = elements * alone / writes.si + cycle + (last - cycle) / drives.groups
    return result


def stream_seconds(elements: Real, streamed_bytes: int, node: NodeSpec) -> Real:
    """Bringing ``streamed_bytes`` of each of ``elements`` parameters to each device for the update,
    and back behind it."""
    result: Real = elements * (2.0 * streamed_bytes) / node.host_link.si
    return result


def link_bytes(spec: OffloadSpec, streamed_bytes: int) -> int:
    """Bytes per parameter that cross the link for the update: the gradient there and the weight
    back, or what is streamed to the device and back."""
    return spec.link_bytes if spec.updates_on == "host" else 2 * streamed_bytes


def fetch_seconds(weights: Real, node: NodeSpec, spec: OffloadSpec) -> Real:
    """Bringing so many bytes of weights from the host to each device."""
    result: Real = weights / node.host_link.si
    drives = spec.drives
    if drives is None or "parameters" not in drives.holds:
        return result
    if node.drives_read_bandwidth is not None:
        each = node.drives_read_bandwidth.si / node.devices_per_node
        result = np.maximum(result, weights / each)
    return result
