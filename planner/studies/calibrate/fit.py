"""A robust, bounded fit of few constants to many logarithmic errors.

Minimised, over coordinates ``x`` (logs of the constants over their priors)::

    sum over families of (weight / members) * sum over members rho(r) / SIGMA^2
        + sum over parameters of (x / spread)^2

``rho`` is the pseudo-Huber function: squared for small errors, absolute for large ones. Every
family weighs the same however many runs it has. The steps are Gauss-Newton with a numeric
Jacobian, projected on the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from planner.studies.calibrate.parameters import Constant

SIGMA = 0.08
"""Spread of single runs about a good model; sets how much a family counts against the priors."""
HUBER = 0.05
"""Where an error stops to count as its square."""
FAMILY_WEIGHT = 6.0
"""Independent observations that a family of many runs amounts to; a smaller one has its runs."""
STEP = 0.03
"""Relative step of the numeric Jacobian."""
LONGEST = 0.4
"""Longest step of one coordinate."""
FAR = 0.1
"""Move after which the Jacobian is taken anew."""


class Pricer(Protocol):
    """Measurements and a model of them: runs, kernels or collectives."""

    @property
    def parameters(self) -> Sequence[Constant]:
        """The constants, in the order of the coordinates."""
        ...

    @property
    def families(self) -> Sequence[str]:
        """The family of each measurement: what is judged together."""
        ...

    def moved_by(self, index: int) -> np.ndarray:
        """Which measurements the constant with this index reaches."""
        ...

    def residuals(self, values: Mapping[str, float], only: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of each; NaN where ``only`` is False."""
        ...


@dataclass(frozen=True)
class Problem:
    """What is fitted: measurements with weights, and constants."""

    pricer: Pricer
    weights: np.ndarray

    @property
    def parameters(self) -> Sequence[Constant]:
        """The constants, in the order of the coordinates."""
        return self.pricer.parameters


@dataclass(frozen=True)
class Fitted:
    """Where the fit ended: coordinates, residuals there and the Jacobian used."""

    x: np.ndarray
    residuals: np.ndarray
    jacobian: np.ndarray = field(repr=False)
    loss: float = math.nan

    def values(self, parameters: Sequence[Constant]) -> dict[str, float]:
        """Constants by parameter name."""
        return values_at(parameters, self.x)


def values_at(parameters: Sequence[Constant], x: np.ndarray) -> dict[str, float]:
    """Constants by parameter name at coordinates ``x``."""
    return {p.name: p.at(at) for p, at in zip(parameters, x, strict=True)}


def family_weights(families: Sequence[str], keep: np.ndarray | None = None) -> np.ndarray:
    """Weight of each case: a family's cases share ``FAMILY_WEIGHT``, or one each if fewer."""
    kept = np.ones(len(families), dtype=bool) if keep is None else keep
    names = np.array(families)
    weights = np.zeros(len(names))
    for name in set(names[kept]):
        members = kept & (names == name)
        count = int(members.sum())
        weights[members] = min(FAMILY_WEIGHT, count) / count
    return weights


def fit(
    problem: Problem,
    *,
    rounds: int = 6,
    progress: Callable[[str], None] = lambda _: None,
) -> Fitted:
    """The fit from the priors. Stops when no coordinate moves by more than 0.2 %."""
    parameters, pricer = problem.parameters, problem.pricer
    x = np.zeros(len(parameters))
    residuals = pricer.residuals(values_at(parameters, x))
    jacobian = np.zeros((len(residuals), len(parameters)))
    loss = objective(problem, x, residuals)
    change = math.inf
    for round_ in range(rounds):
        if change > FAR:
            jacobian = numeric_jacobian(problem, x, residuals)
        goal = linear_optimum(problem, x, residuals, jacobian, problem.weights)
        moved, residuals, new_loss = _line_search(problem, x, goal, residuals, loss)
        change = float(np.max(np.abs(moved - x), initial=0.0))
        progress(f"round {round_ + 1}: loss {new_loss:.2f}, largest move {change:.1%}")
        x, loss = moved, new_loss
        if change < 0.002:
            break
    return Fitted(x, residuals, jacobian, loss)


def objective(problem: Problem, x: np.ndarray, residuals: np.ndarray) -> float:
    """The function that is minimised."""
    rho = 2 * HUBER**2 * (np.sqrt(1 + (residuals / HUBER) ** 2) - 1)
    spread = np.array([p.spread for p in problem.parameters])
    return float((problem.weights * rho).sum() / SIGMA**2 + ((x / spread) ** 2).sum())


def numeric_jacobian(problem: Problem, x: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Derivative of the residuals by coordinate; only the runs that a parameter reaches are priced
    again. At a bound the difference is taken inwards."""
    jacobian = np.zeros((len(residuals), len(x)))
    for column, parameter in enumerate(problem.parameters):
        touched = problem.pricer.moved_by(column)
        if not touched.any():
            continue
        step = STEP if x[column] + STEP <= parameter.coordinate(parameter.high) else -STEP
        shifted = x.copy()
        shifted[column] += step
        again = problem.pricer.residuals(values_at(problem.parameters, shifted), touched)
        actual = parameter.coordinate(parameter.at(shifted[column])) - x[column]
        if actual:
            jacobian[touched, column] = (again - residuals)[touched] / actual
    return jacobian


def linear_optimum(
    problem: Problem,
    x: np.ndarray,
    residuals: np.ndarray,
    jacobian: np.ndarray,
    weights: np.ndarray,
    *,
    sweeps: int = 40,
) -> np.ndarray:
    """The optimum of the objective with residuals linear in the coordinates, inside the bounds.

    Iteratively reweighted least squares; a coordinate that leaves its bounds is held there.
    """
    low = np.array([p.coordinate(p.low) for p in problem.parameters])
    high = np.array([p.coordinate(p.high) for p in problem.parameters])
    precision = np.array([1 / p.spread**2 for p in problem.parameters])
    at = x.copy()
    for _ in range(sweeps):
        here = residuals + jacobian @ (at - x)
        robust = weights / np.sqrt(1 + (here / HUBER) ** 2) / SIGMA**2
        # Minimise sum robust (residuals + J (y - x))^2 + precision y^2 over y.
        constant = residuals - jacobian @ x
        normal = (jacobian * robust[:, None]).T @ jacobian + np.diag(precision)
        right = -(jacobian * robust[:, None]).T @ constant
        new = _bounded(normal, right, low, high)
        if np.max(np.abs(new - at), initial=0.0) < 1e-5:
            return new
        at = new
    return at


def _bounded(
    normal: np.ndarray, right: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Minimum of ``y' normal y / 2 - right' y`` in a box, by coordinate descent."""
    y = np.clip(np.linalg.solve(normal, right), low, high)
    for _ in range(200):
        largest = 0.0
        for i in range(len(y)):
            new = y[i] + (right[i] - normal[i] @ y) / normal[i, i]
            new = min(max(new, low[i]), high[i])
            largest = max(largest, abs(new - y[i]))
            y[i] = new
        if largest < 1e-7:
            break
    return y


def _line_search(
    problem: Problem, x: np.ndarray, goal: np.ndarray, residuals: np.ndarray, loss: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """The farthest of a few points towards ``goal`` that lowers the objective."""
    step = np.clip(goal - x, -LONGEST, LONGEST)
    for share in (1.0, 0.5, 0.25):
        there = x + share * step
        found = problem.pricer.residuals(values_at(problem.parameters, there))
        value = objective(problem, there, found)
        if value < loss:
            return there, found, value
    return x, residuals, loss
