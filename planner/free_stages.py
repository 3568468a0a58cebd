"""Partitions of an interleaved leaf whose virtual stages may hold any numbers of layers.

There are too many to look at but for a few layers and stages, and no bound is near the best of them
in general: where a pipeline fills depends on every stage. So a leaf with few partitions is solved;
of one with many, the likely ones are priced, its bound stands as it was, and the best plan is
improved layer by layer at the end. The certificate then says how far the optimum may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise, product

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import Schedule, stage_of
from cost_models.leaf import Completion, Leaf, stage_costs
from cost_models.partitions import count_free_bounds, free_bounds, interleaved_bounds
from cost_models.peaks import fits
from cost_models.surrogate import surrogate_ns
from planner.leaves import Candidate, Incumbent

Ints = NDArray[np.int64]
EVERY = 1_500
"""Partitions of a leaf up to which all are looked at."""
LIGHTER, HEAVIER = 4, 2
"""Layers by which an end of the pipeline is let differ from the average rank."""
ACTIONS = 12_000_000
"""Simulated passes for which one plan is improved."""


def is_listed(leaf: Leaf) -> bool:
    """Whether :func:`free_partitions` are all there are."""
    return count_free_bounds(len(leaf.sequence), leaf.stages) <= EVERY


def free_partitions(leaf: Leaf) -> Ints:
    """All partitions of few, else the likely ones; shape (partitions, stages + 1)."""
    layers = len(leaf.sequence)
    if is_listed(leaf):
        return _table(free_bounds(layers, leaf.stages), leaf.stages)
    even = tuple(interleaved_bounds(replace(leaf, uneven=True)))
    likely = _likely(layers, leaf.pp, leaf.vpp, leaf.schedule)
    return _table(dict.fromkeys((*even, *likely)), leaf.stages)


def _table(bounds: Iterator[tuple[int, ...]] | dict[tuple[int, ...], None], stages: int) -> Ints:
    return np.array(list(bounds), dtype=np.int64).reshape(-1, stages + 1)


@lru_cache(maxsize=256)
def _likely(layers: int, pp: int, vpp: int, schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Ranks of about equal size, the first and last some layers lighter or heavier; on each, chunks
    that differ by one at most, or the missing layers taken from the model's ends."""
    mean = round(layers / pp)
    ends = range(max(0, mean - LIGHTER), mean + HEAVIER + 1)
    found: dict[tuple[int, ...], None] = {}
    for first, last, late in product(ends, ends, (False, True)):
        inner = _spread(layers - first - last, pp - 2, late=late)
        if inner is None:
            continue
        for heavy, bare in product(("first", "middle", "last"), (False, True)):
            ranks = [_chunks(size, vpp, heavy) for size in (first, *inner, last)]
            if bare:
                ranks[0] = _bared(first, _chunks(max(first, mean), vpp, heavy), 0)
                ranks[-1] = _bared(last, _chunks(max(last, mean), vpp, heavy), vpp - 1)
            sizes = [0] * (pp * vpp)
            for rank, chunks in enumerate(ranks):
                for index, size in enumerate(chunks):
                    sizes[stage_of(schedule, pp, rank, index)] = size
            if min(sizes) >= 0 and 0 not in sizes[1:-1]:
                found[tuple(accumulate(sizes, initial=0))] = None
    return tuple(found)


def _spread(layers: int, ranks: int, *, late: bool) -> list[int] | None:
    """``layers`` over ``ranks`` evenly, what is left over on the last or the first ones."""
    if ranks < 1:
        return [] if layers == 0 else None
    each, rest = divmod(layers, ranks)
    heavy = range(ranks - rest, ranks) if late else range(rest)
    return [each + (rank in heavy) for rank in range(ranks)]


def _chunks(layers: int, vpp: int, heavy: str) -> list[int]:
    """A rank's layers over its chunks, the ``heavy`` ones with one more."""
    each, rest = divmod(layers, vpp)
    start = {"first": 0, "middle": (vpp - rest) // 2, "last": vpp - rest}[heavy]
    return [each + (start <= chunk < start + rest) for chunk in range(vpp)]


def _bared(layers: int, chunks: list[int], index: int) -> list[int]:
    """``chunks`` of a fuller rank with what is too much taken from one of them."""
    result = list(chunks)
    result[index] -= sum(chunks) - layers
    return result


def improve(incumbent: Incumbent, candidate: Candidate, check_deadline: Callable[[], None]) -> None:
    """Move single layers between virtual stages of a plan while that makes it faster."""
    leaf, completion, best = candidate.leaf, candidate.completion, candidate.time_ns
    each = 2 * leaf.stages * leaf.microbatches
    left = ACTIONS
    improved = True
    while improved:
        improved = False
        for giver, taker in _moves(leaf):
            bounds = _moved(completion.bounds, giver, taker)
            if bounds is None:
                continue
            check_deadline()
            other = Completion(bounds, completion.recompute)
            ranks = stage_costs(leaf, other)
            if surrogate_ns(leaf, ranks) >= best or not fits(leaf, ranks):
                continue
            left -= each
            if left < 0:
                return
            time = incumbent.simulate(leaf, candidate.degrees, other, candidate.program)
            if time < best:
                completion, best, improved = other, time, True


def _moves(leaf: Leaf) -> Sequence[tuple[int, int]]:
    """Pairs of virtual stages, one of an end of the pipeline first."""
    held = {j for rank in (0, leaf.pp - 1) for j in leaf.held(rank)}
    pairs = [(i, j) for i in range(leaf.stages) for j in range(leaf.stages) if i != j]
    return sorted(pairs, key=lambda pair: not (pair[0] in held or pair[1] in held))


def _moved(bounds: tuple[int, ...], giver: int, taker: int) -> tuple[int, ...] | None:
    """The partition with one layer fewer on ``giver`` and one more on ``taker``; None where
    ``giver`` has none to give."""
    inner = 0 < giver < len(bounds) - 2
    if bounds[giver + 1] - bounds[giver] <= inner:
        return None
    sizes = [b - a for a, b in pairwise(bounds)]
    sizes[giver] -= 1
    sizes[taker] += 1
    return tuple(accumulate(sizes, initial=0))
