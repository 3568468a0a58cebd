"""Shards that stand for a model as it is."""

from __future__ import annotations

import numpy as np

from cost_models.graph import Shard


def _one_device() -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(1, one, one, one, one, one, one.astype(bool), one * 0)


ONE = _one_device()
"""One token on one device: what a layer is made of, whatever its size."""
