"""Candidates priced to integers, and lower bounds on what they can reach.

Two tiers. A *mesh* is priced without its data-parallel side (:func:`mesh_bounds`); only meshes
that may still win are expanded into layouts and priced in full (:func:`price_layouts`), where a
relaxed memory check also finds the least recomputation that could fit. The quantum of time is one
nanosecond per layer and category, so a sum over ``n`` terms is within ``n / 2`` ns of the real
number it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models import bounds
from cost_models.configs import Configs, PricedConfigs, price_configs
from cost_models.graph import Bools, Int64
from cost_models.leaf import Leaf, Recompute
from cost_models.step import Field
from planner.request import Request
from planner.space import SCHEDULE_NAMES, Layouts, Meshes

QUANTUM = "1 ns per layer and category, 1 byte"

Real = NDArray[np.float64]


def configs_of_meshes(
    meshes: Meshes, dp_replicate: Int64, dp_shard: Int64, zero_stage: Int64
) -> Configs:
    """Configurations of meshes with their data-parallel side."""
    return Configs(
        microbatch=meshes.microbatch,
        tp=meshes.tp,
        cp=meshes.cp,
        cp_kind=meshes.cp_kind,
        ep=meshes.ep,
        etp=meshes.etp,
        sequence_parallel=meshes.sp.astype(bool),
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        pp=meshes.pp,
        zero_stage=zero_stage,
    )


@dataclass(frozen=True)
class _Model:
    """Counts of each layer kind, in the order of the tables."""

    counts: tuple[int, ...]

    @property
    def layers(self) -> int:
        return sum(self.counts)


def _model(priced: PricedConfigs) -> _Model:
    layers = priced.workload.layers
    return _Model(tuple(layers.count(name) for name in priced.kind_names))


def mesh_bounds(request: Request, meshes: Meshes) -> Real:
    """Lower bound in ns on every layout of each mesh; infinity where none can fit.

    Compute and in-layer communication only, without recomputation; the least of plain and
    interleaved 1F1B (and GPipe), with as many virtual stages as there are layers. Memory: what no
    sharding removes, averaged over stages, with one microbatch's boundaries alive.
    """
    one = np.ones_like(meshes.dp)
    priced = price_configs(
        request.workload, request.machine, configs_of_meshes(meshes, meshes.dp, one, one * 0),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.capacity_bytes,
    )  # fmt: skip
    model = _model(priced)
    work = _sum(priced, model, (Field.FORWARD, Field.BACKWARD))
    m = request.global_batch // (meshes.dp * meshes.microbatch)
    shape = bounds.Shape(meshes.pp, one, m, one, one)
    zero = np.zeros(len(meshes))
    totals = bounds.Totals(
        work, zero, zero, zero, zero, priced.hop_ns.astype(np.float64), zero, zero
    )
    least = bounds.step_bound(one, shape, totals)
    if "interleaved" in request.stack.schedules or "gpipe" in request.stack.schedules:
        # No schedule beats a rank's share of the work after the least fill (virtual stages of one
        # layer: cost_models.bounds.interleaved), nor one microbatch's latency.
        layer = np.min([t[Field.FORWARD] + t[Field.BACKWARD] for t in priced.kinds], axis=0)
        fill = layer * (meshes.pp - 1) * (meshes.pp - 2) / 2 / meshes.pp
        latency = work + 2 * (meshes.pp - 1) * priced.hop_ns
        relaxed = np.maximum(m * work / meshes.pp + fill, latency) * bounds.SAFETY
        least = np.where(meshes.pp > 1, np.minimum(least, relaxed), least)
    held = _least_state(request, priced, model, meshes) + _sum(priced, model, (Field.ACT_FULL,))
    room = meshes.pp.astype(np.float64) * (priced.capacity_bytes - priced.fixed_bytes)
    return np.where(held > room, np.inf, least)


def _sum(priced: PricedConfigs, model: _Model, fields: Iterable[Field]) -> Real:
    """A field summed over layers and both ends."""
    total = np.zeros(priced.embedding.shape[1])
    for field in fields:
        for count, table in zip(model.counts, priced.kinds, strict=True):
            total += count * table[field].astype(np.float64)
        if field is not Field.ACT_FULL:
            total += priced.embedding[field] + priced.head[field].astype(np.float64)
    return total


def _least_state(
    request: Request, priced: PricedConfigs, model: _Model, meshes: Meshes
) -> Real:
    """Persistent bytes of a whole pipeline that no allowed sharding removes."""
    rules, stages = request.machine.rules, request.stack.zero_stages
    most = max(stages)
    parameters = _sum(priced, model, (Field.PARAMETERS,))
    ranks = (meshes.dp * meshes.cp * meshes.tp).astype(np.float64)
    fsdp = rules.weight_bytes > rules.gather_bytes
    state = parameters * 0.0
    for bytes_each, sharded_from in (
        (rules.weight_bytes, 2 if fsdp else 3),
        (rules.gradient_bytes, 2),
        (rules.optimizer_bytes, 1),
    ):
        state += parameters * bytes_each / (ranks if most >= sharded_from else 1.0)
    return state


@dataclass(frozen=True)
class PricedLayouts:
    """Layouts with their tables and bounds; ``leaf`` takes one of them out."""

    meshes: Meshes
    layouts: Layouts
    tables: PricedConfigs
    config: Int64
    """Column of each layout in the tables."""
    bound_ns: Real
    """Lower bound on the step; infinity where no partition can fit."""
    request: Request

    def leaf(self, index: int) -> Leaf:
        """The leaf of layout ``index``."""
        mesh = int(self.layouts.mesh[index])
        per_step = int(self.meshes.dp[mesh] * self.meshes.microbatch[mesh])
        return self.tables.leaf(
            int(self.config[index]),
            schedule=SCHEDULE_NAMES[int(self.layouts.schedule[index])],
            vpp=int(self.layouts.vpp[index]),
            microbatches=self.request.global_batch // per_step,
            uneven=self.request.stack.uneven_stages,
        )


def recompute_options(request: Request, layers: int) -> tuple[Recompute, ...]:
    """What a stage may recompute, in ascending order of time: nothing, attention, whole layers."""
    limits = request.job.constraints
    allowed = [
        mode
        for mode in request.stack.recompute
        if limits.recompute in (None, mode) and (request.job.allow_recompute or mode == "none")
    ]
    options: list[Recompute] = []
    for mode in allowed:
        if mode != "full":
            options.append((mode, 0))
        elif request.stack.recompute_layer_count:
            options += (("full", count) for count in range(1, layers + 1))
        else:
            options.append(("full", layers))
    return tuple(options)


def price_layouts(
    request: Request, meshes: Meshes, layouts: Layouts, *, cutoff_ns: float = np.inf
) -> PricedLayouts:
    """Price layouts and bound them; memory is only looked at where time stays below the cutoff."""
    key = np.stack([layouts.mesh, layouts.dp_replicate, layouts.dp_shard, layouts.zero_stage])
    changed = np.any(np.diff(key, axis=1) != 0, axis=0) if key.shape[1] else np.zeros(0, bool)
    config = np.concatenate([[0], np.cumsum(changed)]).astype(np.int64)[: len(layouts)]
    first = np.concatenate([[True], changed])[: len(layouts)]
    tables = price_configs(
        request.workload, request.machine,
        configs_of_meshes(
            meshes.take(layouts.mesh[first]), layouts.dp_replicate[first],
            layouts.dp_shard[first], layouts.zero_stage[first],
        ),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.capacity_bytes,
    )  # fmt: skip
    estimate = _Estimate(request, meshes.take(layouts.mesh), layouts, tables, config)
    return PricedLayouts(meshes, layouts, tables, config, estimate.bounds(cutoff_ns), request)


class _Estimate:
    """Bounds of layouts: time with the least recomputation that a relaxed memory check allows."""

    def __init__(
        self, request: Request, meshes: Meshes, layouts: Layouts, tables: PricedConfigs,
        config: Int64,
    ) -> None:  # fmt: skip
        self.request, self.meshes, self.layouts = request, meshes, layouts
        self.tables, self.config = tables, config
        self.model = _model(tables)
        self.m = request.global_batch // (meshes.dp * meshes.microbatch)
        stages = meshes.pp * layouts.vpp
        self.height = -(-self.model.layers // stages)
        self.spare = stages * self.height - self.model.layers

    def column(self, table: Int64, field: Field) -> Real:
        """One field of one table, per layout."""
        return table[field][self.config].astype(np.float64)

    def total(self, field: Field) -> Real:
        """A field summed over the model, per layout."""
        return _sum(self.tables, self.model, (field,))[self.config]

    def bounds(self, cutoff_ns: float) -> Real:
        work = self.total(Field.FORWARD) + self.total(Field.BACKWARD)
        plain = self.time(work)
        options = {mode for mode, _ in recompute_options(self.request, self.model.layers)}
        result = np.full(len(self.layouts), np.inf)
        open_ = plain < cutoff_ns
        if "none" in options:
            ok = self.memory(open_, "none", np.zeros_like(self.m))
            result = np.where(ok, plain, result)
            open_ = open_ & ~ok
        # Skipped rows keep their time bound: it is at or above the cutoff already.
        result = np.where(plain < cutoff_ns, result, plain)
        if "selective" in options and open_.any():
            extra = sum(
                n * self.column(t, Field.SELECTIVE)
                for n, t in zip(self.model.counts, self.tables.kinds, strict=True)
            )
            ok = self.memory(open_, "selective", np.zeros_like(self.m))
            result = np.where(ok, np.minimum(result, self.time(work + extra)), result)
        if "full" in options and open_.any():
            least, most, ok = self.least_full(open_)
            cheapest = np.min([self.column(t, Field.FULL) for t in self.tables.kinds], axis=0)
            share = least / np.maximum(least, most)
            extra = self.model.layers * share * cheapest
            result = np.where(ok, np.minimum(result, self.time(work + extra)), result)
        return result

    def time(self, work: Real) -> Real:
        """Time bound with ``work`` ns per microbatch through the pipeline."""
        cheapest = np.min(
            [
                self.column(t, Field.FORWARD) + self.column(t, Field.BACKWARD)
                for t in self.tables.kinds
            ],
            axis=0,
        )
        ends = self.tables.embedding
        totals = bounds.Totals(
            work=work,
            gradient=self.total(Field.GRADIENT),
            update=self.total(Field.OPTIMIZER) + self.total(Field.PARAMETER),
            layer_work=cheapest,
            embedding_work=self.column(ends, Field.FORWARD) + self.column(ends, Field.BACKWARD),
            hop=self.tables.hop_ns[self.config].astype(np.float64),
            bucket=self.tables.bucket_ns[self.config].astype(np.float64),
            sync=self.tables.sync_ns[self.config].astype(np.float64),
        )
        shape = bounds.Shape(self.meshes.pp, self.layouts.vpp, self.m, self.height, self.spare)
        return bounds.step_bound(self.layouts.schedule, shape, totals)

    def memory(self, rows: Bools, mode: str, count: Int64) -> Bools:
        """Whether some partition may fit: for each kind alone, what the stages can hold of it."""
        index = np.flatnonzero(rows)
        result = np.zeros(len(rows), dtype=bool)
        if len(index):
            result[index] = self._memory(index, mode, count[index])[0]
        return result

    def least_full(self, rows: Bools) -> tuple[Real, Real, Bools]:
        """Fewest fully recomputed layers per chunk that may fit, the most layers that a stage
        then holds, and whether any number fits."""
        index = np.flatnonzero(rows)
        layers = self.model.layers
        counted = self.request.stack.recompute_layer_count
        low = np.full(len(index), 1 if counted else layers, dtype=np.int64)
        high = np.full(len(index), layers, dtype=np.int64)
        ok, most = self._memory(index, "full", high)
        while counted and np.any(low < high):
            middle = (low + high) // 2
            enough, _ = self._memory(index, "full", middle)
            high = np.where(enough, middle, high)
            low = np.where(enough, low, np.minimum(middle + 1, high))
        _, most = self._memory(index, "full", high)
        least = np.ones(len(rows))
        widest = np.ones(len(rows))
        fit = np.zeros(len(rows), dtype=bool)
        least[index], widest[index], fit[index] = high, most, ok
        return least, widest, fit

    def _memory(self, index: Int64, mode: str, count: Int64) -> tuple[Bools, Real]:
        ok = np.ones(len(index), dtype=bool)
        widest = np.zeros(len(index))
        for kind, table in zip(self.model.counts, self.tables.kinds, strict=True):
            held, most = self._capacity(index, table, mode, count)
            ok &= held >= kind
            widest = np.maximum(widest, most)
        return ok, widest

    def _capacity(
        self, index: Int64, table: Int64, mode: str, count: Int64
    ) -> tuple[Real, Real]:
        """Layers of one kind that all stages, and that the roomiest stage, can hold."""
        config = self.config[index]
        pp, vpp, m = self.meshes.pp[index], self.layouts.vpp[index], self.m[index]
        schedule, height = self.layouts.schedule[index], self.height[index]
        fields = {
            "none": (Field.ACT_NONE, Field.ACT_NONE, Field.WORK_NONE),
            "selective": (Field.ACT_SELECTIVE, Field.ACT_SELECTIVE, Field.WORK_SELECTIVE),
            "full": (Field.ACT_FULL, Field.ACT_NONE, Field.WORK_FULL),
        }[mode]
        front, rest, working = (table[f][config].astype(np.float64) for f in fields)
        static = table[Field.STATIC][config].astype(np.float64)
        if len(self.model.counts) > 1:
            # The recomputed layers of a mixed stage may be of another kind.
            working = table[Field.WORK_NONE][config].astype(np.float64)
        room = self.tables.capacity_bytes - self.tables.fixed_bytes - working
        room = room - table[Field.GATHERED][config]
        limit = count.astype(np.float64) if mode == "full" else np.full(len(index), np.inf)
        total = np.zeros(len(index))
        widest = np.zeros(len(index))
        for rank in range(int(pp.max(initial=0))):
            live = np.where(schedule == 0, m, np.minimum(m, pp - rank)).astype(np.float64)
            left = room - np.where(rank == 0, self._end(self.tables.embedding, config, live), 0.0)
            left = left - np.where(rank == pp - 1, self._end(self.tables.head, config, live), 0.0)
            cost_front, cost_rest = static + live * front, static + live * rest
            few = np.floor(np.maximum(left, 0.0) / cost_front)
            with np.errstate(invalid="ignore"):
                more = limit + np.floor((left - limit * cost_front) / cost_rest)
            holds = np.where((mode != "full") | (few <= limit), few, more)
            holds = np.where(left < 0, -np.inf, holds)
            chunked = self._interleaved(
                rank, pp, vpp, m, height, left, static, front, rest, limit
            )
            holds = np.where(schedule == 2, chunked, holds)
            active = rank < pp
            total += np.where(active, holds, 0.0)
            widest = np.maximum(widest, np.where(active, np.minimum(holds, self.model.layers), 0))
        return total, np.maximum(widest, 1.0)

    def _end(self, table: Int64, config: Int64, live: Real) -> Real:
        """Bytes of the embedding or head on its stage; one microbatch of activations at least."""
        return table[Field.STATIC][config] + table[Field.ACT_NONE][config].astype(np.float64)

    def _interleaved(
        self, rank: int, pp: Int64, vpp: Int64, m: Int64, height: Int64, left: Real,
        static: Real, front: Real, rest: Real, limit: Real,
    ) -> Real:  # fmt: skip
        """Layers a rank of an interleaved pipeline holds: all its chunks are full, or none fits.

        The first and the last rank have one lighter chunk, which is left out of the count.
        """
        in_flight = np.minimum(2 * (pp - rank - 1) + (vpp - 1) * pp + 1, m * vpp)
        lighter = ((rank == 0) | (rank == pp - 1)).astype(np.int64) * (rank < pp)
        # A lighter chunk is alive at most pp times the other chunks' rounds; drop its share.
        dropped = np.minimum(in_flight, lighter * m)
        alive = np.maximum(in_flight - np.where(lighter > 0, dropped, 0), 0)
        per_chunk = np.minimum(limit, height) * front + np.maximum(height - limit, 0) * rest
        need = (vpp - lighter) * height * static + alive * per_chunk
        result: Real = np.where(need <= left, (vpp * height).astype(np.float64), -np.inf)
        return result
