"""Stages that a user names: whether they are those of the schedule, and what follows from them."""

from __future__ import annotations

from cost_models.layout import V_SHAPED, ends_on, place_of, stage_of
from planner.errors import InputError
from planner.given_outside import outside_range
from planner.plan import Chunk, Layout
from planner.request import Request


def settled_stages(layout: Layout, request: Request) -> Layout:
    """``layout`` with embedding, head and devices of its stages filled in where they were left out.

    Raises :class:`InputError` where the stages are no partition of the model's layers over the
    virtual stages of the schedule, or say otherwise of embedding, head or devices than follows.
    """
    _require_shape(layout)
    _require_partition(layout, request)
    per_stage = request.devices // layout.pp
    stages = []
    for rank, stage in enumerate(layout.stages):
        devices = (rank * per_stage, (rank + 1) * per_stage)
        if stage.devices not in (None, devices):
            raise InputError(
                f"layout: stages[{rank}].devices = {list(stage.devices or ())}, but rank {rank} of "
                f"{layout.pp} holds devices {list(devices)}",
                hint="leave devices out: they follow from the degrees",
            )
        chunks = [_settled(layout, rank, index, chunk) for index, chunk in enumerate(stage.chunks)]
        stages.append(stage.model_copy(update={"chunks": tuple(chunks), "devices": devices}))
    return layout.model_copy(update={"stages": tuple(stages)})


def _require_shape(layout: Layout) -> None:
    if len(layout.stages) != layout.pp:
        raise InputError(f"layout: {len(layout.stages)} stages for pp = {layout.pp} ranks")
    for rank, stage in enumerate(layout.stages):
        if len(stage.chunks) != layout.vpp:
            raise InputError(
                f"layout: stages[{rank}] has {len(stage.chunks)} chunks, but vpp = {layout.vpp}"
            )


def _require_partition(layout: Layout, request: Request) -> None:
    """Refuse virtual stages that leave layers out, hold them twice or in another order."""
    outside = outside_range(layout, request)
    position, count = (len(outside) if outside.start == 0 else 0), layout.pp * layout.vpp
    for stage in range(count):
        rank, index = place_of(layout.schedule, layout.pp, stage)
        first, last = layout.stages[rank].chunks[index].layers
        if first != position or last < first:
            raise InputError(
                f"layout: stages[{rank}].chunks[{index}] is virtual stage {stage} of {count} and "
                f"holds layers [{first}, {last}]; it should start at layer {position}",
                hint=_order(layout),
            )
        position = last
    layers = request.model.layer_count
    if position != (layers if outside.start == 0 else outside.start):
        raise InputError(
            f"layout: the stages hold {position} layers, the model has {layers}",
            hint="layers are [first, last_exclusive], numbered through the model",
        )


def _order(layout: Layout) -> str:
    """How the schedule deals virtual stages to ranks."""
    pp = layout.pp
    if layout.schedule in V_SHAPED:
        return f"{layout.schedule}: rank r holds virtual stages r and {2 * pp - 1} - r"
    if layout.vpp > 1:
        return f"{layout.schedule}: rank r holds virtual stages r, {pp} + r and so on"
    return "layers are [first, last_exclusive], numbered through the model"


def _settled(layout: Layout, rank: int, index: int, chunk: Chunk) -> Chunk:
    stage = stage_of(layout.schedule, layout.pp, rank, index)
    embedding, head = ends_on(layout.schedule, layout.pp, layout.vpp, stage)
    follows = {"has_embedding": embedding, "has_head": head}
    for name, value in follows.items():
        if name in chunk.model_fields_set and getattr(chunk, name) != value:
            raise InputError(
                f"layout: stages[{rank}].chunks[{index}].{name} = {str(not value).lower()}: "
                f"under {layout.schedule} it is {str(value).lower()}",
                hint=f"leave {name} out: it follows from the schedule",
            )
    return chunk.model_copy(update=follows)
