"""A small derivative-free minimiser, so that the fits need nothing beyond numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def minimise(
    function: Callable[[Vector], float],
    start: Sequence[float],
    *,
    step: float = 0.3,
    iterations: int = 250,
    restarts: int = 2,
) -> tuple[Vector, float]:
    """The best point found and its value, by the Nelder-Mead simplex, restarted at its own best."""
    best = np.asarray(start, dtype=np.float64)
    value = function(best)
    for _ in range(restarts):
        best, value = _simplex(function, best, step, iterations)
    return best, value


def _simplex(
    function: Callable[[Vector], float], start: Vector, step: float, iterations: int
) -> tuple[Vector, float]:
    points = np.vstack([start, start + step * np.eye(len(start))])
    values = np.array([function(point) for point in points])
    for _ in range(iterations):
        order = np.argsort(values, kind="stable")
        points, values = points[order], values[order]
        centre = points[:-1].mean(axis=0)
        away = centre - points[-1]
        reflected = centre + away
        at_reflected = function(reflected)
        if at_reflected < values[0]:
            expanded = centre + 2.0 * away
            at_expanded = function(expanded)
            if at_expanded < at_reflected:
                reflected, at_reflected = expanded, at_expanded
        elif at_reflected >= values[-2]:
            contracted = centre - 0.5 * away
            at_contracted = function(contracted)
            if at_contracted >= values[-1]:
                points[1:] = points[0] + 0.5 * (points[1:] - points[0])
                values[1:] = [function(point) for point in points[1:]]
                continue
            reflected, at_reflected = contracted, at_contracted
        points[-1], values[-1] = reflected, at_reflected
    lowest = int(np.argmin(values))
    return points[lowest], float(values[lowest])
