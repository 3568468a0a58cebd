"""The completions of a leaf with several virtual stages per rank, all of its partitions at once.

There are few partitions (equal virtual stages, lighter ends: ``cost_models.partitions``), so they
are listed, priced as arrays, and the ones that may win handed out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import V_SHAPED, Schedule
from cost_models.leaf import Completion, Leaf, Recompute
from cost_models.partitions import interleaved_bounds
from cost_models.recompute import group_of
from cost_models.schedule import live_peaks
from cost_models.step import Field

UNLIMITED = 1 << 62

Ints = NDArray[np.int64]
_PARTITIONS: dict[tuple[int, int, bool, bool], Ints] = {}
"""Partitions by number of layers, of virtual stages, whether they may be uneven, and on a V."""


def interleaved_candidates(
    leaf: Leaf, options: Iterable[Recompute], *, cutoff: Callable[[], int]
) -> Iterator[tuple[int, Completion | None]]:
    """Completions of an interleaved leaf that fit, with their surrogates in ns, best first.

    The last item, with no completion, is the bound on everything that was left out for being at or
    above ``cutoff()``. For one partition an option is left out where another fits that adds no
    more time to any kind of layer, or fewer fully recomputed layers do.
    """
    key = (len(leaf.sequence), leaf.stages, leaf.uneven, leaf.schedule in V_SHAPED)
    partitions = _PARTITIONS.get(key)
    if partitions is None:
        partitions = np.array(list(interleaved_bounds(leaf)), dtype=np.int64)
        _PARTITIONS[key] = partitions
    if not len(partitions):
        return
    table = _Table(leaf, partitions)
    limit = cutoff()
    found: list[tuple[int, tuple[int, ...], Recompute]] = []
    plain = table.uniform_surrogates([("none", 0)])[0]
    skipped = int(plain[plain >= limit].min(initial=UNLIMITED))
    least = np.flatnonzero(plain < limit)
    if not len(least):
        yield skipped, None
        return
    ordered = _by_time(leaf, options)
    uniform = [option for option, _ in ordered if option[0] != "full"]
    uniform_times = dict(zip(uniform, table.uniform_surrogates(uniform), strict=True))
    fitted: list[tuple[tuple[int, ...], NDArray[np.bool_]]] = []
    for option, extra in ordered:
        open_ = least
        for other, settled in fitted:
            if all(a <= b for a, b in zip(other, extra, strict=True)):
                open_ = open_[~settled[open_]]
        if not len(open_):
            continue
        known = uniform_times.get(option)
        times = table.surrogates(open_, option) if known is None else known[open_]
        slow = times >= limit
        skipped = min(skipped, int(times[slow].min(initial=UNLIMITED)))
        fast, times = open_[~slow], times[~slow]
        holds = table.fits(fast, option) if len(fast) else np.zeros(0, dtype=bool)
        for index, time in zip(fast[holds], times[holds], strict=True):
            found.append((int(time), tuple(partitions[index].tolist()), option))
        if option[0] == "full":
            least = fast[~holds]
        elif holds.any():
            settled = np.zeros(len(partitions), dtype=bool)
            settled[fast[holds]] = True
            fitted.append((extra, settled))
    for time, bounds, option in sorted(found):
        if time >= cutoff():
            skipped = min(skipped, time)
            break
        yield time, Completion(bounds, (option,) * leaf.stages)
    if skipped < UNLIMITED:
        yield skipped, None


def _by_time(leaf: Leaf, options: Iterable[Recompute]) -> list[tuple[Recompute, tuple[int, ...]]]:
    """Options with the time that each adds per kind of layer, the least first.

    Numbers of fully recomputed layers come last, in their order; of a part of the layers all that
    is known is that it takes as long as no other option.
    """
    partial, full = [], []
    for option in options:
        extra = tuple([kind[leaf.modes[option[0]].extra] for kind in leaf.kinds])
        if option[0] == "full":
            full.append((option, extra if option[1] >= len(leaf.sequence) else (0,) * len(extra)))
        else:
            partial.append((option, extra))
    return sorted(partial, key=lambda item: (sum(item[1]), item[0])) + full


@lru_cache(maxsize=16384)
def _live(schedule: Schedule, pp: int, vpp: int, microbatches: int, rank: int) -> Ints:
    """Microbatches alive per chunk (rows; then what a split backward holds beside them) at each
    candidate for the peak (columns)."""
    vectors = live_peaks(schedule, pp, vpp, microbatches, rank)
    return np.ascontiguousarray(np.array(vectors, dtype=np.int64).T)


class _Table:
    """Costs of many partitions of one leaf; ``cost_models.leaf`` and ``peaks`` on arrays."""

    def __init__(self, leaf: Leaf, partitions: Ints) -> None:
        self.leaf = leaf
        self.first, self.last = partitions[:, :-1], partitions[:, 1:]
        self.counts = np.array(leaf.counts, dtype=np.int64)
        self.kinds = np.array(leaf.kinds, dtype=np.int64)
        self.held = self.counts[self.last] - self.counts[self.first]
        """Layers per partition, virtual stage and kind."""
        self.forward = self._sum(self.held, Field.FORWARD)
        self.backward = self._sum(self.held, Field.BACKWARD)
        if leaf.sends:
            sends = np.array(leaf.sends, dtype=np.int64)
            cuts = [stage for stage in range(leaf.stages - 1) if leaf.sends_on(stage)]
            behind = [stage + 1 for stage in cuts]
            self.forward[:, cuts] += sends[self.last[:, cuts], 0]
            self.backward[:, behind] += sends[self.first[:, behind], 1]
        gradient = self._sum(self.held, Field.GRADIENT)
        gradient[:, [0, -1]] += leaf.tied_ns
        self.reduction = leaf.bucket_ns + self._by_rank(gradient).sum(axis=1)
        update = self._sum(self.held, Field.OPTIMIZER) + self._sum(self.held, Field.PARAMETER)
        self.update = self._by_rank(update).sum(axis=1).max(axis=1)

    def uniform_surrogates(self, options: Sequence[Recompute]) -> Ints:
        """Surrogates in ns under options that treat all layers alike; (options, partitions)."""
        modes, count = self.leaf.modes, len(self.held)
        extra = self.held @ self.kinds[:, [modes[mode].extra for mode, _ in options]]
        backward = self.backward + np.moveaxis(extra, -1, 0)
        rows = np.tile(np.arange(count), len(options))
        return self._surrogate(rows, backward.reshape(-1, self.leaf.stages)).reshape(-1, count)

    def surrogates(self, rows: Ints, option: Recompute) -> Ints:
        """Surrogate in ns of each partition in ``rows`` under ``option``."""
        _, front = self._layers(rows, option)
        backward = self.backward[rows] + front @ self.kinds[:, self.leaf.modes[option[0]].extra]
        return self._surrogate(rows, backward)

    def _layers(self, rows: Ints, option: Recompute) -> tuple[Ints, Ints]:
        """Layers per partition, virtual stage and kind: all, and those in the option's mode."""
        mode, limit = option
        held = self.held[rows]
        if mode != "full":
            return held, held
        first, last = self.first[rows], self.last[rows]
        return held, self.counts[np.minimum(last, first + limit)] - self.counts[first]

    def _sum(self, held: Ints, field: Field) -> Ints:
        """A field per virtual stage, ends included; shape (partitions, stages)."""
        total: Ints = held @ self.kinds[:, field]
        total[:, 0] += self.leaf.embedding[field]
        total[:, -1] += self.leaf.head[field]
        return total

    def _by_rank(self, values: Ints) -> Ints:
        """Shape (partitions, chunks, ranks)."""
        result = values.reshape(len(values), self.leaf.vpp, self.leaf.pp)
        if self.leaf.schedule in V_SHAPED:
            return np.stack([result[:, 0], result[:, 1, ::-1]], axis=1)
        return result

    def _surrogate(self, rows: Ints, backward: Ints) -> Ints:
        """Surrogates of partitions ``rows`` with the given backward times per virtual stage."""
        leaf, split = self.leaf, self.leaf.splits_backward
        forward, backward = self._by_rank(self.forward[rows]), self._by_rank(backward)
        reduction = self.reduction[rows].T
        work = leaf.microbatches * (forward + backward).sum(axis=1).T
        out = forward[:, 0].T + leaf.hop_ns
        both = out + backward[:, 0].T + leaf.hop_ns
        nested = work[-1]
        ends = nested + reduction[-1]
        for rank in reversed(range(leaf.pp - 1)):
            nested = work[rank] if split else np.maximum(work[rank], both[rank] + nested)
            ends = np.maximum(out[rank] + ends, nested + reduction[rank])
        result: Ints = ends + self.update[rows] + leaf.sync_ns
        return result

    def fits(self, rows: Ints, option: Recompute) -> NDArray[np.bool_]:
        """Whether each partition in ``rows`` fits under ``option``."""
        leaf = self.leaf
        held, front = self._layers(rows, option)
        rest = held - front
        kept, short, _ = leaf.modes[option[0]]
        activation = front @ self.kinds[:, kept] + rest @ self.kinds[:, Field.ACT_NONE]
        group = group_of(option[0])
        if group > 1:
            activation += -front.sum(axis=2) % group * self._largest(front, kept)
        working = np.maximum(self._largest(front, short), self._largest(rest, Field.WORK_NONE))
        new, reduced = Field.NEW_GRADIENTS, Field.IN_FLIGHT
        draining = np.maximum(
            self._largest(front, kept, short, less=new),
            self._largest(rest, Field.ACT_NONE, Field.WORK_NONE, less=new),
        )
        sent = np.maximum(
            self._largest(front, reduced, less=kept),
            self._largest(rest, reduced, less=Field.ACT_NONE),
        )
        many = held.sum(axis=2) > 1
        sent, behind = np.where(many, sent, 0), np.where(many, self._largest(held, reduced), 0)
        head = leaf.head
        behind[:, -1] = np.where(many[:, -1], behind[:, -1], head[reduced])
        sent[:, -1] = np.maximum(sent[:, -1], head[reduced])
        if leaf.splits_backward:
            unsummed = self._largest(held, Field.LATE_GRADIENTS)
            sent[:, 1:] += unsummed[:, 1:]
        working, draining = working + sent, draining + behind
        activation[:, 0] += leaf.embedding[Field.ACT_NONE]
        activation[:, -1] += leaf.head[Field.ACT_NONE]
        start = leaf.embedding[Field.WORK_NONE]
        idle = self._largest(front, Field.ACT_NONE, less=kept)[:, -1] if leaf.idle_forward else 0
        loss = head[Field.WORK_NONE] + idle
        working[:, -1] = np.maximum(working[:, -1] - head[Field.ACT_NONE], loss)
        first = leaf.embedding[Field.ACT_NONE] + start
        draining[:, 0] = np.maximum(draining[:, 0], first)
        working[:, 0] = np.maximum(working[:, 0], start - activation[:, 0])
        static, made, step = (
            self._by_rank(self._sum(held, field)).sum(axis=1)
            for field in (Field.STATIC, Field.NEW_GRADIENTS, Field.UPDATE_BYTES)
        )
        short_lived = self._by_rank(working).max(axis=1)
        last = self._by_rank(draining).max(axis=1)
        alive = self._by_rank(activation)
        if leaf.splits_backward:
            deferred = np.maximum(self._sum(held, Field.DEFERRED), 0)
            late = self._sum(held, Field.LATE_GRADIENTS)
            deferred[:, 0] = late[:, 0] = 0
            beside = [self._by_rank(deferred), self._by_rank(late)]
            alive = np.concatenate([alive, *beside], axis=1)
        ok = np.ones(len(held), dtype=bool)
        for rank in range(leaf.pp):
            vectors = _live(leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank)
            most = (alive[:, :, rank] @ vectors).max(axis=1)
            lively = most + short_lived[:, rank]
            if leaf.microbatches > 1 or leaf.splits_backward:
                peak = made[:, rank] + np.maximum(lively, step[:, rank])
            else:
                peak = np.maximum(lively, made[:, rank] + np.maximum(last, step)[:, rank])
            fixed = leaf.fixed_bytes + leaf.received_bytes(rank)
            ok &= fixed + static[:, rank] + peak <= leaf.capacity_bytes
        return ok

    def _largest(self, counts: Ints, *fields: int, less: int | None = None) -> Ints:
        values = self.kinds[:, list(fields)].sum(axis=1)
        if less is not None:
            values = values - self.kinds[:, less]
        result: Ints = np.where(counts > 0, values, 0).max(axis=2, initial=0)
        return result
