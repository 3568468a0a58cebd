"""Partitions of the layers over the virtual stages of a leaf."""

from __future__ import annotations

from collections.abc import Iterator

from cost_models.leaf import Leaf


def interleaved_bounds(leaf: Leaf) -> Iterator[tuple[int, ...]]:
    """Partitions over several virtual stages per rank: equal ones, the first and last may be
    lighter.

    Every virtual stage holds ``h`` layers, the first ``h - x`` and the last ``h - y`` with
    ``0 <= x, y <= h``: what even splitting with the embedding and the loss counted as layers, or a
    smaller first and last stage, can express.
    """
    layers, stages = len(leaf.sequence), leaf.stages
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
