"""Judge a fit on families that it did not see.

Each family is left out in turn. Its constants start from the optimum of the linear model without
it, around the optimum with all families; the residuals of the left-out family are then those of a
true evaluation. ``refine`` evaluates the remaining families truly too and takes another step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.studies.calibrate.fit import (
    Fitted,
    Problem,
    family_weights,
    linear_optimum,
    values_at,
)


@dataclass(frozen=True)
class LeftOut:
    """Constants by family that was left out, and each case's residual under its family's."""

    values: dict[str, dict[str, float]]
    residuals: np.ndarray


def leave_one_out(
    problem: Problem,
    fitted: Fitted,
    *,
    refine: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> LeftOut:
    """Residuals of every case under constants that its family had no part in."""
    families = np.array(problem.pricer.families)
    parameters, pricer = problem.parameters, problem.pricer
    residuals = np.full(len(families), np.nan)
    values: dict[str, dict[str, float]] = {}
    for family in sorted(set(families)):
        out = families == family
        weights = family_weights(list(families), ~out)
        x = linear_optimum(problem, fitted.x, fitted.residuals, fitted.jacobian, weights)
        for _ in range(refine):
            here = pricer.residuals(values_at(parameters, x), ~out)
            x = linear_optimum(problem, x, np.nan_to_num(here), fitted.jacobian, weights)
        values[family] = values_at(parameters, x)
        residuals[out] = pricer.residuals(values[family], out)[out]
        progress(f"left out {family}: median |error| {median_error(residuals[out]):.1%}")
    return LeftOut(values, residuals)


def median_error(residuals: np.ndarray) -> float:
    """Median of |predicted / measured - 1|."""
    return float(np.median(np.abs(np.exp(residuals) - 1)))
