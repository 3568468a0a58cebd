"""Outputs of layers that a layout's recomputation keeps on the hosts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cost_models.configs import shard_of
from cost_models.graph import Shard
from cost_models.host_outputs import Waiting, host_bytes, without_room
from cost_models.idle_passes import bubble_passes
from cost_models.layer_offload import hosted_bytes as layer_bytes
from cost_models.memory import Activations
from hardware_profiles.units import format_bytes
from planner.errors import InputError
from planner.given_outside import outside_recompute
from planner.hosting import host_capacity
from planner.layouts import configs_of
from planner.plan import Layout
from planner.recompute import named_policy
from planner.request import Request


def check_hosted_outputs(request: Request, layout: Layout) -> None:
    """Raise :class:`InputError` where the hosts cannot take what the layout's modes send."""
    shard, waiting = shard_of(request.workload, configs_of(layout)), _waiting(request, layout)
    outside = Counter[str]()
    for (kind, _), count in outside_recompute(layout, request).items():
        outside[kind] += count
    for mode in sorted({part.mode for stage in layout.stages for part in stage.recompute}):
        policy = named_policy(mode, request.stack)
        if not policy.sends:
            continue
        machine, workload = request.machine, request.workload
        if without_room(workload, shard, waiting, machine, (policy,), outside)[0, 0]:
            several = f" of all {layout.num_microbatches} microbatches" if layout.pp > 1 else ""
            spec = request.stack.layer_offload
            each = host_bytes(workload, shard, waiting, (policy,), spec, outside)[0, 0]
            capacity = host_capacity(request)
            node = request.cluster.groups[0].node
            room = (
                f"{node.name} states no host_memory"
                if capacity is None
                else f"{format_bytes(int(each) * node.devices_per_node)} per node, which has "
                f"{format_bytes(capacity)}"
            )
            raise InputError(
                f"layout: recompute {mode} sends outputs{several} to the hosts; they have no room "
                f"for them: {room}"
            )


def hosted_bytes(request: Request, layout: Layout) -> tuple[int, int]:
    """Bytes that one device keeps on its host, and those that it sends there with a microbatch."""
    shard = shard_of(request.workload, configs_of(layout))
    sent = _first_layers(request, layout, shard)
    if sent:
        return sent, sent
    whole = sum(
        part.layers * _listed(request, part.kind, part.mode, shard)
        for stage in layout.stages
        for part in stage.recompute
    )
    # A rank's share of the batch takes as much room outside the pipeline as inside.
    outside = sum(
        count * _listed(request, kind, mode, shard)
        for (kind, mode), count in outside_recompute(layout, request).items()
        if mode != "none"
    )
    whole += outside
    held = _waiting(request, layout).on_one_device(np.array([whole]), outside)
    return int(held[0]), -(-whole // layout.pp)


def _first_layers(request: Request, layout: Layout, shard: Shard) -> int:
    """What the model's first layers send, where a layout offloads them."""
    spec = request.stack.layer_offload
    for part in layout.stages[0].recompute:
        policy = named_policy(part.mode, request.stack)
        if policy.hosted_layers and spec is not None:
            return int(layer_bytes(request.workload, shard, policy, spec)[0])
    return 0


def _listed(request: Request, kind: str, mode: str, shard: Shard) -> int:
    policy = named_policy(mode, request.stack)
    if not policy.offloads:
        return 0
    return int(Activations(request.workload.kinds[kind], shard).listed(policy, policy.offloads)[0])


def _waiting(request: Request, layout: Layout) -> Waiting:
    idle = bubble_passes(layout.schedule, layout.pp) if request.stack.idle_passes_stay else 0
    return Waiting(np.array([layout.pp]), np.array([layout.num_microbatches]), layout.vpp, idle)
