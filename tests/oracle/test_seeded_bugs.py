"""Bugs put into the planner on purpose: the comparison with brute force must see each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cost_models import bounds
from cost_models import leaf as leaf_module
from cost_models.configs import PricedConfigs
from cost_models.leaf import ChunkCosts, Leaf, Recompute
from cost_models.step import Field
from planner import program, space
from tests.oracle.brute import Answer, brute_force
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw

SEEDS = range(120)


@pytest.fixture(scope="module")
def answers() -> dict[int, Answer]:
    """Brute force on the instances of :data:`SEEDS`."""
    return {seed: brute_force(draw(seed)) for seed in SEEDS}


def failures(answers: dict[int, Answer]) -> Iterator[str]:
    """Differences, instance after instance; a planner that breaks down is one too."""
    for seed, answer in answers.items():
        try:
            yield from differences(compare(seed, answer))
        except (ArithmeticError, LookupError, ValueError) as error:
            yield f"seed {seed}: {error!r}"


def dropped_constraint(patch: pytest.MonkeyPatch) -> None:
    """The user's fixed, greatest and forbidden degrees of a mesh are not looked at."""
    patch.setattr(space, "_constraint_rules", lambda _: iter(()))


def dropped_memory(patch: pytest.MonkeyPatch) -> None:
    """The program of a leaf does not look at a stage's memory."""
    right = PricedConfigs.leaf

    def wrong(self: PricedConfigs, index: int, **kwargs: Any) -> Leaf:
        return replace(right(self, index, **kwargs), capacity_bytes=1 << 60)

    patch.setattr(PricedConfigs, "leaf", wrong)


def wrong_bound(patch: pytest.MonkeyPatch) -> None:
    """The steady-state estimate stands in for the bound, and the ranks do not share the work."""

    def wrong(schedule: Any, shape: bounds.Shape, totals: bounds.Totals) -> Any:
        return (shape.microbatches + shape.pp - 1) * totals.work

    patch.setattr(bounds, "step_bound", wrong)


def stage_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The solver prices each rank as the one after it: no embedding, the head twice."""
    right = leaf_module.chunk_costs

    def wrong(leaf: Leaf, stage: int, first: int, last: int, recompute: Recompute) -> ChunkCosts:
        return right(leaf, min(stage + 1, leaf.stages - 1), first, last, recompute)

    patch.setattr(program, "chunk_costs", wrong)


def misscaled_cost(patch: pytest.MonkeyPatch) -> None:
    """The head's forward counts half."""
    right = PricedConfigs.leaf

    def wrong(self: PricedConfigs, index: int, **kwargs: Any) -> Leaf:
        leaf = right(self, index, **kwargs)
        head = list(leaf.head)
        head[Field.FORWARD] //= 2
        return replace(leaf, head=tuple(head))

    patch.setattr(PricedConfigs, "leaf", wrong)


def lost_candidate(patch: pytest.MonkeyPatch) -> None:
    """Degrees are powers of two only."""
    right = space.divisors

    def wrong(number: int) -> tuple[int, ...]:
        return tuple(d for d in right(number) if d & (d - 1) == 0)

    patch.setattr(space, "divisors", wrong)


def lost_partition(patch: pytest.MonkeyPatch) -> None:
    """The last rank is never left without layers."""

    def wrong(self: program.Rows, rank: int) -> int:
        return 0 if rank == 0 and self.leaf.pp > 1 else 1

    patch.setattr(program.Rows, "least", wrong)


def idle_sender(patch: pytest.MonkeyPatch) -> None:
    """Ranks do not wait for what they send."""
    right = PricedConfigs.leaf

    def wrong(self: PricedConfigs, index: int, **kwargs: Any) -> Leaf:
        return replace(right(self, index, **kwargs), sends=())

    patch.setattr(PricedConfigs, "leaf", wrong)


BUGS = (
    dropped_constraint, dropped_memory, wrong_bound, stage_off_by_one, misscaled_cost,
    lost_candidate, lost_partition, idle_sender,
)  # fmt: skip


def test_without_a_bug_nothing_differs(answers: dict[int, Answer]) -> None:
    assert list(failures(answers)) == []


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_comparison_sees_it(
    bug: Callable[[pytest.MonkeyPatch], None],
    answers: dict[int, Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug(monkeypatch)
    assert next(failures(answers), None) is not None
