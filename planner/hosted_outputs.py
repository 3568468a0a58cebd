"""Outputs of layers that a layout's recomputation keeps on the hosts."""

from __future__ import annotations

import numpy as np

from cost_models.configs import shard_of
from cost_models.host_outputs import without_room
from cost_models.memory import offloaded_bytes
from planner.errors import InputError
from planner.layouts import configs_of
from planner.plan import Layout
from planner.recompute import named_policy
from planner.request import Request


def check_hosted_outputs(request: Request, layout: Layout) -> None:
    """Raise :class:`InputError` where the hosts cannot take what the layout's modes send."""
    shard = shard_of(request.workload, configs_of(layout))
    for mode in sorted({part.mode for stage in layout.stages for part in stage.recompute}):
        policy = named_policy(mode, request.stack)
        if not policy.offloads:
            continue
        pipelines = np.array([layout.pp])
        if without_room(request.workload, shard, pipelines, policy, request.machine)[0]:
            deep = "those of a pipeline would hold several microbatches, which is not priced"
            why = deep if layout.pp > 1 else "they have no room for them"
            raise InputError(f"layout: recompute {mode} sends outputs to the hosts; {why}")


def hosted_bytes(request: Request, layout: Layout) -> int:
    """Bytes that one device keeps on its host, and sends and fetches with every microbatch."""
    shard = shard_of(request.workload, configs_of(layout))
    return sum(
        part.layers
        * int(
            offloaded_bytes(
                request.workload.kinds[part.kind], shard, named_policy(part.mode, request.stack)
            )[0]
        )
        for stage in layout.stages
        for part in stage.recompute
    )
