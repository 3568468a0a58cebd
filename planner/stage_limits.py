"""Whether a stack can give the stages of a layout their layers and their recomputation."""

from __future__ import annotations

from cost_models.leaf import Recompute
from cost_models.recompute import is_counted
from planner.errors import InputError
from planner.plan import Layout, Stage
from planner.request import Request
from planner.stage_recompute import recompute_of


def require_stages_of_stack(layout: Layout, request: Request) -> None:
    """Raise :class:`InputError` where stages hold unlike numbers of layers, or recompute unlike,
    and the stack has no such stages."""
    stack = request.stack
    sizes = sorted({size for stage in layout.stages for size in _sizes(stage)})
    if len(sizes) > 1 and not stack.uneven_stages:
        raise InputError(
            f"layout: stages of {', '.join(map(str, sizes))} layers, and {stack.name} "
            f"{stack.version} has equal ones only",
            hint="leave stages out for an even split",
        )
    if not stack.recompute_layer_count and _limits(layout, request):
        raise InputError(
            f"layout: full recomputation of {min(_limits(layout, request))} layers of a virtual "
            f"stage, and {stack.name} {stack.version} recomputes all of them or none",
            hint="leave recompute_layers out",
        )
    if stack.recompute_per_stage and layout.vpp == 1:
        return
    if not _share_recompute(layout, request):
        raise InputError(
            f"layout: the stages recompute unlike each other, and in {stack.name} {stack.version} "
            + ("virtual stages" if stack.recompute_per_stage else "all stages")
            + " recompute alike",
            hint="give every stage the same recompute, or recompute instead of stages",
        )


def _sizes(stage: Stage) -> list[int]:
    return [chunk.layers[1] - chunk.layers[0] for chunk in stage.chunks]


def _recompute(layout: Layout, request: Request) -> list[tuple[Recompute, int]]:
    """What each rank that has layers recomputes, and the most layers in a virtual stage of it."""
    held = [stage for stage in layout.stages if any(_sizes(stage))]
    return [(recompute_of(stage, request), max(_sizes(stage))) for stage in held]


def _limits(layout: Layout, request: Request) -> set[int]:
    """Numbers of fully recomputed layers that are less than a virtual stage has."""
    found = _recompute(layout, request)
    return {count for (mode, count), size in found if mode == "full" and count < size}


def _share_recompute(layout: Layout, request: Request) -> bool:
    """Whether one mode, and one number of layers, stand for what all stages recompute."""
    found = _recompute(layout, request)
    if len({mode for (mode, _), _ in found}) > 1:
        return False
    counted = [(count, size) for (mode, count), size in found if is_counted(mode)]
    limits = {count for count, size in counted if count < size}
    tallest = max((size for count, size in counted if count == size), default=0)
    return len(limits) < 2 and tallest <= min(limits, default=tallest)
