"""What the cost model says of one layer of each layout, for brute force: it defines the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from cost_models.configs import Configs, PricedConfigs, price_configs
from planner.request import Request
from tests.oracle.layouts import (
    CP_KINDS,
    Layout,
)
from tests.oracle.vocabulary import Ends, ends_of


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sums over one virtual stage."""

    forward: int
    backward: int
    gradient: int
    update: int
    static: int
    made: int
    activation: int
    working: int
    draining: int
    step: int
    inputs: int
    """Of a backward in two halves, the first; then the second, and what waits for it."""
    weights: int
    waiting: int
    unsummed: int
    """Gradients of weights that wait for the next microbatch."""
    gathered: int = 0
    """Weights that stay gathered behind a backward."""


@dataclass
class Prices:
    """One layout's integers per layer, and the chunks summed from them so far."""

    layers: tuple[tuple[int, ...], ...]
    embedding: tuple[int, ...]
    head: tuple[int, ...]
    hop: int
    bucket: int
    tied_sync: int
    sync: int
    fixed: int
    receive: int
    output: int
    """What the last stage keeps of each microbatch until the step ends."""
    capacity: int
    policies: tuple[str, ...]
    """Recomputation in the order of its rows: kept, working, extra time of each."""
    late: tuple[tuple[int, int], ...] = ()
    """Per cut between layers, what its transfers take beyond ``hop``."""
    waiting: tuple[str, ...] = ()
    """Schedules in which a rank waits until what it sends has arrived."""
    put_off: tuple[int, int, int] = (0, 0, 0)
    """Of the last stage's backward: in how many microbatches at most a part waits, for how long it
    runs and what it reads."""
    blocks_stay: bool = False
    """Whether what a layer does not keep stays cached beside the loss."""
    ends: Ends | None = None
    """Parts of embedding and head that every rank has."""
    shares: tuple[tuple[int, ...], ...] = ()
    """As ``layers``, run by all stages at once, on a share of the batch each."""
    ahead: int = 0
    """Layers gathered before the one whose backward runs, where weights stay gathered behind it."""
    stay: bool = False
    """Whether passes on padding keep what others do."""
    casts: tuple[int, ...] = ()
    """Per layer, weights that a pass keeps on ranks of several virtual stages where all that
    autodiff saves stays."""
    chunks: dict[tuple[object, ...], Chunk] = field(default_factory=dict)

    def key(self) -> tuple[object, ...]:
        """Everything that defines the problem."""
        return (self.layers, self.embedding, self.head, self.hop, self.bucket, self.tied_sync,
                self.sync, self.fixed, self.receive, self.output, self.capacity, self.late,
                self.waiting, self.put_off, self.blocks_stay, self.ends, self.shares,
                self.stay, self.casts)  # fmt: skip


def _configs(layouts: Sequence[Layout]) -> Configs:
    def column(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return np.array([getattr(x, name) for x in layouts], dtype=np.int64)

    return Configs(
        microbatch=column("microbatch"), tp=column("tp"), cp=column("cp"),
        cp_kind=np.array(
            [CP_KINDS.index(x.cp_kind) + (5 * x.cp_inner if x.cp_kind in CP_KINDS[3:] else 0)
             for x in layouts],
            dtype=np.int64,
        ),
        ep=column("ep"), etp=column("etp"), sequence_parallel=column("sp").astype(bool),
        dp_replicate=column("dp_replicate"), dp_shard=column("dp_shard"), pp=column("pp"),
        zero_stage=column("zero"), reshard=column("reshard"),
    )  # fmt: skip


def usable(request: Request) -> int:
    """Most bytes of a prediction that fit: the device's memory is that and the margin on it."""
    memory = request.capacity_bytes or int(request.machine.device.memory_capacity.si)
    margin = request.job.memory_margin
    return memory if not margin else int(memory / (1 + Fraction(str(margin))))


def price_all(request: Request, layouts: Sequence[Layout]) -> list[Prices]:
    """Prices of each layout."""
    tables = price_configs(
        request.workload, request.machine, _configs(layouts), reserve_bytes=request.reserve_bytes,
        capacity_bytes=usable(request),
    )  # fmt: skip
    return [_take(request, tables, index) for index in range(len(layouts))]


def priced_alone(request: Request, layout: Layout) -> Prices:
    """Prices of one layout by itself."""
    return price_all(request, [layout])[0]


def _take(request: Request, tables: PricedConfigs, index: int) -> Prices:
    spread = int(tables.configs.dp_shard[index] * tables.configs.cp[index])
    rows = {
        name: tuple(table[:, index].tolist())
        for name, table in zip(tables.kind_names, tables.kinds, strict=True)
    }
    apart = {
        name: tuple(table[:, index].tolist())
        for name, table in zip(tables.kind_names, tables.outside, strict=False)
    }
    return Prices(
        shares=tuple(apart[name] for name in request.workload.layers if apart),
        layers=tuple(rows[name] for name in request.workload.layers),
        embedding=tuple(tables.embedding[:, index].tolist()),
        head=tuple(tables.head[:, index].tolist()),
        hop=int(tables.hop_ns[index]),
        bucket=int(tables.bucket_ns[index]),
        tied_sync=int(tables.tied_sync_ns[index]),
        sync=int(tables.sync_ns[index]),
        fixed=int(tables.fixed_bytes[index]),
        receive=int(tables.receive_bytes[index]),
        output=int(tables.output_bytes[index]),
        capacity=tables.capacity_bytes,
        policies=tables.policies,
        late=tuple((int(on[index]), int(back[index])) for on, back in tables.late),
        waiting=request.stack.blocking_transfers,
        put_off=_put_off(request, tables, index),
        blocks_stay=request.stack.idle_forward
        and not (request.job.loss == "chunked" and request.stack.loss_chunks > 1),
        ends=ends_of(tables, index),
        stay=request.stack.idle_passes_stay,
        ahead=request.stack.prefetched_units if spread > 1 else 0,
        casts=_casts(request, tables, index),
    )


def _put_off(request: Request, tables: PricedConfigs, index: int) -> tuple[int, int, int]:
    most, found = request.stack.deferred_head_gradients, tables.put_off
    if not most or found is None or not found.each_ns[index]:
        return 0, 0, 0
    return most, int(found.each_ns[index]), int(found.each_bytes[index])


def _casts(request: Request, tables: PricedConfigs, index: int) -> tuple[int, ...]:
    """By layer, in the arithmetic's bytes: matrices and vectors over what splits them."""
    x = tables.configs
    tp, ep, etp = (int(column[index]) for column in (x.tp, x.ep, x.etp))
    found, size = {}, {"fp32": 4, "fp8": 1}.get(request.job.precision, 2)
    if request.job.precision == "fp8" and request.machine.device.vendor == "amd":
        size = 2
    for name in tables.kind_names:
        total = 0
        for weight in request.workload.kinds[name].weights:
            ways = {"column": tp, "row": tp, "expert_column": ep * etp, "expert_row": ep * etp}
            split = ways.get(weight.sharding, 1)
            if weight.kv_heads:
                split = min(tp, weight.kv_heads)
            total += size * weight.elements // split
        found[name] = total
    return tuple(found[name] for name in request.workload.layers)
