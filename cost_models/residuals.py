"""Seconds in which what autodiff keeps of a layer is written and read."""

from __future__ import annotations

import numpy as np

from cost_models.compute import memory_bound_bandwidth_bytes_per_s
from cost_models.graph import LayerKind, Shard
from cost_models.memory import Activations
from cost_models.repeat import Real, Work
from hardware_profiles.schema import DeviceSpec


def stored(kind: LayerKind, shard: Shard, device: DeviceSpec) -> Work | None:
    """What one microbatch's residuals that no kernel writes anyway take the device, written by the
    forward's kernels and read by the backward's; None where they were not counted."""
    if kind.everything is None:
        return None
    activations = Activations(kind, shard)
    beyond = np.maximum(kind.everything(activations.shard) - activations.everything, 0)
    seconds: Real = 2.0 * beyond / memory_bound_bandwidth_bytes_per_s(device)
    return Work(seconds, 0.0 * seconds)
