"""Price layers under many configurations at once; overlap inside a microbatch is decided here only.

The result for one layer kind is a table of integers (nanoseconds and bytes), one column per
configuration. Integers make everything above exact: a stage's time is the sum of its layers'.

How far the host runs ahead of the device is in ``cost_models.host``.

What a layer communicates, and what of it stays visible, is ``cost_models.communication``.
Data-parallel traffic, and with it the whole :class:`Field` table, is ``cost_models.data_parallel``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from cost_models import compute
from cost_models.attention_passes import attention_passes
from cost_models.communication import Visible, Windows, merge_passes, visible
from cost_models.fabric import Fabric, fabric_of
from cost_models.graph import LayerKind, Shard
from cost_models.host import wait_for_host
from cost_models.layer_times import LayerTimes
from cost_models.offload import Offload
from cost_models.ops import (
    Attention,
    Collective,
    Elementwise,
    GroupedMatMul,
    Ints,
    Kernel,
    MatMul,
    Op,
    Quantised,
    Reals,
    Repeat,
    Roofline,
)
from cost_models.quantise import passes
from cost_models.repeat import ForwardLog, Real, Repeats, Work, forward_only
from cost_models.residuals import stored
from cost_models.state_rules import ON_DEVICE, StateRules, state_rules
from hardware_profiles.holdings import Precision
from hardware_profiles.schema import ClusterSpec, DeviceSpec, StackSpec

CATEGORIES = (
    "matmul", "attention", "memory_bound", "launch", "tp_comm", "cp_comm", "ep_comm", "dp_comm",
)  # fmt: skip
PHASES = ("forward", "backward")


class Field(IntEnum):
    """Rows of a priced table: times in ns, then sizes in bytes, per layer and device.

    What each recomputation policy changes follows, three rows a policy
    (``cost_models.recompute.mode_rows``).
    """

    FORWARD = 0
    BACKWARD = 1
    GRADIENT = 2
    """Exposed gradient reduction, once per step."""
    PARAMETER = 3
    """Exposed parameter gather, once per step."""
    OPTIMIZER = 4
    STATIC = 5
    """Weights, gradients, optimizer state, and gathered weights that live for the whole step."""
    NEW_GRADIENTS = 6
    """Gradients that each step's backward makes anew, sharded as they are held."""
    ACT_NONE = 7
    """Activations kept per microbatch without recomputation."""
    WORK_NONE = 8
    """Short-lived buffers beside them, gathered weights and unreduced gradients included."""
    EXTRA_NONE = 9
    """Extra backward time without recomputation: zero."""
    PARAMETERS = 10
    """Parameters on the device before data-parallel sharding."""
    WEIGHT_BYTES = 11
    GRADIENT_BYTES = 12
    OPTIMIZER_BYTES = 13
    STEP_BYTES = 14
    """Flat buffers of the optimizer step."""
    BUFFER_BYTES = 16
    """Tensors that stay and are no parameters: rotary factors, gradients of a chunked loss."""
    UPDATE_BYTES = 15
    """Short-lived bytes of the optimizer step, when no activations are left."""
    IN_FLIGHT = 17
    """The buffer in which the layer's gradients are reduced: it lives through the backward of the
    unit before. Zero in a pipeline, which reduces when all backwards are over."""
    HOST_WAIT = 18
    """Of the forward and the backward, what they wait for activations on the link to the host."""
    WEIGHT_BACKWARD = 19
    """Of the backward, the products that give the gradients of weights."""
    DEFERRED = 20
    """Gradients of outputs that weights need for theirs, less the activations that nothing but they
    needed."""
    LATE_GRADIENTS = 21
    """Gradients of weights, as the backward makes them, that wait to be summed in the next one."""
    LEFT_BLOCKS = 22
    """Of the static bytes, in no tensor: what is left of the blocks in which weights were made."""
    WEIGHT_PASSES = 24
    """Weights whose gradients are passes of their own in the second half of a split backward."""
    DEFERRED_AGAIN = 25
    """As ``DEFERRED``, of a layer that runs again: what nothing else needed is gone anyway."""
    LOOKUP_BLOCK = 23
    """Of the static bytes, the block of the embedding's dense gradient, in which nothing else lies
    when it is needed (``cost_models.fragments``)."""
    GATHERED = 27
    """Gathered weights that a backward leaves for the next pass of a pipeline stage."""
    GATHER_LATE = 28
    """Of gathers, what a forward would hide less of than the backward that is charged with them."""
    LEFT_AGAIN = 26
    """What these passes leave of a layer that runs again, until the stage's last weight."""


@dataclass(frozen=True)
class Machine:
    """What prices depend on besides the layer and the layout."""

    cluster: ClusterSpec
    stack: StackSpec
    precision: Precision
    optimizer: str
    offload: Offload = ON_DEVICE
    device: DeviceSpec = field(init=False)
    fabric: Fabric = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.cluster.groups[0].node.device)
        object.__setattr__(self, "fabric", fabric_of(self.cluster))

    @property
    def rules(self) -> StateRules:
        """Bytes per parameter."""
        return state_rules(
            spec=self.stack.state,
            precision=self.precision,
            optimizer=self.optimizer,
            master_weights=self.stack.master_weights,
            gradient_dtype=self.stack.gradient_dtype,
            offload=self.offload,
            host=self.stack.offload,
            muon=self.stack.muon,
        )

    @property
    def sums_whole(self) -> bool:
        """Whether stage 3 sums gradients whole for an optimizer that needs matrices of them."""
        return self.stack.muon.each_reduction and self.rules.optimizer.orthogonalises

    @property
    def momentum_on_host(self) -> bool:
        """Whether momentum comes from the host for the iterations that follow each reduction."""
        return self.rules.hosts_extra and self.rules.optimizer.orthogonalises

    @property
    def reshard_group(self) -> int | None:
        """Ranks from which the backward gathers weights in stage 3 in every layout; None: all that
        share them, or as the layout says."""
        group = self.stack.reshard_group
        if group == "node":
            return self.cluster.groups[0].node.devices_per_node
        return None if group == "any" else group

    @property
    def accumulated_bytes(self) -> int:
        """Read and written per weight by products that add to the kept gradient; 0: none do.

        Both in its own width: megatron-core 0.8.0, core/tensor_parallel/layers.py, calls
        wgrad_gemm_accum_fp16 for 16-bit ``main_grad``, wgrad_gemm_accum_fp32 for fp32.
        """
        wide = self.precision == "fp32" or self.stack.gradient_dtype == "fp32"
        return (8 if wide else 4) if "wgrad_accumulation" in self.stack.fused else 0

    def dtype(self, *, low_precision: bool) -> str:
        """Operands of a matrix product, as ``cost_models.compute`` knows them."""
        if self.precision in compute.QUANTISATION_BYTES and not low_precision:
            return "bf16"
        if self.precision == "fp32" and "fp32" in self.stack.cast_products:
            return f"fp32_in_{self.stack.cast_products['fp32']}"
        return self.precision

    @property
    def product_dtypes(self) -> tuple[str, ...]:
        """Arithmetic of a job's matrix products, the densest first."""
        return tuple(compute.arithmetic(self.dtype(low_precision=low)) for low in (True, False))


class _Accumulator:
    """Adds op times to categories and remembers kernel windows by name."""

    def __init__(self, size: int, ops: tuple[Op, ...]) -> None:
        self.terms = {c: {p: np.zeros(size) for p in PHASES} for c in CATEGORIES}
        self.windows = Windows()
        self.exchanges: list[Visible] = []
        self.wire = {w: {p: np.zeros(size) for p in PHASES} for w in ("inside", "across")}
        self.host = {p: np.zeros(size) for p in PHASES}
        self.busy = {p: np.zeros(size) for p in PHASES}
        self.log = ForwardLog(ops)
        self.drains = False
        self.weights = np.zeros(size)

    def add(self, category: str, forward: Real | float, backward: Real | float) -> None:
        for phase, seconds in zip(PHASES, (forward, backward), strict=True):
            self.terms[category][phase] += seconds
            self.busy[phase] += seconds

    def quantise(
        self, machine: Machine, dtype: str, inputs: Reals, gradients: Reals, tensors: Ints = 1,
        *, given: Quantised | None,
    ) -> None:  # fmt: skip
        """Add the quantisation of a product's input and of its output's gradient (elements)."""
        reads = machine.stack.quantisation_reads.get(machine.precision, 1)
        (forward, launched), (backward, again) = passes(
            machine.device, dtype, inputs, gradients, tensors, reads=reads, given=given
        )
        self.add("memory_bound", forward, backward)
        _launch(self, machine, launched, again)

    def repeat(self, other: _Accumulator, count: int) -> None:
        """Add ``count`` runs of ``other``."""
        for own, theirs in ((self.terms, other.terms), (self.wire, other.wire)):
            for key, phases in theirs.items():
                for phase, time in phases.items():
                    own[key][phase] += count * time
        self.weights += count * other.weights
        for phase in PHASES:
            self.host[phase] += count * other.host[phase]
            self.busy[phase] += count * other.busy[phase]


def price_layer(kind: LayerKind, shard: Shard, machine: Machine) -> LayerTimes:
    """Times of one layer of ``kind`` for every configuration of ``shard``."""
    acc, merged = _price_ops(kind.ops(shard), kind.shard(shard), machine), None
    if acc.exchanges:
        merged = merge_passes(acc.exchanges, acc.terms, machine.stack.overlap_contention.si)
    repeats = Repeats(
        Work(acc.busy["forward"], acc.host["forward"], acc.drains), acc.log.modules,
        acc.log.outputs, Work(acc.busy["backward"], acc.host["backward"]),
        machine.stack.expert_sync.si, unneeded=acc.log.unneeded, again=acc.log.again,
        stored=stored(kind, shard, machine.device),
    )  # fmt: skip
    wait_for_host(acc.terms["launch"], repeats, drains=acc.drains)
    if not kind.backward:
        return LayerTimes(*forward_only(acc.terms, acc.wire), 0.0 * acc.weights)
    return LayerTimes(acc.terms, acc.wire, repeats, acc.weights, merged)


def _price_ops(ops: tuple[Op, ...], shard: Shard, machine: Machine) -> _Accumulator:
    """Kernels, then the collectives that may hide behind them, then what is repeated."""
    acc = _Accumulator(len(shard.tp), ops)
    for op in sorted(ops, key=lambda op: isinstance(op, Collective | Repeat)):
        device, host = acc.busy["forward"].copy(), acc.host["forward"].copy()
        match op:
            case Collective():
                _price_collective(op, acc, shard, machine)
            case Repeat():
                acc.repeat(_price_ops(op.ops, shard, machine), op.count)
                continue
            case _:
                _price_kernel(op, acc, machine)
        work = Work(
            acc.busy["forward"] - device, acc.host["forward"] - host, isinstance(op, GroupedMatMul)
        )
        acc.log.add(op, work)
    return acc


def _price_kernel(op: Kernel, acc: _Accumulator, machine: Machine) -> None:
    device = machine.device
    match op:
        case MatMul():
            dtype = machine.dtype(low_precision=op.low_precision)
            sliced = machine.stack.heads_need_alignment and not op.weight

            def time(m: Reals, n: Reals, k: Reals, stage: compute.MatmulStage) -> Real:
                return compute.matmul_time_s(
                    device, dtype, m, n, k, stage=stage, batch=op.batch,
                    accumulated_bytes=op.weight * machine.accumulated_bytes, sliced=sliced,
                )  # fmt: skip

            fprop = time(op.m, op.n * op.alike[0], op.k, "fprop")
            none = np.zeros_like(fprop)
            dgrad = time(op.m, op.k * op.alike[1], op.n, "dgrad") if op.backward else none
            trained = op.backward and not op.frozen
            wgrad = time(op.k, op.n * op.alike[2], op.m, "wgrad") if trained else none
            acc.add("matmul", fprop, dgrad + wgrad)
            acc.weights += wgrad
            if dtype in compute.QUANTISATION_BYTES:
                tokens = np.asarray(op.m) * op.batch
                gradients = tokens * op.n if op.backward else 0
                acc.quantise(machine, dtype, tokens * op.k, gradients, given=op.quantised)
            acc.windows.seconds |= {
                f"{op.name}:fprop": fprop, f"{op.name}:dgrad": dgrad, f"{op.name}:wgrad": wgrad,
            }  # fmt: skip
            acc.windows.in_parts |= {
                f"{op.name}:fprop": lambda parts: time(-(-op.m // parts), op.n, op.k, "fprop"),
                f"{op.name}:dgrad": lambda parts: time(-(-op.m // parts), op.k, op.n, "dgrad"),
            }
            _launch(acc, machine, 1, op.backward + trained)
        case GroupedMatMul():
            dtype = machine.dtype(low_precision=op.low_precision)
            args = (op.groups, op.rows, op.n, op.k)
            fprop = compute.grouped_matmul_time_s(device, dtype, *args, stage="fprop")
            dgrad = compute.grouped_matmul_time_s(
                device, dtype, op.groups, op.rows, op.k, op.n, stage="dgrad"
            )
            wgrad = np.zeros_like(fprop)
            if not op.frozen:
                wgrad = compute.grouped_matmul_time_s(
                    device, dtype, op.groups, op.k, op.n, op.rows, stage="wgrad",
                    accumulated_bytes=machine.accumulated_bytes,
                )  # fmt: skip
            acc.add("matmul", fprop, dgrad + wgrad)
            acc.weights += wgrad
            if dtype in compute.QUANTISATION_BYTES:
                rows = op.rows * np.asarray(op.groups)
                acc.quantise(
                    machine, dtype, rows * op.k, rows * op.n, op.groups, given=op.quantised
                )
            _launch(acc, machine, 1, 2)
            calls = np.asarray(op.groups) * machine.stack.expert_launch.si
            _host(acc, machine, calls, 2 * calls)
            acc.drains = True
        case Attention():
            kernel = machine.stack.attention_kernel(device.name)
            dtype = "fp16" if machine.precision == "fp16" else "bf16"
            forward, backward = attention_passes(op, device, dtype, kernel)
            acc.add("attention", forward, backward)
            acc.windows.seconds |= {f"{op.name}:fprop": forward, f"{op.name}:dgrad": backward}
            _launch(acc, machine, op.blocks, 2 * np.asarray(op.blocks))
        case Elementwise():
            acc.add(
                "memory_bound",
                _elementwise(machine, op.forward_bytes, op.forward_launches, op.forward_flops),
                _elementwise(machine, op.backward_bytes, op.backward_launches, op.backward_flops),
            )
            _launch(acc, machine, op.forward_launches, op.backward_launches)
        case Roofline():
            dtype, latency = machine.dtype(low_precision=False), _elementwise(machine, 0.0, 1, 0.0)
            forward = compute.roofline_time_s(device, dtype, op.forward_flops, op.forward_bytes)
            backward = compute.roofline_time_s(device, dtype, op.backward_flops, op.backward_bytes)
            acc.add(
                "matmul",
                forward + latency * op.forward_launches, backward + latency * op.backward_launches,
            )  # fmt: skip
            _launch(acc, machine, op.forward_launches, op.backward_launches)


def _elementwise(
    machine: Machine, bytes_moved: Reals, launches: Ints, flops: Reals
) -> Real | float:
    """``launches`` kernels that move ``bytes_moved`` together; no launch, no time.

    ``flops`` take their time at the fp32 vector peak where that is longer (devices that state no
    such peak are taken to be bound by memory).
    """
    count = np.asarray(launches)
    if not count.any():
        return 0.0
    device = machine.device
    time = compute.memory_bound_time_s(device, bytes_moved)
    if np.any(flops) and "fp32" in device.peak_flops:
        time = np.maximum(time, np.asarray(flops) / device.peak_flops["fp32"].si)
    time = time + device.kernels.memory_bound_latency.si * (count - 1)
    return np.where(count > 0, time, 0.0)


def _launch(acc: _Accumulator, machine: Machine, forward: Ints, backward: Ints) -> None:
    """Host time of an op's launches."""
    each_s = machine.stack.launch_overhead.si
    _host(acc, machine, np.asarray(forward) * each_s, np.asarray(backward) * each_s)


def _host(acc: _Accumulator, machine: Machine, forward_s: Real, backward_s: Real) -> None:
    """Host time by pass: beside the device's, or before it where each launch is waited for."""
    if machine.stack.blocking_launches:
        acc.add("launch", forward_s, backward_s)
        return
    acc.host["forward"] += forward_s
    acc.host["backward"] += backward_s


def _price_collective(op: Collective, acc: _Accumulator, shard: Shard, machine: Machine) -> None:
    seen = visible(op, shard, machine.fabric, machine.stack, machine.device.name, acc.windows)
    if seen is None:
        return
    if op.routing is not None and machine.stack.expert_overlap == "across_nodes":
        acc.exchanges.append(seen)
    category = f"{'ep' if op.group == 'etp' else op.group[:2]}_comm"
    acc.add(category, seen.forward, seen.backward)
    for phase, busy in zip(PHASES, seen.wire, strict=True):
        acc.wire["across"][phase] += np.where(seen.spans_nodes, busy, 0.0)
        acc.wire["inside"][phase] += np.where(seen.spans_nodes, 0.0, busy)
    passes = ((op.forward_kind, op.forward_count), (op.backward_kind, op.backward_count))
    counts = (np.where(seen.active, count if kind else 0, 0) for kind, count in passes)
    _launch(acc, machine, *counts)
