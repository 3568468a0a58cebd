"""Price layers under many configurations at once; overlap and exposure are decided here only.

The result for one layer kind is a table of integers (nanoseconds and bytes), one column per
configuration. Integers make everything above exact: a stage's time is the sum of its layers'.

What hides behind what:

* tensor-parallel collectives of a column-parallel layer's backward hide behind the weight- or
  data-gradient product they are named with (Megatron's asynchronous linear layer); all others are
  exposed, less the share that the stack overlaps by other means (``overlap_tensor_parallel``);
* the context-parallel ring hides behind the attention of the block in hand;
* FSDP gathers and reductions hide behind the compute of the same layer (one layer of prefetch);
* gradient reductions of a step hide behind the backward of the last microbatch, parameter gathers
  behind the forward of the first, layer by layer, where the stack overlaps them; one bucket of
  gradients is always exposed;
* while two things overlap, the hidden collective still costs its contention: ``overlap_contention``
  of the hidden time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models import compute, interconnect, memory
from cost_models.fabric import Fabric, fabric_of
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.ops import Attention, Collective, Elementwise, GroupedMatMul, MatMul, Op
from hardware_profiles.schema import ClusterSpec, DeviceSpec, StackSpec

Real: TypeAlias = NDArray[np.float64]

NS = 1_000_000_000

CATEGORIES = (
    "matmul", "attention", "memory_bound", "launch", "tp_comm", "cp_comm", "ep_comm", "dp_comm",
)  # fmt: skip
PHASES = ("forward", "backward", "selective", "full")


class Field(IntEnum):
    """Rows of a priced table: times in ns, then sizes in bytes, per layer and device."""

    FORWARD = 0
    BACKWARD = 1
    SELECTIVE = 2
    """Extra backward time under selective recomputation."""
    FULL = 3
    """Extra backward time under full recomputation."""
    GRADIENT = 4
    """Exposed gradient reduction, once per step."""
    PARAMETER = 5
    """Exposed parameter gather, once per step."""
    OPTIMIZER = 6
    STATIC = 7
    """Weights, gradients, optimizer state, and gathered weights that live for the whole step."""
    GATHERED = 8
    """Gathered weights while the layer runs (two layers with prefetch)."""
    ACT_NONE = 9
    ACT_SELECTIVE = 10
    ACT_FULL = 11
    WORK_NONE = 12
    WORK_SELECTIVE = 13
    WORK_FULL = 14
    PARAMETERS = 15
    """Parameters on the device before data-parallel sharding."""
    WEIGHT_BYTES = 16
    GRADIENT_BYTES = 17
    OPTIMIZER_BYTES = 18


@dataclass(frozen=True)
class Machine:
    """What prices depend on besides the layer and the layout."""

    cluster: ClusterSpec
    stack: StackSpec
    precision: str
    optimizer: str
    device: DeviceSpec = field(init=False)
    fabric: Fabric = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.cluster.groups[0].node.device)
        object.__setattr__(self, "fabric", fabric_of(self.cluster))

    @property
    def rules(self) -> memory.StateRules:
        """Bytes per parameter."""
        return memory.state_rules(
            precision=self.precision,
            optimizer=self.optimizer,
            master_weights=self.stack.master_weights,
            gradient_dtype=self.stack.gradient_dtype,
        )

    def dtype(self, *, low_precision: bool) -> str:
        """Arithmetic of a matrix product."""
        if self.precision == "fp8":
            return "fp8" if low_precision else "bf16"
        return self.precision


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer by category and phase; ``nanoseconds`` sums them exactly."""

    terms: dict[str, dict[str, Real]]

    def nanoseconds(self, phase: str) -> Int64:
        """Integer time of a phase: the sum of its rounded terms."""
        parts = [to_ns(term[phase]) for term in self.terms.values()]
        return np.sum(parts, axis=0, dtype=np.int64)


def to_ns(seconds: Real) -> Int64:
    """Seconds as integer nanoseconds."""
    return np.rint(seconds * NS).astype(np.int64)


def expose(time: Real, window: Real, contention: float) -> Real:
    """What remains visible of ``time`` hidden behind ``window``: the rest, plus contention."""
    return np.maximum(time - window, 0.0) + contention * np.minimum(time, window)


class _Accumulator:
    """Adds op times to categories and remembers kernel windows by name."""

    def __init__(self, size: int) -> None:
        self.terms = {c: {p: np.zeros(size) for p in PHASES} for c in CATEGORIES}
        self.windows: dict[str, Real] = {}
        self.launches = {"forward": np.zeros(size), "backward": np.zeros(size)}

    def add(
        self, category: str, forward: Real | float, backward: Real | float, *, selective: bool
    ) -> None:
        term = self.terms[category]
        term["forward"] += forward
        term["backward"] += backward
        term["full"] += forward
        if selective:
            term["selective"] += forward


def price_layer(kind: LayerKind, shard: Shard, machine: Machine) -> LayerTimes:
    """Times of one layer of ``kind`` for every configuration of ``shard``."""
    acc = _Accumulator(len(shard.tp))
    ops = kind.ops(shard)
    for op in ops:
        if not isinstance(op, Collective):
            _price_kernel(op, acc, machine)
    for op in ops:
        if isinstance(op, Collective):
            _price_collective(op, acc, shard, machine)
    overhead = machine.stack.launch_overhead.si
    for phase in ("forward", "backward"):
        busy = np.sum([acc.terms[c][phase] for c in CATEGORIES], axis=0)
        slow = np.maximum(acc.launches[phase] * overhead - busy, 0.0)
        acc.terms["launch"][phase] += slow
        if phase == "forward":
            acc.terms["launch"]["full"] += slow
    return LayerTimes(acc.terms)


def _price_kernel(op: Op, acc: _Accumulator, machine: Machine) -> None:
    device = machine.device
    match op:
        case MatMul():
            dtype = machine.dtype(low_precision=op.low_precision)

            def time(m: object, n: object, k: object, stage: str) -> Real:
                return compute.matmul_time_s(device, dtype, m, n, k, stage=stage, batch=op.batch)

            fprop = time(op.m, op.n, op.k, "fprop")
            dgrad = time(op.m, op.k, op.n, "dgrad")
            wgrad = time(op.k, op.n, op.m, "wgrad")
            acc.add("matmul", fprop, dgrad + wgrad, selective=op.selective)
            acc.windows |= {
                f"{op.name}:fprop": fprop, f"{op.name}:dgrad": dgrad, f"{op.name}:wgrad": wgrad,
            }  # fmt: skip
            _launch(acc, 1, 2)
        case GroupedMatMul():
            dtype = machine.dtype(low_precision=op.low_precision)
            args = (op.groups, op.rows, op.n, op.k)
            fprop = compute.grouped_matmul_time_s(device, dtype, *args, stage="fprop")
            dgrad = compute.grouped_matmul_time_s(
                device, dtype, op.groups, op.rows, op.k, op.n, stage="dgrad"
            )
            wgrad = compute.grouped_matmul_time_s(
                device, dtype, op.groups, op.k, op.n, op.rows, stage="wgrad"
            )
            acc.add("matmul", fprop, dgrad + wgrad, selective=op.selective)
            _launch(acc, 1, 2)
        case Attention():
            kernel = machine.stack.attention_kernel(device.name)
            # Context parallelism deals the blocks of a causal mask out evenly: a rank with a share
            # of the queries has that share of the work of all of them.
            batch, q_len = op.batch, op.q_len
            if op.causal:
                batch, q_len = np.asarray(op.batch) * (op.q_len / np.asarray(op.kv_len)), op.kv_len
            forward, backward = (
                compute.attention_time_s(
                    device, "bf16", kernel, batch=batch, q_len=q_len, kv_len=op.kv_len,
                    heads=op.heads, kv_heads=op.kv_heads, qk_head_dim=op.qk_head_dim,
                    v_head_dim=op.v_head_dim, causal=op.causal, stage=stage,
                )
                for stage in ("forward", "backward")
            )  # fmt: skip
            acc.add("attention", forward, backward, selective=op.selective)
            acc.windows |= {f"{op.name}:fprop": forward, f"{op.name}:dgrad": backward}
            _launch(acc, 1, 2)
        case Elementwise():
            latency = device.kernels.memory_bound_latency.si
            forward = compute.memory_bound_time_s(device, op.forward_bytes)
            forward = forward + latency * max(op.forward_launches - 1, 0)
            backward = np.zeros_like(forward)
            if op.backward_launches:
                backward = compute.memory_bound_time_s(device, op.backward_bytes)
                backward = backward + latency * (op.backward_launches - 1)
            acc.add("memory_bound", forward, backward, selective=op.selective)
            _launch(acc, op.forward_launches, op.backward_launches)
        case Collective():  # priced after the kernels it may hide behind
            pass


def _launch(acc: _Accumulator, forward: int, backward: int) -> None:
    acc.launches["forward"] += forward
    acc.launches["backward"] += backward


def _price_collective(op: Collective, acc: _Accumulator, shard: Shard, machine: Machine) -> None:
    size, stride = {
        "tp": (shard.tp, np.ones_like(shard.tp)),
        "cp": (shard.cp, shard.tp),
        "ep": (shard.ep, shard.etp),
        "etp": (shard.etp, np.ones_like(shard.tp)),
    }[op.group]
    active = np.asarray(op.active) & (size > 1)
    if not active.any():
        return
    contention = machine.stack.overlap_contention.si
    share = machine.stack.overlap_tensor_parallel if op.group == "tp" else 0.0
    visible: list[Real] = []
    for kind, payload, hidden, count in (
        (op.forward_kind, op.forward_bytes, op.forward_hidden, op.forward_count),
        (op.backward_kind, op.backward_bytes, op.backward_hidden, op.backward_count),
    ):
        if kind is None:
            visible.append(np.zeros(len(shard.tp)))
            continue
        time = _collective_time(kind, payload, size, stride, machine) * count
        if hidden is not None and hidden in acc.windows:
            time = expose(time, acc.windows[hidden], contention)
        else:
            time = time * (1.0 - share * (1.0 - contention))
        visible.append(np.where(active, time, 0.0))
        acc.launches["forward" if len(visible) == 1 else "backward"] += np.where(active, count, 0)
    category = f"{'ep' if op.group in ('ep', 'etp') else op.group}_comm"
    acc.add(category, visible[0], visible[1], selective=op.selective)


def _collective_time(
    kind: str, payload: object, size: Int64, stride: Int64, machine: Machine
) -> Real:
    if kind == "ring":
        hop = interconnect.send_recv_time_s(machine.fabric, payload, stride=stride, size=size)
        return hop * (size - 1)
    return interconnect.collective_time_s(machine.fabric, kind, payload, size=size, stride=stride)


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel side of each configuration (arrays of one length)."""

    replicate: Int64
    shard: Int64
    pp: Int64
    zero_stage: Int64


@dataclass(frozen=True)
class _Mesh:
    """Groups over which parameters are replicated, and their rank strides."""

    ways: Int64
    """Ranks that shard the state."""
    stride: Int64
    replicas: Int64
    replica_stride: Int64


def price_kind(
    kind: LayerKind,
    times: LayerTimes,
    shard: Shard,
    data: DataParallel,
    machine: Machine,
    *,
    vocab_divisor: int,
    drop_tied: Bools | None = None,
) -> tuple[Int64, dict[str, Int64]]:
    """All :class:`Field` rows of one layer, shape (fields, configurations), and its exposed
    data-parallel communication per microbatch (``{"forward": ns, "backward": ns}``).

    ``times`` are the layer's for the same ``shard``. ``drop_tied`` marks configurations whose
    head shares the embedding's weights on the same device (one pipeline stage).
    """
    local = memory.local_parameters(kind, shard, vocab_divisor)
    dense = local.dense
    if drop_tied is not None:
        for weight in kind.weights:
            if weight.name == "head.tied":
                dense = dense - np.where(
                    drop_tied, memory.local_elements(weight, shard, vocab_divisor), 0
                )
    expert_ranks = shard.tp * shard.cp * data.shard // (shard.ep * shard.etp)
    attention_mesh = _Mesh(
        data.shard * shard.cp, shard.tp, data.replicate, shard.tp * shard.cp * data.shard
    )
    expert_mesh = _Mesh(
        np.maximum(expert_ranks, 1), shard.ep * shard.etp, data.replicate,
        shard.tp * shard.cp * data.shard,
    )  # fmt: skip
    forward = _phase_seconds(times, "forward")
    backward = _phase_seconds(times, "backward")
    rules, stack = machine.rules, machine.stack
    state = [
        memory.state_bytes(elements, ways=mesh.ways, zero_stage=data.zero_stage, rules=rules)
        for elements, mesh in ((dense, attention_mesh), (local.expert, expert_mesh))
    ]
    reduce_s = np.zeros(len(shard.tp))
    gather_s = np.zeros(len(shard.tp))
    for elements, mesh in ((dense, attention_mesh), (local.expert, expert_mesh)):
        reduced, gathered = _data_parallel_times(elements, mesh, data, machine)
        reduce_s += reduced
        gather_s += gathered
    # ZeRO 3 gathers and reduces with every microbatch; ZeRO 2 gathers once per forward, and with a
    # pipeline keeps the weights for the whole step.
    fsdp = (data.zero_stage >= 3) | ((data.zero_stage == 2) & (data.pp == 1))
    contention = stack.overlap_contention.si
    per_microbatch = {
        "forward": to_ns(np.where(fsdp, expose(gather_s, forward, contention), 0.0)),
        "backward": to_ns(
            np.where(
                fsdp,
                expose(
                    reduce_s + np.where(data.zero_stage >= 3, gather_s, 0.0), backward, contention
                ),
                0.0,
            )
        ),
    }
    gradient = expose(reduce_s, backward, contention) if stack.overlap_dp_gradients else reduce_s
    parameter = expose(gather_s, forward, contention) if stack.overlap_dp_parameters else gather_s
    activations = memory.activation_bytes(kind, shard)
    gathered_bytes = state[0].gathered + state[1].gathered
    lasting = np.where((data.zero_stage == 2) & (gathered_bytes > 0), gathered_bytes, 0)
    weights = state[0].weights + state[1].weights
    gradients = state[0].gradients + state[1].gradients
    optimizer = state[0].optimizer + state[1].optimizer
    rows = np.empty((len(Field), len(shard.tp)), dtype=np.int64)
    rows[Field.FORWARD] = times.nanoseconds("forward") + per_microbatch["forward"]
    rows[Field.BACKWARD] = times.nanoseconds("backward") + per_microbatch["backward"]
    rows[Field.SELECTIVE] = times.nanoseconds("selective")
    rows[Field.FULL] = times.nanoseconds("full")
    rows[Field.GRADIENT] = to_ns(np.where(fsdp, 0.0, gradient))
    rows[Field.PARAMETER] = to_ns(np.where(fsdp | (data.zero_stage == 0), 0.0, parameter))
    rows[Field.OPTIMIZER] = to_ns(_optimizer_seconds(dense, local.expert, attention_mesh,
                                                     expert_mesh, data, machine))  # fmt: skip
    rows[Field.STATIC] = weights + gradients + optimizer + lasting
    rows[Field.GATHERED] = np.where(lasting > 0, 0, 2 * gathered_bytes)
    rows[Field.ACT_NONE] = activations.none
    rows[Field.ACT_SELECTIVE] = activations.selective
    rows[Field.ACT_FULL] = activations.full
    rows[Field.WORK_NONE] = activations.working_none
    rows[Field.WORK_SELECTIVE] = activations.working_selective
    rows[Field.WORK_FULL] = activations.working_full
    rows[Field.PARAMETERS] = dense + local.expert
    rows[Field.WEIGHT_BYTES] = weights + lasting
    rows[Field.GRADIENT_BYTES] = gradients
    rows[Field.OPTIMIZER_BYTES] = optimizer
    return rows, per_microbatch


def _phase_seconds(times: LayerTimes, phase: str) -> Real:
    result: Real = np.sum([term[phase] for term in times.terms.values()], axis=0)
    return result


def _data_parallel_times(
    elements: Int64, mesh: _Mesh, data: DataParallel, machine: Machine
) -> tuple[Real, Real]:
    """Seconds to reduce the gradients of ``elements`` parameters and to gather their weights."""
    rules, fabric = machine.rules, machine.fabric
    gradient = elements * float(rules.gradient_bytes)
    ranks = mesh.ways * mesh.replicas

    def collective(kind: str, payload: Real, size: Int64, stride: Int64) -> Real:
        time = interconnect.collective_time_s(fabric, kind, payload, size=size, stride=stride)
        return np.where((size > 1) & (elements > 0), time, 0.0)

    sharded = collective("reduce_scatter", gradient, mesh.ways, mesh.stride) + collective(
        "all_reduce", gradient / mesh.ways, mesh.replicas, mesh.replica_stride
    )
    plain = collective("all_reduce", gradient, ranks, mesh.stride)
    weights = elements * float(rules.gather_bytes)
    gather = collective("all_gather", weights, mesh.ways, mesh.stride)
    return (
        np.where(data.zero_stage == 0, plain, sharded),
        np.where(data.zero_stage == 0, 0.0, gather),
    )


def _optimizer_seconds(
    dense: Int64, expert: Int64, attention_mesh: _Mesh, expert_mesh: _Mesh, data: DataParallel,
    machine: Machine,
) -> Real:  # fmt: skip
    """Optimizer step, memory bound: gradient norm and read, state read and written, weight out."""
    moments = memory.OPTIMIZER_MOMENTS[machine.optimizer]
    per_element = 8 + 8 + 8 * moments + machine.rules.gather_bytes
    sharded = data.zero_stage >= 1
    elements = np.where(sharded, memory.ceil_div(dense, attention_mesh.ways), dense)
    elements = elements + np.where(sharded, memory.ceil_div(expert, expert_mesh.ways), expert)
    time = compute.memory_bound_time_s(machine.device, per_element * elements.astype(np.float64))
    result: Real = np.where(elements > 0, time, 0.0)
    return result
