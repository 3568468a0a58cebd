"""CP-SAT, the dynamic program and plain enumeration state one program and find one optimum."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random

import pytest

from cost_models.leaf import (
    Completion,
    Leaf,
    Recompute,
    stage_costs,
)
from cost_models.peaks import fits
from cost_models.step_time import simulate_step
from cost_models.surrogate import surrogate_ns
from planner.program import UNLIMITED, enumerate_chain, solve_chain
from planner.solve import solve_cp_sat
from tests.oracle.layouts import partitions
from tests.oracle.leaves import draw_leaf, draw_options

LEAVES = 400


def draw(seed: int) -> tuple[Leaf, tuple[Recompute, ...]]:
    rng = Random(seed)
    pp, layers = rng.choice(((1, 3), (2, 4), (2, 6), (3, 5), (4, 4), (4, 6), (3, 2), (6, 5)))
    leaf = draw_leaf(
        rng,
        schedule=rng.choice(("1f1b", "1f1b", "gpipe")) if pp > 1 else "1f1b",
        pp=pp,
        vpp=1,
        microbatches=rng.randint(1, 9),
        layers=layers,
        tight=rng.random() < 0.7,
        uneven=layers % pp > 0 or rng.random() < 0.8,
    )
    options = draw_options(rng, layers)
    if rng.random() < 0.6:
        return leaf, (("none", 0), ("full", rng.randint(1, layers)))
    few = 4 if pp < 4 else 2
    return leaf, tuple(rng.sample(options, min(few, len(options))))


def listed(leaf: Leaf, options: tuple[Recompute, ...], *, linked: bool) -> int | None:
    """The program's optimum by listing every completion."""
    best = None
    for sizes in partitions(len(leaf.sequence), leaf.schedule, leaf.pp, 1, leaf.uneven):
        bounds = tuple(sum(sizes[:j]) for j in range(leaf.pp + 1))
        choices = [(o,) * leaf.pp for o in options] if linked else product(options, repeat=leaf.pp)
        for choice in choices:
            ranks = stage_costs(leaf, Completion(bounds, choice))
            if fits(leaf, ranks):
                value = surrogate_ns(leaf, ranks)
                best = value if best is None else min(best, value)
    return best


@pytest.fixture(scope="module")
def counts() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("start", range(0, LEAVES, 50))
def test_solvers_agree(start: int, counts: Counter[str]) -> None:
    for seed in range(start, start + 50):
        leaf, options = draw(seed)
        apart, linked = (listed(leaf, options, linked=flag) for flag in (False, True))
        counts["leaves"] += 1
        counts["infeasible"] += apart is None
        counts["one option for all is worse"] += apart is not None and apart != linked

        solution = solve_chain(leaf, options)
        assert solution.objective_ns == apart, f"seed {seed}: dynamic program, free options"
        assert (solution.completion is None) == (apart is None)
        if solution.completion is not None:
            assert apart is not None
            ranks = stage_costs(leaf, solution.completion)
            assert fits(leaf, ranks)
            assert surrogate_ns(leaf, ranks) == apart
            assert simulate_step(leaf, ranks).total_ns >= apart
        cp_sat = solve_cp_sat(leaf, options, linked=False)
        assert cp_sat.objective_ns == apart, f"seed {seed}: CP-SAT, free options"
        assert cp_sat.termination == ("infeasible" if apart is None else "optimal")
        values = [value for value, _ in enumerate_chain(leaf, options, cutoff=lambda: UNLIMITED)]
        assert min(values, default=None) == apart, f"seed {seed}: enumeration"

        single = [solve_chain(leaf, (option,)).objective_ns for option in options]
        found = [value for value in single if value is not None]
        assert min(found, default=None) == linked, f"seed {seed}: dynamic program, one option"
        together = solve_cp_sat(leaf, options, linked=True)
        assert together.objective_ns == linked, f"seed {seed}: CP-SAT, one option"


def test_the_leaves_are_mixed(counts: Counter[str]) -> None:
    """Some leaves are infeasible, and on some free options beat one for all ranks."""
    assert counts["leaves"] == LEAVES
    assert counts["infeasible"] >= 0.1 * LEAVES
    assert counts["one option for all is worse"] >= 0.05 * LEAVES
