"""Activation bytes per device: what a layer keeps for its backward, and its short-lived buffers.

Weights, gradients and optimizer state are ``cost_models.state``.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from cost_models.communication import group_of
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.layout import OutputKind, RecomputePolicy
from cost_models.named_outputs import NAMED, REDUCED, unneeded
from cost_models.ops import Attention, Collective, GroupedMatMul, Ints, MatMul, Op, Reals

Sizes: TypeAlias = tuple[Int64, Int64]
"""Bytes kept per microbatch, and short-lived bytes beside them."""


def activation_bytes(kind: LayerKind, shard: Shard, policy: RecomputePolicy | None) -> Sizes:
    """Activations of one layer under ``policy`` (None: all are kept).

    What is freed comes back while the layer's backward runs: the whole layer at once, or one module
    after the other, the largest of which counts.
    """
    zero = np.zeros_like(shard.tp)
    working = kind.working_bytes(shard) + zero
    tensors = kind.saved(shard)
    everything = zero + sum(tensor.bytes for tensor in tensors)
    if policy is None:
        return everything, working
    if policy.keeps is not None:
        stays = policy.keeps - policy.offloads
        kept = zero + kind.boundary_bytes(shard) + _kept_bytes(kind, shard, policy, stays)
        kept = np.minimum(kept, everything)
        if policy.offloads:
            working = working + offloaded_bytes(kind, shard, policy)
        if policy.to_the_end:
            working = np.maximum(working, _output_again(kind, shard))
        return kept, working + everything - kept
    freed: dict[str, Int64] = {}
    for tensor in tensors:
        module = next((name for name in tensor.modules if name in policy.modules), None)
        if module is not None:
            freed[module] = freed.get(module, zero) + tensor.bytes
    total = zero + sum(freed.values())
    largest = np.max([zero, *freed.values()], axis=0)
    return everything - total, working + largest


def offloaded_bytes(kind: LayerKind, shard: Shard, policy: RecomputePolicy) -> Int64:
    """Bytes of one layer's outputs that a policy keeps on the host, one microbatch."""
    return _kept_bytes(kind, shard, policy, policy.offloads)


def _kept_bytes(
    kind: LayerKind, shard: Shard, policy: RecomputePolicy, names: frozenset[OutputKind]
) -> Int64:
    ops = kind.ops(shard)
    dropped = unneeded(ops) if policy.needed_only else frozenset()
    total = np.zeros_like(shard.tp)
    for name, size in _outputs(ops, shard, kind.element_bytes, dropped):
        if name in names:
            total = total + size
    return total


def _output_again(kind: LayerKind, shard: Shard) -> Int64:
    """Where a layer runs again to its last op, with its gradient waiting (torchtitan's ``FullAC``
    and ``SelectiveAC`` on DTensor, ``early_stop=False``).

    All-gathered over tp: the gradient, the output of the last product, and that output laid out for
    its reduction (DTensor scatters the first dimension, so it concatenates the chunks of the
    sequence); and the reduced output.
    """
    output = kind.boundary_bytes(shard)
    return output * (3 * shard.sp + 1)


def _outputs(
    ops: tuple[Op, ...], shard: Shard, element_bytes: int, dropped: frozenset[str]
) -> list[tuple[OutputKind, Int64]]:
    """Bytes on one device of the outputs that a save list may name, without ``dropped`` ops."""
    found: list[tuple[OutputKind, Int64]] = []
    products = 0

    def add(kind: OutputKind, size: Reals | Ints) -> None:
        found.append((kind, np.ceil(np.asarray(size) + np.zeros_like(shard.tp)).astype(np.int64)))

    for op in ops:
        if op.name in dropped:
            continue
        if isinstance(op, MatMul | GroupedMatMul):
            named = next((kind for kind, names in NAMED.items() if op.name in names), None)
            if named is not None:
                ways = shard.sp if named in REDUCED and isinstance(op, MatMul) else 1
                add(named, _product_elements(op) * element_bytes / ways)
        if isinstance(op, MatMul):
            size = _product_elements(op) * element_bytes
            add("matmul", size)
            whole = sum(np.asarray(part) for part in op.parts)
            for part in op.parts:
                products += 1
                if products % 2:
                    add("odd_matmul", size * np.asarray(part) // whole)
        elif isinstance(op, GroupedMatMul):
            add("grouped_matmul", _product_elements(op) * element_bytes)
        elif isinstance(op, Attention):
            rows = np.asarray(op.batch) * op.q_len * op.heads
            # The output and its fp32 statistics.
            add("attention", rows * (op.v_head_dim * element_bytes + 4))
        elif isinstance(op, Collective) and op.forward_kind in ("reduce_scatter", "all_to_all"):
            ways = shard.tp if op.group == "tp" else 1
            ways = ways if op.forward_kind == "reduce_scatter" else 1
            size = np.asarray(op.forward_bytes) / ways
            add(op.forward_kind, np.where(np.asarray(op.active) & _used(op, shard), size, 0))
    return found


def _product_elements(op: MatMul | GroupedMatMul) -> Reals:
    if isinstance(op, MatMul):
        return np.asarray(op.m) * op.n * op.batch
    return np.asarray(op.groups) * op.rows * op.n


def _used(op: Collective, shard: Shard) -> Bools:
    """Whether the collective's group has more than one rank."""
    used: Bools = group_of(op, shard)[0] > 1
    return used
