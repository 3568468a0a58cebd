"""Sums over the whole model, per configuration."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cost_models.configs import PricedConfigs
from cost_models.graph import Bools
from cost_models.step import Field

Real = NDArray[np.float64]


def layer_counts(priced: PricedConfigs) -> tuple[int, ...]:
    """Layers of each kind, in the order of the tables."""
    layers = priced.workload.layers
    return tuple(layers.count(name) for name in priced.kind_names)


def model_sum(priced: PricedConfigs, fields: Iterable[Field], *, ends: bool = True) -> Real:
    """Fields summed over all layers and, unless told otherwise, embedding and head, as often as
    ranks hold one; per configuration."""
    total = np.zeros(priced.embedding.shape[1])
    times = np.where(divided(priced), priced.configs.pp, 1)
    for field in fields:
        for count, table in zip(layer_counts(priced), priced.kinds, strict=True):
            total += count * table[field].astype(np.float64)
        if ends:
            total += times * (priced.embedding[field] + priced.head[field].astype(np.float64))
    return total


def divided(priced: PricedConfigs) -> Bools:
    """Where all ranks of a pipeline hold parts of embedding and head; per configuration."""
    if priced.vocabulary is None:
        return np.zeros(len(priced.configs), dtype=bool)
    return priced.vocabulary.divided
