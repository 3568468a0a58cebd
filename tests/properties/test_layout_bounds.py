"""Lower bounds of a layout against every completion of it, on made-up prices.

Random integers stand in for prices, so that extremes no real model has (a kind of layer that is
free, ends heavier than all layers, links slower than compute) are looked at too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models import bounds
from cost_models.configs import PricedConfigs
from cost_models.deferral import PutOff
from cost_models.layout import SCHEDULES, RecomputePolicy
from cost_models.leaf import (
    Completion,
    Leaf,
    Recompute,
    stage_costs,
)
from cost_models.peaks import fits, peaks
from cost_models.relaxation import Relaxation
from cost_models.reserve import Reserve
from cost_models.step import Field
from cost_models.step_time import simulate_step
from tests.oracle.layouts import partitions
from tests.oracle.leaves import draw_leaf
from tests.properties.test_schedules import Shape, shapes

CODES = {name: code for code, name in enumerate(SCHEDULES)}
FEW = 400
"""Completions simulated per leaf at most; the quickest by work are always among them."""


@dataclass(frozen=True)
class _OneConfig:
    """What a relaxation reads of configurations: the pipeline of one."""

    pp: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.pp)


def tables_of(leaf: Leaf) -> PricedConfigs:
    """Tables of one configuration with the leaf's prices."""

    def column(row: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array(row, dtype=np.int64)[:, None]

    def one(value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([value], dtype=np.int64)

    names = tuple(f"kind{i}" for i in range(len(leaf.kinds)))
    return PricedConfigs(
        workload=SimpleNamespace(  # type: ignore[arg-type]
            layers=tuple(names[i] for i in leaf.sequence),
            policies=tuple(RecomputePolicy(name) for name in leaf.policies),
        ),
        machine=SimpleNamespace(stack=SimpleNamespace(idle_passes_stay=False)),  # type: ignore[arg-type]
        configs=_OneConfig(one(leaf.pp)),  # type: ignore[arg-type]
        kind_names=names,
        kinds=tuple(column(row) for row in leaf.kinds),
        embedding=column(leaf.embedding),
        head=column(leaf.head),
        hop_ns=one(min(map(min, leaf.sends)) if leaf.sends else leaf.hop_ns),
        bucket_ns=one(leaf.bucket_ns),
        tied_sync_ns=one(leaf.tied_sync_ns),
        sync_ns=one(leaf.sync_ns),
        reserve=Reserve({}, {}),
        fixed_bytes=one(leaf.fixed_bytes),
        receive_bytes=one(leaf.receive_bytes),
        output_bytes=one(leaf.output_bytes),
        capacity_bytes=leaf.capacity_bytes,
        blocking=(leaf.schedule,) if leaf.sends else (),
        put_off=PutOff(
            one(leaf.deferral.each_ns), one(leaf.deferral.each_bytes), leaf.deferral.microbatches
        ),
    )


def bound_of(leaf: Leaf, modes: tuple[str, ...], *, counted: bool, per_stage: bool) -> float:
    """The layout's lower bound in ns; infinity where nothing is said to fit."""

    def one(value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([value], dtype=np.int64)

    relaxation = Relaxation(
        tables_of(leaf), config=one(0), schedule=one(CODES[leaf.schedule]), vpp=one(leaf.vpp),
        microbatches=one(leaf.microbatches), modes=modes, counted=counted, per_stage=per_stage,
    )  # fmt: skip
    return float(relaxation.bounds()[0])


def choices_of(modes: tuple[str, ...], layers: int, *, counted: bool) -> list[Recompute]:
    found: list[Recompute] = []
    for mode in modes:
        if mode != "full":
            found.append((mode, 0))
        else:
            found += [("full", n) for n in (range(1, layers + 1) if counted else (layers,))]
    return found


def least_time(leaf: Leaf, choices: list[Recompute], *, per_stage: bool, rng: Random) -> int | None:
    """The least simulated step over the completions that fit (a sample where they are many)."""
    found = []
    for sizes in partitions(len(leaf.sequence), leaf.schedule, leaf.pp, leaf.vpp, leaf.uneven):
        edges = tuple(sum(sizes[:j]) for j in range(leaf.stages + 1))
        free = per_stage and leaf.vpp == 1 and len(choices) ** leaf.pp <= 256
        for options in (
            product(choices, repeat=leaf.pp) if free else [(o,) * leaf.pp for o in choices]
        ):
            ranks = stage_costs(leaf, Completion(edges, tuple(options) * leaf.vpp))
            if fits(leaf, ranks):
                found.append((max(r.work_ns for r in ranks), len(found), ranks))
    found.sort(key=lambda item: item[:2])
    if len(found) > FEW:
        found = found[: FEW // 2] + rng.sample(found[FEW // 2 :], FEW // 2)
    return min((simulate_step(leaf, ranks).total_ns for _, _, ranks in found), default=None)


def tightened(leaf: Leaf, choices: list[Recompute], rng: Random) -> Leaf:
    """``leaf`` with a capacity that some random completion just needs."""
    every = partitions(len(leaf.sequence), leaf.schedule, leaf.pp, leaf.vpp, leaf.uneven)
    sizes = rng.choice(every)
    edges = tuple(sum(sizes[:j]) for j in range(leaf.stages + 1))
    options = (rng.choice(choices),) * leaf.stages
    need = max(peaks(leaf, stage_costs(leaf, Completion(edges, options))))
    return replace(leaf, capacity_bytes=need + rng.choice((0, 0, need // 50)))


@settings(deadline=None, derandomize=True, max_examples=600)
@given(
    shapes(),
    st.integers(1, 12),
    st.sampled_from(
        (("none",), ("none", "full"), ("none", "selective", "full"), ("full",), ("selective",))
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_layout_bound_is_at_most_every_completion_that_fits(
    shape: Shape, layers: int, modes: tuple[str, ...], counted: bool, per_stage: bool, seed: int
) -> None:
    schedule, pp, vpp, m, size = shape
    if not partitions(layers, schedule, pp, vpp, True):
        layers = max(1, pp * vpp - 2 + seed % 3)
    rng = Random(seed)
    leaf = draw_leaf(
        rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m, layers=layers, tight=False
    )
    leaf = replace(leaf, round_size=size)
    choices = choices_of(modes, layers, counted=counted)
    leaf = tightened(leaf, choices, rng)
    bound = bound_of(leaf, modes, counted=counted, per_stage=per_stage)
    best = least_time(leaf, choices, per_stage=per_stage, rng=rng)
    assert best is not None
    assert bound <= best


def with_fields(row: tuple[int, ...], values: dict[Field, int]) -> tuple[int, ...]:
    return tuple(values.get(field, value) for field, value in enumerate(row))  # type: ignore[call-overload]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes(chunked=True), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_ranks_without_layers_do_not_need_what_layers_work_in(
    shape: Shape, height: int, seed: int
) -> None:
    """Ends of much state and layers that work in much: a V has both ends, bare, on one rank."""
    schedule, pp, vpp, m, size = shape
    rng = Random(seed)
    leaf = draw_leaf(
        rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m,
        layers=height * max(1, pp * vpp - 2), tight=False,
    )  # fmt: skip
    leaf = replace(leaf, round_size=size)
    wide = {Field.WORK_NONE: rng.randint(0, 100_000)}
    large = {Field.STATIC: rng.randint(0, 100_000)}
    leaf = replace(
        leaf,
        kinds=tuple(with_fields(row, wide) for row in leaf.kinds),
        embedding=with_fields(leaf.embedding, large),
        head=with_fields(leaf.head, large),
    )
    choices: list[Recompute] = [("none", 0)]
    leaf = tightened(leaf, choices, rng)
    bound = bound_of(leaf, ("none",), counted=False, per_stage=False)
    best = least_time(leaf, choices, per_stage=False, rng=rng)
    assert best is not None
    assert bound <= best


@settings(deadline=None, derandomize=True, max_examples=300)
@given(shapes(), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_step_bound_is_at_most_every_completion(shape: Shape, layers: int, seed: int) -> None:
    """The time bound alone, for layers of one price."""
    schedule, pp, vpp, m, size = shape
    if not partitions(layers, schedule, pp, vpp, True):
        layers = max(1, pp * vpp - 2 + seed % 3)
    rng = Random(seed)
    leaf = draw_leaf(
        rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m, layers=layers, tight=False
    )
    leaf = replace(leaf, round_size=size)
    relaxation = Relaxation(
        tables_of(leaf), config=np.zeros(1, dtype=np.int64),
        schedule=np.array([CODES[schedule]]), vpp=np.array([vpp]), microbatches=np.array([m]),
        modes=("none",), counted=False, per_stage=False,
    )  # fmt: skip
    rows = (*(leaf.kinds[i] for i in leaf.sequence), leaf.embedding, leaf.head)
    work = np.array([float(sum(row[Field.FORWARD] + row[Field.BACKWARD] for row in rows))])
    bound = float(relaxation.time(work)[0])
    assert bound > 0 or work[0] == 0
    best = least_time(leaf, [("none", 0)], per_stage=False, rng=rng)
    assert best is not None
    assert bound <= best
    assert bounds.SAFETY < 1
