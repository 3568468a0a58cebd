"""Lower bounds of many layouts at once, memory included.

A layout is bounded by ``cost_models.bounds`` at the least recomputation that could make it fit. The
memory check is relaxed so that it never refuses what some partition could hold: for each kind of
layer alone, the stages together must have room for all layers of that kind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from cost_models import bounds, deferral
from cost_models.checked_rows import CheckedRows
from cost_models.configs import PricedConfigs
from cost_models.given_order import GivenOrder
from cost_models.graph import Bools, Int64
from cost_models.layout import LISTED, V_SHAPED, codes_of
from cost_models.least_alive import Pipelines, alive_on_every_chunk, alive_on_full_chunks
from cost_models.model_sums import divided, layer_counts, model_sum
from cost_models.recompute import mode_rows
from cost_models.split_backward import layers_for_weights
from cost_models.step import Field

Real = NDArray[np.float64]

PAIRS = 200_000
"""Layouts times recomputation modes whose memory is checked at once."""


class Relaxation:
    """Bounds of layouts (arrays of one length) over priced configurations.

    ``config`` is each layout's column in the tables, ``schedule`` its code; ``modes`` are the
    allowed recompute modes, and ``counted`` says whether full recomputation may be limited to a
    number of layers. With ``per_stage`` only the stages that need it recompute, so the time bound
    has none; with ``free`` virtual stages hold any numbers of layers. ``order`` is the user's own.
    """

    def __init__(
        self, tables: PricedConfigs, *, config: Int64, schedule: Int64, vpp: Int64,
        microbatches: Int64, modes: Collection[str], counted: bool,
        per_stage: bool = False, free: bool = False, order: GivenOrder | None = None,
    ) -> None:  # fmt: skip
        self.tables, self.config = tables, config
        self.schedule, self.vpp, self.m = schedule, vpp, microbatches
        self.pp = tables.configs.pp[config]
        self.modes, self.counted, self.per_stage = modes, counted, per_stage
        self.free, self.order = free, order
        self.rows = mode_rows(tables.policies)
        self.kind_counts = layer_counts(tables)
        self.layers = sum(self.kind_counts)
        stages = self.pp * vpp
        self.height = -(-self.layers // stages)
        self.spare = stages * self.height - self.layers
        self.turns = np.isin(schedule, codes_of(V_SHAPED))
        self.divided = divided(tables)[config]
        self.rank_layers = np.where(self.turns, -(-self.layers // self.pp), vpp * self.height)
        """Least layers of a rank with no end of the model, where ranks hold several chunks."""

    def column(self, table: Int64, field: int) -> Real:
        """One field of one table, per layout."""
        values: Real = table[field][self.config].astype(np.float64)
        return values

    def total(self, field: Field) -> Real:
        """A field summed over the model, per layout."""
        return model_sum(self.tables, (field,))[self.config]

    def bounds(self, cutoff_ns: float = np.inf) -> Real:
        """Lower bound on the step in ns; infinity where no partition can fit.

        Memory is looked at only where time alone stays below ``cutoff_ns``.
        """
        work = self.total(Field.FORWARD) + self.total(Field.BACKWARD)
        plain = self.time(work)
        result = np.full(len(self.config), np.inf)
        open_ = plain < cutoff_ns
        if self.per_stage:
            everything = np.full_like(self.m, self.layers)
            ok = np.zeros(len(self.config), dtype=bool)
            for mode in self.modes:
                ok |= self.memory(open_, mode, everything)
            return np.where(ok | ~open_, plain, np.inf)
        if "none" in self.modes:
            ok = self.memory(open_, "none", np.zeros_like(self.m))
            result = np.where(ok, plain, result)
            open_ = open_ & ~ok
        # Skipped rows keep their time bound: it is at or above the cutoff already.
        result = np.where(plain < cutoff_ns, result, plain)
        partial = [mode for mode in self.modes if mode not in ("none", "full")]
        if partial and open_.any():
            extra = self.least_extra(open_, partial)
            bound = self.time(work + np.where(np.isinf(extra), 0.0, extra))
            result = np.where(np.isinf(extra), result, np.minimum(result, bound))
        if "full" in self.modes and open_.any():
            least, most, ok = self.least_full(open_)
            if np.isfinite(cutoff_ns):
                # A stage of more layers than this is above the cutoff by itself.
                layer = self.cheapest_layers(np.ones_like(self.m))
                most = np.minimum(most, np.maximum(cutoff_ns / (self.m * layer), 1.0))
            share = least / np.maximum(least, most)
            recomputed = np.floor(self.layers * share + 1e-9).astype(np.int64)
            tall = np.minimum(least.astype(np.int64), -(-self.layers // self.pp))
            full = (self.rows["full"].extra,)
            later = layers_for_weights(
                self.schedule, recomputed, self.layers, self.pp * self.vpp, free=self.free
            )
            added = self.cheapest_layers(recomputed, full)
            if later.any():
                added = added + bounds.least_sum(later, self._passes(full[0]), self.kind_counts)
            bound = self.time(work + added, self.cheapest_layers(tall, full))
            result = np.where(ok, np.minimum(result, bound), result)
        return result

    def _passes(self, extra: int) -> Real:
        """Time of running each kind of layer again for all of its weights."""
        kinds = self.tables.kinds
        each = [self.column(t, extra) * self.column(t, Field.WEIGHT_PASSES) for t in kinds]
        return np.stack(each)

    def time(self, work: Real, tallest_extra: Real | float = 0.0) -> Real:
        """Time bound with ``work`` ns per microbatch through the pipeline.

        ``tallest_extra`` is recomputation on the rank with the most layers.
        """
        cheapest = np.min(
            [
                self.column(t, Field.FORWARD) + self.column(t, Field.BACKWARD)
                for t in self.tables.kinds
            ],
            axis=0,
        )
        ends = [
            self.column(end, Field.FORWARD) + self.column(end, Field.BACKWARD)
            for end in (self.tables.embedding, self.tables.head)
        ]
        transfer = self.tables.hop_ns[self.config].astype(np.float64)
        blocking = np.isin(self.schedule, codes_of(self.tables.blocking))
        totals = bounds.Totals(
            work=work,
            tallest_work=self.cheapest_layers(-(-self.layers // self.pp)) + tallest_extra,
            gradient=self.total(Field.GRADIENT),
            update=self.total(Field.OPTIMIZER) + self.total(Field.PARAMETER),
            layer_work=cheapest,
            rank_work=self.cheapest_layers(self.rank_layers),
            first_work=self.cheapest_layers(
                np.maximum((self.pp - 2) * self.height - np.minimum(self.spare, self.height), 0)
            ),
            embedding_work=np.where(self.divided, 0.0, ends[0]),
            hop=np.where(blocking, 0.0, transfer),
            bucket=self.tables.bucket_ns[self.config].astype(np.float64),
            sync=self.tables.sync_ns[self.config].astype(np.float64),
            send=np.where(blocking, transfer, 0.0),
            end_work=np.where(self.divided, 0.0, np.minimum(*ends)),
            every_work=np.where(self.divided, sum(ends), 0.0),
            waits=deferral.waiting_in(self.tables.put_off, self.config, self.m),
        )
        shape = bounds.Shape(self.pp, self.vpp, self.m, self.height, self.spare, self.free)
        return bounds.step_bound(self.schedule, shape, totals)

    def cheapest_layers(
        self, count: Int64, fields: tuple[int, ...] = (Field.FORWARD, Field.BACKWARD)
    ) -> Real:
        """Fields of the ``count`` layers of the model in which they are least."""
        work = np.stack([sum(self.column(t, field) for field in fields) for t in self.tables.kinds])
        return bounds.least_sum(count, work, self.kind_counts)

    def least_extra(self, rows: Bools, modes: Sequence[str]) -> Real:
        """Least recomputation in ns per microbatch, of the whole model, of a mode that may fit;
        infinity where none does.

        Modes are tried from the fastest on, more and more at once, each only where it is faster
        than what was found to fit.
        """
        index = np.flatnonzero(rows)
        field = np.array([self.rows[mode].extra for mode in modes])
        extra = np.zeros((len(modes), len(self.tables.configs)))
        for count, table in zip(self.kind_counts, self.tables.kinds, strict=True):
            extra += count * table[field].astype(np.float64)
        order = np.argsort(extra.mean(axis=1), kind="stable")
        least = np.full(len(index), np.inf)
        first, size = 0, 1
        while first < len(order):
            block = order[first : first + size]
            each = extra[block][:, self.config[index]]
            place, row = np.nonzero(each < least)
            chosen = [self.rows[modes[mode]] for mode in block.tolist()]
            kept, working = (np.array([getattr(r, n) for r in chosen]) for n in ("kept", "working"))
            option = CheckedRows(
                kept[place], kept[place], working[place], np.full(len(row), np.inf)
            )
            if len(row):
                ok, _ = self._memory(index[row], option)
                np.minimum.at(least, row[ok], each[place[ok], row[ok]])
            first, size = first + size, min(2 * size, max(1, PAIRS // len(index)))
        result = np.full(len(rows), np.inf)
        result[index] = least
        return result

    def memory(self, rows: Bools, mode: str, count: Int64) -> Bools:
        """Whether some partition may fit: for each kind alone, what the stages can hold of it."""
        index = np.flatnonzero(rows)
        result = np.zeros(len(rows), dtype=bool)
        if len(index):
            result[index] = self._memory(
                index,
                self._whole(count[index])
                if mode == "full"
                else CheckedRows.alike(self.rows[mode], len(index)),
            )[0]
        return result

    def least_full(self, rows: Bools) -> tuple[Real, Real, Bools]:
        """Fewest fully recomputed layers per chunk that may fit, the most layers that a stage
        then holds, and whether any number fits."""
        index = np.flatnonzero(rows)
        layers = self.layers
        counted = self.counted
        low = np.full(len(index), 1 if counted else layers, dtype=np.int64)
        high = np.full(len(index), layers, dtype=np.int64)
        ok, most = self._memory(index, self._whole(high))
        while counted and np.any(low < high):
            middle = (low + high) // 2
            enough, _ = self._memory(index, self._whole(middle))
            high = np.where(enough, middle, high)
            low = np.where(enough, low, np.minimum(middle + 1, high))
        _, most = self._memory(index, self._whole(high))
        least = np.ones(len(rows))
        widest = np.ones(len(rows))
        fit = np.zeros(len(rows), dtype=bool)
        least[index], widest[index], fit[index] = high, most, ok
        return least, widest, fit

    def _whole(self, count: Int64) -> CheckedRows:
        """Full recomputation of as many layers of each layout."""
        return CheckedRows.alike(self.rows["full"], len(count), Field.ACT_NONE, count)

    def _memory(self, index: Int64, option: CheckedRows) -> tuple[Bools, Real]:
        """Whether layouts may fit, and the most layers that one stage may hold."""
        # Longest pipelines first: those that have a rank are then the first ones.
        order = np.argsort(-self.pp[index], kind="stable")
        index, option = index[order], option.take(order)
        chunked = np.isin(self.schedule[index], () if self.free else codes_of(LISTED))
        ok = np.ones(len(index), dtype=bool)
        widest = np.zeros(len(index))
        if chunked.any():
            part = index[chunked]
            ok[chunked] = self._chunked(part, option.take(chunked))
            widest[chunked] = np.minimum(self.layers, self.vpp[part] * self.height[part] * 2.0)
        if not chunked.all():
            part = index[~chunked]
            for kind, table in zip(self.kind_counts, self.tables.kinds, strict=True):
                held, most = self._chain(part, table, option.take(~chunked))
                ok[~chunked] &= held >= kind
                widest[~chunked] = np.maximum(widest[~chunked], most)
        back = np.argsort(order)
        return ok[back], widest[back]

    def _short_lived(self, config: Int64, tables: Sequence[Int64], working: Int64) -> Real:
        """Short-lived bytes on a stage that holds the least demanding of ``tables``.

        Where a model has several kinds, the recomputed layers of a stage may be of another one.
        """
        field = working if len(self.kind_counts) == 1 else np.full_like(working, Field.WORK_NONE)
        need: Real = np.min([t[field, config] for t in tables], axis=0).astype(np.float64)
        return need

    def _rooms(self, index: Int64, short_lived: Real) -> tuple[Real, Real, Real]:
        """Bytes of a rank for the state and the activations of its layers, and what of them the
        first and the last rank do not have.

        The loss runs beside the activations of all layers, a layer's backward without the head's.
        """
        config, tables = self.config[index], self.tables
        room = (tables.capacity_bytes - tables.fixed_bytes[config]).astype(np.float64)
        embedding, head = tables.embedding, tables.head
        first = self._static(embedding, index) + embedding[Field.ACT_NONE][config]
        loss = head[Field.ACT_NONE][config] + head[Field.WORK_NONE][config]
        last = self._static(head, index) + np.maximum(loss - short_lived, 0.0)
        every = np.where(self.divided[index], first + last, 0.0)
        first, last = (np.where(self.divided[index], 0.0, end) for end in (first, last))
        return room - short_lived - every, first, last

    def _static(self, table: Int64, index: Int64) -> Real:
        """Static bytes, with the gradients that earlier microbatches have made."""
        config = self.config[index]
        made = np.where(self.m[index] > 1, table[Field.NEW_GRADIENTS][config], 0)
        static: Real = (table[Field.STATIC][config] + made).astype(np.float64)
        return static

    def _chain(self, index: Int64, table: Int64, option: CheckedRows) -> tuple[Real, Real]:
        """Layers of one kind that all ranks, and that the roomiest rank, can hold (1F1B, GPipe, or
        free virtual stages).

        A rank without room for one such layer holds none of them, unless every rank must.
        """
        config = self.config[index]
        pp, turns = self.pp[index], self.turns[index]
        # The front of every chunk.
        limit = option.limit * self.vpp[index]
        front = table[option.front, config].astype(np.float64)
        rest = table[option.rest, config].astype(np.float64)
        static = self._static(table, index)
        room, first, last = self._rooms(index, self._short_lived(config, [table], option.working))
        total, widest = np.zeros(len(index)), np.ones(len(index))
        for rank in range(int(pp.max(initial=0))):
            has = slice(int(np.searchsorted(-pp, -rank)))
            at_end = rank == pp[has] - 1
            left = room[has] - first[has] if rank == 0 else room[has]
            left = left - np.where(at_end & ~turns[has], last[has], 0.0)
            live = alive_on_every_chunk(self._pipelines(index[has]), rank).astype(np.float64)
            cost_front, cost_rest = static[has] + live * front[has], static[has] + live * rest[has]
            holds = np.floor(np.maximum(left, 0.0) / cost_front)
            counted = np.where(np.isinf(limit[has]), 0.0, limit[has])
            beyond = counted + np.floor((left - counted * cost_front) / cost_rest)
            holds = np.where(holds <= limit[has], holds, beyond)
            may_be_empty = len(self.kind_counts) > 1 or rank == 0
            empty = np.where(may_be_empty | at_end, 0.0, -np.inf)
            holds = np.where(left < 0, np.where(pp[has] == 1, -np.inf, empty), holds)
            total[has] += holds
            widest[has] = np.maximum(widest[has], np.minimum(holds, self.layers))
        return total, widest

    def _pipelines(self, index: Int64) -> Pipelines:
        return Pipelines(
            self.pp[index], self.vpp[index], self.m[index], self.schedule[index], self.order,
            self.tables.machine.stack.idle_passes_stay,
        )  # fmt: skip

    def _chunked(self, index: Int64, option: CheckedRows) -> Bools:
        """Whether every rank has room for its full chunks of the least demanding layers.

        The first and the last rank have one lighter chunk, which is left out, with the most
        microbatches that it may have in flight; on a V the first rank has both, and the last none.
        """
        config, tables = self.config[index], self.tables.kinds
        pp, vpp, height = self.pp[index], self.vpp[index], self.height[index]
        limit = option.limit

        def least(field: Int64) -> Real:
            values: Real = np.min([t[field, config] for t in tables], axis=0).astype(np.float64)
            return values

        static = np.stack([self._static(t, index) for t in tables])
        front, rest = least(option.front), least(option.rest)
        turns, on_rank = self.turns[index], self.rank_layers[index]
        # The first rank of a V has both ends of the model and holds no layer where these are bare.
        bare = turns & (self.layers % np.maximum(pp - 1, 1) == 0)
        short_lived = np.where(bare, 0.0, self._short_lived(config, tables, option.working))
        room, first, last = self._rooms(index, short_lived)
        inner, none = bounds.least_sum(on_rank, static, self.kind_counts), np.zeros(len(index))
        one = bounds.least_sum((vpp - 1) * height, static, self.kind_counts)
        each = np.where(turns, on_rank // 2, height)
        per_chunk = np.minimum(limit, each) * front + np.maximum(each - limit, 0) * rest
        runs, ok = self._pipelines(index), np.ones(len(index), dtype=bool)
        for rank in range(int(pp.max(initial=0))):
            has = slice(int(np.searchsorted(-pp, -rank)))
            at_end = rank == pp[has] - 1
            left = room[has] - first[has] if rank == 0 else room[has]
            turned = turns[has]
            left = left - np.where(np.where(turned, rank == 0, at_end), last[has], 0.0)
            lighter = (rank == 0) * (1 + turned) + (at_end & ~turned & (rank > 0))
            alive = alive_on_full_chunks(runs, has, rank, lighter)
            held = np.select([lighter == 0, lighter == 1], [inner[has], one[has]], none[has])
            ok[has] &= held + alive * per_chunk[has] <= left
        return ok
