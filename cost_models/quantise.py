"""Time of the kernels that quantise what low-precision products multiply."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from cost_models import compute
from cost_models.ops import Ints, Quantised, Reals
from cost_models.repeat import Real
from hardware_profiles.schema import DeviceSpec

Pass: TypeAlias = tuple[Real | float, Ints]
"""Seconds on the device, and calls from the host."""


def passes(
    device: DeviceSpec, dtype: str, inputs: Reals, gradients: Reals, tensors: Ints = 1, *,
    reads: int = 1, given: Quantised | None = None,
) -> tuple[Pass, Pass]:  # fmt: skip
    """Forward and backward of quantising a product's input and its output's gradient (elements).

    What is ``given`` comes instead. Weights are quantised once per step, which is left out.
    """
    again = bool(np.any(gradients))
    if given is not None:
        kernels = np.asarray(given.forward_kernels), again * np.asarray(given.backward_kernels)
        return (
            (_kernels_s(device, given.forward_bytes, kernels[0]), np.minimum(kernels[0], 1)),
            (_kernels_s(device, given.backward_bytes, kernels[1]), np.minimum(kernels[1], 1)),
        )
    forward = compute.quantisation_time_s(device, dtype, inputs, tensors, reads=reads)
    backward: Real | float = 0.0
    if again:
        backward = compute.quantisation_time_s(device, dtype, gradients, tensors, reads=reads)
    return (forward, 1), (backward, int(again))


def _kernels_s(device: DeviceSpec, moved: Reals, count: Ints) -> Real:
    """Seconds of ``count`` kernels that move so many bytes together; no kernel, no time."""
    latency_s = device.kernels.memory_bound_latency.si
    time = compute.memory_bound_time_s(device, moved) + latency_s * (np.asarray(count) - 1)
    return np.asarray(np.where(np.asarray(count) > 0, time, 0.0))
