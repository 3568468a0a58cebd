"""Which layers may be outside a pipeline, once more."""

from __future__ import annotations

from itertools import pairwise

from planner.request import Request


def left_outside(schedule: str, stages: int, request: Request) -> list[int]:
    """Numbers of layers that the stack runs outside a pipeline of so many virtual stages. Layers of
    the first kind are there, where one other kind follows; of the rest any, while the stages hold
    equally many, and whole patterns of several kinds."""
    kinds = request.workload.layers
    turns = [n for n in range(1, len(kinds)) if kinds[n] != kinds[n - 1]]
    piped = schedule.removesuffix("_delayed") in ("gpipe", "looped_bfs") and stages > 1
    each = _repeated(request) if len(turns) > 1 else 1
    if not request.stack.outside_layers or not piped or each is None:
        return [0]
    first = turns[0] if len(turns) == 1 else 0
    found = [n for n in range(first, len(kinds)) if (len(kinds) - n) % (stages * each) == 0]
    return found or [first]


def _repeated(request: Request) -> int | None:
    """Layers of the pattern that the stack pipes; None where it is longer, or nothing is said."""
    kinds, most = request.workload.layers, request.stack.longest_pattern
    repeats = (n for n in range(2, (most or 0) + 1) if kinds[n:] == kinds[:-n])
    return next(repeats, None)


def breaks_patterns(held: float, request: Request) -> bool:
    """Whether equal stages of so many layers begin inside a pattern that the stack pipes whole, or
    the pattern is longer than any that it has."""
    kinds = request.workload.layers
    turns = sum(a != b for a, b in pairwise(kinds))
    if request.stack.longest_pattern is None or turns < 2:
        return False
    each = _repeated(request)
    return each is None or held % each != 0
