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

from collections.abc import Iterable

import numpy as np

from cost_models import compute, interconnect, offload, orthogonalise, state, unsharded
from cost_models.activation_offload import move_inputs
from cost_models.buffers import dummy_wgrad_bytes
from cost_models.communication import expose
from cost_models.data_traffic import (
    DataCall,
    DataParallel,
    GatheredBytes,
    Mesh,
    Pieces,
    Wire,
    backward_mesh,
    calls,
    gathered_bytes,
    gathered_pieces,
    gathers_again,
    gathers_between,
    gathers_each,
    in_each,
    meshes,
    reduces_each,
    state_mesh,
    sums_each,
    tensor_parallel_sums,
)
from cost_models.fabric import Fabric
from cost_models.fragments import left_by_weights, split_by_checkpoints
from cost_models.gradient_copies import copy_seconds
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.host_outputs import move_outputs
from cost_models.layer_times import NS, LayerTimes, to_ns
from cost_models.layout import OVER_PIPELINE, SPLIT_BACKWARD, RecomputePolicy
from cost_models.partitioned import gather_parts
from cost_models.placed import Placed, placed, without
from cost_models.recompute import move_checkpoints, row_count, write_modes
from cost_models.repeat import Real
from cost_models.split_backward import late_gradient_bytes, write_halves
from cost_models.step import Field, Machine
from cost_models.tiled import cut_collectives


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
    attention_mesh, expert_mesh = _meshes(shard, data, machine)
    ways = attention_mesh.ways
    gathering = ways, attention_mesh.stride
    reducing = ways * data.replicate, attention_mesh.stride
    forward = _window(times, "forward", machine.fabric, *gathering)
    backward = _window(times, "backward", machine.fabric, *reducing)
    behind = backward if kind.backward else forward
    rules, stack = machine.rules, machine.stack
    held = layer_state(kind, shard, data, machine, vocab_divisor=vocab_divisor, drop_tied=drop_tied)
    names = ("reduce", "replicas", "gather", "again", "updated", "fetched")
    seconds = dict.fromkeys(names, np.zeros(len(shard.tp)))
    narrower, alone = np.zeros_like(shard.tp), np.zeros_like(shard.tp)
    for elements, mesh, experts in (
        (dense + local.again, attention_mesh, False),
        (local.expert, expert_mesh, True),
    ):
        pieces = gathered_pieces(kind, stack.layers, experts=experts)
        sent = gathered_bytes(kind, shard, rules, vocab_divisor, experts=experts)
        apart = None if experts else placed(kind, shard, vocab_divisor)
        part = _data_parallel_times(elements, mesh, data, machine, pieces, sent, apart)
        if machine.sums_whole:
            more = orthogonalise.exchanges(
                kind, shard, data, machine, vocab_divisor, experts=experts
            )
            part["reduce"] = part["reduce"] + _seconds(more, len(shard.tp), machine)
        seconds = {name: total + part[name] for name, total in seconds.items()}
        narrower = narrower + sent.narrower
        alone = alone + np.where(mesh.ways == 1, elements, 0)
    reduce_s, gather_s = seconds["reduce"], seconds["gather"]
    sums_s = _seconds(
        tensor_parallel_sums(kind, shard, data, stack.layers, rules), len(shard.tp), machine
    )
    fsdp = reduces_each(data, rules)
    each = gathers_each(data, rules)
    between = gathers_between(data, rules)
    again = gathers_again(kind, data.zero_stage) & ~between
    cast_again = again | ((data.zero_stage == 0) & kind.backward & rules.casts_whole_weights)
    copies = copy_seconds(
        dense + local.expert, times, machine, twice=local.again,
        frozen=local.frozen_dense + local.frozen_expert, narrower=narrower,
        sharded=in_each(data, rules), again=cast_again, alone=alone,
        waits=data.deferred, between=between,
        lookup=kind.name == "embedding",
    )  # fmt: skip
    contention, orthogonal_s = stack.overlap_contention.si, np.zeros(len(shard.tp))
    if machine.sums_whole:
        orthogonal_s = orthogonalise.microbatch_seconds(kind, shard, data, machine, vocab_divisor)
    matrices = orthogonalise.held_elements(kind, shard, data, machine, vocab_divisor)
    blocks = matrices > 0
    held_by = np.where(data.zero_stage >= 1, ways, 1)
    orthogonal_s = orthogonal_s + orthogonalise.momentum_seconds(matrices, held_by, machine)
    orthogonal_s = orthogonal_s + np.where(fsdp & blocks, reduce_s, 0.0)
    hidden_s = np.where(fsdp & ~blocks, reduce_s, 0.0)
    in_backward = hidden_s + np.where(again & each, seconds["again"], 0.0)
    per_microbatch = {
        "forward": to_ns(
            np.where(each, expose(gather_s, forward, contention), 0.0) + copies["forward"]
        ),
        "backward": to_ns(
            expose(in_backward, backward, contention)
            + np.where(between, expose(gather_s, behind, contention), 0.0)
            + np.where(sums_each(data, stack.layers, rules), sums_s, 0.0)
            + copies["backward"]
            + orthogonal_s
        ),
    }  # fmt: skip
    last_s = np.where(fsdp, 0.0, reduce_s) + seconds["replicas"]
    # What each microbatch's backward hides leaves so much less for what comes once per step.
    beside = np.maximum(backward - in_backward, 0.0)
    gradient = expose(last_s, beside, contention) if stack.overlap_dp_gradients else last_s
    # Gathered with every microbatch, or once; in groups besides what they have updated parts of.
    once_s = np.where(each, 0.0, gather_s) + seconds["updated"]
    beside = np.maximum(forward - np.where(each, gather_s, 0.0), 0.0)
    parameter = expose(once_s, beside, contention) if stack.overlap_dp_parameters else once_s
    buffers = held.step
    if rules.dummy_wgrad and kind.name == "head":
        buffers = buffers + dummy_wgrad_bytes(
            kind, shard, vocab_divisor, element_bytes=rules.gather_bytes
        )
    stays = (data.zero_stage > 0) & ((data.zero_stage <= 2) | kind.ends_unit)
    lasting = np.where(stays, held.gathered, 0)
    whole_gradients = between | ((lasting > 0) & ((data.pp > 1) | (data.zero_stage == 1)))
    half_open = unsharded.partly_gathered(held, attention_mesh.ways, data)
    rows = np.zeros((row_count(policies), len(shard.tp)), dtype=np.int64)
    rows[Field.FORWARD] = times.nanoseconds("forward") + per_microbatch["forward"]
    rows[Field.BACKWARD] = times.nanoseconds("backward") + per_microbatch["backward"]
    late_sums = np.where(sums_each(data, stack.layers, rules), 0.0, sums_s)
    late_s = expose(gather_s, forward, contention) - expose(gather_s, behind, contention)
    rows[Field.GATHER_LATE] = to_ns(np.where(between, np.maximum(late_s, 0.0), 0.0))
    rows[Field.GRADIENT] = to_ns(gradient + late_sums)
    rows[Field.PARAMETER] = to_ns(np.where(data.zero_stage == 0, 0.0, parameter))
    state_meshes = [state_mesh(m, data.zero_stage, rules) for m in (attention_mesh, expert_mesh)]
    update = _optimizer_seconds(
        dense, local.expert, *state_meshes, data=data, machine=machine, matrices=matrices
    )
    # What some tensors have more comes and leaves with the rest of their state.
    update = update + held.streamed_extra * 2.0 / machine.cluster.groups[0].node.host_link.si
    if rules.optimizer.orthogonalises:
        update = update + orthogonalise.step_seconds(kind, shard, data, machine, vocab_divisor)
        update = update + orthogonalise.gradients_again_seconds(matrices, held_by, machine)
    rows[Field.OPTIMIZER] = to_ns(update)
    buffers = buffers + kind.buffer_bytes(shard)
    rows[Field.STATIC] = held.weights + held.gradients + held.optimizer + buffers + lasting
    rows[Field.STATIC] += half_open
    left = left_by_weights(kind, shard, data, rules=rules, vocab_divisor=vocab_divisor)
    rows[Field.LEFT_BLOCKS] = left
    rows[Field.STATIC] += left
    made = unsharded.made_each_step(held, data.zero_stage, stack=stack)
    rows[Field.NEW_GRADIENTS] = made
    rows[Field.STATIC] += unsharded.reduced_apart(held, data, stack=stack, rules=rules) - made
    rows[Field.UPDATE_BYTES] = unsharded.update_bytes(
        held, copies=stack.optimizer_step_copies, state=max(4, rules.optimizer_bytes)
    )
    write_modes(rows, kind, shard, times, policies)
    gather_parts(rows, kind, shard, policies, machine.fabric)
    cut_collectives(rows, kind, shard, policies, machine.fabric)
    if not {*SPLIT_BACKWARD, *OVER_PIPELINE}.isdisjoint(stack.schedules):
        write_halves(rows, kind, shard, weights_ns=times.weights * NS)
        trained = local.total - local.frozen_dense - local.frozen_expert
        rows[Field.LATE_GRADIENTS] = late_gradient_bytes(trained, rules)
    rows[Field.BUFFER_BYTES] = kind.buffer_bytes(shard)
    if stack.splits_blocks and not machine.offload.checkpoints:
        split_by_checkpoints(rows, kind, shard, policies)
    coming = np.where(again & each, to_ns(seconds["fetched"]), 0)
    host_link = machine.cluster.groups[0].node.host_link.si
    move_outputs(rows, kind, shard, policies, host_link, coming)
    if machine.offload.checkpoints and stack.offload is not None:
        move_checkpoints(rows, policies, host_link, waits=stack.offload.checkpoints_wait)
    move_inputs(rows, kind, shard, policies, machine)
    if stack.pipeline_buffers:
        unsharded.add_output(
            rows, kind, shard, pipelined=data.pp > 1, policies=tuple(p.name for p in policies)
        )
    used = held
    if drop_tied is not None:
        used = layer_state(kind, shard, data, machine, vocab_divisor=vocab_divisor)
    unsharded.add_unsharded(
        rows, kind, shard, used, lasting=lasting, whole_gradients=whole_gradients,
        between=between, waits=data.deferred, rules=rules, ahead=gathered_ahead(ways, machine),
        policies=tuple(policy.name for policy in policies),
    )  # fmt: skip
    rows[Field.ACT_NONE] += unsharded.held_by_graph(kind, used, data, rules=rules)
    rows[Field.GATHERED] = np.where(between, used.gathered, 0)
    rows[Field.IN_FLIGHT] = unsharded.in_flight(used, data, rules=rules)
    rows[Field.PARAMETERS] = local.total
    rows[Field.WEIGHT_BYTES] = held.weights + lasting + half_open
    rows[Field.GRADIENT_BYTES] = held.gradients
    rows[Field.OPTIMIZER_BYTES] = held.optimizer
    rows[Field.STEP_BYTES] = held.step
    return rows, per_microbatch


def gathered_ahead(ways: Int64, machine: Machine) -> Int64:
    """Layers whose weights come before the one that runs: none where FSDP2 has one rank, which
    casts a layer's when they are used (PyTorch, ``FSDPParamGroup.wait_for_unshard``)."""
    alone = (ways == 1) & (machine.rules.layout == "dim0")
    return np.where(alone, 0, machine.stack.prefetched_units)


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
    parts, dense_ranks = [], data.shard * shard.cp * data.replicate
    for mesh, expert in zip(_meshes(shard, data, machine), (False, True), strict=True):
        parts.append(
            state.state_bytes(
                [weight for weight in kind.weights if state.is_expert(weight) == expert],
                shard,
                state.Sharding(
                    mesh.ways,
                    data.zero_stage,
                    data.pp > 1,
                    mesh.state_replicas,
                    dense_ranks,
                    data.deferred,
                ),
                machine.rules,
                vocab_divisor=vocab_divisor,
                drop_tied=drop_tied,
            )
        )
    return without(parts[0] + parts[1], placed(kind, shard, vocab_divisor), machine.rules)


def _meshes(shard: Shard, data: DataParallel, machine: Machine) -> tuple[Mesh, Mesh]:
    return meshes(shard, data, machine.stack.layers, machine.fabric.devices_per_node)


def _window(times: LayerTimes, phase: str, fabric: Fabric, size: Int64, stride: Int64) -> Real:
    """Seconds of a pass beside which data-parallel traffic can flow: its links must be free.

    Groups that span nodes wait for the ports while other collectives of the layer use them; groups
    inside a node for the links there.
    """
    total: Real = np.sum([term[phase] for term in times.terms.values()], axis=0)
    spans = interconnect.spans_nodes(fabric, size, stride)
    busy = np.where(spans, times.wire["across"][phase], times.wire["inside"][phase])
    return np.maximum(total - busy, 0.0)


def _data_parallel_times(
    elements: Int64, mesh: Mesh, data: DataParallel, machine: Machine, pieces: Pieces,
    gathered: GatheredBytes, apart: Placed | None,
) -> dict[str, Real]:  # fmt: skip
    """Seconds for the gradients of ``elements`` parameters (``reduce``; ``replicas`` where the last
    microbatch alone sums them over replicas) and to gather the weights for the forward
    (``gather``) and the backward (``again``), in so many collectives, of both what they take from
    the host (``fetched``); once per step, from groups that have updated parts of the same shards
    (``updated``)."""
    wire = Wire(
        machine.stack.layers, machine.fabric.devices_per_node, whole_sums=machine.sums_whole
    )
    found = calls(elements, mesh, data.zero_stage, machine.rules, pieces, gathered, wire, apart)
    late = machine.stack.replica_reduction == "step"
    gradients = [call for call in found if call.role == "gradient"]
    weights = [call for call in found if call.role == "parameter"]
    parts = {
        "reduce": [call for call in gradients if not (late and call.over_replicas)],
        "replicas": [call for call in gradients if late and call.over_replicas],
        "gather": [call for call in weights if not call.over_replicas],
        "updated": [call for call in weights if call.over_replicas],
    }
    kept = backward_mesh(mesh, data)
    if kept is not mesh:
        again = calls(elements, kept, data.zero_stage, machine.rules, pieces, gathered, wire, apart)
        parts["again"] = [
            call for call in again if call.role == "parameter" and not call.over_replicas
        ]
    seconds = {name: _seconds(part, len(elements), machine) for name, part in parts.items()}
    seconds.setdefault("again", seconds["gather"])
    host = machine.stack.offload
    seconds["fetched"] = np.zeros(len(elements))
    if machine.offload.parameters and host is not None:
        shard, node = elements / mesh.ways, machine.cluster.groups[0].node
        each = host.fetch_bytes or machine.rules.gather_bytes
        fetch = offload.fetch_seconds(shard * float(each), node, host)
        seconds |= {name: seconds[name] + fetch for name in ("gather", "again", "fetched")}
        seconds["reduce"] = seconds["reduce"] + shard * host.reduced_bytes / node.host_link.si
    return seconds


def _seconds(found: Iterable[DataCall], size: int, machine: Machine) -> Real:
    total = np.zeros(size)
    for call in found:
        runs = call.active & (call.size > 1)
        if not np.any(runs):
            continue
        time = interconnect.collective_time_s(
            machine.fabric, call.kind, call.bytes, size=call.size, stride=call.stride
        )
        total += np.where(runs, call.count * time, 0.0)
    return total


def _optimizer_seconds(
    dense: Int64, expert: Int64, attention_mesh: Mesh, expert_mesh: Mesh, *, data: DataParallel,
    machine: Machine, matrices: Real,
) -> Real:  # fmt: skip
    """Optimizer step, memory bound: gradient norm and read, the stack's other passes over the
    gradient, state read and written, weight out."""
    rule = machine.rules.optimizer
    updated = 2 * machine.rules.updated_bytes
    passes = machine.stack.gradient_pass_bytes.get(machine.precision, 0)
    per_element = 8 + passes + updated + rule.step_bytes + machine.rules.gather_bytes
    sharded = data.zero_stage >= 1
    elements = np.where(sharded, state.ceil_div(dense, attention_mesh.ways), dense)
    elements = elements + np.where(sharded, state.ceil_div(expert, expert_mesh.ways), expert)
    host, node = machine.stack.offload, machine.cluster.groups[0].node
    streamed = np.zeros(1)
    if machine.rules.streamed_bytes:
        streamed = offload.stream_seconds(
            elements.astype(np.float64), machine.rules.streamed_bytes, node
        )
    elif machine.offload.optimizer and host is not None:
        weights = machine.rules.gather_bytes if machine.offload.parameters else 0
        per_1000, count = machine.offload.optimizer_per_1000, elements.astype(np.float64)
        there = offload.update_seconds(
            count, rule, node, host, weight_bytes=weights, per_1000=per_1000, matrices=matrices
        )
        here = per_element * (1 - per_1000 / 1000) * count
        return np.maximum(there, compute.memory_bound_time_s(machine.device, here) * (here > 0))
    whole = machine.stack.gradient_buffer_bytes
    ways = data.replicate * attention_mesh.ways
    buffer = whole.get("zeroed", 0) + whole.get("checked", 0)
    buffer = (buffer + np.where(ways > 1, whole.get("averaged", 0), 0)) * (dense + expert)
    moved = per_element * elements.astype(np.float64) + buffer
    time = compute.memory_bound_time_s(machine.device, moved) + streamed
    result: Real = np.where(elements > 0, time, 0.0)
    return result
