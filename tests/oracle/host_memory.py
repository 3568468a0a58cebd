"""What the devices of a layout keep on their nodes, by loops over weights, ranks and devices."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.graph import LayerKind, Weight
from planner.request import Request
from tests.oracle.layouts import Layout
from tests.oracle.timeline import homes


def hosts_hold(request: Request, x: Layout, sizes: Sequence[int]) -> bool:
    """Whether every node has room for the optimizer's state of its devices, where virtual stages
    have ``sizes`` layers."""
    memory = request.cluster.groups[0].node.host_memory
    if not request.job.optimizer_offload or memory is None:
        return True
    return all(total <= memory.si for total in bytes_on_nodes(request, x, sizes))


def bytes_on_nodes(request: Request, x: Layout, sizes: Sequence[int]) -> list[int]:
    """Bytes on each node; devices fill nodes in order, the ranks of a pipeline one after the
    other."""
    work = request.workload
    held = [0] * x.pp
    first = 0
    home = homes(x.schedule, x.pp, x.vpp)
    for stage, size in enumerate(sizes):
        for name in work.layers[first : first + size]:
            held[home[stage]] += _state(request, x, work.kinds[name])
        first += size
    held[home[0]] += _state(request, x, work.embedding)
    held[home[-1]] += _state(request, x, work.head)
    per_node = request.cluster.groups[0].node.devices_per_node
    nodes = [0] * request.cluster.nodes
    for device in range(request.devices):
        nodes[device // per_node] += held[device // (request.devices // x.pp)]
    return nodes


def _state(request: Request, x: Layout, kind: LayerKind) -> int:
    """Optimizer bytes of one device's shard of a layer; a tied head has none of its own beside the
    embedding."""
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
    return (dense + expert) * offload.optimizer_bytes


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
