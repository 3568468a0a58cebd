"""The program of a leaf on numbers small enough to check by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.leaf import (
    Completion,
    Leaf,
    Recompute,
    stage_costs,
)
from cost_models.peaks import fits
from cost_models.step_time import simulate_step
from planner.interleaved import even_partitions, interleaved_candidates
from planner.program import (
    UNLIMITED,
    Rows,
    enumerate_chain,
    reaches,
    solve_chain,
)
from planner.solve import solve_cp_sat
from tests.rows import POLICIES, row

NONE: Recompute = ("none", 0)


LEAF = Leaf(
    schedule="1f1b",
    pp=2,
    vpp=1,
    microbatches=4,
    sequence=(0, 0, 0),
    kinds=(row(FORWARD=2, BACKWARD=4, STATIC=10, ACT_NONE=5, full=(1, 4, 2)),),
    embedding=row(),
    head=row(FORWARD=2, BACKWARD=4, STATIC=3),
    hop_ns=0,
    bucket_ns=0,
    tied_sync_ns=0,
    sync_ns=0,
    fixed_bytes=0,
    capacity_bytes=1000,
    uneven=True,
    policies=POLICIES,
)
"""Three layers of 2 + 4 and a head that costs one more, on two ranks, four microbatches."""


def test_the_head_is_balanced() -> None:
    """Two layers, and one with the head: both ranks work 12 per microbatch, 60 in all.

    1F1B of equal stages: (4 + 2 - 1) x 12 = 60. One layer first: rank 1 alone 4 x 18 = 72, behind
    6: 78. All three first: rank 0 alone 4 x 18 = 72.
    """
    solution = solve_chain(LEAF, (NONE,))
    assert solution.objective_ns == 60
    assert solution.completion == Completion((0, 2, 3), (NONE, NONE))
    assert simulate_step(LEAF, stage_costs(LEAF, solution.completion)).total_ns == 60
    found = sorted(enumerate_chain(LEAF, (NONE,), cutoff=lambda: UNLIMITED))
    assert [(value, x.bounds) for value, x in found] == [
        (60, (0, 2, 3)), (72, (0, 3, 3)), (78, (0, 1, 3)), (96, (0, 0, 3))
    ]  # fmt: skip
    assert [value for value, _ in enumerate_chain(LEAF, (NONE,), cutoff=lambda: 72)] == [60]


def test_cutoff() -> None:
    assert solve_chain(LEAF, (NONE,), cutoff_ns=61).objective_ns == 60
    below = solve_chain(LEAF, (NONE,), cutoff_ns=60)
    assert (below.termination, below.completion) == ("cutoff", None)


@pytest.mark.parametrize(
    ("capacity", "options", "objective", "bounds"),
    [
        # Rank 0 with two layers: 20 + 2 x 10 = 40; rank 1 with one and the head: 13 + 5 = 18.
        (40, (NONE,), 60, (0, 2, 3)),
        # One byte less: one layer first (10 + 10), then two and the head (23 + 10 = 33).
        (39, (NONE,), 78, (0, 1, 3)),
        # Recomputing both layers of rank 0: 20 + 2 x 2 + 4 = 28, work 2 x 8 = 16 there, 14 behind.
        # Two round trips and one microbatch on rank 0: 2 x 30 + 16 = 76; nesting 16 + 4 x 14 = 72.
        (28, (("full", 2),), 76, (0, 2, 3)),
        # Recomputed where it is needed only: 16 + 12: 2 x 28 + 16 = 72; nesting 16 + 4 x 12 = 64.
        (28, (NONE, ("full", 2)), 72, (0, 2, 3)),
        # Only the first of the two: 20 + 2 x 6 + 4 = 36, work 14 on both: 5 x 14 = 70.
        (36, (("full", 1),), 70, (0, 2, 3)),
    ],
)
def test_memory(
    capacity: int, options: tuple[Recompute, ...], objective: int, bounds: tuple[int, ...]
) -> None:
    leaf = replace(LEAF, capacity_bytes=capacity)
    solution = solve_chain(leaf, options)
    assert solution.objective_ns == objective
    assert solution.completion is not None
    assert solution.completion.bounds == bounds
    assert solve_cp_sat(leaf, options, linked=False).objective_ns == objective


def test_nothing_fits() -> None:
    """The least that can be held: one layer first, 10 + 2 x 1 + 4 = 16, then 23 + 2 + 4 = 29; or
    two recomputed first, 28, then 13 + 1 + 4 = 18."""
    options: tuple[Recompute, ...] = (NONE, ("full", 3))
    assert reaches(Rows(replace(LEAF, capacity_bytes=28)), options)
    leaf = replace(LEAF, capacity_bytes=27)
    assert not reaches(Rows(leaf), options)
    assert solve_chain(leaf, options).termination == "infeasible"
    assert solve_cp_sat(leaf, options, linked=False).termination == "infeasible"


def test_even_stages_only() -> None:
    """Four layers: 2 + 2 although the head makes the last rank longer (3 x 6 = 18 behind 12)."""
    leaf = replace(LEAF, sequence=(0,) * 4, uneven=False)
    solution = solve_chain(leaf, (NONE,))
    assert solution.completion == Completion((0, 2, 4), (NONE, NONE))
    assert solution.objective_ns == 12 + 4 * 18
    assert [x.bounds for _, x in enumerate_chain(leaf, (NONE,), cutoff=lambda: UNLIMITED)] == [
        (0, 2, 4)
    ]
    assert solve_cp_sat(leaf, (NONE,), linked=False).objective_ns == solution.objective_ns


def test_gradients_wider_than_the_work() -> None:
    """A bucket far longer than all work: still solved, and added once."""
    leaf = replace(LEAF, bucket_ns=10**9)
    assert solve_chain(leaf, (NONE,)).objective_ns == 60 + 10**9
    assert solve_cp_sat(leaf, (NONE,), linked=True).objective_ns == 60 + 10**9


def test_interleaved_takes_the_fewest_recomputed_layers_that_fit() -> None:
    """Sixteen layers in four virtual stages may stand as 0 + 8 + 8 + 0; the middle ones then
    recompute 7 of 8 layers where 6 are one byte too much."""
    leaf = replace(
        LEAF, schedule="interleaved", vpp=2, microbatches=2, sequence=(0,) * 16, head=row()
    )
    tall = (0, 0, 8, 16, 16)
    options: tuple[Recompute, ...] = tuple(("full", count) for count in range(1, 17))
    # Rank 0 holds two microbatches of its second chunk: 80 + 2 (1 n + 5 (8 - n)) + 4 = 164 - 8 n.
    leaf = replace(leaf, capacity_bytes=164 - 8 * 7)
    found = interleaved_candidates(
        leaf, even_partitions(leaf), options, (2,), cutoff=lambda: UNLIMITED, spent=lambda: False
    )
    listed = [each.completion for each in found if each.completion is not None]
    listed = [completion for completion in listed if completion.bounds == tall]
    assert [completion.recompute for completion in listed] == [(("full", 7),) * 4]


def test_every_size_of_rounds_takes_its_own_fewest_recomputed_layers() -> None:
    """Longer rounds hold more: a number of recomputed layers that fits in none of them must not
    hide a larger one that does."""
    leaf = replace(
        LEAF, schedule="interleaved", vpp=2, microbatches=6, sequence=(0,) * 16, head=row(),
        capacity_bytes=200,
    )  # fmt: skip
    options: tuple[Recompute, ...] = tuple(("full", count) for count in range(1, 17))
    partitions, sizes = even_partitions(leaf), (2, 3, 4, 6)
    expected = set()
    for bounds in map(tuple, partitions.tolist()):
        for size in sizes:
            completions = [Completion(bounds, (option,) * 4) for option in options]
            variant = replace(leaf, round_size=size)
            fitting = [c for c in completions if fits(variant, stage_costs(variant, c))]
            expected |= {(size, fitting[0])} if fitting else set()
    found = interleaved_candidates(
        leaf, partitions, options, sizes, cutoff=lambda: UNLIMITED, spent=lambda: False
    )
    listed = {(each.round_size, each.completion) for each in found if each.completion is not None}
    assert listed == expected
    assert {size for size, _ in listed} == set(sizes)
