"""The data-parallel side of a layer: its state, its collectives, and the priced table.

Overlap and exposure of data-parallel traffic are decided here only:

* FSDP gathers and reductions hide behind the compute of the same layer (one layer of prefetch);
* gradient reductions of a step hide behind the backward of the last microbatch, parameter gathers
  behind the forward of the first, layer by layer, where the stack overlaps them; one bucket of
  gradients is always exposed;
* nothing hides while another collective of the layer uses the same ports (or, inside a node, the
  same links): expert exchanges across nodes, a context-parallel ring;
* what is hidden still costs its contention, as in ``cost_models.step``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models import compute, interconnect, state
from cost_models.communication import expose
from cost_models.fabric import Fabric
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.layout import RecomputePolicy
from cost_models.recompute import row_count, write_modes
from cost_models.repeat import Real
from cost_models.step import Field, LayerTimes, Machine, to_ns

Payload: TypeAlias = NDArray[np.floating[Any]]


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
    policies: tuple[RecomputePolicy, ...] = (),
    drop_tied: Bools | None = None,
) -> tuple[Int64, dict[str, Int64]]:
    """All :class:`Field` rows of one layer, shape (fields, configurations), and its exposed
    data-parallel communication per microbatch (``{"forward": ns, "backward": ns}``). Rows of
    ``policies`` follow those of :class:`Field` (``cost_models.recompute``).

    ``times`` are the layer's for the same ``shard``. ``drop_tied`` marks configurations whose
    head shares the embedding's weights on the same device (one pipeline stage).
    """
    local = state.local_parameters(kind, shard, vocab_divisor, drop_tied=drop_tied)
    dense = local.dense
    attention_mesh, expert_mesh = _meshes(shard, data)
    gathering = attention_mesh.ways, attention_mesh.stride
    reducing = attention_mesh.ways * data.replicate, attention_mesh.stride
    forward = _window(times, "forward", machine.fabric, *gathering)
    backward = _window(times, "backward", machine.fabric, *reducing)
    rules, stack = machine.rules, machine.stack
    held = layer_state(kind, shard, data, machine, vocab_divisor=vocab_divisor, drop_tied=drop_tied)
    reduce_s = np.zeros(len(shard.tp))
    gather_s = np.zeros(len(shard.tp))
    for elements, mesh, experts in (
        (dense, attention_mesh, False),
        (local.expert, expert_mesh, True),
    ):
        pieces = _gathered_pieces(kind, experts=experts) if stack.gathers_each_tensor else 1
        reduced, gathered = _data_parallel_times(elements, mesh, data, machine, pieces)
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
    buffers = held.step
    if rules.dummy_wgrad and kind.name == "head":
        buffers = buffers + state.dummy_wgrad_bytes(
            kind, shard, vocab_divisor, element_bytes=rules.gather_bytes
        )
    gathered_bytes = held.gathered
    lasting = np.where((data.zero_stage == 2) & (gathered_bytes > 0), gathered_bytes, 0)
    rows = np.empty((row_count(policies), len(shard.tp)), dtype=np.int64)
    rows[Field.FORWARD] = times.nanoseconds("forward") + per_microbatch["forward"]
    rows[Field.BACKWARD] = times.nanoseconds("backward") + per_microbatch["backward"]
    rows[Field.GRADIENT] = to_ns(np.where(fsdp, 0.0, gradient))
    rows[Field.PARAMETER] = to_ns(np.where(fsdp | (data.zero_stage == 0), 0.0, parameter))
    rows[Field.OPTIMIZER] = to_ns(_optimizer_seconds(dense, local.expert, attention_mesh,
                                                     expert_mesh, data, machine))  # fmt: skip
    rows[Field.STATIC] = held.weights + held.gradients + held.optimizer + buffers + lasting
    rows[Field.GATHERED] = np.where(lasting > 0, 0, 2 * gathered_bytes)
    write_modes(rows, kind, shard, times, policies)
    rows[Field.PARAMETERS] = dense + local.expert
    rows[Field.WEIGHT_BYTES] = held.weights + lasting
    rows[Field.GRADIENT_BYTES] = held.gradients
    rows[Field.OPTIMIZER_BYTES] = held.optimizer
    rows[Field.STEP_BYTES] = held.step
    return rows, per_microbatch


def _meshes(shard: Shard, data: DataParallel) -> tuple[_Mesh, _Mesh]:
    """The attention and the expert mesh of each configuration."""
    span = shard.tp * shard.cp * data.shard
    expert_ranks = np.maximum(span // (shard.ep * shard.etp), 1)
    return (
        _Mesh(data.shard * shard.cp, shard.tp, data.replicate, span),
        _Mesh(expert_ranks, shard.ep * shard.etp, data.replicate, span),
    )


def layer_state(
    kind: LayerKind,
    shard: Shard,
    data: DataParallel,
    machine: Machine,
    *,
    vocab_divisor: int,
    drop_tied: Bools | None = None,
) -> state.StateBytes:
    """Persistent state of one layer on one device; experts are sharded over their own mesh."""
    parts = []
    for mesh, expert in zip(_meshes(shard, data), (False, True), strict=True):
        parts.append(
            state.state_bytes(
                [weight for weight in kind.weights if state.is_expert(weight) == expert],
                shard,
                state.Sharding(mesh.ways, data.zero_stage, data.pp > 1),
                machine.rules,
                vocab_divisor=vocab_divisor,
                drop_tied=drop_tied,
            )
        )
    return parts[0] + parts[1]


def _window(times: LayerTimes, phase: str, fabric: Fabric, size: Int64, stride: Int64) -> Real:
    """Seconds of a pass beside which data-parallel traffic can flow: its links must be free.

    Groups that span nodes wait for the ports while other collectives of the layer use them; groups
    inside a node for the links there.
    """
    total: Real = np.sum([term[phase] for term in times.terms.values()], axis=0)
    spans = interconnect.spans_nodes(fabric, size, stride)
    busy = np.where(spans, times.wire["across"][phase], times.wire["inside"][phase])
    return np.maximum(total - busy, 0.0)


def _gathered_pieces(kind: LayerKind, *, experts: bool) -> int:
    """Tensors of a layer, dense or of its experts, at least 1."""
    names = ("expert_column", "expert_row")
    return max(1, sum(w.count for w in kind.weights if (w.sharding in names) == experts))


def _data_parallel_times(
    elements: Int64, mesh: _Mesh, data: DataParallel, machine: Machine, pieces: int
) -> tuple[Real, Real]:
    """Seconds to reduce the gradients of ``elements`` parameters and to gather their weights, in
    so many collectives."""
    rules, fabric = machine.rules, machine.fabric
    gradient = elements * float(rules.gradient_bytes)
    ranks = mesh.ways * mesh.replicas

    def collective(
        kind: interconnect.CollectiveKind, payload: Payload, size: Int64, stride: Int64
    ) -> Real:
        time = interconnect.collective_time_s(fabric, kind, payload, size=size, stride=stride)
        return np.where((size > 1) & (elements > 0), time, 0.0)

    sharded = collective("reduce_scatter", gradient, mesh.ways, mesh.stride) + collective(
        "all_reduce", gradient / mesh.ways, mesh.replicas, mesh.replica_stride
    )
    plain = collective("all_reduce", gradient, ranks, mesh.stride)
    weights = elements * float(rules.gather_bytes)
    gather = pieces * collective("all_gather", weights / pieces, mesh.ways, mesh.stride)
    return (
        np.where(data.zero_stage == 0, plain, sharded),
        np.where(data.zero_stage == 0, 0.0, gather),
    )


def _optimizer_seconds(
    dense: Int64, expert: Int64, attention_mesh: _Mesh, expert_mesh: _Mesh, data: DataParallel,
    machine: Machine,
) -> Real:  # fmt: skip
    """Optimizer step, memory bound: gradient norm and read, state read and written, weight out."""
    moments = state.OPTIMIZER_MOMENTS[machine.optimizer]
    per_element = 8 + 8 + 8 * moments + machine.rules.gather_bytes
    sharded = data.zero_stage >= 1
    elements = np.where(sharded, state.ceil_div(dense, attention_mesh.ways), dense)
    elements = elements + np.where(sharded, state.ceil_div(expert, expert_mesh.ways), expert)
    time = compute.memory_bound_time_s(machine.device, per_element * elements.astype(np.float64))
    result: Real = np.where(elements > 0, time, 0.0)
    return result
