"""Sizes of rounds of microbatches that a request leaves open (``cost_models.rounds``).

They are chosen where a layout is opened: all bounds on a layout hold for every size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cost_models.graph import Bools
from cost_models.layout import IN_ROUNDS, SCHEDULES
from cost_models.rounds import round_sizes
from planner.meshes import Layouts, Meshes
from planner.request import Request
from planner.rules import overfills

NAME = "round_size"


def open_rounds(request: Request, meshes: Meshes, layouts: Layouts, index: int) -> tuple[int, ...]:
    """Sizes of rounds for one layout, the smallest first, that the stack runs, the user allows and
    the hosts have room for; only 0 where its schedule has no rounds."""
    sizes = _allowed(request, meshes, layouts, index)
    offload = request.machine.offload
    if sizes == (0,) or not (offload.inputs or offload.checkpoints):
        return sizes
    row = np.full(len(sizes), index)
    layouts = layouts.take(row)
    full = overfills(request, meshes.take(layouts.mesh), layouts, np.array(sizes))
    return tuple([size for size, bad in zip(sizes, full.tolist(), strict=True) if not bad])


def _allowed(request: Request, meshes: Meshes, layouts: Layouts, index: int) -> tuple[int, ...]:
    if SCHEDULES[int(layouts.schedule[index])] not in IN_ROUNDS:
        return (0,)
    mesh, limits = int(layouts.mesh[index]), request.job.constraints
    pp, per_step = int(meshes.pp[mesh]), int(meshes.dp[mesh] * meshes.microbatch[mesh])
    sizes = round_sizes(request.stack.rounds, pp, request.global_batch // per_step)
    if NAME in limits.fix:
        sizes = tuple([size for size in sizes if size == limits.fix[NAME]])
    if NAME in limits.max:
        sizes = tuple([size for size in sizes if size <= limits.max[NAME]])
    return () if NAME in limits.forbid else sizes


def round_limits(
    request: Request,
) -> Iterator[tuple[str, Callable[[Meshes, Layouts], Bools]]]:
    """The user's limits on rounds as rules over layouts: one has none of the sizes asked for."""
    limits = request.job.constraints
    asked = [f"= {limits.fix[NAME]}"] if NAME in limits.fix else []
    asked += [f"<= {limits.max[NAME]}"] if NAME in limits.max else []
    if asked or NAME in limits.forbid:
        yield (
            f"asked for {NAME} {' and '.join(asked)}" if asked else f"asked for no {NAME}",
            lambda m, x: _without(request, m, x),
        )


def _without(request: Request, meshes: Meshes, layouts: Layouts) -> Bools:
    """Which layouts have no size of rounds left. ``meshes`` are gathered to their length."""
    own = Layouts(np.arange(len(layouts)), *[getattr(layouts, n) for n in _LAYOUT_COLUMNS])
    fixed = request.job.constraints.fix.get(NAME)
    return np.array(
        [
            not sizes or (sizes == (0,) and fixed is not None)
            for sizes in (_allowed(request, meshes, own, index) for index in range(len(layouts)))
        ],
        dtype=bool,
    )


_LAYOUT_COLUMNS = (
    "dp_replicate",
    "dp_shard",
    "zero_stage",
    "reshard",
    "schedule",
    "vpp",
    "outside",
)
