"""Named bytes per device beside a model's own tensors, for many configurations at once.

Nothing here is a share of a total: each term is what one library holds, times how many of them the
layout has (``hardware_profiles.holdings.ReserveSpec``). Communicators are those that a rank of
Megatron-Core or torchtitan joins: tensor, context, data (with context) and expert parallel groups,
expert data parallelism, the model-parallel group of the gradient norm, the world, the
ranks that share 8-bit scales, and the pipeline's neighbours; hierarchical context parallelism has
two levels of groups more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cost_models import state
from cost_models.activation_offload import staying_bytes
from cost_models.buffers import dummy_wgrad_bytes
from cost_models.data_traffic import Mesh, Wire
from cost_models.graph import Bools, Int64, Shard, WorkloadGraph
from cost_models.step import Machine

INSIDE = (
    "workspace", "dummy_gradients", "live_parameters", "reduction_buffers", "inputs_on_device",
)  # fmt: skip
"""Terms that the caching allocator counts as allocated."""
CACHED = (
    "fragmentation",
    "routing_fragmentation",
    "graph_pool",
    "gather_buffers",
    "reduction_block",
    "first_gather",
    "idle_logits",
)
"""Terms that it holds beyond that."""
OUTSIDE = ("context", "communicators", "overlap_buffers")
"""Terms that only the driver sees."""


class Degrees(Protocol):
    """What communicators depend on (``cost_models.configs.Configs``)."""

    @property
    def dp_replicate(self) -> Int64: ...
    @property
    def dp_shard(self) -> Int64: ...
    @property
    def pp(self) -> Int64: ...
    @property
    def zero_stage(self) -> Int64: ...


@dataclass(frozen=True)
class Reserve:
    """Terms by name, one entry per configuration, and where each is from."""

    terms: dict[str, Int64]
    details: dict[str, str]

    @property
    def total(self) -> Int64:
        """All terms."""
        result: Int64 = np.sum(list(self.terms.values()), axis=0, dtype=np.int64)
        return result


def reserve_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Reserve:
    """The terms of every configuration."""
    spec, ones = machine.stack.reserve, np.ones_like(shard.tp)
    dummies = np.zeros_like(shard.tp)
    if machine.rules.dummy_wgrad:
        # Of the kind of layer with most: measured peaks of stages with several kinds show no more.
        for kind in workload.kinds.values():
            of_kind = dummy_wgrad_bytes(
                kind, shard, workload.vocab_divisor, element_bytes=machine.rules.gather_bytes
            )
            dummies = np.maximum(dummies, of_kind)
    gathered = shard.tokens * workload.boundary_bytes_per_token
    quantisation = machine.stack.quantisation
    piped = quantisation is None or quantisation.pipelines(machine.precision)
    count = machine.stack.overlap_buffers * piped
    overlapped = np.where(shard.tp > 1, count * gathered, 0)
    graphs, routing = machine.stack.graph_pool, machine.stack.routing_fragmentation
    live = machine.stack.state.live_elements * machine.rules.gather_bytes
    return Reserve(
        terms={
            "workspace": int(spec.workspace.si) * ones,
            "dummy_gradients": dummies,
            "live_parameters": np.where(degrees.zero_stage >= 3, live, 0),
            "fragmentation": int(spec.fragmentation.si) * ones,
            "routing_fragmentation": _routing_fragmentation(workload, machine, shard),
            "graph_pool": (int(graphs.si) if graphs else 0) * ones,
            "reduction_buffers": _reduction_bytes(workload, machine, shard, degrees),
            "gather_buffers": _gather_bytes(workload, machine, shard, degrees),
            "reduction_block": _reduction_block(workload, machine, shard, degrees),
            "first_gather": _first_gather(workload, machine, shard, degrees),
            "idle_logits": _idle_logits(workload, machine, shard, degrees),
            "inputs_on_device": staying_bytes(workload.kinds.values(), shard, machine),
            "context": int(spec.context.si) * ones,
            "communicators": communicator_bytes(machine, shard, degrees),
            "overlap_buffers": overlapped,
        },
        details={
            "workspace": spec.workspace.source,
            "dummy_gradients": "placeholders of fused weight gradients, one for each shape",
            "live_parameters": "gathered parameters not yet released",
            "fragmentation": spec.fragmentation.source,
            "routing_fragmentation": routing.source if routing else "",
            "graph_pool": graphs.source if graphs else "",
            "reduction_buffers": "flat copies in which gradients are reduced",
            "gather_buffers": "flat buffers of gathered weights, on a stream of their own",
            "reduction_block": "flat buffer of a unit's gradients, made after the last backward",
            "first_gather": "block of the head's weights as the first step gathered them",
            "idle_logits": "16-bit logits, whose block no fp32 copy fits into",
            "inputs_on_device": "what the layer whose backward is next does not send to the host",
            "context": spec.context.source,
            "communicators": f"{spec.communicator.source}; {spec.exchange_peer.source}",
            "overlap_buffers": f"{count} user buffers of a gathered activation",
        },
    )


def _routing_fragmentation(workload: WorkloadGraph, machine: Machine, shard: Shard) -> Int64:
    """Idle blocks of other microbatches' shapes, where ranks hold different experts: a rank that
    holds all of them gets as many rows whatever the routing."""
    routing = machine.stack.routing_fragmentation
    if routing is None or not workload.uneven_routing:
        return np.zeros_like(shard.tp)
    return np.where(shard.ep > 1, int(routing.si), 0)


def _reduction_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Int64:
    """The flat copy of gradients that is reduced, where there is anybody to reduce it with.

    It is filled with whole tensors, so it holds the largest one, the embedding's. Gradients that
    are held in a wider type than they travel in have a copy in the latter beside it (DeepSpeed,
    ``DeepSpeedEngine.allreduce_bucket``). Shards on their way to the host leave a copy of the
    largest that its norm was taken of.
    """
    rules, elements = machine.rules, machine.stack.state.reduction_elements
    if not elements:
        return np.zeros_like(shard.tp)
    largest = np.max(
        [
            state.local_tensor(weight, shard, workload.vocab_divisor).elements
            for weight in workload.embedding.weights
        ],
        axis=0, initial=0,
    )  # fmt: skip
    host = machine.stack.offload
    wide = host.norm_bytes if host is not None and machine.offload.optimizer else 0
    norms = wide * state.ceil_div(largest, degrees.dp_shard * shard.cp)
    largest = np.maximum(largest, elements)
    held, sent = rules.held_gradient_bytes, rules.gradient_bytes
    each = held + sent if held > sent else sent
    each = each * machine.stack.state.reduction_copies
    return np.where(degrees.dp_replicate * degrees.dp_shard > 1, largest * each + norms, 0)


def _gather_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Int64:
    """What all-gathers write into before each weight is copied out, on a stream of their own.

    A buffer lives until the next unit's is there: that of a layer and of those gathered ahead, or
    of one of the ends (PyTorch, ``FSDPParamGroup.wait_for_unshard`` and
    ``_fsdp_collectives.foreach_all_gather``).
    """
    if not machine.stack.stream_pools:
        return np.zeros_like(shard.tp)
    units = [(kind, 1 + machine.stack.prefetched_units) for kind in workload.kinds.values()]
    units += [(workload.embedding, 1), (workload.head, 1)]
    largest, rules = np.zeros_like(shard.tp), machine.rules
    for kind, count in units:
        held = np.zeros_like(shard.tp)
        for weight in kind.weights:
            local = state.local_tensor(weight, shard, workload.vocab_divisor)
            held = held + local.total * rules.gather_bytes
            held = held - state.narrower_bytes(weight, local, rules)
        largest = np.maximum(largest, held * count)
    return np.where(_sharded(shard, degrees), largest, 0)


def _sharded(shard: Shard, degrees: Degrees) -> Bools:
    """Where data-parallel ranks hold parts of weights or gradients."""
    result: Bools = (degrees.zero_stage >= 2) & (degrees.dp_shard * shard.cp > 1)
    return result


def _reduction_block(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Int64:
    """The largest unit's flat gradients, where a pipeline reduces all of them after its last
    backward.

    Every activation is gone by then, but the allocator joins no blocks that were asked for apart,
    and this one is as large as a unit; the blocks of the gradients themselves are a tensor's each
    (PyTorch, ``_fsdp_collectives.foreach_reduce``; pipelining, ``perform_reduce_grad`` of a stage).
    """
    rules, largest = machine.rules, np.zeros_like(shard.tp)
    if not rules.unit_gradients or rules.reduces_each_backward:
        return largest
    for kind in (*workload.kinds.values(), workload.embedding, workload.head):
        elements = state.local_parameters(kind, shard, workload.vocab_divisor)
        largest = np.maximum(largest, (elements.dense + elements.expert) * rules.gradient_bytes)
    last = 3 if rules.keeps_after_backward else 2
    once = (degrees.zero_stage >= 2) & (degrees.zero_stage <= last) & (degrees.pp > 1)
    return np.where(_sharded(shard, degrees) & once, largest, 0)


def _first_gather(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Int64:
    """The head's weights where the loss reads them outside their module, in stage 3.

    DeepSpeed learns of that in the first step and gathers them there and then, on the stream of the
    computation; from the second step on it gathers them ahead, on a stream of its own, whose blocks
    are others (``runtime/zero/parameter_offload.py``, ``ZeROOrderedDict``; ``fetch_sub_module``).
    """
    if not machine.stack.loss_reads_head:
        return np.zeros_like(shard.tp)
    head = state.local_parameters(workload.head, shard, workload.vocab_divisor)
    apart = (degrees.zero_stage >= 3) & _sharded(shard, degrees)
    return np.where(apart, head.total * machine.rules.gather_bytes, 0)


def _idle_logits(
    workload: WorkloadGraph, machine: Machine, shard: Shard, degrees: Degrees
) -> Int64:
    """The 16-bit logits of a loss in one piece. In a pipeline they are held and counted anyway."""
    if not machine.stack.idle_logits or workload.head.in_pieces:
        return np.zeros_like(shard.tp)
    return np.where(degrees.pp > 1, 0, workload.head.output_bytes(shard))


def communicator_bytes(machine: Machine, shard: Shard, degrees: Degrees) -> Int64:
    """Buffers of all communicators that one device joins."""
    spec = machine.stack.reserve
    pair, more = int(spec.communicator_pair.si), int(spec.communicator.si)
    node = machine.cluster.groups[0].node
    per_node = node.devices_per_node
    each = int(spec.multicast_rank.si) if spec.multicast_rank and node.scale_up.multicast else 0
    replicas, pp, tp, cp = degrees.dp_replicate, degrees.pp, shard.tp, shard.cp
    ones, span = np.ones_like(tp), tp * cp * degrees.dp_shard
    experts = shard.ep * shard.etp
    # Sizes and strides; a model's ranks are those of tp and their likes on other stages.
    groups = [
        (tp, ones), (cp, tp), (degrees.dp_shard * cp, tp), (replicas, span), (tp * pp, ones),
        (span * replicas * pp, ones), (np.where(experts > 1, span // experts, 1), experts),
        (shard.etp if machine.stack.layers.experts == "dealt" else ones, ones),
    ]  # fmt: skip
    outer = np.maximum(shard.cp_ring, shard.cp_gather)
    levels = (shard.cp_exchange > 1) & (outer > 1)
    if levels.any():
        groups.append((np.where(levels, shard.cp_exchange, 1), tp))
        groups.append((np.where(levels, outer, 1), tp * shard.cp_exchange))
    layers = machine.stack.layers
    if layers.gradient_wire_bytes_per_64 or layers.hierarchical_gathers:
        ways = degrees.dp_shard * cp
        inner, apart = Wire(layers, per_node).levels(Mesh(ways, tp, replicas, span))
        groups.append((np.where(apart, inner, 1), tp))
        groups.append((np.where(apart, ways // inner, 1), tp * inner))
    if machine.stack.delayed_scaling and machine.precision == "fp8":
        groups.append((span * replicas, ones))
    if spec.loss_group:
        groups.append((degrees.dp_shard * replicas, tp * cp))
    total = np.zeros_like(tp)
    for size, stride in groups:
        total = total + np.where(size > 2, more, np.where(size == 2, pair, 0))
        together = np.minimum(size, np.maximum(per_node // stride, 1))
        total = total + np.where(together > 2, together * each, 0)
    total = total + (np.minimum(shard.ep, per_node) - 1) * int(spec.exchange_peer.si)
    if layers.gradient_wire_bytes_per_64:
        total = total + np.where(apart, inner - 1, 0) * int(spec.exchange_peer.si)
    result: Int64 = total + np.minimum(pp - 1, 2) * int(spec.pipeline_peer.si)
    return result
