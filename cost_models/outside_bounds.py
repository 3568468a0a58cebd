"""Lower bounds of many layouts with layers outside the pipeline, memory included.

Their pipelines have equal stages of one kind of layer, or of whole patterns of several, in one mode
of recomputation, so each rank's work and memory are known: the time is that of
``cost_models.surrogate`` for that one partition, and of the layers outside, in the fastest mode
that may fit. What a rank rounds up, or makes room for in the optimizer step, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.bounds import SAFETY
from cost_models.configs import PricedConfigs
from cost_models.graph import Bools, Int64
from cost_models.idle_passes import bubbles
from cost_models.layout import ONE_CHUNK_AT_ONCE, codes_of
from cost_models.outside import leading, pattern_of
from cost_models.recompute import mode_rows
from cost_models.step import Field

Real = NDArray[np.float64]


@dataclass(frozen=True)
class OutsideLayouts:
    """Layouts with layers outside, as arrays of one length."""

    config: Int64
    """Column in the tables."""
    schedule: Int64
    vpp: Int64
    microbatches: Int64
    outside: Int64
    """Layers outside, one at least."""

    def take(self, index: Int64) -> OutsideLayouts:
        """Some of them."""
        return OutsideLayouts(
            self.config[index], self.schedule[index], self.vpp[index], self.microbatches[index],
            self.outside[index],
        )  # fmt: skip


def outside_step_bounds(
    tables: PricedConfigs, layouts: OutsideLayouts, modes: Sequence[str], cutoff_ns: float = np.inf
) -> Real:
    """Lower bound on the step in ns; infinity where no mode fits. Memory is looked at only where
    the fastest mode stays below ``cutoff_ns``."""
    every = mode_rows(tables.policies)
    rows = [every[mode] for mode in modes]
    stages = _Stages(tables, layouts)
    result = stages.step_ns(stages.least([mode.extra for mode in rows]))
    index = np.flatnonzero(result < cutoff_ns)
    result[index] = np.inf
    stages = _Stages(tables, layouts.take(index))
    # As if one mode kept least and worked with least: most layouts without room have none here.
    kept, working = (stages.least([getattr(m, n) for m in rows]) for n in ("kept", "working"))
    least = stages.least_bytes(kept, working, np.arange(len(index)))
    index = index[least <= tables.capacity_bytes]
    stages = _Stages(tables, layouts.take(index))
    for mode in sorted(rows, key=lambda mode: float(stages.kind[mode.extra].sum())):
        time = stages.step_ns(stages.row(mode.extra))
        faster = np.flatnonzero(time < result[index])
        if len(faster):
            need = stages.least_bytes(stages.row(mode.kept), stages.row(mode.working), faster)
            fits = need <= tables.capacity_bytes
            result[index[faster[fits]]] = time[faster[fits]]
    return result


Rows = tuple[Int64, ...]
"""Something of a layer by configuration: of the pipeline's, then of those outside by kind."""


class _Stages:
    """The ranks of some layouts, each with its head or embedding beside equally many layers."""

    def __init__(self, tables: PricedConfigs, layouts: OutsideLayouts) -> None:
        self.tables, self.config = tables, layouts.config
        names, ahead = tables.workload.layers, leading(tables.workload.layers) or 0
        self.ahead = ahead > 0
        pattern = names[ahead : ahead + pattern_of(names)]
        kinds = [tables.kinds[tables.kind_names.index(name)] for name in pattern]
        self.kind = np.sum(kinds, axis=0) // len(pattern)
        """A layer of the pipeline, of several kinds their mean, rounded down."""
        # How many of a kind the first or the last layers have.
        order = names if self.ahead else names[::-1]
        self.counts = [
            np.cumsum([0, *(each == name for each in order)])[layouts.outside]
            for name in tables.kind_names
        ]
        self.pp, self.vpp = tables.configs.pp[self.config], layouts.vpp
        self.m = layouts.microbatches.astype(np.float64)
        stay = tables.machine.stack.idle_passes_stay
        self.idle = bubbles(layouts.schedule, self.pp) * stay / self.vpp
        """Passes of the bubble that stay, in microbatches of a whole rank."""
        self.held = (len(names) - layouts.outside) // self.pp
        """Layers of a rank."""
        gpipe = np.isin(layouts.schedule, codes_of(ONE_CHUNK_AT_ONCE))
        self.plain_ns = self._plain_ns(layouts, gpipe)
        self.passes = self.held * np.where(gpipe, self.m + self.pp - 1, self.m)
        """By how many times what a layer of the pipeline repeats the step is longer, at least."""

    def row(self, field: int) -> Rows:
        """A field of the priced tables."""
        return tuple(table[field] for table in (self.kind, *self.tables.outside))

    def least(self, fields: Sequence[int]) -> Rows:
        """The least of several fields."""
        rows = list(fields)
        return tuple(table[rows].min(axis=0) for table in (self.kind, *self.tables.outside))

    def _of(self, table: Int64, *fields: int) -> Real:
        values = table[fields[0]][self.config]
        for field in fields[1:]:
            values = values + table[field][self.config]
        result: Real = values.astype(np.float64)
        return result

    def _outside(self, *fields: int) -> Real:
        """Fields summed over the layers outside."""
        parts = zip(self.counts, self.tables.outside, strict=True)
        total: Real = np.sum([count * self._of(table, *fields) for count, table in parts], axis=0)
        return total

    def step_ns(self, extra: Rows) -> Real:
        """Lower bound on the step where layers repeat ``extra`` ns."""
        total = self.plain_ns + self.passes * extra[0][self.config]
        for count, each in zip(self.counts, extra[1:], strict=True):
            total = total + count * each[self.config]
        result: Real = total * SAFETY
        return result

    def _plain_ns(self, layouts: OutsideLayouts, gpipe: Bools) -> Real:
        """The step without recomputation."""
        passes = (Field.FORWARD, Field.BACKWARD)
        updates = (Field.OPTIMIZER, Field.PARAMETER)
        tables, pp, m = self.tables, self.pp, self.m
        embedding, head = (self._of(end, *passes) for end in (tables.embedding, tables.head))
        transfer = tables.hop_ns[self.config].astype(np.float64)
        blocking = np.isin(layouts.schedule, codes_of(tables.blocking))
        send, hop = np.where(blocking, transfer, 0.0), np.where(blocking, 0.0, transfer)
        chunk = self.held // self.vpp * self._of(self.kind, *passes) + 2 * send
        inner = self.vpp * chunk
        first, last = inner - send + embedding, inner - send + head
        widest = np.maximum(np.maximum(first, last), np.where(pp > 2, inner, 0.0))
        trip = first + last + (pp - 2) * inner + 2 * (pp - 1) * hop
        begun, between = chunk - send + embedding + 2 * hop, chunk + 2 * hop
        nested = np.maximum(m * first, begun + (pp - 2) * between + m * last)
        middle = begun + (pp - 3) * between + m * inner
        nested = np.maximum(nested, np.where(pp > 2, middle, 0.0))
        pipeline = np.where(gpipe, trip + (m - 1) * widest, nested)
        gradient = self.held * self._of(self.kind, Field.GRADIENT)
        gradient = gradient + self._of(tables.embedding, Field.GRADIENT)
        ends = [self._of(end, *updates) for end in (tables.embedding, tables.head)]
        update = self.held * self._of(self.kind, *updates) + np.maximum(*ends)
        once = (tables.bucket_ns + tables.tied_sync_ns + tables.sync_ns)[self.config]
        apart = self._outside(*passes, Field.GRADIENT, *updates)
        total: Real = pipeline + gradient + update + once + apart
        return total

    def least_bytes(self, keeps: Rows, works: Rows, some: Int64) -> Real:
        """Least bytes of the fullest rank, of some of the layouts, where layers keep and work with
        so many."""
        config, held = self.config[some], self.held[some].astype(np.float64)
        counts, outside = [count[some] for count in self.counts], self.tables.outside

        def apart(rows: Sequence[Int64]) -> Real:
            parts = [n * row[config] for n, row in zip(counts, rows, strict=True)]
            result: Real = np.sum(parts, axis=0, dtype=np.float64)
            return result

        static, new = Field.STATIC, Field.NEW_GRADIENTS
        kept, made = apart(keeps[1:]), apart([table[new] for table in outside])
        busy = zip(counts, works[1:], strict=True)
        working = np.max([(n > 0) * row[config] for n, row in busy], axis=0)
        base = self.tables.fixed_bytes[config] + apart([table[static] for table in outside])
        base = base + held * self.kind[static][config]
        own, layers = held * self.kind[new][config], held * keeps[0][config]
        loss, freed = (self.tables.head[f][config] for f in (Field.WORK_NONE, Field.ACT_NONE))
        short, need = works[0][config], np.zeros(len(some))
        for end, most, beside in (
            (self.tables.embedding, short, np.zeros_like(loss)),
            (self.tables.head, np.maximum(short - freed, loss), loss),
        ):
            alive = self.m[some] * (layers + end[Field.ACT_NONE][config])
            alive = alive + self.idle[some] * layers
            gradients = own + end[new][config]
            if self.ahead:
                moments = alive + gradients + most + kept, gradients + made + kept + working
            else:
                turn = alive + kept + np.maximum(made + working, beside)
                moments = alive + gradients + most + made, turn
            need = np.maximum(need, end[static][config] + np.maximum(*moments))
        result: Real = base + need
        return result
