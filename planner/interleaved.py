"""The completions of a leaf with several virtual stages per rank, all of its partitions at once.

There are few partitions (equal virtual stages, lighter ends: ``cost_models.partitions``; if any are
allowed, ``planner.free_stages``), so they are listed, priced as arrays, and the ones that may win
handed out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_models.host_room import HostRoom
from cost_models.idle_passes import idle_bytes_by_rank
from cost_models.layout import V_SHAPED
from cost_models.leaf import Completion, Leaf, Recompute
from cost_models.partitions import interleaved_bounds
from cost_models.recompute import group_of
from cost_models.resharding import beyond_at_start, beyond_of_ranges, held_columns
from cost_models.schedule import live_at_first_backward
from cost_models.step import Field

UNLIMITED = 1 << 62

Ints = NDArray[np.int64]
_PARTITIONS: dict[tuple[int, int, bool, bool], Ints] = {}
"""Partitions by number of layers, of virtual stages, whether they may be uneven, and on a V."""


@dataclass(frozen=True, slots=True)
class Found:
    """A completion with its surrogate in ns and the size of its rounds; without a completion, a
    bound on what was left out."""

    surrogate_ns: int
    completion: Completion | None = None
    round_size: int = 0


def even_partitions(leaf: Leaf) -> Ints:
    """Partitions into virtual stages of equal size, lighter at the ends; shape (partitions,
    stages + 1)."""
    key = (len(leaf.sequence), leaf.stages, leaf.uneven, leaf.schedule in V_SHAPED)
    if key not in _PARTITIONS:
        _PARTITIONS[key] = np.array(list(interleaved_bounds(leaf)), dtype=np.int64)
    return _PARTITIONS[key]


def interleaved_candidates(
    leaf: Leaf,
    partitions: Ints,
    options: Sequence[Recompute],
    sizes: Sequence[int],
    *,
    cutoff: Callable[[], int],
    spent: Callable[[], bool],
) -> Iterator[Found]:
    """Completions of an interleaved leaf that fit, best first for each of ``sizes`` of rounds.

    What is at or above ``cutoff()`` is left out, and all further sizes once ``spent()``. For one
    partition and size an option is left out where another fits that adds no more time to any kind
    of layer, or fewer fully recomputed layers do.
    """
    if not len(partitions):
        return
    opened = _Opened(leaf, partitions, options, cutoff, several=len(sizes) > 1)
    for size in sizes:
        if opened.least_ns >= cutoff() or (size != sizes[0] and spent()):
            yield Found(opened.least_ns)
            return
        yield from opened.in_rounds(size)
        if not opened.looked_at_memory:
            return


class _Opened:
    """What is known of a leaf's partitions while the sizes of rounds are tried one by one."""

    def __init__(
        self,
        leaf: Leaf,
        partitions: Ints,
        options: Sequence[Recompute],
        cutoff: Callable[[], int],
        *,
        several: bool,
    ) -> None:
        self.leaf, self.partitions, self.cutoff = leaf, partitions, cutoff
        self.table = _Table(leaf, partitions)
        self.plain = self.table.uniform_surrogates([("none", 0)])[0]
        """Surrogates without recomputation."""
        self.least_ns = int(self.plain.min())
        self.ordered = _by_time(leaf, options)
        self.several = several
        self.hopeless = {option: np.zeros(len(partitions), dtype=bool) for option in options}
        """Partitions without room for an option, however long the rounds are."""
        self._rooms: dict[Recompute, _Room] = {}
        self.looked_at_memory = False
        """Whether there was anything left to try in rounds of the last size."""

    @cached_property
    def _uniform(self) -> dict[Recompute, Ints]:
        """Surrogates under options that treat all layers alike."""
        options = [option for option, _ in self.ordered if option[0] != "full"]
        return dict(zip(options, self.table.uniform_surrogates(options), strict=True))

    def in_rounds(self, size: int) -> Iterator[Found]:
        """The completions in rounds of ``size``."""
        limit = self.cutoff()
        found: list[tuple[int, tuple[int, ...], Recompute]] = []
        skipped = int(self.plain[self.plain >= limit].min(initial=UNLIMITED))
        least = np.flatnonzero(self.plain < limit)
        fitted: list[tuple[tuple[int, ...], NDArray[np.bool_]]] = []
        self.looked_at_memory = False
        for option, extra in self.ordered:
            open_ = least[~self.hopeless[option][least]]
            for other, settled in fitted:
                if all(a <= b for a, b in zip(other, extra, strict=True)):
                    open_ = open_[~settled[open_]]
            if not len(open_):
                continue
            known = self._uniform.get(option)
            times = self.table.surrogates(open_, option) if known is None else known[open_]
            slow = times >= limit
            skipped = min(skipped, int(times[slow].min(initial=UNLIMITED)))
            fast, times = open_[~slow], times[~slow]
            holds = self._fits(fast, option, size)
            for index, time in zip(fast[holds], times[holds], strict=True):
                found.append((int(time), tuple(self.partitions[index].tolist()), option))
            if option[0] == "full":
                # More of them take no less time: what fits, or is slow already, is settled.
                over = np.zeros(len(self.partitions), dtype=bool)
                over[fast[holds]] = over[open_[slow]] = True
                least = least[~over[least]]
            elif holds.any():
                settled = np.zeros(len(self.partitions), dtype=bool)
                settled[fast[holds]] = True
                fitted.append((extra, settled))
        for time, bounds, option in sorted(found):
            if time >= self.cutoff():
                skipped = min(skipped, time)
                break
            yield Found(time, Completion(bounds, (option,) * self.leaf.stages), size)
        if skipped < UNLIMITED:
            yield Found(skipped)

    def _fits(self, rows: Ints, option: Recompute, size: int) -> NDArray[np.bool_]:
        if not len(rows):
            return np.zeros(0, dtype=bool)
        self.looked_at_memory = True
        if not self.several:
            return self.table.room(rows, option).fits(size)
        known = self._rooms.get(option)
        if known is None:
            known = self._rooms[option] = self.table.room(np.arange(len(self.partitions)), option)
            self.hopeless[option] = ~known.fits_in_some(size)
        return known.take(rows).fits(size)


def _by_time(leaf: Leaf, options: Sequence[Recompute]) -> list[tuple[Recompute, tuple[int, ...]]]:
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


@dataclass(frozen=True, slots=True)
class _Room:
    """What partitions have room for beside all that does not depend on the size of rounds."""

    leaf: Leaf
    alive: Ints
    """Bytes per microbatch in flight; shape (partitions, chunks and what a split backward holds
    beside them, ranks)."""
    room: Ints
    """Bytes for all microbatches in flight; shape (partitions, ranks)."""
    possible: NDArray[np.bool_]
    """Whether there is room at the step's other moments."""

    def take(self, rows: Ints) -> _Room:
        """That of some of the partitions."""
        return _Room(self.leaf, self.alive[rows], self.room[rows], self.possible[rows])

    def fits(self, size: int) -> NDArray[np.bool_]:
        """Whether each partition fits in rounds of ``size``."""
        leaf, ok = self.leaf, self.possible
        for rank in range(leaf.pp):
            vectors = held_columns(
                leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank, size, leaf.order,
                leaf.reshards,
            )  # fmt: skip
            most = (self.alive[:, :, rank] @ vectors).max(axis=1)
            ok = ok & (most <= self.room[:, rank])
        return ok

    def fits_in_some(self, size: int) -> NDArray[np.bool_]:
        """Whether each partition may fit in rounds of ``size`` or more: what is in flight at the
        first backward does not fall with it."""
        leaf, ok = self.leaf, self.possible
        for rank in range(leaf.pp):
            live = live_at_first_backward(leaf.pp, leaf.vpp, leaf.microbatches, rank, size)
            least = self.alive[:, : leaf.vpp, rank] @ np.array(live)
            ok = ok & (least <= self.room[:, rank])
        return ok


class _Table:
    """Costs of many partitions of one leaf; ``cost_models.leaf`` and ``peaks`` on arrays."""

    def __init__(self, leaf: Leaf, partitions: Ints) -> None:
        self.leaf, self.partitions = leaf, partitions
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
        extra = self.kinds[:, self.leaf.modes[option[0]].extra]
        backward = self.backward[rows] + front @ extra
        if self.leaf.splits_backward and option[0] == "full":
            backward[:, 1:] += front[:, 1:] @ (extra * self.kinds[:, Field.WEIGHT_PASSES])
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
        nested = work[-1] - leaf.deferral.total_ns
        ends = work[-1] + reduction[-1]
        for rank in reversed(range(leaf.pp - 1)):
            nested = work[rank] if split else np.maximum(work[rank], both[rank] + nested)
            ends = np.maximum(out[rank] + ends, nested + reduction[rank])
        result: Ints = ends + self.update[rows] + leaf.sync_ns
        return result

    def room(self, rows: Ints, option: Recompute) -> _Room:
        """What each partition in ``rows`` has room for under ``option``."""
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
        gathered = self._sum(held, Field.GATHERED)
        working, draining = working + sent, draining + behind + gathered
        if leaf.reshards:
            working += self._beyond(rows, option[0], held, activation)
        padding = idle_bytes_by_rank(leaf, self._by_rank(activation))
        activation[:, 0] += leaf.embedding[Field.ACT_NONE]
        activation[:, -1] += leaf.head[Field.ACT_NONE]
        start = leaf.embedding[Field.WORK_NONE] + gathered[:, 0] - leaf.embedding[Field.GATHERED]
        idle = self._largest(front, Field.ACT_NONE, less=kept)[:, -1] if leaf.idle_forward else 0
        loss = head[Field.WORK_NONE] + idle
        left = leaf.deferral.left_bytes(leaf.microbatches)
        draining[:, -1] += left
        working[:, -1] = np.maximum(working[:, -1] - head[Field.ACT_NONE] + left, loss)
        first = leaf.embedding[Field.ACT_NONE] + start
        draining[:, 0] = np.maximum(draining[:, 0], first)
        working[:, 0] = np.maximum(working[:, 0], start - activation[:, 0])
        again = leaf.splits_backward and option[0] == "full"
        if again:
            graphs = front[:, 1:] @ self.kinds[:, Field.LEFT_AGAIN]
            working[:, 1:] = np.maximum(working[:, 1:], graphs)
        static, made, step = (
            self._by_rank(self._sum(held, field)).sum(axis=1)
            for field in (Field.STATIC, Field.NEW_GRADIENTS, Field.UPDATE_BYTES)
        )
        short_lived = self._by_rank(working).max(axis=1)
        last = self._by_rank(draining).max(axis=1)
        alive = self._by_rank(activation)
        if leaf.splits_backward:
            deferred = self._sum(held, Field.DEFERRED)
            if again:
                grown = self.kinds[:, Field.DEFERRED_AGAIN] - self.kinds[:, Field.DEFERRED]
                deferred += front @ grown
            deferred = np.maximum(deferred, 0)
            late = self._sum(held, Field.LATE_GRADIENTS)
            deferred[:, 0] = late[:, 0] = 0
            beside = [self._by_rank(deferred), self._by_rank(late)]
            alive = np.concatenate([alive, *beside], axis=1)
        if leaf.reshards:
            alive = np.concatenate([alive, self._by_rank(gathered)], axis=1)
        fixed = leaf.fixed_bytes + np.array([leaf.step_buffer_bytes(r) for r in range(leaf.pp)])
        free = leaf.capacity_bytes - fixed - static
        if leaf.microbatches > 1 or leaf.splits_backward:
            free, at_the_end = free - made, step
        else:
            at_the_end = made + np.maximum(last, step)
        possible = (at_the_end <= free).all(axis=1)
        if leaf.hosts is not None:
            possible &= self._hosted(held, leaf.hosts, option)
        return _Room(leaf, alive, free - short_lived - padding, possible)

    def _beyond(self, rows: Ints, mode: str, held: Ints, kept: Ints) -> Ints:
        """Gathered weights beyond activations ``kept``, of each partition and virtual stage."""
        gathered = held @ self.kinds[:, Field.GATHERED]
        beyond = beyond_of_ranges(self.leaf, mode)[self.first[rows], self.last[rows]]
        beyond[:, 0] = beyond_at_start(self.leaf, mode, beyond[:, 0], gathered[:, 0], kept[:, 0])
        beyond[:, -1] += self.leaf.head[Field.GATHERED]
        return beyond

    def _hosted(self, held: Ints, hosts: HostRoom, option: Recompute) -> NDArray[np.bool_]:
        """Whether each rank's state and outputs, by themselves, have room on the hosts."""
        state = held @ (np.array(hosts.kinds) + np.array(hosts.of_mode(option[0])))
        state[:, 0] += hosts.embedding
        state[:, -1] += hosts.head
        devices = np.array([hosts.most_on_node(rank) for rank in range(self.leaf.pp)])
        on_node = self._by_rank(state).sum(axis=1) * devices
        return np.asarray(on_node.max(axis=1) <= hosts.room)

    def _largest(self, counts: Ints, *fields: int, less: int | None = None) -> Ints:
        values = self.kinds[:, list(fields)].sum(axis=1)
        values = values if less is None else values - self.kinds[:, less]
        result: Ints = np.where(counts > 0, values, 0).max(axis=2, initial=0)
        return result
