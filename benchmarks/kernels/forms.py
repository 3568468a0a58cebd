"""Which terms of the law of matrix products a table of times supports, and their constants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from nelder_mead import Vector, minimise
from tables import BoolArray, FloatArray

from hardware_profiles.schema import Kind, MatmulConstants

Loss = Callable[[MatmulConstants], float]

BASE = (1.0, 1.5, np.log(2.5e-6), 4.0, -2.0, np.log(0.3), np.log(2000.0))
"""Start of the search: e_compute, e_memory, t0_s, k0, wave_share, tile_latency, split_k."""
OPTIONAL: dict[str, tuple[float, ...]] = {
    "heating": (np.log(0.2), np.log(1e-3)),
    "cache_share": (np.log(0.2),),
}
"""Conditions of benchmarks that not every device shows, and where the search for them starts."""
EARNED = 0.03
"""A condition is kept if it lowers the loss on the fitted shapes by this share."""

NEIGHBOURHOOD_OCTAVES, NOISE = 1.0, 1.0
"""Of a table of residuals: how far a shape speaks for others, and how little one shape counts."""
OUTLIER = 0.4
"""Logarithm beyond which a residual counts no further."""


def sigmoid(value: float) -> float:
    """The open interval (0, 1), for the search."""
    return float(0.5 * (1.0 + np.tanh(0.5 * value)))


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def fit_forms(loss: Loss) -> MatmulConstants:
    """The constants with the least ``loss``, without conditions that do not earn their place."""
    kept: tuple[str, ...] = ()
    best, least = _fit(loss, kept)
    for condition in OPTIONAL:
        found, value = _fit(loss, (*kept, condition))
        if value < (1.0 - EARNED) * least:
            kept, best, least = (*kept, condition), found, value
    return best


def _fit(loss: Loss, conditions: tuple[str, ...]) -> tuple[MatmulConstants, float]:
    start = [*BASE, *(number for each in conditions for number in OPTIONAL[each])]
    candidates = []
    for p in (2.0, 4.0):
        x, value = minimise(
            lambda x, p=p: loss(_constants(x, p, conditions)), start, iterations=500, restarts=3
        )
        candidates.append((value, _constants(x, p, conditions)))
    value, best = min(candidates, key=lambda item: item[0])
    return best, value


def _constants(x: Vector, p: float, conditions: tuple[str, ...]) -> MatmulConstants:
    rest = iter(np.exp(x[len(BASE) :]))
    update = {}
    for condition in conditions:
        update[condition] = float(next(rest))
        if condition == "heating":
            update["heating_s"] = float(next(rest))
    return MatmulConstants(
        e_compute=sigmoid(x[0]),
        e_memory=sigmoid(x[1]),
        t0_s=float(np.exp(x[2])),
        k0=float(np.exp(x[3])),
        wave_share=sigmoid(x[4]),
        tile_latency=float(np.exp(x[5])),
        split_k=float(np.exp(x[6])),
        p=p,
        kind=Kind.FITTED,
        source="",
        **update,
    )


def rounded_matmul(constants: MatmulConstants) -> MatmulConstants:
    """``constants`` with the digits that ship."""
    names = ("e_compute", "e_memory", "t0_s", "tile_latency", "split_k", "heating", "heating_s")
    update = {name: rounded(getattr(constants, name)) for name in (*names, "cache_share")}
    update |= {"k0": round(constants.k0, 1), "wave_share": round(constants.wave_share, 4)}
    return constants.model_copy(update=update)


def smoothed(residual: FloatArray, place: FloatArray, fitted: BoolArray) -> FloatArray:
    """``residual`` of the ``fitted`` rows, smoothed over ``place`` (rows, axes), at every row.

    Ridge regression with Gaussian bumps: it falls to zero away from the data. Places in octaves.
    """
    apart = ((place[:, None, :] - place[None, :, :]) ** 2).sum(axis=2)
    near = np.exp(-apart / (2.0 * NEIGHBOURHOOD_OCTAVES**2))
    own = near[np.ix_(fitted, fitted)] + NOISE * np.eye(int(fitted.sum()))
    weights = np.linalg.solve(own, np.clip(residual[fitted], -OUTLIER, OUTLIER))
    return np.asarray(near[:, fitted] @ weights)
