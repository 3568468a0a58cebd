"""Whether a stack has stages like those of a layout, as the recheck reads it."""

from __future__ import annotations

from collections.abc import Iterator

from planner.plan import Layout
from planner.request import Request


def unlike_stages(layout: Layout, request: Request) -> Iterator[str]:
    """Where stages differ although the stack has no such stages: in their layers, or in what they
    recompute."""
    stack = request.stack
    heights = [[c.layers[1] - c.layers[0] for c in stage.chunks] for stage in layout.stages]
    if not stack.uneven_stages and len({height for rank in heights for height in rank}) > 1:
        yield f"virtual stages of {heights} layers, and the stack has equal ones only"
    again = [
        (frozenset(part.mode for part in stage.recompute), sum(p.layers for p in stage.recompute))
        for stage in layout.stages
    ]
    if not stack.recompute_layer_count and any(
        "full" in modes and 0 < number < sum(rank)
        for (modes, number), rank in zip(again, heights, strict=True)
    ):
        yield "full recomputation of some layers of a stage, and the stack has it for all or none"
    if stack.recompute_per_stage and layout.vpp == 1:
        return
    fronts = range(1, 1 + max(height for rank in heights for height in rank))
    alike = any(
        all(
            number == (sum(min(height, front) for height in rank) if modes else 0)
            for (modes, number), rank in zip(again, heights, strict=True)
        )
        for front in fronts
    )
    shared = {modes for (modes, _), rank in zip(again, heights, strict=True) if any(rank)}
    if len(shared) > 1 or not alike:
        yield "the stages recompute unlike each other, and the stack's recompute alike"
