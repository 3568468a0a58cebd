"""The even split of layers over stages that a layout has where nobody says another."""

from __future__ import annotations

from cost_models.leaf import Leaf
from cost_models.outside import leading
from cost_models.partitions import interleaved_bounds
from cost_models.step import Field
from planner.errors import InputError
from planner.request import Request


def even_bounds(request: Request, pp: int, vpp: int, outside: int = 0) -> tuple[int, ...]:
    """Layer boundaries of an even split; ``StackSpec.spare_layers`` says where the layers go that
    it leaves over. Those with some layers ``outside`` are equal."""
    layers, stages = request.model.layer_count, pp * vpp
    if outside:
        first = outside if leading(request.workload.layers) else 0
        return tuple(first + j * (layers - outside) // stages for j in range(stages + 1))
    if stages > layers + 2:
        raise InputError(f"{stages} virtual stages for {layers} layers")
    if vpp > 1:
        shell = _shell(request, pp, vpp)
        # The first partitions have the least height: equal chunks where the layers divide.
        height = -(-layers // stages)
        options = [b for b in interleaved_bounds(shell) if b[2] - b[1] == height]
        if not options:
            raise InputError(
                f"{layers} layers do not split evenly over pp {pp} x vpp {vpp} = {stages} virtual "
                "stages, even with a lighter first and last one",
                hint="give the stages explicitly",
            )
        return options[len(options) // 2]
    sizes = _even_sizes(layers, stages, request.stack.spare_layers)
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return tuple(bounds)


def _even_sizes(layers: int, stages: int, spare: str) -> list[int]:
    base, extra = divmod(layers, stages)
    if spare == "filled":
        height = -(-layers // stages)
        sizes = [min(height, max(0, layers - j * height)) for j in range(stages)]
        if min(sizes) > 0:
            return sizes
    start = stages - extra if spare == "last" else (stages - extra) // 2
    return [base + (start <= j < start + extra) for j in range(stages)]


def _shell(request: Request, pp: int, vpp: int) -> Leaf:
    """A leaf that only knows its shape."""
    row = (0,) * len(Field)
    return Leaf(
        "interleaved", pp, vpp, pp, (0,) * request.model.layer_count, (row,), row, row,
        0, 0, 0, 0, 0, 0, uneven=True,
    )  # fmt: skip
