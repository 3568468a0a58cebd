"""What a layout communicates: calls and bytes by collective, group and pass.

The calls are those of the ops and of the data-parallel side that are priced; nothing here is
counted by a rule of its own. ``bytes`` are of the whole buffer (gathered or unreduced), summed over
calls. Ring exchanges are ``size - 1`` sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cost_models import data_traffic, expert_exchange, state
from cost_models.communication import group_of, routed
from cost_models.data_traffic import DataParallel
from cost_models.graph import Bools, LayerKind, Shard
from cost_models.layout import RecomputePolicy
from cost_models.memory import sequence_tiles
from cost_models.named_outputs import spared, unneeded
from cost_models.ops import Collective, Op, Reals, collectives
from cost_models.orthogonalise import exchanges
from cost_models.placed import placed
from cost_models.step import Machine
from cost_models.tiled import forwards, in_pieces

Pass = Literal["forward", "backward", "recompute", "step"]
SHARDS = {"tp_shards": "dp_shard", "tp_and_shards": "tp_dp_shard", "tp_sharing": "dp_cp"}
"""Groups of a layer's own calls that data-parallel ranks are in."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Equal calls of one rank; in one pass of one microbatch, or (``step``) once per step."""

    name: str
    group: str
    """Dimension of the mesh: tp, cp, ep, etp, dp_shard, dp_replicate, expert_dp, pp, world; the
    levels of hierarchical context parallelism are cp_exchange and cp_ring; tp_dp_shard are all
    ranks of both and dp_cp all that share out tokens, where a layer's calls go over them
    (``planner.blocks.transposed_fsdp``)."""
    ranks: int
    phase: Pass
    kind: str
    count: int
    bytes: int
    """Of all ``count`` calls."""

    def times(self, factor: int) -> Calls:
        """The calls ``factor`` times over."""
        return replace(self, count=self.count * factor, bytes=self.bytes * factor)


def total(calls: Iterable[Calls]) -> tuple[Calls, ...]:
    """Calls of the same kind over the same group in the same pass as one; names are dropped."""
    counts: Counter[tuple[str, int, str, str]] = Counter()
    sizes: Counter[tuple[str, int, str, str]] = Counter()
    for call in calls:
        key = (call.group, call.ranks, call.phase, call.kind)
        counts[key] += call.count
        sizes[key] += call.bytes
    return tuple(
        Calls("", group, ranks, phase, kind, counts[key], sizes[key])  # type: ignore[arg-type]
        for key in counts
        for group, ranks, phase, kind in [key]
    )


def layer_calls(kind: LayerKind, shard: Shard, machine: Machine) -> tuple[Calls, ...]:
    """Collectives inside one layer, one microbatch; ``shard`` holds one configuration."""
    return tuple(
        replace(call, count=times * call.count, bytes=times * call.bytes)
        for op, times in collectives(kind.ops(shard))
        for call in _op_calls(op, kind.shard(shard), machine)
    )


def recomputed_calls(
    kind: LayerKind, shard: Shard, machine: Machine, policy: RecomputePolicy, *, first: bool = True
) -> tuple[Calls, ...]:
    """Collectives that recomputation of one layer calls again in the backward; ``first`` of those
    that run again together."""
    ops = kind.ops(shard)
    return (
        *(_input_parts(kind, shard, policy) if first else ()),
        *(
            replace(call, phase="recompute")
            for op in ops
            if isinstance(op, Collective) and _runs_again(op, ops, policy)
            for call in _op_calls(op, kind.shard(shard), machine)
            if call.phase == "forward"
        ),
        *_in_pieces(kind, shard, machine, policy),
    )


def _in_pieces(
    kind: LayerKind, shard: Shard, machine: Machine, policy: RecomputePolicy
) -> Iterator[Calls]:
    """What pieces of the sequence add: a call for each instead of one, and the forward of those
    modules once more where the layer has run again before."""
    pieces = int(np.ravel(sequence_tiles(kind, shard))[0]) if policy.tiled else 1
    for op in in_pieces(kind.ops(shard), policy):
        for call in _op_calls(op, kind.shard(shard), machine):
            yield replace(call, count=call.count * (pieces - 1), bytes=0)
            if call.phase == "forward":
                runs = forwards(policy) - 1
                count = call.count * (pieces * runs - 1)
                yield replace(call, phase="recompute", count=count, bytes=call.bytes * (runs - 1))


def _input_parts(kind: LayerKind, shard: Shard, policy: RecomputePolicy) -> Iterator[Calls]:
    ways, size = int(shard.input_parts[0]), int(kind.boundary_bytes(shard)[0])
    if policy.in_parts and ways > 1:
        yield Calls(f"{kind.name}.input", "tp", ways, "recompute", "all_gather", 1, size)


def _runs_again(op: Collective, ops: tuple[Op, ...], policy: RecomputePolicy) -> bool:
    if policy.keeps is None:
        return bool(policy.modules.intersection(op.modules))
    if policy.needed_only and op.name in unneeded(ops):
        return False
    kept = any(names <= policy.keeps for names, _ in spared(op, ops))
    return not kept and op.forward_kind not in policy.keeps


def _op_calls(op: Collective, shard: Shard, machine: Machine) -> Iterator[Calls]:
    size, _ = group_of(op, shard)
    ranks = int(size[0])
    if ranks == 1 or not _first(op.active):
        return
    stack = machine.stack
    for back, side in zip((False, True), op.sides(), strict=True):
        if side is None:
            continue
        kind, payload = str(side.kind), side.bytes
        if op.routing is not None:
            dispatcher = stack.dispatcher(machine.device.name)
            routing = routed(op.routing, stack, gradients=back, outputs=op.back)
            kind, payload = expert_exchange.sent(dispatcher, routing, size, back=op.back != back)
            if dispatcher not in ("alltoall", "allgather"):
                kind = f"{dispatcher}_{'combine' if op.back != back else 'dispatch'}"
        count = round(_first(side.count))
        if kind == "permute":
            kind = "send_recv"
        if kind == "ring":
            kind, count = "send_recv", count * (ranks - 1)
        each = round(_first(payload))
        phase: Pass = "backward" if back else "forward"
        group = SHARDS.get(op.group)
        if group is None:
            whole = {"cp": shard.cp[0], "tp": shard.tp[0]}.get(op.group[:2])
            group = op.group[:2] if ranks == whole else op.group
        yield Calls(op.name, group, ranks, phase, kind, count, count * each)


def data_calls(
    kind: LayerKind, shard: Shard, data: DataParallel, machine: Machine, *, vocab_divisor: int,
    tied: bool = False,
) -> tuple[Calls, ...]:  # fmt: skip
    """Data-parallel collectives of one layer: per microbatch, or once per step (``step``).

    ``tied``: whether a tied head holds no weight of its own here.
    """
    local = state.local_parameters(
        kind, shard, vocab_divisor, drop_tied=np.array([tied]) if tied else None
    )
    every = bool(data_traffic.reduces_each(data, machine.rules)[0])
    each = bool(data_traffic.gathers_each(data, machine.rules)[0])
    between = bool(data_traffic.gathers_between(data, machine.rules)[0])
    again = each and bool(data_traffic.gathers_again(kind, data.zero_stage)[0])
    found: list[Calls] = []
    attention, expert = data_traffic.meshes(
        shard, data, machine.stack.layers, machine.fabric.devices_per_node
    )
    for elements, mesh, group in (
        (local.dense + local.again, attention, "dp_shard"), (local.expert, expert, "expert_dp"),
    ):  # fmt: skip
        pieces = data_traffic.gathered_pieces(
            kind, machine.stack.layers, experts=group == "expert_dp"
        )
        gathered = data_traffic.gathered_bytes(
            kind, shard, machine.rules, vocab_divisor, experts=group == "expert_dp"
        )
        wire = data_traffic.Wire(
            machine.stack.layers, machine.fabric.devices_per_node, whole_sums=machine.sums_whole
        )
        apart = placed(kind, shard, vocab_divisor) if group == "dp_shard" else None
        calls = data_traffic.calls(
            elements, mesh, data.zero_stage, machine.rules, pieces, gathered, wire, apart
        )
        if machine.sums_whole:
            calls += exchanges(
                kind, shard, data, machine, vocab_divisor, experts=group != "dp_shard"
            )
        for call in calls:
            if not call.active[0] or call.size[0] == 1:
                continue
            whole = int(data.zero_stage[0]) == 0
            replicas = call.over_replicas
            name = f"{kind.name}.{call.role}"
            late = replicas and machine.stack.replica_reduction == "step"
            late |= replicas or not each if call.role == "parameter" else not every
            first: Pass = "forward" if call.role == "parameter" else "backward"
            base = Calls(
                name, "dp_replicate" if replicas else "dp" if whole else group, int(call.size[0]),
                "step" if late else first, call.kind, call.count,
                round(call.count * float(call.bytes[0])),
            )  # fmt: skip
            found.append(base)
            if between and call.role == "parameter" and not replicas:
                found.append(replace(base, phase="backward"))
            if again and call.role == "parameter" and not replicas:
                kept = data_traffic.backward_mesh(mesh, data)
                ways = int((call.size if kept is mesh else kept.ways)[0])
                if ways > 1:
                    found.append(replace(base, phase="backward", ranks=ways))
    for call in data_traffic.tensor_parallel_sums(
        kind, shard, data, machine.stack.layers, machine.rules
    ):
        if call.active[0] and call.size[0] > 1:
            size = round(call.count * float(call.bytes[0]))
            late = not data_traffic.sums_each(data, machine.stack.layers, machine.rules)[0]
            when: Pass = "step" if late else "backward"
            found.append(
                Calls(
                    f"{kind.name}.sum", "tp", int(call.size[0]), when, call.kind, call.count, size
                )
            )
    return tuple(found)


def _first(value: Reals | Bools | bool) -> float:
    return float(np.ravel(np.asarray(value))[0])
