"""Activation bytes per device: what a layer keeps for its backward, and its short-lived buffers.

Weights, gradients and optimizer state are ``cost_models.state``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes kept per microbatch by one layer, and short-lived bytes beside them, by recompute."""

    none: Int64
    selective: Int64
    full: Int64
    working_none: Int64
    working_selective: Int64
    working_full: Int64


def activation_bytes(kind: LayerKind, shard: Shard) -> ActivationBytes:
    """Activations of one layer; what is recomputed comes back as a working buffer."""
    kept = np.zeros_like(shard.tp)
    freed = np.zeros_like(shard.tp)
    for tensor in kind.saved(shard):
        if tensor.selective:
            freed = freed + tensor.bytes
        else:
            kept = kept + tensor.bytes
    boundary = kind.boundary_bytes(shard) + np.zeros_like(shard.tp)
    working = kind.working_bytes(shard) + np.zeros_like(shard.tp)
    everything = kept + freed
    return ActivationBytes(
        none=everything,
        selective=kept,
        full=np.minimum(boundary, everything),
        working_none=working,
        working_selective=working + freed,
        working_full=working + np.maximum(everything - boundary, 0),
    )
