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
from cost_models.step import LayerTimes, Machine

Real = NDArray[np.float64]


def copy_seconds(
    elements: Int64, times: LayerTimes, machine: Machine, *, sharded: Bools, again: Bools
) -> dict[str, Real]:
    """Seconds per microbatch, ``{"forward": ..., "backward": ...}``, for ``elements`` parameters
    held (or gathered) on a device.

    ``sharded`` marks configurations that gather and reduce with every microbatch, ``again`` those
    whose backward gathers once more.
    """
    stack = machine.stack
    gather = stack.unsharded_copy_bytes.get("gather", 0)
    reduce = stack.unsharded_copy_bytes.get("reduce", 0)
    accumulate = stack.accumulation_bytes.get(machine.precision, 0)
    bytes_each = {
        "forward": np.where(sharded, gather, 0),
        "backward": accumulate
        + np.where(sharded, reduce, 0)
        + np.where(sharded & again, gather, 0),
    }
    bandwidth = compute.memory_bound_bandwidth_bytes_per_s(machine.device)
    return {
        phase: np.maximum(each * elements / bandwidth - times.terms["launch"][phase], 0.0)
        for phase, each in bytes_each.items()
    }
