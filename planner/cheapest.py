"""The recomputation of a rank that fits and takes least time, for every range of layers.

Where ranks may differ in their recomputation and two modes may share a stage, there are too many
options to try each in every state of the program. But given its layers, what a rank recomputes
changes nothing else than the time of its backward and what it keeps. A step's time grows with the
former, so an option is never better than another that fits the same layers and repeats less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cost_models.layout import RecomputeMode
from cost_models.leaf import Leaf, Recompute
from cost_models.recompute import is_counted
from planner.ranges import Ints, Ranges, Table

BEST: Recompute = ("cheapest", 0)
"""Stands for the cheapest option of each rank and range."""
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Choice:
    """What a rank recomputes with each range of layers: an index into the modes, negative where
    none fits, and a number of layers."""

    mode: Ints
    count: Ints


class Cheapest:
    """The cheapest of ``options`` for each rank of ``leaf`` and range of its layers."""

    def __init__(self, leaf: Leaf, options: Iterable[Recompute]) -> None:
        self.leaf, self.ranges = leaf, Ranges(leaf)
        counts: dict[RecomputeMode, list[int]] = {}
        for mode, count in options:
            counts.setdefault(mode, []).append(count)
        self.counts = counts
        self.modes = tuple(counts)
        self._known: dict[int, Choice] = {}

    def table(self, rank: int, *, least: int) -> Table:
        """``[first, last]``: whether ``rank`` may hold layers ``first .. last - 1``."""
        fits: Table = (self.choice(rank).mode >= 0) & (self.ranges.layers >= least)
        return fits if self.leaf.uneven else fits & self.ranges.even(rank)

    def option(self, rank: int, first: int, last: int) -> Recompute:
        """What ``rank`` recomputes with layers ``first .. last - 1``, which fit."""
        choice = self.choice(rank)
        return self.modes[choice.mode[first, last]], int(choice.count[first, last])

    def choice(self, rank: int) -> Choice:
        """The cheapest option of ``rank`` for every range."""
        if rank not in self._known:
            self._known[rank] = self._choose(rank)
        return self._known[rank]

    def _choose(self, rank: int) -> Choice:
        ranges = self.ranges
        shape = ranges.layers.shape
        best = np.full(shape, _NEVER, dtype=np.int64)
        mode_of, count_of = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)

        def offer(index: int, count: Ints | int, fits: Table) -> None:
            cost = np.where(fits, ranges.repeated(self.modes[index], count), _NEVER)
            better = cost < best
            best[better], mode_of[better] = cost[better], index
            count_of[better] = np.broadcast_to(np.asarray(count, dtype=np.int64), shape)[better]

        for index, mode in enumerate(self.modes):
            counts = self.counts[mode]
            if is_counted(mode) and len(counts) > 1 and mode in self._ascending:
                offer(index, *ranges.fewest(rank, mode))
                counts = counts[-1:]
            for count in counts:
                offer(index, count, ranges.table(rank, (mode, count), least=0))
        return Choice(mode_of, count_of)

    @cached_property
    def _ascending(self) -> frozenset[RecomputeMode]:
        """Counted modes of which more layers take no less time and keep no more."""
        found = []
        for mode in self.modes:
            front, rest = self.leaf.parts(mode)
            if all(
                kind[front.kept] <= kind[rest.kept] and kind[front.extra] >= kind[rest.extra]
                for kind in self.leaf.kinds
            ):
                found.append(mode)
        return frozenset(found)
