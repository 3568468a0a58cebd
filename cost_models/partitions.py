"""Partitions of the layers over the virtual stages of a leaf."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, combinations
from math import comb

from cost_models.layout import V_SHAPED
from cost_models.leaf import Leaf


def interleaved_bounds(leaf: Leaf) -> Iterator[tuple[int, ...]]:
    """Partitions over several virtual stages per rank: equal ones, the first and last may be
    lighter.

    Every virtual stage holds ``h`` layers, the first ``h - x`` and the last ``h - y`` with
    ``0 <= x, y <= h``: what even splitting with the embedding and the loss counted as layers, or a
    smaller first and last stage, can express.
    """
    layers, stages = len(leaf.sequence), leaf.stages
    if leaf.schedule in V_SHAPED and leaf.uneven:
        yield from _on_a_v(layers, leaf.pp)
        return
    height = -(-layers // stages)
    while stages * height - layers <= 2 * height:
        spare = stages * height - layers
        for x in range(max(0, spare - height), min(spare, height) + 1):
            y = spare - x
            if not leaf.uneven and spare:
                continue
            bounds = [0, *(height * (j + 1) - x for j in range(stages - 1)), layers]
            if stages == 1 or (bounds[1] >= 0 and bounds[-2] <= layers and y >= 0):
                yield tuple(bounds)
        height += 1
        if stages <= 2 and height > layers + 1:
            return


def rank_layers(layers: int, pp: int) -> range:
    """Layers that every rank of a V but the first may hold: at least as many as the first, which
    has both ends of the model."""
    return range(max(2, -(-layers // pp)), layers // (pp - 1) + 1)


def _on_a_v(layers: int, pp: int) -> Iterator[tuple[int, ...]]:
    """Where stages lie on a V, ranks balance: all but the first hold equally many layers, in two
    chunks that differ by one at most, and the first has what is left, lighter in either chunk."""
    for total in rank_layers(layers, pp):
        left = layers - (pp - 1) * total
        for down in sorted({total // 2, total - total // 2}):
            up = total - down
            for first in range(max(0, left - up), min(down, left) + 1):
                sizes = [first, *[down] * (pp - 1), *[up] * (pp - 1), left - first]
                yield tuple(accumulate(sizes, initial=0))


def count_free_bounds(layers: int, stages: int) -> int:
    """How many partitions :func:`free_bounds` has."""
    return comb(layers + 1, stages - 1) if stages <= layers + 2 else 0


def free_bounds(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Partitions into any numbers of layers: at least one per stage, but for the first and last,
    which hold an end of the model."""
    # Cuts between layers -1 .. layers, of which the ends of the model are the first and last.
    for cuts in combinations(range(1, layers + 2), stages - 1):
        yield (0, *(cut - 1 for cut in cuts), layers)
