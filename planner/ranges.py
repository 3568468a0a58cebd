"""Which ranges of layers each rank of a leaf has room for: all ranges at once."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.leaf import Leaf, Recompute
from cost_models.recompute import group_of
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
        fields = (Field.STATIC, Field.NEW_GRADIENTS, Field.UPDATE_BYTES)
        self.sums = tuple(self.held @ self.kinds[:, field] for field in fields)
        """Static bytes, new gradients and bytes of the update of every range."""
        self.many: Table = self.held.sum(axis=2) > 1
        """Whether a layer has another one of the range behind it."""
        edges: Ints = np.arange(len(leaf.sequence) + 1)
        self.layers: Ints = edges[None, :] - edges[:, None]
        """``[first, last]``: layers in a range."""
        self._known: dict[Recompute, tuple[Ints, ...]] = {}
        self._most: dict[Recompute, Ints] = {}

    def table(self, rank: int, option: Recompute, *, least: int) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``.

        The peak of ``cost_models.peaks.peak_bytes``; fewer than ``least`` layers are not allowed.
        """
        leaf = self.leaf
        layers, pp = len(leaf.sequence), leaf.pp
        live = live_peaks(leaf.schedule, pp, leaf.vpp, leaf.microbatches, rank)[0][0]
        # Of the ranks between the ends only that number differs.
        most = self._most_alive(rank, option) if rank in (0, pp - 1) else self._between(option)
        allowed: Table = (most >= live) & (self.layers >= least)
        if not leaf.uneven:
            first, last = rank * layers // pp, (rank + 1) * layers // pp
            alone = np.zeros_like(allowed)
            alone[first, last] = allowed[first, last]
            return alone
        return allowed

    def _between(self, option: Recompute) -> Ints:
        if option not in self._most:
            self._most[option] = self._most_alive(1, option)
        return self._most[option]

    def _most_alive(self, rank: int, option: Recompute) -> Ints:
        """Most microbatches that ``rank`` has room for with each range; negative without any."""
        leaf = self.leaf
        activation, working, draining, sent, idle = self._bytes(option)
        static, made, step = self.sums
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
        working = working + sent
        if leaf.shared is not None:
            step = step + leaf.shared.total(Field.UPDATE_BYTES)
            working = np.maximum(working, leaf.shared.working_bytes)
        if rank == leaf.pp - 1:
            loss = head[Field.WORK_NONE] + (idle if leaf.idle_forward else 0)
            working = np.maximum(working - head[Field.ACT_NONE] + left, loss)
        if rank == 0:
            short = leaf.embedding[Field.WORK_NONE]
            draining = np.maximum(draining, leaf.embedding[Field.ACT_NONE] + short)
            working = np.maximum(working, short - activation)
        free = leaf.capacity_bytes - leaf.fixed_bytes - leaf.step_buffer_bytes(rank) - static
        if leaf.microbatches > 1:
            free, after = free - made, step
        else:
            after = made + np.maximum(draining, step)
        room = free - working
        any_number: Ints = np.where(room >= 0, leaf.microbatches, -1)
        most = np.where(activation > 0, room // np.maximum(activation, 1), any_number)
        return np.where(after <= free, most, -1)

    def _bytes(self, option: Recompute) -> tuple[Ints, ...]:
        """Activations, working bytes, most of one layer by itself, what the reduction of one has
        more than its activations, and most that one does not keep, of every range of layers."""
        known = self._known.get(option)
        if known is None:
            mode, limit = option
            held = self.held
            front = held
            if mode == "full":
                edges: Ints = np.arange(len(self.leaf.sequence) + 1)
                split = np.minimum(edges[None, :], edges[:, None] + limit)
                front = self.counts[split] - self.counts[:, None, :]
            rest = held - front
            kept, short, _ = self.leaf.modes[mode]
            made, sent = self.kinds[:, Field.NEW_GRADIENTS], self.kinds[:, Field.IN_FLIGHT]
            least, most = self.kinds[:, kept], self.kinds[:, Field.ACT_NONE]
            in_mode, plain = self.kinds[:, short], self.kinds[:, Field.WORK_NONE]
            any_, changed, other = held > 0, front > 0, rest > 0
            group = group_of(mode)
            unfilled = -front.sum(axis=2) % group * _largest(changed, least) if group > 1 else 0
            known = (
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
                _largest(changed, most - least),
            )
            self._known[option] = known
        return known


def _largest(present: Table, values: Ints) -> Ints:
    """The largest of ``values`` of the kinds in a range; at least 0."""
    largest: Ints = np.zeros(present.shape[:2], dtype=np.int64)
    for kind, value in enumerate(values.tolist()):
        if value > 0:
            np.maximum(largest, present[:, :, kind] * value, out=largest)
    return largest
