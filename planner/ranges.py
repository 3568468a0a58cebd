"""Which ranges of layers each rank of a leaf has room for: all ranges at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.host_room import HostRoom
from cost_models.layout import RecomputeMode
from cost_models.leaf import Leaf, Recompute
from cost_models.recompute import group_of, is_counted, parts_of
from cost_models.resharding import beyond_at_start, beyond_of_ranges
from cost_models.schedule import live_peaks
from cost_models.step import Field

Ints: TypeAlias = NDArray[np.int64]
Table: TypeAlias = NDArray[np.bool_]


class Ranges:
    """Bytes of every range of consecutive layers of ``leaf``, per option of recomputation."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        self.counts: Ints = np.array(leaf.counts, dtype=np.int64)
        self.held: Ints = self.counts[None, :, :] - self.counts[:, None, :]
        """``[first, last, kind]``: layers of each kind in a range."""
        self.kinds: Ints = np.array(leaf.kinds, dtype=np.int64)
        fields = (Field.STATIC, Field.NEW_GRADIENTS, Field.UPDATE_BYTES, Field.GATHERED)
        self.sums = tuple(self.held @ self.kinds[:, field] for field in fields)
        """Static bytes, new gradients, bytes of the update and gathered weights of every range."""
        self.many: Table = self.held.sum(axis=2) > 1
        """Whether a layer has another one of the range behind it."""
        edges: Ints = np.arange(len(leaf.sequence) + 1)
        self.layers: Ints = edges[None, :] - edges[:, None]
        """``[first, last]``: layers in a range."""
        self._known: dict[Recompute, tuple[Ints, ...]] = {}
        self._most: dict[Recompute, Ints] = {}
        self._between_ends: dict[RecomputeMode, dict[int, tuple[Ints, Table]]] = {}

    def table(self, rank: int, option: Recompute, *, least: int) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``.

        The peak of ``cost_models.peaks.peak_bytes``; fewer than ``least`` layers are not allowed.
        """
        leaf, pp = self.leaf, self.leaf.pp
        # Of the ranks between the ends only the number of microbatches in flight differs.
        at_end = rank in (0, pp - 1)
        most = self._most_alive(rank, self._bytes(option)) if at_end else self._between(option)
        allowed: Table = (most >= self._live(rank)) & (self.layers >= least)
        if leaf.hosts is not None:
            allowed &= self._hosted(rank, leaf.hosts, option[0])
        if not leaf.uneven:
            return allowed & self.even(rank)
        return allowed

    def even(self, rank: int) -> Table:
        """The range of a rank where all hold as many layers."""
        layers, pp = len(self.leaf.sequence), self.leaf.pp
        alone = np.zeros(self.layers.shape, dtype=bool)
        alone[rank * layers // pp, (rank + 1) * layers // pp] = True
        return alone

    def fewest(self, rank: int, mode: RecomputeMode) -> tuple[Ints, Table]:
        """Fewest layers at the front of each range that a counted mode must change to fit on
        ``rank``, less than all of them, and whether any number does; of a mode whose front keeps
        no more than its rest in any kind of layer.

        What is kept falls with the number; short-lived bytes may rise where the next layer is the
        first of its kind. So the number lies between that which fits without any and that which
        fits with the most that a layer of the range may need.
        """
        if 0 < rank < self.leaf.pp - 1 and self.leaf.hosts is None:
            return self._fewest_between(mode)[self._live(rank)]
        if len(self.kinds) == 1:
            return self._bisected(rank, lambda count: self._measured(mode, count))
        none = (np.zeros_like(self.layers),) * 6
        count, possible = self._bisected(rank, lambda n: (self._kept(mode, n), *none))
        most = self._most_short_lived(mode)
        high, sure = self._bisected(rank, lambda n: (self._kept(mode, n), *most))
        high = np.where(sure, high, np.maximum(self.layers - 1, 1))
        fits, open_ = np.zeros_like(possible), possible
        while open_.any():
            enough = open_ & self._fits(rank, self._measured(mode, count))
            fits |= enough
            open_ = open_ & ~enough & (count < high)
            count = np.where(open_, count + 1, count)
        return count, fits

    def _fewest_between(self, mode: RecomputeMode) -> dict[int, tuple[Ints, Table]]:
        """What :meth:`fewest` says of the ranks between the ends, by microbatches in flight: every
        number of layers is measured once for all of them."""
        if mode not in self._between_ends:
            found = {
                live: (np.maximum(self.layers - 1, 1), np.zeros(self.layers.shape, dtype=bool))
                for live in {self._live(rank) for rank in range(1, self.leaf.pp - 1)}
            }
            for count in range(len(self.leaf.sequence) - 1, 0, -1):
                most = self._most_alive(1, self._measured(mode, count))
                for live, (fewest, fits) in found.items():
                    enough = (most >= live) & (self.layers > count)
                    fewest[enough] = count
                    fits |= enough
            self._between_ends[mode] = found
        return self._between_ends[mode]

    def _bisected(
        self, rank: int, needed: Callable[[Ints], tuple[Ints, ...]]
    ) -> tuple[Ints, Table]:
        """The fewest layers of each range that fit, if more need no more."""
        low = np.ones_like(self.layers)
        high = np.maximum(self.layers - 1, 1)
        fits = self._fits(rank, needed(high)) & (self.layers > 1)
        while np.any(low < high):
            middle = (low + high) // 2
            enough = self._fits(rank, needed(middle))
            high = np.where(enough, middle, high)
            low = np.where(enough, low, np.minimum(middle + 1, high))
        return high, fits

    def _kept(self, mode: RecomputeMode, count: Ints) -> Ints:
        front, rest = self._split(mode, count)
        kept, behind = (self.kinds[:, rows.kept] for rows in self.leaf.parts(mode))
        total: Ints = front @ kept + rest @ behind
        return total

    def _most_short_lived(self, mode: RecomputeMode) -> tuple[Ints, ...]:
        """What :meth:`_measured` says beside the activations, at most for any number of layers."""
        each = [self._bytes((part, len(self.leaf.sequence))) for part in parts_of(mode)]
        return tuple(np.maximum(*pair) for pair in zip(*(e[1:] for e in each), strict=True))

    def _fits(self, rank: int, needed: tuple[Ints, ...]) -> Table:
        found: Table = self._most_alive(rank, needed) >= self._live(rank)
        hosts = self.leaf.hosts
        # Numbers of layers go with modes that send no outputs there.
        return found if hosts is None else found & self._hosted(rank, hosts, "full")

    def repeated(self, mode: RecomputeMode, count: Ints | int) -> Ints:
        """Time in ns that recomputation adds to a microbatch's backward of each range."""
        front, rest = self._split(mode, count)
        in_front, behind_it = (self.kinds[:, rows.extra] for rows in self.leaf.parts(mode))
        total: Ints = front @ in_front + rest @ behind_it
        return total

    def _live(self, rank: int) -> int:
        leaf = self.leaf
        return live_peaks(leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank)[0][0]

    def _hosted(self, rank: int, hosts: HostRoom, mode: RecomputeMode) -> Table:
        """Whether what ``rank`` alone sends to a node with each range has room there."""
        ends = hosts.embedding * (rank == 0) + hosts.head * (rank == self.leaf.pp - 1)
        each = np.array(hosts.kinds) + self._live(rank) * np.array(hosts.inputs)
        each += np.array(hosts.of_mode(mode))
        holds: Table = (self.held @ each + ends) * hosts.most_on_node(rank) <= hosts.room
        return holds

    def _between(self, option: Recompute) -> Ints:
        if option not in self._most:
            self._most[option] = self._most_alive(1, self._bytes(option))
        return self._most[option]

    def _most_alive(self, rank: int, needed: tuple[Ints, ...]) -> Ints:
        """Most microbatches that ``rank`` has room for with each range that needs so many bytes;
        negative without any."""
        leaf = self.leaf
        activation, working, draining, sent, idle, beyond, at_start = needed
        beyond = at_start if rank == 0 else beyond
        gathered = self.sums[3] if leaf.reshards else np.zeros_like(self.layers)
        static, made, step = self.sums[:3]
        bubble = leaf.idle_passes * activation
        for end, present in ((leaf.embedding, rank == 0), (leaf.head, rank == leaf.pp - 1)):
            if present:
                static = static + end[Field.STATIC]
                made = made + end[Field.NEW_GRADIENTS]
                step = step + end[Field.UPDATE_BYTES]
                activation = activation + end[Field.ACT_NONE]
        if rank == leaf.pp - 1:
            head = leaf.head
            sent = np.maximum(sent, head[Field.IN_FLIGHT])
            draining = np.where(self.many, draining, draining + head[Field.IN_FLIGHT])
            left = leaf.deferral.left_bytes(leaf.microbatches)
            draining = draining + left
        if rank == leaf.pp - 1:
            gathered = gathered + leaf.head[Field.GATHERED]
            beyond = beyond + leaf.head[Field.GATHERED]
        working, draining = working + sent + beyond, draining + gathered
        if rank == 0:
            draining = draining + leaf.embedding[Field.GATHERED]
        if leaf.shared is not None:
            step = step + leaf.shared.total(Field.UPDATE_BYTES)
            working = np.maximum(working, leaf.shared.working_bytes)
        if rank == leaf.pp - 1:
            loss = head[Field.WORK_NONE] + (idle if leaf.idle_forward else 0)
            working = np.maximum(working - head[Field.ACT_NONE] + left, loss)
        if rank == 0:
            short = leaf.embedding[Field.WORK_NONE] + gathered
            draining = np.maximum(draining, leaf.embedding[Field.ACT_NONE] + short)
            working = np.maximum(working, short - activation)
        free = leaf.capacity_bytes - leaf.fixed_bytes - leaf.step_buffer_bytes(rank) - static
        if leaf.microbatches > 1:
            free, after = free - made, step
        else:
            after = made + np.maximum(draining, step)
        room = free - working - bubble
        any_number: Ints = np.where(room >= 0, leaf.microbatches, -1)
        most = np.where(activation > 0, room // np.maximum(activation, 1), any_number)
        return np.where(after <= free, most, -1)

    def _bytes(self, option: Recompute) -> tuple[Ints, ...]:
        """Activations, working bytes, most of one layer by itself, what the reduction of one has
        more than its activations, most that one does not keep, and gathered weights beyond the
        activations (``cost_models.resharding``) behind and on the first stage, of every range."""
        known = self._known.get(option)
        if known is None:
            known = self._known[option] = self._measured(*option)
        return known

    def _split(self, mode: RecomputeMode, count: Ints | int) -> tuple[Ints, Ints]:
        """Layers of each kind at the front and in the rest of every range."""
        if not is_counted(mode):
            return self.held, np.zeros_like(self.held)
        edges: Ints = np.arange(len(self.leaf.sequence) + 1)
        split = np.minimum(edges[None, :], edges[:, None] + count)
        front: Ints = self.counts[split] - self.counts[:, None, :]
        return front, self.held - front

    def _measured(self, mode: RecomputeMode, count: Ints | int) -> tuple[Ints, ...]:
        """What :meth:`_bytes` says, of one number of layers or of one for each range."""
        front, rest = self._split(mode, count)
        (kept, short, _), (kept_behind, short_behind, _) = self.leaf.parts(mode)
        made, sent = self.kinds[:, Field.NEW_GRADIENTS], self.kinds[:, Field.IN_FLIGHT]
        least, most = self.kinds[:, kept], self.kinds[:, kept_behind]
        in_mode, plain = self.kinds[:, short], self.kinds[:, short_behind]
        whole = self.kinds[:, Field.ACT_NONE]
        any_, changed, other = self.held > 0, front > 0, rest > 0
        group = group_of(mode)
        unfilled = -front.sum(axis=2) % group * _largest(changed, least) if group > 1 else 0
        return (
            front @ least + rest @ most + unfilled,
            np.maximum(_largest(changed, in_mode), _largest(other, plain)),
            np.maximum(
                _largest(changed, least + in_mode - made), _largest(other, most + plain - made)
            )
            + np.where(self.many, _largest(any_, sent), 0),
            np.where(
                self.many,
                np.maximum(_largest(changed, sent - least), _largest(other, sent - most)),
                0,
            ),
            np.maximum(_largest(changed, whole - least), _largest(other, whole - most)),
            *self._beyond(mode, front @ least + rest @ most),
        )

    def _beyond(self, mode: RecomputeMode, kept: Ints) -> tuple[Ints, Ints]:
        """Gathered weights beyond activations ``kept``: of any stage, and of the first."""
        if not self.leaf.reshards:
            return (np.zeros_like(self.layers),) * 2
        beyond = beyond_of_ranges(self.leaf, mode)
        return beyond, beyond_at_start(self.leaf, mode, beyond, self.sums[3], kept)


def _largest(present: Table, values: Ints) -> Ints:
    """The largest of ``values`` of the kinds in a range; at least 0."""
    largest: Ints = np.zeros(present.shape[:2], dtype=np.int64)
    for kind, value in enumerate(values.tolist()):
        if value > 0:
            np.maximum(largest, present[:, :, kind] * value, out=largest)
    return largest
