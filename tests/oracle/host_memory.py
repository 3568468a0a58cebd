"""What the devices of a layout keep on their nodes, by loops over weights, ranks and devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import LayerKind, Shard, Weight
from planner.recompute import named_policy
from planner.recount_host import outputs_of_layer
from planner.request import Request
from tests.oracle.layouts import Layout, Option, parts
from tests.oracle.timeline import held as chunks_of_rank
from tests.oracle.timeline import homes, live_vectors, padded

MOMENTS = {"adamw": 8, "sgd": 4, "muon": 4, "lion": 4, "adagrad": 4}
"""Bytes per parameter of moments that a host keeps; Muon's of hidden matrices."""

LOOPS = {"sgd": (4, 0), "rmsprop": (4, 4), "adamax": (8, 4), "adadelta": (8, 8),
         "adafactor": (4, 8)}  # fmt: skip
"""Bytes per parameter of moments, and of new tensors, of optimizers that PyTorch runs there."""


def hosts_hold(
    request: Request, x: Layout, sizes: Sequence[int], options: Sequence[Option], m: int
) -> bool:
    """Whether every node has room for what its devices send there of ``m`` microbatches, where
    virtual stages have ``sizes`` layers and ranks recompute as ``options`` say: the optimizer's
    state, outputs and inputs of layers."""
    job, node = request.job, request.cluster.groups[0].node
    memory = node.drives if swaps(request) else node.host_memory
    if memory is None or not (job.optimizer_offload or job.activation_offload):
        return True
    if job.activation_offload and least_on_node(request, x) > memory.si:
        return False
    return all(total <= memory.si for total in bytes_on_nodes(request, x, sizes, options, m))


def swaps(request: Request) -> bool:
    """Whether the optimizer's state goes on to drives."""
    offload = request.stack.offload
    drives = None if offload is None else offload.drives
    return request.job.optimizer_offload and drives is not None and "optimizer" in drives.holds


def padding_has_room(request: Request, x: Layout, mode: str, m: int) -> bool:
    """Whether a device's share of its node's memory takes outputs of passes on padding too."""
    if not request.stack.idle_passes_stay or x.pp == 1:
        return True
    node = request.cluster.groups[0].node
    room = 0 if node.host_memory is None else int(node.host_memory.si) // node.devices_per_node
    return with_padding(request, x, mode, m) <= room


def with_padding(request: Request, x: Layout, mode: str, m: int) -> int:
    """Bytes that one device sends of outputs, its stage's share of the layers taken as any other's:
    of the microbatches and, but for layers outside the pipeline, of passes on padding."""
    idle = sum(padded(x.schedule, x.pp, x.vpp, m, 0))
    _, inside, _ = parts(request, x.outside) if x.outside else (0, range(1 << 30), 0)
    total = 0
    for layer, name in enumerate(request.workload.layers):
        each = _outputs(request, x, request.workload.kinds[name], mode)
        total += each * (m * x.vpp + idle * (layer in inside))
    return -(-total // (x.pp * x.vpp))


def least_on_node(request: Request, x: Layout) -> float:
    """Bytes without which the search takes no layout: all of a node's devices as those of a first
    stage that has as many layers as any, and state as if nodes had equal parts."""
    microbatches = request.global_batch // (x.dp_replicate * x.dp_shard * x.microbatch)
    alive = min(microbatches, x.pp)
    inputs = -(-request.model.layer_count * layer_input(request, x) * alive // x.pp)
    held = float(inputs * request.cluster.groups[0].node.devices_per_node)
    if request.job.optimizer_offload:
        work, offload = request.workload, request.stack.offload
        assert offload is not None
        assert offload.optimizer_bytes is not None
        kinds = [work.embedding, work.head, *(work.kinds[name] for name in work.layers)]
        elements = sum(
            w.rows * w.cols * w.count for kind in kinds for w in kind.weights if not w.copy
        )
        copies = x.dp_replicate * (1 if x.zero else x.dp_shard * x.cp)
        held += copies * (elements * offload.optimizer_bytes // request.cluster.nodes)
    return held


def layer_input(request: Request, x: Layout) -> int:
    """Bytes of a layer's input that one device may send to its host in each microbatch."""
    if not request.job.activation_offload:
        return 0
    ways = x.tp if request.job.tensor_transpose == 1 else request.job.tensor_transpose
    tokens = x.microbatch * (request.sequence // x.cp) // (ways if x.sp else 1)
    size = tokens * request.workload.boundary_bytes_per_token
    parts = (request.job.constraints.recompute or "").startswith("partitioned")
    return -(-size // x.tp) if parts else size


def bytes_on_nodes(
    request: Request, x: Layout, sizes: Sequence[int], options: Sequence[Option], m: int
) -> list[int]:
    """Bytes on each node; devices fill nodes in order, the ranks of a pipeline one after the
    other. Layers outside the pipeline are on all ranks, each with its share of the batch."""
    work = request.workload
    ahead, inside, behind = parts(request, x.outside) if x.outside else (range(0),) * 3
    mode, alive = options[0][0], m if x.pp > 1 else 1
    held = [0] * x.pp
    for layer in (*ahead, *behind):
        kind = work.kinds[work.layers[layer]]
        share = -(-alive * _outputs(request, x, kind, mode) // x.pp)
        held = [size + _state(request, x, kind) + share for size in held]
    first = inside.start
    home = homes(x.schedule, x.pp, x.vpp)
    microbatches = request.global_batch // (x.dp_replicate * x.dp_shard * x.microbatch)
    layers = [[0] * x.vpp for _ in range(x.pp)]
    for stage, size in enumerate(sizes):
        for name in work.layers[first : first + size]:
            kind, mode = work.kinds[name], options[home[stage]][0]
            held[home[stage]] += _state(request, x, kind)
            outputs = _outputs(request, x, kind, mode)
            idle = 0
            if request.stack.idle_passes_stay and x.pp > 1:
                idle = sum(padded(x.schedule, x.pp, x.vpp, m, 0))
            held[home[stage]] += -(-outputs * (alive * x.vpp + idle) // x.vpp)
        layers[home[stage]][chunks_of_rank(x.schedule, x.pp, x.vpp, home[stage]).index(stage)] = (
            size
        )
        first += size
    held[home[0]] += _state(request, x, work.embedding)
    held[home[-1]] += _state(request, x, work.head)
    if request.job.activation_offload:
        for rank in range(x.pp):
            met = live_vectors(x.schedule, x.pp, x.vpp, microbatches, rank)
            most = max(
                sum(n * size for n, size in zip(live, layers[rank], strict=False)) for live in met
            )
            held[rank] += most * layer_input(request, x)
    per_node = request.cluster.groups[0].node.devices_per_node
    nodes = [0] * request.cluster.nodes
    for device in range(request.devices):
        nodes[device // per_node] += held[device // (request.devices // x.pp)]
    loop = request.job.optimizer_offload and request.job.optimizer in LOOPS
    if x.zero == 3 and loop and not swaps(request):
        nodes = [size + per_node * _group(request, x) for size in nodes]
    if _muon_there(request) and not swaps(request):
        nodes = [size + per_node * _muon_group(request, x) for size in nodes]
    return nodes


def _group(request: Request, x: Layout) -> int:
    """Bytes of one device of what a loop makes of a group of its parameters in stage 3."""
    work, offload = request.workload, request.stack.offload
    assert offload is not None
    moments, made = LOOPS[request.job.optimizer]
    kinds = [work.embedding, work.head, *(work.kinds[name] for name in work.layers)]
    # A loop of stage 3 has its state alone.
    elements = sum(_state(request, x, kind) for kind in kinds) // (8 + moments)
    return made * min(elements, offload.loop_elements)


def _muon_there(request: Request) -> bool:
    """Whether the host updates what Muon has orthogonalised on the device."""
    offload, job = request.stack.offload, request.job
    there = offload is not None and offload.updates_on == "host"
    return there and job.optimizer_offload and job.optimizer == "muon"


def _muon_group(request: Request, x: Layout) -> int:
    """Bytes of one device of what Adam's update makes, of four new tensors in fp32, of a group of
    those parameters that are in no hidden matrix."""
    work, offload = request.workload, request.stack.offload
    assert offload is not None
    total = 0
    for kind in (work.embedding, work.head, *(work.kinds[name] for name in work.layers)):
        for expert in (False, True):
            held = [
                (weight, _on_device(request, x, weight))
                for weight in kind.weights
                if weight.sharding.startswith("expert") == expert
                and not (weight.copy and x.pp == 1)
            ]
            ways = _ways(x, expert)
            taken = sum(size for weight, size in held if not _is_other(weight))
            total += -(-sum(size for _, size in held) // ways) - taken // ways
    return 16 * min(total, offload.loop_elements)


def _is_other(weight: Weight) -> bool:
    """Whether Adam updates it beside Muon."""
    return weight.cols == 1 or weight.name.startswith(("embedding", "head"))


def _ways(x: Layout, expert: bool) -> int:
    """Ranks that share a device's dense weights, or its experts."""
    if not x.zero:
        return 1
    ranks = x.dp_shard * x.cp
    return max(ranks * x.tp // (x.ep * x.etp), 1) if expert else ranks


def _state(request: Request, x: Layout, kind: LayerKind) -> int:
    """Optimizer bytes of one device's shard of a layer; a tied head has none of its own beside the
    embedding."""
    if not request.job.optimizer_offload:
        return 0
    dense = expert = others = 0
    for weight in kind.weights:
        if weight.copy and x.pp == 1:
            continue
        if weight.sharding.startswith("expert"):
            expert += _on_device(request, x, weight)
        else:
            dense += _on_device(request, x, weight)
            ends = weight.name.startswith(("embedding", "head"))
            if request.job.optimizer == "muon" and (weight.cols == 1 or ends):
                others += 4 * _on_device(request, x, weight)
    if x.zero:
        others = -(-others // (x.dp_shard * x.cp))
        dense = -(-dense // (x.dp_shard * x.cp))
        expert = -(-expert // max(x.dp_shard * x.cp * x.tp // (x.ep * x.etp), 1))
    offload = request.stack.offload
    assert offload is not None
    if offload.updates_on == "device":
        return (dense + expert) * MOMENTS[request.job.optimizer] + others
    assert offload.optimizer_bytes is not None
    if request.job.optimizer in LOOPS:
        # Master weight, gradient and moments; below stage 3 what the loop makes of the whole shard.
        # Beside drives that is in memory.
        moments, made = LOOPS[request.job.optimizer]
        whole = x.zero < 3 and not swaps(request)
        return (dense + expert) * (8 + moments + (made if whole else 0))
    if _muon_there(request):
        # Weight, gradient and momentum, in 16 bits but for drives; two moments in fp32 of what Adam
        # updates.
        momentum = 4 if request.job.precision == "fp32" or swaps(request) else 2
        more = sum(
            (8 - momentum) * _on_device(request, x, weight)
            for weight in kind.weights
            if _is_other(weight) and not (weight.copy and x.pp == 1)
        )
        return (dense + expert) * (8 + momentum) + -(-more // _ways(x, expert=False))
    share = round(1000 * request.job.optimizer_offload_share)
    each = offload.optimizer_bytes - MOMENTS["adamw"] + MOMENTS[request.job.optimizer]
    return -(-(dense + expert) * each * share // 1000)


def _outputs(request: Request, x: Layout, kind: LayerKind, mode: str) -> int:
    """Bytes of one microbatch that a layer's mode sends to the host."""
    if not any(p.name == mode and p.offloads for p in request.workload.policies):
        return 0
    kinds = {name: np.array([getattr(x, name)]) for name in ("microbatch", "tp", "cp", "ep", "etp")}
    turned = request.job.tensor_transpose > 1
    shard = Shard(
        sequence=request.sequence,
        cp_kind=np.array([cp_kind_code(x.cp_kind, x.cp_inner)]),
        sequence_parallel=np.array([x.sp]),
        transposed=request.job.tensor_transpose,
        fsdp=np.array([x.dp_shard if x.zero == 3 else 1]) if turned else None,
        piped=np.array([x.pp > 1]) if turned else None,
        **kinds,
    )
    return outputs_of_layer(kind, shard, named_policy(mode, request.stack))


def _on_device(request: Request, x: Layout, weight: Weight) -> int:
    """Elements of a weight before data parallelism splits them."""
    rows, cols, count = weight.rows, weight.cols, weight.count
    if weight.sharding == "vocab":
        multiple = request.stack.vocab_divisor
        rows = -(-rows // (multiple * x.tp)) * multiple
    elif weight.sharding == "column":
        rows = -(-rows // (min(x.tp, weight.kv_heads) if weight.kv_heads else x.tp))
    elif weight.sharding == "row":
        cols = -(-cols // x.tp)
    elif weight.sharding.startswith("expert"):
        return -(-rows * cols // x.etp) * -(-count // x.ep)
    return rows * cols * count
