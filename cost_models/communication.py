"""Communication inside a layer: its time, and how much of it stays visible. Decided here only.

What hides behind what:

* tensor-parallel collectives of a column-parallel layer's backward hide behind the weight- or
  data-gradient product they are named with (Megatron's asynchronous linear layer), unless the stack
  overlaps nothing;
* where the stack pipelines (``tensor_parallel_overlap``), a gather before a product and a scatter
  after it run in tp chunks with the product's own chunks: the first (last) chunk's product is
  alone, each of the others shares its time with the transfer of one chunk. A chunk is a product
  with 1/tp of the rows, priced by the product law: cutting costs, and is not done where it costs
  more than it hides. Inside a node only;
* the context-parallel ring hides behind the attention of the block in hand;
* exchanges with the experts hide as the stack says (``expert_overlap``);
* while two things overlap, the hidden collective still costs its contention: ``overlap_contention``
  of the hidden time.

Everything else is exposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models import expert_exchange, interconnect
from cost_models.fabric import Fabric
from cost_models.graph import Int64, Shard
from cost_models.lanes import exchange_stride
from cost_models.ops import Collective, CollectiveKind, Reals, Routing
from hardware_profiles.schema import StackSpec

Real: TypeAlias = NDArray[np.float64]


@dataclass
class Windows:
    """Kernels of a layer that communication may run beside, by ``"op:fprop"`` and the like."""

    seconds: dict[str, Real] = field(default_factory=dict)
    in_parts: dict[str, Callable[[Int64], Real]] = field(default_factory=dict)
    """Seconds of one of so many equal chunks of a product's rows."""


@dataclass(frozen=True)
class Visible:
    """Seconds of a collective that nothing hides, forward and backward."""

    forward: Real
    backward: Real
    wire: tuple[Real, Real]
    """Seconds for which it keeps its links busy, hidden or not."""
    spans_nodes: NDArray[np.bool_]
    active: NDArray[np.bool_]


def expose(time: Real, window: Real, contention: float) -> Real:
    """What remains visible of ``time`` hidden behind ``window``: the rest, plus contention."""
    return np.maximum(time - window, 0.0) + contention * np.minimum(time, window)


def visible(
    op: Collective, shard: Shard, fabric: Fabric, stack: StackSpec, device: str, windows: Windows
) -> Visible | None:
    """The visible time of ``op`` for every configuration; ``None`` where nobody takes part."""
    size, stride = group_of(op, shard)
    if op.group == "ep" and stack.layers.experts == "folded":
        stride = exchange_stride(shard.tp, shard.ep, fabric.nodes * fabric.devices_per_node)
    active = np.asarray(op.active) & (size > 1)
    if not active.any():
        return None
    spans = interconnect.spans_nodes(fabric, size, stride)
    times: list[Real] = []
    wire: list[Real] = []
    for back, side in zip((False, True), op.sides(), strict=True):
        if side is None:
            times.append(np.zeros(len(size)))
            wire.append(times[-1])
            continue
        if op.routing is not None:
            time = _exchange(op, size, stride, fabric, stack, device, back=back)
        else:
            time = _collective_time(side.kind, side.bytes, size, stride, fabric) * side.count
        wire.append(np.where(active, time, 0.0))
        hidden, product = side.hidden, side.product
        contention = stack.overlap_contention.si
        if op.group.startswith("tp") and stack.tensor_parallel_overlap == "none":
            hidden = None
        hidden = hidden or (_shared_expert(op, back=back) if _hides_shared(op, stack) else None)
        if hidden is not None and hidden in windows.seconds:
            time = expose(time, windows.seconds[hidden], contention)
        elif product is not None and _pipelines(op, stack) and product in windows.in_parts:
            piped = _pipelined(time, product, size, windows, contention)
            time = np.where(spans, time, np.minimum(time, piped))
        times.append(np.where(active, time, 0.0))
    return Visible(
        times[0], times[1], (wire[0], wire[1]), spans, np.broadcast_to(active, size.shape)
    )


def merge_passes(
    exchanges: list[Visible], terms: dict[str, dict[str, Real]], contention: float
) -> dict[str, Real]:
    """``ep_comm`` by phase with the exchanges of a microbatch behind the other pass of another one.

    Where nodes part the experts, forward and backward of two microbatches run merged layer by
    layer (Megatron-Core's ``--overlap-moe-expert-parallel-comm``; DeepSeek-V3, arXiv 2412.19437,
    section 3.2.1). Full recomputation is taken to hide as the pass it belongs to. ``terms`` are the
    layer's seconds by category and phase, exchanges included.
    """
    plain, spans = terms["ep_comm"], exchanges[0].spans_nodes
    hidden = {}
    for phase, other in (("forward", "backward"), ("backward", "forward")):
        window = np.sum([t[other] for c, t in terms.items() if c != "ep_comm"], axis=0)
        time = np.sum([getattr(each, phase) for each in exchanges], axis=0)
        hidden[phase] = np.where(spans, time - expose(time, window, contention), 0.0)
    return {
        "forward": plain["forward"] - hidden["forward"],
        "backward": plain["backward"] - hidden["backward"],
    }


def group_of(op: Collective, shard: Shard) -> tuple[Int64, Int64]:
    """Ranks of a collective's group, and the stride between them."""
    match op.group:
        case "tp":
            return shard.tp, np.ones_like(shard.tp)
        case "tp_transposed":
            return np.full_like(shard.tp, shard.transposed), np.ones_like(shard.tp)
        case "tp_straight":
            return shard.straight, np.full_like(shard.tp, shard.transposed)
        case "tp_shards":
            return shard.shards, shard.tp * shard.cp
        case "tp_and_shards":
            return shard.shards * shard.tp, np.ones_like(shard.tp)
        case "tp_sharing":
            return shard.sharing, shard.tp
        case "cp":
            return shard.cp, shard.tp
        case "cp_exchange":
            return shard.cp_exchange, shard.tp
        case "cp_ring":
            return shard.cp_ring, shard.tp * shard.cp_exchange
        case "cp_gather":
            return shard.cp_gather, shard.tp * shard.cp_exchange
        case "ep":
            return shard.ep, shard.etp
        case "etp":
            return shard.etp, np.ones_like(shard.tp)


def _exchange(
    op: Collective, size: Int64, stride: Int64, fabric: Fabric, stack: StackSpec, device: str,
    *, back: bool,
) -> Real:  # fmt: skip
    """Dispatch or combine; the backward of one is the other, with gradients in 16 bits."""
    assert op.routing is not None
    routing = routed(op.routing, stack, gradients=back, outputs=op.back)
    return expert_exchange.exchange_time_s(
        fabric, stack.dispatcher(device), routing, size=size, stride=stride, back=op.back != back
    )


def routed(routing: Routing, stack: StackSpec, *, gradients: bool, outputs: bool) -> Routing:
    """``routing`` with the rows that travel: tokens to experts may go in 8 bits."""
    if gradients or outputs or stack.moe_dispatch_bytes >= 2:
        return routing
    return replace(routing, row_bytes=routing.row_bytes * stack.moe_dispatch_bytes // 2)


def _hides_shared(op: Collective, stack: StackSpec) -> bool:
    return op.routing is not None and stack.expert_overlap == "shared_expert"


def _shared_expert(op: Collective, *, back: bool) -> str:
    """The shared expert's product that runs beside a dispatch or a combine."""
    return f"shared_{'fc2' if op.back else 'fc1'}:{'dgrad' if back else 'fprop'}"


def _pipelines(op: Collective, stack: StackSpec) -> bool:
    return op.group.startswith("tp") and stack.tensor_parallel_overlap == "pipelined"


def _pipelined(time: Real, product: str, parts: Int64, windows: Windows, contention: float) -> Real:
    """Visible time of a gather or scatter that is pipelined with ``product`` in ``parts`` chunks.

    ``chunk + (parts - 1) max(chunk, transfer) - whole``, where ``transfer`` is one of the parts - 1
    messages of the ring.
    """
    chunk = windows.in_parts[product](parts)
    others = np.maximum(parts - 1, 1)
    together = chunk + others * np.maximum(chunk, time / others)
    rest = np.maximum(together - windows.seconds[product], 0.0)
    exposed: Real = rest + contention * np.maximum(time - rest, 0.0)
    return exposed


def _collective_time(
    kind: CollectiveKind, payload: Reals, size: Int64, stride: Int64, fabric: Fabric
) -> Real:
    if kind == "ring":
        hop = interconnect.send_recv_time_s(fabric, payload, stride=stride, size=size)
        return hop * (size - 1)
    if kind == "permute":
        return interconnect.send_recv_time_s(fabric, payload, stride=stride, size=size)
    return interconnect.collective_time_s(fabric, kind, payload, size=size, stride=stride)
