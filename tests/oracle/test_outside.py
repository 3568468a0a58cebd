"""Layers outside the pipeline against brute force, with both places that they run in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, product
from random import Random

import pytest

from cost_models.outside import leading
from planner.models.spec import ModelSpec
from planner.refute import better_layout
from planner.request import Request
from planner.space import build_space
from tests.oracle.amount import of
from tests.oracle.brute import Answer, brute_force
from tests.oracle.compare import agreed, compare, differences
from tests.oracle.instances import capacity_of, draw
from tests.oracle.layouts import every_layout
from tests.oracle.test_bounds import as_tuple, check_bounds, surviving

STACKS = ("maxtext-gpu", "maxtext-tpu")
STARTS = range(8000, 8040, 10)
EACH = of(10, 3)
PATTERNED = (
    (8036, "maxtext-tpu"), (8065, "maxtext-gpu"), (8042, "maxtext-gpu"), (8042, "maxtext-tpu"),
)[: of(4)]  # fmt: skip
"""Instances of two kinds of layers."""
SEEDS = tuple(start + i for start in STARTS for i in range(EACH))


@lru_cache(maxsize=256)
def piped(seed: int, stack: str, pattern: int = 0) -> Request | None:
    """The instance of a seed in a pipeline and with a batch that its stages can share; None where
    it has no layout with layers outside. With a ``pattern``: so many layers, of two kinds in turns.
    """
    try:
        request = draw(seed, stack)
    except ValueError:
        return None  # no figures of the stack's attention kernel on this device
    rng = Random(f"piped {seed}")
    if pattern:
        if not isinstance(request.model, ModelSpec) or len(request.model.blocks) != 2:
            return None
        run = request.model.layers[0]
        turns = zip(range(pattern), cycle(request.model.blocks), strict=False)
        layers = tuple(run.model_copy(update={"block": name, "count": 1}) for _, name in turns)
        request = replace(request, model=request.model.model_copy(update={"layers": layers}))
    stages = [n for n in range(2, request.devices + 1) if request.devices % n == 0]
    if request.unsupported is not None or not stages or len(request.workload.layers) < 2:
        return None
    limits = request.job.constraints.model_copy(
        update={"fix": {"pp": rng.choice(stages)}, "max": {}, "forbid": (), "schedule": None}
    )
    batch = request.devices * rng.choice((1, 2, 4))
    job = request.job.model_copy(update={"constraints": limits, "global_batch": batch})
    request = replace(request, job=job)
    layouts = list(every_layout(request))
    if not any(x.outside for x in layouts) or len(layouts) > 80:
        return None
    return replace(request, capacity_bytes=capacity_of(request, layouts, rng))


@lru_cache(maxsize=256)
def solved(seed: int, stack: str) -> Answer:
    """Brute force on :func:`piped`."""
    request = piped(seed, stack)
    assert request is not None
    return brute_force(request)


def check_space(seed: int, request: Request) -> None:
    """The layouts are those of brute force, none faster than its bound."""
    meshes, layouts = surviving(request)
    found = [as_tuple(meshes, layouts, index) for index in range(len(layouts))]
    assert sorted(found) == sorted(every_layout(request)), f"seed {seed}"
    check_bounds(seed, request=request)


@pytest.mark.parametrize("pattern", (6, 5, 8)[: of(3)])
def test_the_planner_is_right_with_patterns_of_layers(pattern: int) -> None:
    """Kinds that take turns are in the pipeline, and outside, in pairs."""
    found = Counter[str]()
    for seed, stack in PATTERNED:
        request = piped(seed, stack, pattern)
        if request is None:
            continue
        check_space(seed, request)
        x = agreed(seed, request).layout
        if x is not None:
            found["outside" if x.outside else "inside"] += 1
    assert found, "no instance"


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("start", STARTS)
def test_the_planner_is_right_with_layers_outside(start: int, stack: str) -> None:
    for seed in range(start, start + EACH):
        request = piped(seed, stack)
        if request is None:
            continue
        check_space(seed, request)
        assert not differences(compare(seed, solved(seed, stack), request=request))


def test_instances_with_layers_outside_differ() -> None:
    """Optima with layers outside: behind a pipeline and ahead, with and without repeats."""
    count: Counter[str] = Counter()
    for seed, stack in product(SEEDS, STACKS):
        request = piped(seed, stack)
        if request is None:
            continue
        answer = solved(seed, stack)
        count["infeasible"] += answer.layout is None
        if answer.layout is not None and answer.layout.outside:
            ahead = bool(leading(request.workload.layers))
            count["ahead" if ahead else "behind"] += 1
            count[answer.layout.schedule] += 1
        count["inside"] += answer.layout is not None and not answer.layout.outside
    assert min(count[name] for name in ("ahead", "behind", "gpipe", "looped_bfs", "inside")) > 0


@pytest.mark.parametrize("stack", STACKS)
def test_the_recheck_finds_what_is_better(stack: str) -> None:
    feasible = 0
    for seed in SEEDS:
        request = piped(seed, stack)
        optimum = None if request is None else solved(seed, stack).time
        if request is None or optimum is None:
            continue
        feasible += 1
        assert better_layout(request, optimum) is None, f"seed {seed}"
        assert better_layout(request, optimum + 1) is not None, f"seed {seed}"
    assert feasible > 0


def test_the_space_counts_every_number_of_layers_outside() -> None:
    """A user's limits take away layouts, each counted under the limit."""
    request = next(r for r in (piped(seed, STACKS[0]) for seed in range(8000, 8100)) if r)
    fixed = request.job.constraints.model_copy(
        update={"fix": request.job.constraints.fix | {"layers_outside": 1}}
    )
    job = request.job.model_copy(update={"constraints": fixed})
    limited = replace(request, job=job)
    assert {x.outside for x in every_layout(limited)} <= {1}
    assert build_space(limited).size == build_space(request).size
    _, layouts = surviving(limited)
    assert set(layouts.outside.tolist()) <= {1}
