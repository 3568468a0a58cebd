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
        self.gathered = self._largest(self.held, Field.GATHERED)
        self._known: dict[Recompute, tuple[Ints, Ints, Ints]] = {}

    def table(self, rank: int, option: Recompute, *, least: int) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``.

        The peak of ``cost_models.leaf.peak_bytes``; fewer than ``least`` layers are not allowed.
        """
        leaf = self.leaf
        static, activation, working = self._bytes(option)
        live = live_peaks(leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank)[0][0]
        gathered = 0
        for end, present in ((leaf.embedding, rank == 0), (leaf.head, rank == leaf.pp - 1)):
            if present:
                static = static + end[Field.STATIC]
                activation = activation + end[Field.ACT_NONE]
                working = np.maximum(working, end[Field.WORK_NONE])
                gathered = max(gathered, end[Field.GATHERED])
        peak = leaf.fixed_bytes + static + live * activation + working
        peak = peak + np.maximum(self.gathered, gathered)
        layers, pp = len(leaf.sequence), leaf.pp
        edges: Ints = np.arange(layers + 1)
        first, last = edges[:, None], edges[None, :]
        allowed: Table = last - first >= least
        if not leaf.uneven:
            allowed &= (first == rank * layers // pp) & (last == (rank + 1) * layers // pp)
        return allowed & (peak <= leaf.capacity_bytes)

    def _largest(self, counts: Ints, field: int) -> Ints:
        """The largest ``field`` of the kinds that a range has any layer of."""
        values = np.array([kind[field] for kind in self.leaf.kinds], dtype=np.int64)
        largest: Ints = np.max(np.where(counts > 0, values, 0), axis=2)
        return largest

    def _bytes(self, option: Recompute) -> tuple[Ints, Ints, Ints]:
        """Static, activation and working bytes of every range of layers under an option."""
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
            kinds: Ints = np.array(self.leaf.kinds, dtype=np.int64)
            known = (
                held @ kinds[:, Field.STATIC],
                front @ kinds[:, kept] + rest @ kinds[:, Field.ACT_NONE],
                np.maximum(self._largest(front, short), self._largest(rest, Field.WORK_NONE)),
            )
            self._known[option] = known
        return known
