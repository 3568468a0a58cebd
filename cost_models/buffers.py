"""Tensors as Megatron lays them out: which weights are one, placeholders of their shapes, and the
exact size of a contiguous buffer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, Weight
from cost_models.state import BUCKET_ALIGNMENT, START_ALIGNMENT, local_tensor

_FUSED = {
    "attention.q": "attention.qkv", "attention.k": "attention.qkv", "attention.v": "attention.qkv",
    "attention.q.bias": "attention.qkv.bias", "attention.k.bias": "attention.qkv.bias",
    "attention.v.bias": "attention.qkv.bias", "mlp.gate": "mlp.fc1", "mlp.up": "mlp.fc1",
    "mlp.gate.bias": "mlp.fc1.bias", "mlp.up.bias": "mlp.fc1.bias",
    "moe.shared.gate": "moe.shared.fc1", "moe.shared.up": "moe.shared.fc1",
    "moe.experts.gate": "moe.experts.fc1", "moe.experts.up": "moe.experts.fc1",
}  # fmt: skip
"""Weights that Megatron stores as one tensor."""


def fused_name(weight: Weight) -> str:
    """The tensor that Megatron stores a weight in."""
    return _FUSED.get(weight.name, weight.name)


def dummy_wgrad_bytes(
    kind: LayerKind, shard: Shard, vocab_divisor: int, *, element_bytes: int
) -> Int64:
    """Placeholders for weight gradients: one tensor for each shape among a layer's products.

    Transformer Engine hands autograd a cached tensor of the weight's shape where the gradient went
    into the main gradient (transformer_engine/pytorch/module/base.py, ``get_dummy_wgrad``).
    """
    merged: dict[str, list[Weight]] = {}
    for weight in kind.weights:
        if weight.cols > 1 and not weight.name.startswith(("embedding", "moe.router")):
            merged.setdefault(fused_name(weight), []).append(weight)
    shapes: dict[tuple[object, ...], Int64] = {}
    for parts in merged.values():
        key = tuple((part.rows, part.cols, part.sharding) for part in parts)
        sizes = [local_tensor(part, shard, vocab_divisor).elements for part in parts]
        shapes[key] = np.sum(sizes, axis=0)
    total: Int64 = sum(shapes.values(), np.zeros_like(shard.tp))
    return total * element_bytes


def contiguous_elements(
    sizes: Iterable[int], ways: int, least_bucket: int | None, *, alone: Collection[int] = ()
) -> int:
    """Elements of Megatron-Core's distributed-optimizer buffer, padding included.

    ``sizes`` are the parameters' elements in the order of the module; the buffer is filled from the
    last to the first, and a bucket ends with the parameter that reaches ``least_bucket`` (None: one
    bucket). ``alone`` are the places of parameters with a bucket of their own: embeddings that two
    stages share, so that both split their state alike.
    ``DistributedOptimizer._compute_per_buffer_param_layout``, Megatron-Core 0.19;
    ``_ParamAndGradBuffer`` (``_does_param_require_new_bucket``), 0.16.
    """
    divisor = math.lcm(ways, BUCKET_ALIGNMENT)
    start = end = 0
    filled = False
    for place, size in reversed(list(enumerate(sizes))):
        end = -(-end // START_ALIGNMENT) * START_ALIGNMENT
        if place in alone and filled:
            end = -(-end // divisor) * divisor
        end += size
        filled = True
        full = least_bucket is not None and end - start >= least_bucket
        if full or place in alone:
            start = end = -(-end // divisor) * divisor
            filled = False
    return -(-end // divisor) * divisor if filled else end
