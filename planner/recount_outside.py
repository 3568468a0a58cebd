"""Which layers may be outside a pipeline, once more."""

from __future__ import annotations

from planner.request import Request


def left_outside(schedule: str, stages: int, request: Request) -> list[int]:
    """Numbers of layers that the stack runs outside a pipeline of so many virtual stages. Layers of
    the first kind are there, where one other kind follows; of the rest any, while the stages hold
    equally many."""
    kinds = request.workload.layers
    turns = [n for n in range(1, len(kinds)) if kinds[n] != kinds[n - 1]]
    piped = schedule.removesuffix("_delayed") in ("gpipe", "looped_bfs") and stages > 1
    if not request.stack.outside_layers or not piped or len(turns) > 1:
        return [0]
    first = turns[0] if turns else 0
    return [n for n in range(first, len(kinds)) if (len(kinds) - n) % stages == 0]
