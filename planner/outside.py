"""Leaves of the search with layers outside the pipeline.

Such a leaf has one partition, equal stages, and one mode of recomputation for all of its layers, so
what is left of it is a list of modes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cost_models.layout import RecomputeMode
from cost_models.leaf import Completion, Leaf, Recompute, stage_costs
from cost_models.outside import outside_bounds, recomputing
from cost_models.peaks import fits
from cost_models.surrogate import surrogate_ns
from planner.leaves import Degrees, Incumbent
from planner.program import ProgramSolution


def close_outside(
    leaf: Leaf, degrees: Degrees, options: Sequence[Recompute], incumbent: Incumbent,
    check_deadline: Callable[[], None],
) -> int | None:  # fmt: skip
    """Raise the leaf's bound to the incumbent's cutoff, or as far as it goes; None where nothing
    fits. Modes are tried in the order of what they add to the step at least: to every microbatch on
    a rank, and to the layers outside."""
    bounds, stages = outside_bounds(leaf), leaf.stages
    plain = recomputing(leaf, "none")
    fastest = surrogate_ns(plain, stage_costs(plain, Completion(bounds, (("none", 0),) * stages)))
    reached: int | None = None
    for added, option in sorted((_added_ns(leaf, option[0]), option) for option in options):
        check_deadline()
        if fastest + added >= incumbent.cutoff:
            bound = fastest + added
            return bound if reached is None else min(reached, bound)
        variant = recomputing(leaf, option[0])
        completion = Completion(bounds, (option,) * stages)
        ranks = stage_costs(variant, completion)
        if not fits(variant, ranks):
            continue
        bound = surrogate_ns(variant, ranks)
        if bound < incumbent.cutoff:
            program = ProgramSolution("optimal", bound, completion, "enumeration")
            bound = incumbent.simulate(variant, degrees, completion, program)
        reached = bound if reached is None else min(reached, bound)
    return reached


def _added_ns(leaf: Leaf, mode: RecomputeMode) -> int:
    assert leaf.outside is not None
    row, bounds = leaf.modes[mode].extra, outside_bounds(leaf)
    inside = Counter(leaf.sequence[bounds[0] : bounds[-1]])
    held = sum(count // leaf.pp * leaf.kinds[kind][row] for kind, count in inside.items())
    apart = zip(leaf.outside.counts, leaf.outside.kinds, strict=True)
    return leaf.microbatches * held + sum(count * each[row] for count, each in apart)
