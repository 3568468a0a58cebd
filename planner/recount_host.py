"""What waits on the hosts, once more and tensor by tensor: the recheck's own count."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from cost_models.configs import shard_of
from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import LayerKind, Shard
from cost_models.layer_offload import leaves
from cost_models.layout import RecomputePolicy
from cost_models.named_outputs import LAYER_INPUT, SAVED, pieces, unneeded
from cost_models.ops import Attention, GroupedMatMul, MatMul, Op
from planner.layouts import configs_of
from planner.plan import Layout
from planner.recompute import named_policy
from planner.request import Request

if TYPE_CHECKING:
    from planner.recount import Mesh


def shard_of_mesh(mesh: Mesh, request: Request, *, fsdp: int = 1) -> Shard:
    """The sizes of one device's parts, as arrays of one; ``fsdp`` ranks split weights."""
    return Shard(
        sequence=request.sequence,
        cp_kind=np.array([cp_kind_code(mesh.cp_kind, mesh.cp_inner)]),
        sequence_parallel=np.array([mesh.sp]),
        transposed=request.job.tensor_transpose,
        fsdp=np.array([fsdp]) if request.job.tensor_transpose > 1 else None,
        piped=np.array([mesh.pp > 1]) if request.job.tensor_transpose > 1 else None,
        **{
            name: np.array([value])
            for name, value in (
                ("microbatch", mesh.mbs), ("tp", mesh.tp), ("cp", mesh.cp), ("ep", mesh.ep),
                ("etp", mesh.etp),
            )
        },
    )  # fmt: skip


def inputs_held(mesh: Mesh, run: tuple[str, int, int, int], request: Request) -> int:
    """Bytes on a node of the inputs that the first stage's devices send there, of modules or of
    layers, its share of the layers taken as any stage's. ``run`` is schedule, virtual stages,
    microbatches and the size of rounds."""
    schedule, vpp, m, size = run
    shard = shard_of_mesh(mesh, request)
    workload, modules = request.workload, request.machine.offload.inputs
    layer_bytes = 0
    for name, layers in Counter(workload.layers).items():
        for tensor in workload.kinds[name].saved(shard):
            if tensor.input_of in modules:
                layer_bytes += layers * int(np.broadcast_to(tensor.bytes, (1,))[0])
    layer_bytes += len(workload.layers) * layer_input_held(mesh, request)
    known = {"gpipe": m, "looped_bfs": m * vpp, "1f1b": min(m, mesh.pp)}
    alive = known.get(schedule.removesuffix("_delayed"))
    if alive is None:
        alive = min(m * vpp, 2 * mesh.pp - 1 + (vpp - 1) * size)
    held = -(-layer_bytes * alive // (mesh.pp * vpp))
    return held * request.cluster.groups[0].node.devices_per_node


def layer_input_held(mesh: Mesh, request: Request) -> int:
    """Bytes of one layer's input that a device may send to its host; a part of it where the job
    asks for parts."""
    if not request.job.activation_offload:
        return 0
    parts = request.job.tensor_transpose if request.job.tensor_transpose > 1 else mesh.tp
    tokens = mesh.mbs * (request.sequence // mesh.cp) // (parts if mesh.sp else 1)
    size = tokens * request.workload.boundary_bytes_per_token
    asked = (request.job.constraints.recompute or "").startswith("partitioned")
    return -(-size // mesh.tp) if asked else size


def outputs_held(layout: Layout, request: Request) -> int:
    """Bytes on a node of the outputs that the layout's modes send there: what the layers' products
    write, of all microbatches under a pipeline, each stage's share of the layers taken as any
    other's; and of passes on padding, where these keep theirs."""
    shard = shard_of(request.workload, configs_of(layout))
    whole, apart = _first_layers(layout, shard, request), 0
    for stage in layout.stages:
        parts = [(part.kind, part.mode, part.layers) for part in stage.recompute]
        if stage is layout.stages[0] and parts:
            # The layers that no stage holds, in the mode of all.
            held = {n for s in layout.stages for c in s.chunks for n in range(*c.layers)}
            left = set(range(len(request.workload.layers))) - held
            parts += [(request.workload.layers[n], parts[0][1], 1) for n in left]
        else:
            left = set()
        for place, (name, mode, layers) in enumerate(parts):
            policy = named_policy(mode, request.stack)
            if not policy.offloads:
                continue
            each = layers * outputs_of_layer(request.workload.kinds[name], shard, policy)
            whole += each
            apart += each * (place >= len(parts) - len(left))
    alive = layout.vpp * (layout.num_microbatches if layout.pp > 1 else 1)
    total = whole * alive + (whole - apart) * padding_of(layout.schedule, layout.pp, request)
    stages = layout.pp * layout.vpp
    return total // stages * request.cluster.groups[0].node.devices_per_node


def padding_of(schedule: str, pp: int, request: Request) -> int:
    """Passes on padding whose outputs are kept as any others."""
    if not request.stack.idle_passes_stay or not schedule.startswith(("gpipe", "looped_bfs")):
        return 0
    return 2 * pp - 2 if schedule.endswith("_delayed") else pp - 1


def _first_layers(layout: Layout, shard: Shard, request: Request) -> int:
    """Bytes of the tensors that the first layers of a layout without a pipeline send."""
    modes = {part.mode for stage in layout.stages for part in stage.recompute}
    numbers = [int(mode.removeprefix("offload:")) for mode in modes if mode.startswith("offload:")]
    spec = request.stack.layer_offload
    if not numbers or spec is None:
        return 0
    total = 0
    for name in request.workload.layers[: numbers[0]]:
        for tensor in request.workload.kinds[name].saved(shard):
            if leaves(tensor, spec):
                total += int(np.broadcast_to(tensor.bytes, (1,))[0])
    return total


def outputs_of_layer(kind: LayerKind, shard: Shard, policy: RecomputePolicy) -> int:
    """Bytes of one layer and microbatch that a policy sends there."""
    ops = kind.ops(shard)
    ends = unneeded(ops) if policy.needed_only else frozenset()
    layer = 0.0
    for op in ops:
        if op.name not in ends:
            layer += _written(op, ops, policy, shard, kind.element_bytes)
    if SAVED in policy.offloads:
        held = sum(np.ravel(tensor.bytes)[0] for tensor in kind.saved(shard))
        layer = float(held + sum(w.elements for w in kind.weights) * kind.element_bytes)
    if LAYER_INPUT in policy.offloads:
        layer += float(np.broadcast_to(kind.boundary_bytes(shard), (1,))[0])
    return math.ceil(layer)


def _written(
    op: Op, ops: tuple[Op, ...], policy: RecomputePolicy, shard: Shard, element_bytes: int
) -> float:
    """Bytes of what an op writes that a policy sends to the host."""
    if isinstance(op, Attention):
        rows = np.asarray(op.batch) * op.q_len * op.heads
        size = rows * (op.v_head_dim * element_bytes + 4)
        return float(np.ravel(size)[0]) if "attention" in policy.offloads else 0.0
    if op.name == "latent_norm":
        latents = sum(piece.width for piece in pieces(op, ops) if piece.name in policy.offloads)
        down = next(other for other in ops if other.name == "kv_down")
        assert isinstance(down, MatMul)
        return float(np.ravel(np.asarray(down.m) * latents * element_bytes)[0])
    if not isinstance(op, MatMul | GroupedMatMul):
        return 0.0
    sent = [piece.share for piece in pieces(op, ops) if piece.name in policy.offloads]
    many = (op.m, op.batch) if isinstance(op, MatMul) else (op.rows * op.room, op.groups)
    size = np.asarray(many[0]) * many[1] * op.n * element_bytes
    scattered = isinstance(op, MatMul) and op.name in ("proj", "fc2", "shared_fc2")
    ways = np.asarray(shard.sp if scattered else 1)
    if op.name == "fc2":
        ways = ways // shard.transposed  # the product makes a part of the width
    return float(np.ravel(size * sum(sent) / ways)[0])
