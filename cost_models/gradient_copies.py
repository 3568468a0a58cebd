"""Copies of weights and gradients that software makes in every microbatch, outside its products.

Three mechanisms, each the stack's own (``hardware_profiles.stack.StackSpec``):

* a product that writes its 16-bit weight gradient leaves adding it to another kernel
  (``accumulation_bytes``; Megatron's fused accumulation needs none);
* sharded weights are copied from the buffer of their gathering into the layer's tensors
  (``unsharded_copy_bytes["gather"]``), once more where the backward gathers them again;
* gradients are copied into the buffer of their reduction (``unsharded_copy_bytes["reduce"]``), or
  added to one that keeps them whole (``"whole"``);
* where one rank holds the weights whole, it casts and copies them all the same (``gather_alone``),
  and hands gradients on from buffer to buffer (``reduce_alone``).

A lookup has no product: its gradient is a table as large as the weights, filled with zeros into
which rows are added (PyTorch, ``embedding_dense_backward``; XLA scatters into zeros), and where
products add their own gradients another kernel adds this one.

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
    alone: Int64,
    twice: Int64 | int = 0,
    waits: Bools | bool = False,
    between: Bools | bool = False,
    lookup: bool = False,
) -> dict[str, Real]:
    """Seconds per microbatch, ``{"forward": ..., "backward": ...}``, for ``elements`` trained and
    ``frozen`` parameters held (or gathered) on a device, which are gathered in ``narrower`` bytes
    fewer than 16 bits each.

    ``sharded`` marks configurations that gather and reduce with every microbatch, ``waits`` those
    of them whose gradients wait for the last one, ``again`` those whose backward gathers once more,
    ``between`` those that gather once per microbatch, charged to its backward; ``alone`` of the
    trained parameters are in groups of one rank, ``twice`` are gathered and reduced as two.
    ``lookup``: the parameters are tables that tokens look up.
    """
    stack = machine.stack
    sizes = stack.unsharded_copy_bytes
    copied, put = sizes.get("gather", 0), sizes.get("reduce", 0)
    sent = elements + twice
    gathered = copied * (sent + frozen) - copied // machine.rules.gather_bytes * narrower
    gathered = gathered + (sizes.get("gather_alone", copied) - copied) * alone
    reduced = put * sent + (sizes.get("reduce_alone", put) - put) * alone
    reduced = np.where(waits, sizes.get("wait", 0) * elements, reduced)
    accumulated = stack.accumulation_bytes.get(machine.precision, 0) * elements
    if lookup:
        accumulated = accumulated + lookup_bytes(machine) * elements
    moved = {
        "forward": np.where(sharded, gathered, 0),
        "backward": accumulated
        + np.where(sharded, reduced, sizes.get("whole", 0) * elements)
        + np.where((sharded & again) | between, gathered, 0),
    }
    bandwidth = compute.memory_bound_bandwidth_bytes_per_s(machine.device)
    return {
        phase: np.maximum(each / bandwidth - times.terms["launch"][phase], 0.0)
        for phase, each in moved.items()
    }


def lookup_bytes(machine: Machine) -> int:
    """Bytes moved per weight of a table for its dense gradient, beside ``accumulation_bytes``."""
    zeroed = 4 if machine.precision == "fp32" else 2
    added = machine.accumulated_bytes
    return zeroed + zeroed + added if added else zeroed
