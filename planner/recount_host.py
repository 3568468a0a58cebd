"""What waits on the hosts, once more and tensor by tensor: the recheck's own count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import Shard
from planner.request import Request

if TYPE_CHECKING:
    from planner.recount import Mesh


def inputs_held(mesh: Mesh, run: tuple[str, int, int], request: Request) -> int:
    """Bytes on a node of the module inputs that the first stage's devices send there, its share of
    the layers taken as any stage's. ``run`` is schedule, virtual stages and microbatches."""
    schedule, vpp, m = run
    shard = Shard(
        sequence=request.sequence,
        cp_kind=np.array([cp_kind_code(mesh.cp_kind, mesh.cp_inner)]),
        sequence_parallel=np.array([mesh.sp]),
        **{
            name: np.array([value])
            for name, value in (
                ("microbatch", mesh.mbs), ("tp", mesh.tp), ("cp", mesh.cp), ("ep", mesh.ep),
                ("etp", mesh.etp),
            )
        },
    )  # fmt: skip
    workload, modules = request.workload, request.machine.offload.inputs
    layer_bytes = 0
    for name in workload.layers:
        for tensor in workload.kinds[name].saved(shard):
            if tensor.input_of in modules:
                layer_bytes += int(np.broadcast_to(tensor.bytes, (1,))[0])
    alive = {"gpipe": m, "looped_bfs": m * vpp, "1f1b": min(m, mesh.pp)}.get(schedule)
    if alive is None:
        alive = min(m * vpp, (vpp + 1) * mesh.pp - 1)
    held = -(-layer_bytes * alive // (mesh.pp * vpp))
    return held * request.cluster.groups[0].node.devices_per_node
