"""Bounds of meshes and layouts against the best completion of every single layout.

Sharper than the comparison of optima: a bound above one layout's best step, or a layout declared
too big that fits, fails here even where another layout wins anyway.
"""

from __future__ import annotations

import pytest

from cost_models.layout import SCHEDULES
from planner.request import Request
from planner.space import (
    Layouts,
    Meshes,
    build_space,
    expand,
    layout_rules,
)
from planner.tables import mesh_bounds, price_layouts
from tests.oracle.amount import of
from tests.oracle.brute import BruteForce
from tests.oracle.instances import draw
from tests.oracle.layouts import CP_KINDS, Layout, every_layout


def surviving(request: Request) -> tuple[Meshes, Layouts]:
    """All layouts of the planner's space that its rules leave."""
    meshes = build_space(request).meshes
    layouts = expand(request, meshes)
    for _, broken in layout_rules(request):
        layouts = layouts.take(~broken(meshes.take(layouts.mesh), layouts))
    return meshes, layouts


def as_tuple(meshes: Meshes, layouts: Layouts, index: int) -> Layout:
    """One of the planner's layouts in the oracle's words."""
    mesh = int(layouts.mesh[index])
    return Layout(
        tp=int(meshes.tp[mesh]),
        sp=int(meshes.sp[mesh]),
        cp=int(meshes.cp[mesh]),
        cp_kind=CP_KINDS[int(meshes.cp_kind[mesh]) % 5],
        cp_inner=max(1, int(meshes.cp_kind[mesh]) // 5),
        pp=int(meshes.pp[mesh]),
        ep=int(meshes.ep[mesh]),
        etp=int(meshes.etp[mesh]),
        microbatch=int(meshes.microbatch[mesh]),
        dp_replicate=int(layouts.dp_replicate[index]),
        dp_shard=int(layouts.dp_shard[index]),
        zero=int(layouts.zero_stage[index]),
        reshard=int(layouts.reshard[index]),
        schedule=SCHEDULES[int(layouts.schedule[index])],
        vpp=int(layouts.vpp[index]),
        outside=int(layouts.outside[index]),
    )


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_the_spaces_are_the_same(start: int) -> None:
    for seed in range(start, start + of(20, 6)):
        request = draw(seed)
        meshes, layouts = surviving(request)
        found = [as_tuple(meshes, layouts, i) for i in range(len(layouts))]
        assert sorted(found) == sorted(every_layout(request)), f"seed {seed}"


def check_bounds(seed: int, stack: str | None = None, request: Request | None = None) -> int:
    """Compare the bounds of one instance's layouts; how many were compared."""
    request = request or draw(seed, stack)
    meshes, layouts = surviving(request)
    if not len(layouts):
        return 0
    brute = BruteForce(request)
    xs = [as_tuple(meshes, layouts, i) for i in range(len(layouts))]
    prices = brute.prices(xs)
    of_layout = price_layouts(request, meshes, layouts).bound_ns
    of_mesh = mesh_bounds(request, meshes)[layouts.mesh]
    for x, bound, looser in zip(xs, of_layout.tolist(), of_mesh.tolist(), strict=True):
        best = brute.best_of(x, prices[x.config()])
        if best is not None:
            assert bound <= best, f"seed {seed}: layout bound {bound} > {best} of {x}"
            assert looser <= best, f"seed {seed}: mesh bound {looser} > {best} of {x}"
    return len(xs)


@pytest.mark.parametrize("start", range(3000, 3060, 10))
def test_bounds_are_below_every_completion(start: int) -> None:
    assert sum(check_bounds(seed) for seed in range(start, start + of(10, 4))) > 0


@pytest.mark.parametrize("seed", [1059])
def test_gradients_made_in_the_only_microbatch_are_not_beside_its_activations(seed: int) -> None:
    assert check_bounds(seed) > 0
