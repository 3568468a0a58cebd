"""Whether the space has a layout that a user names: the rules of ``planner.rules`` on one row."""

from __future__ import annotations

import numpy as np

from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import Int64
from cost_models.layout import SCHEDULES
from cost_models.recompute import in_parts
from hardware_profiles.stack_words import EVERYTHING
from planner.errors import InputError
from planner.hosting import overfilled
from planner.meshes import Layouts, Meshes
from planner.plan import Layout
from planner.recompute import (
    FIRST_LAYERS,
    IN_PIPELINES,
    UNCOUNTED,
    WHOLE_INPUTS,
    first_layers,
    refusal,
    uncounted,
)
from planner.request import Request
from planner.rules import layout_rules, mesh_rules
from planner.stage_limits import require_stages_of_stack


def check_layout(request: Request, layout: Layout) -> None:
    """Raise :class:`InputError` with the reason where the space would remove this layout.

    The user's constraints are not applied: they bound the search, not a layout that is asked about.
    Nor is room, on the devices or on the hosts: what overfills them has its price (``fits``).
    """

    request = request.offloading(layout)

    def one(value: int) -> Int64:
        return np.array([value], dtype=np.int64)

    meshes = Meshes(
        tp=one(layout.tp), sp=one(layout.sequence_parallel), cp=one(layout.cp),
        cp_kind=one(cp_kind_code(layout.cp_kind, layout.cp_inner)), pp=one(layout.pp),
        ep=one(layout.ep), etp=one(layout.etp), microbatch=one(layout.microbatch_size),
        dp=one(layout.dp_replicate * layout.dp_shard), weight=one(1),
    )  # fmt: skip
    too_much_on_hosts = overfilled(request)
    for reason, broken in mesh_rules(request):
        if broken(meshes).any():
            raise InputError(f"layout {_brief(layout)}: {reason}")
    layouts = Layouts(
        mesh=one(0), dp_replicate=one(layout.dp_replicate), dp_shard=one(layout.dp_shard),
        zero_stage=one(layout.zero_stage), reshard=one(layout.reshard_group),
        schedule=one(SCHEDULES.index(layout.schedule)), vpp=one(layout.vpp),
        outside=one(layout.layers_outside),
    )  # fmt: skip
    if layout.zero_stage not in request.zero_stages:
        raise InputError(
            f"{request.stack.name} has no ZeRO stage {layout.zero_stage} in "
            f"{request.job.precision}; it has {', '.join(map(str, request.zero_stages))}"
        )
    ranks, zero = layout.dp_replicate * layout.dp_shard, layout.zero_stage
    if zero > 0 and layout.dp_replicate > 1 and not request.stack.hybrid_sharding:
        raise InputError(
            f"{request.stack.name} has no hybrid sharding: ZeRO {zero} splits over all "
            f"{ranks} data-parallel ranks, not {layout.dp_shard} in {layout.dp_replicate} copies",
            hint=f"dp_shard {ranks}, dp_replicate 1",
        )
    if layout.cp > 1 and layout.cp_kind not in request.stack.cp_kinds:
        raise InputError(
            f"{request.stack.name} has no {layout.cp_kind} context parallelism; "
            f"it has {', '.join(request.stack.cp_kinds)}"
        )
    if layout.pp > 1 and layout.schedule not in request.runnable_schedules:
        raise InputError(
            f"{request.stack.name} has no schedule {layout.schedule}; "
            f"it has {', '.join(request.stack.schedules)}"
        )
    for mode in {part.mode for stage in layout.stages for part in stage.recompute}:
        refused = refusal(mode, request.stack, request.job)
        if refused is not None:
            raise refused
        sent = first_layers(mode)
        if sent and (layout.pp > 1 or sent >= request.model.layer_count):
            raise InputError(f"layout {_brief(layout)}: {FIRST_LAYERS}", hint="recompute none")
        if mode == EVERYTHING:
            _require_counted(request, layout)
        if in_parts(mode) and (layout.tp == 1 or layout.sequence_parallel):
            raise InputError(f"layout {_brief(layout)}: {WHOLE_INPUTS}", hint="recompute full")
    for reason, layout_broken in layout_rules(request):
        allowed = reason == too_much_on_hosts or reason.startswith("no even split")
        if not allowed and layout_broken(meshes, layouts).any():
            raise InputError(f"layout {_brief(layout)}: {reason}")
    require_stages_of_stack(layout, request)


def _require_counted(request: Request, layout: Layout) -> None:
    """Layers without a policy: in a pipeline, and of kinds whose residuals are known."""
    if layout.pp == 1:
        raise InputError(f"layout {_brief(layout)}: {IN_PIPELINES}", hint="recompute full")
    if uncounted(EVERYTHING, request.workload.kinds.values()):
        raise InputError(UNCOUNTED, hint="recompute minimal_with_context")


def _brief(layout: Layout) -> str:
    return (
        f"tp {layout.tp} cp {layout.cp} pp {layout.pp} vpp {layout.vpp} ep {layout.ep} "
        f"etp {layout.etp} dp {layout.dp_replicate}x{layout.dp_shard} "
        f"microbatches {layout.num_microbatches} x {layout.microbatch_size}"
    )
