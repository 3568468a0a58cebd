"""Layers outside the pipeline of a layout that a user names, or of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cost_models.layout import RecomputeMode, Schedule
from cost_models.outside import leading, outside_numbers
from planner.errors import InputError
from planner.plan import Layout
from planner.request import Request


def settled_outside(
    asked: object, schedule: Schedule, degree: Mapping[str, int], request: Request
) -> int:
    """Layers outside of a layout that a user names: what was asked, or the fewest that leave equal
    stages.

    Raises :class:`InputError` for a number that the stack cannot run.
    """
    pp, vpp = degree["pp"], degree["vpp"]
    stack, layers = request.stack, request.workload.layers
    if pp == 1 or not stack.outside_layers:
        if asked:
            raise InputError(
                f"layout: layers_outside = {asked}, but "
                + ("pp = 1 is no pipeline" if pp == 1 else f"{stack.name} pipelines all layers"),
                hint="leave it out",
            )
        return 0
    numbers = outside_numbers(layers, schedule, pp * vpp, stack.longest_pattern)
    if asked is None:
        return numbers[0]
    if not isinstance(asked, int) or asked not in numbers:
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        ahead = leading(layers)
        first = f", the first {ahead} of another kind outside" if ahead else ""
        raise InputError(
            f"layout: layers_outside = {asked}, but {len(layers)} layers over pp {pp} x vpp {vpp} "
            f"equal stages leave {shown}{first}",
            hint="leave it out for the fewest",
        )
    return asked


def with_stages_left_out(layout: Layout, request: Request) -> Layout:
    """A layout whose stages are given, with the number of layers outside that these leave."""
    if "layers_outside" in layout.model_fields_set or not request.stack.outside_layers:
        return layout
    held = sum(chunk.layers[1] - chunk.layers[0] for s in layout.stages for chunk in s.chunks)
    left = max(request.model.layer_count - held, 0)
    return layout.model_copy(update={"layers_outside": left})


def outside_range(layout: Layout, request: Request) -> range:
    """Which layers of the model are outside the layout's pipeline."""
    layers = request.workload.layers
    if leading(layers):
        return range(layout.layers_outside)
    return range(len(layers) - layout.layers_outside, len(layers))


def outside_recompute(layout: Layout, request: Request) -> dict[tuple[str, RecomputeMode], int]:
    """How many layers of each kind run outside, in the mode of the stages."""
    names = [request.workload.layers[index] for index in outside_range(layout, request)]
    mode = next((part.mode for stage in layout.stages for part in stage.recompute), "none")
    return {(name, mode): count for name, count in Counter(names).items()}
