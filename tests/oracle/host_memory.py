"""What the devices of a layout keep on their nodes, by loops over weights, ranks and devices."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.graph import LayerKind, Weight
from planner.request import Request
from tests.oracle.layouts import Layout
from tests.oracle.timeline import held as chunks_of_rank
from tests.oracle.timeline import homes, live_vectors


def hosts_hold(request: Request, x: Layout, sizes: Sequence[int]) -> bool:
    """Whether every node has room for what its devices send there, where virtual stages have
    ``sizes`` layers: the optimizer's state, and the inputs of layers."""
    job, memory = request.job, request.cluster.groups[0].node.host_memory
    if memory is None or not (job.optimizer_offload or job.activation_offload):
        return True
    if job.activation_offload and least_on_node(request, x) > memory.si:
        return False
    return all(total <= memory.si for total in bytes_on_nodes(request, x, sizes))


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
    tokens = x.microbatch * (request.sequence // x.cp) // (x.tp if x.sp else 1)
    size = tokens * request.workload.boundary_bytes_per_token
    parts = (request.job.constraints.recompute or "").startswith("partitioned")
    return -(-size // x.tp) if parts else size


def bytes_on_nodes(request: Request, x: Layout, sizes: Sequence[int]) -> list[int]:
    """Bytes on each node; devices fill nodes in order, the ranks of a pipeline one after the
    other."""
    work = request.workload
    held = [0] * x.pp
    first = 0
    home = homes(x.schedule, x.pp, x.vpp)
    microbatches = request.global_batch // (x.dp_replicate * x.dp_shard * x.microbatch)
    layers = [[0] * x.vpp for _ in range(x.pp)]
    for stage, size in enumerate(sizes):
        for name in work.layers[first : first + size]:
            held[home[stage]] += _state(request, x, work.kinds[name])
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
    return nodes


def _state(request: Request, x: Layout, kind: LayerKind) -> int:
    """Optimizer bytes of one device's shard of a layer; a tied head has none of its own beside the
    embedding."""
    if not request.job.optimizer_offload:
        return 0
    dense = expert = 0
    for weight in kind.weights:
        if weight.copy and x.pp == 1:
            continue
        if weight.sharding.startswith("expert"):
            expert += _on_device(request, x, weight)
        else:
            dense += _on_device(request, x, weight)
    if x.zero:
        dense = -(-dense // (x.dp_shard * x.cp))
        expert = -(-expert // max(x.dp_shard * x.cp * x.tp // (x.ep * x.etp), 1))
    offload = request.stack.offload
    assert offload is not None
    assert offload.optimizer_bytes is not None
    share = round(1000 * request.job.optimizer_offload_share)
    return -(-(dense + expert) * offload.optimizer_bytes * share // 1000)


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
