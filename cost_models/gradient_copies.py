"""Copies of weights and gradients that software makes in every microbatch, outside its products.

Three mechanisms, each the stack's own (``hardware_profiles.stack.StackSpec``):

* a product that writes its 16-bit weight gradient leaves adding it to another kernel
  (``accumulation_bytes``; Megatron's fused accumulation needs none);
* sharded weights are copied from the buffer of their gathering into the layer's tensors
  (``unsharded_copy_bytes["gather"]``), once more where the backward gathers them again;
* gradients are copied into the buffer of their reduction (``unsharded_copy_bytes["reduce"]``).

They are kernels of the device like others: where it waits for the host, they cost nothing more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cost_models import compute
from cost_models.graph import Bools, Int64
from cost_models.layer_times import LayerTimes
from cost_models.step import Machine

Real = NDArray[np.float64]


def copy_seconds(
    elements: Int64,
    times: LayerTimes,
    machine: Machine,
    *,
    frozen: Int64,
    narrower: Int64,
    sharded: Bools,
    again: Bools,
) -> dict[str, Real]:
    """Seconds per microbatch, ``{"forward": ..., "backward": ...}``, for ``elements`` trained and
    ``frozen`` parameters held (or gathered) on a device, which are gathered in ``narrower`` bytes
    fewer than 16 bits each.

    ``sharded`` marks configurations that gather and reduce with every microbatch, ``again`` those
    whose backward gathers once more.
    """
    stack = machine.stack
    copied = stack.unsharded_copy_bytes.get("gather", 0)
    gathered = copied * (elements + frozen) - copied // machine.rules.gather_bytes * narrower
    reduced = stack.unsharded_copy_bytes.get("reduce", 0) * elements
    accumulated = stack.accumulation_bytes.get(machine.precision, 0) * elements
    moved = {
        "forward": np.where(sharded, gathered, 0),
        "backward": accumulated
        + np.where(sharded, reduced, 0)
        + np.where(sharded & again, gathered, 0),
    }
    bandwidth = compute.memory_bound_bandwidth_bytes_per_s(machine.device)
    return {
        phase: np.maximum(each / bandwidth - times.terms["launch"][phase], 0.0)
        for phase, each in moved.items()
    }
