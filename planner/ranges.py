"""Which ranges of layers each rank of a leaf has room for: all ranges at once."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.leaf import Leaf, Recompute
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
        kinds: Ints = np.array(leaf.kinds, dtype=np.int64)
        fields = (Field.STATIC, Field.NEW_GRADIENTS, Field.UPDATE_BYTES)
        self.sums = tuple(self.held @ kinds[:, field] for field in fields)
        """Static bytes, new gradients and bytes of the update of every range."""
        self.many: Table = self.held.sum(axis=2) > 1
        """Whether a layer has another one of the range behind it."""
        self._known: dict[Recompute, tuple[Ints, Ints, Ints, Ints]] = {}

    def table(self, rank: int, option: Recompute, *, least: int) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``.

        The peak of ``cost_models.leaf.peak_bytes``; fewer than ``least`` layers are not allowed.
        """
        leaf = self.leaf
        activation, working, draining, sent = self._bytes(option)
        static, made, step = self.sums
        live = live_peaks(leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank)[0][0]
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
        working = working + sent
        if rank == leaf.pp - 1:
            working = np.maximum(working - head[Field.ACT_NONE], head[Field.WORK_NONE])
        if rank == 0:
            short = leaf.embedding[Field.WORK_NONE]
            draining = np.maximum(draining, leaf.embedding[Field.ACT_NONE] + short)
            working = np.maximum(working, short - activation)
        lively = live * activation + working
        if leaf.microbatches > 1:
            peak = made + np.maximum(lively, step)
        else:
            peak = np.maximum(lively, made + np.maximum(draining, step))
        peak = leaf.fixed_bytes + leaf.received_bytes(rank) + static + peak
        layers, pp = len(leaf.sequence), leaf.pp
        edges: Ints = np.arange(layers + 1)
        first, last = edges[:, None], edges[None, :]
        allowed: Table = last - first >= least
        if not leaf.uneven:
            allowed &= (first == rank * layers // pp) & (last == (rank + 1) * layers // pp)
        allowed &= peak <= leaf.capacity_bytes
        return allowed

    def _largest(self, counts: Ints, *fields: int, less: int | None = None) -> Ints:
        """The largest sum of ``fields``, less one, of the kinds in a range; at least 0."""
        kinds: Ints = np.array(self.leaf.kinds, dtype=np.int64)
        values = kinds[:, list(fields)].sum(axis=1)
        if less is not None:
            values = values - kinds[:, less]
        largest: Ints = np.max(np.where(counts > 0, values, 0), axis=2, initial=0)
        return largest

    def _bytes(self, option: Recompute) -> tuple[Ints, Ints, Ints, Ints]:
        """Activations, working bytes, most of one layer by itself, and what the reduction of one
        has more than its activations, of every range of layers."""
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
            made, sent = Field.NEW_GRADIENTS, Field.IN_FLIGHT
            kinds: Ints = np.array(self.leaf.kinds, dtype=np.int64)
            known = (
                front @ kinds[:, kept] + rest @ kinds[:, Field.ACT_NONE],
                np.maximum(self._largest(front, short), self._largest(rest, Field.WORK_NONE)),
                np.maximum(
                    self._largest(front, kept, short, less=made),
                    self._largest(rest, Field.ACT_NONE, Field.WORK_NONE, less=made),
                )
                + np.where(self.many, self._largest(held, sent), 0),
                np.where(
                    self.many,
                    np.maximum(
                        self._largest(front, sent, less=kept),
                        self._largest(rest, sent, less=Field.ACT_NONE),
                    ),
                    0,
                ),
            )
            self._known[option] = known
        return known
