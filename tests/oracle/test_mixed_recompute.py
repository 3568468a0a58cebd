"""Two modes in one stage: the program's optimum and the whole search against listings."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random

from cost_models.layout import RecomputeMode
from cost_models.leaf import Completion, Leaf, Recompute, stage_costs
from cost_models.peaks import fits
from cost_models.recompute import is_counted
from cost_models.surrogate import surrogate_ns
from planner.cheapest import BEST, Cheapest
from planner.program import UNLIMITED, Rows, enumerate_chain, solve_chain
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.layouts import partitions
from tests.oracle.leaves import draw_leaf

MIXED: tuple[RecomputeMode, ...] = ("full", "full/selective", "selective/none")


def listed(leaf: Leaf, options: tuple[Recompute, ...]) -> int | None:
    """The program's optimum by listing every completion."""
    best = None
    for sizes in partitions(len(leaf.sequence), leaf.schedule, leaf.pp, 1, leaf.uneven):
        bounds = tuple(sum(sizes[:j]) for j in range(leaf.pp + 1))
        for choice in product(options, repeat=leaf.pp):
            ranks = stage_costs(leaf, Completion(bounds, choice))
            if fits(leaf, ranks):
                value = surrogate_ns(leaf, ranks)
                best = value if best is None else min(best, value)
    return best


def test_the_cheapest_option_of_each_range_loses_nothing() -> None:
    count: Counter[str] = Counter()
    for seed in range(40):
        rng = Random(seed)
        pp, layers = rng.choice(((1, 3), (2, 4), (2, 5), (3, 4)))
        leaf = draw_leaf(
            rng, schedule=rng.choice(("1f1b", "gpipe")) if pp > 1 else "1f1b", pp=pp, vpp=1,
            microbatches=rng.randint(1, 6), layers=layers,
            uneven=layers % pp > 0 or rng.random() < 0.8,
        )  # fmt: skip
        numbers = [(mode, n) for mode in MIXED for n in range(1, layers)]
        options = (("none", 0), ("selective", 0), *numbers, ("full", layers))
        rows = Rows(leaf, cheapest=Cheapest(leaf, options))
        solution = solve_chain(leaf, (BEST,), rows=rows)
        best = listed(leaf, options)
        assert solution.objective_ns == best, f"seed {seed}"
        count["infeasible"] += best is None
        if solution.completion is None:
            continue
        ranks = stage_costs(leaf, solution.completion)
        assert fits(leaf, ranks)
        assert surrogate_ns(leaf, ranks) == best
        found = enumerate_chain(leaf, (BEST,), cutoff=lambda: UNLIMITED, rows=rows)
        assert min(value for value, _ in found) == best
        used = {mode for mode, _ in solution.completion.recompute}
        count["mixed"] += any(is_counted(mode) for mode in used)
    assert count["mixed"] > 10
    assert count["infeasible"] > 2


def test_the_search_finds_the_best_mixture() -> None:
    """MindFormers' patterns on tiny instances; in some the optimum has two kinds of layers."""
    mixed = 0
    for seed in (5018, 5031, 5039, 5140, 5189, 5199, 5304, 5314):
        request = draw(seed, "mindformers")
        each = compare(seed, stack="mindformers", request=request)
        assert not differences(each)
        mixed += any("/" in mode for mode, _ in each.answer.options)
    assert mixed >= 4


def test_three_modes_of_a_stage_are_sums_over_its_layers() -> None:
    """In ``full/2*selective/none`` the layers behind the first are counted one by one here."""
    for seed in range(40):
        rng = Random(seed)
        layers = rng.randint(3, 8)
        leaf = draw_leaf(
            rng, schedule="1f1b", pp=1, vpp=1, microbatches=rng.randint(1, 4), layers=layers
        )
        front, between = rng.randint(1, layers - 2), rng.randint(1, layers)
        option = (f"full/{between}*selective/none", front)
        (rank,) = stage_costs(leaf, Completion((0, layers), (option,)))
        (plain,) = stage_costs(leaf, Completion((0, layers), (("none", 0),)))
        again = activation = 0
        for place, kind in enumerate(leaf.sequence):
            mode = "full" if place < front else "selective" if place < front + between else "none"
            rows = leaf.modes[mode]
            again += leaf.kinds[kind][rows.extra] - leaf.kinds[kind][leaf.modes["none"].extra]
            kept = leaf.kinds[kind][leaf.modes["none"].kept]
            activation += kept - leaf.kinds[kind][rows.kept]
        (one,), (other,) = rank.chunks, plain.chunks
        assert one.backward_ns - other.backward_ns == again, seed
        assert other.activation_bytes - one.activation_bytes == activation, seed
        if front + between >= layers:
            two = stage_costs(leaf, Completion((0, layers), (("full/selective", front),)))
            assert two == (rank,)
