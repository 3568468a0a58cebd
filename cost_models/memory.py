"""Activation bytes per device: what a layer keeps for its backward, and its short-lived buffers.

Weights, gradients and optimizer state are ``cost_models.state``.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

import numpy as np

from cost_models.communication import group_of
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.layout import OutputKind, RecomputePolicy
from cost_models.named_outputs import (
    LAYER_INPUT,
    REDUCED,
    SAVED,
    latent_rows,
    pieces,
    unneeded,
)
from cost_models.ops import Attention, Collective, GroupedMatMul, Ints, MatMul, Op, Reals
from cost_models.state import local_tensor

Sizes: TypeAlias = tuple[Int64, Int64]
"""Bytes kept per microbatch, and short-lived bytes beside them."""


def activation_bytes(kind: LayerKind, shard: Shard, policy: RecomputePolicy | None) -> Sizes:
    """Activations of one layer under ``policy`` (None: all are kept)."""
    return Activations(kind, shard).under(policy)


def offloaded_bytes(kind: LayerKind, shard: Shard, policy: RecomputePolicy) -> Int64:
    """Bytes of one layer's outputs that a policy keeps on the host, one microbatch."""
    if not policy.offloads:
        return np.zeros_like(shard.tp)
    return Activations(kind, shard).listed(policy, policy.offloads)


class Activations:
    """The tensors and the ops' outputs of one layer, for any number of policies."""

    def __init__(self, kind: LayerKind, shard: Shard) -> None:
        self.kind, self.shard = kind, kind.shard(shard)
        self.zero = np.zeros_like(shard.tp)
        self.working = kind.working_bytes(shard) + self.zero
        self.tensors = kind.saved(shard)
        self.everything = self.zero + sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """Ops of the layer's forward."""
        return self.kind.ops(self.shard)

    @cached_property
    def outputs(self) -> list[tuple[str, OutputKind, Int64]]:
        """What a save list may name, with the op that makes it."""
        return _outputs(self.ops, self.shard, self.kind.element_bytes)

    @cached_property
    def sizes(self) -> dict[tuple[OutputKind, bool], Int64]:
        """Bytes by output, of the ops whose results a gradient needs or (False) none does."""
        last, found = unneeded(self.ops), dict[tuple[OutputKind, bool], Int64]()
        for op, name, size in self.outputs:
            key = name, op not in last
            found[key] = found.get(key, self.zero) + size
        found[LAYER_INPUT, True] = self.zero + self.kind.boundary_bytes(self.shard)
        found[SAVED, True] = self.everything + sum(self.weights)
        return found

    @property
    def weights(self) -> tuple[Int64, ...]:
        """Bytes of the layer's weights in the arithmetic's precision, each."""
        local = (local_tensor(weight, self.shard, 1) for weight in self.kind.weights)
        return tuple(each.elements * each.count * self.kind.element_bytes for each in local)

    def listed(self, policy: RecomputePolicy, names: frozenset[OutputKind]) -> Int64:
        """Bytes of the outputs of those ``names`` that a policy needs."""
        return self.zero + sum(
            size
            for (name, needed), size in self.sizes.items()
            if name in names and (needed or not policy.needed_only)
        )

    def under(self, policy: RecomputePolicy | None) -> Sizes:
        """Kept and working bytes under ``policy`` (None: all are kept).

        What is freed comes back while the layer's backward runs: the whole layer at once, or one
        module after the other, the largest of which counts.
        """
        if policy is None:
            return self.everything, self.working
        if policy.everything is not None:
            assert self.kind.everything is not None
            return self.zero + self.kind.everything(self.shard), self.working
        if SAVED in policy.offloads:
            return self.zero, self.working + self._fetched()
        if policy.keeps is not None:
            return self._of_list(policy, policy.keeps)
        freed: dict[str, Int64] = {}
        inputs = self.zero
        for tensor in self.tensors:
            module = next((name for name in tensor.modules if name in policy.modules), None)
            if module is not None:
                freed[module] = freed.get(module, self.zero) + tensor.bytes
                inputs = inputs + tensor.instead
        total = self.zero + sum(freed.values())
        largest = np.max([self.zero, *freed.values()], axis=0)
        if policy.tiled:
            largest = -(-largest // sequence_tiles(self.kind, self.shard))
        return self.everything - total + inputs, self.working + largest

    def _fetched(self) -> Int64:
        """Most of what is saved that one op of the backward has back from the host: all of the
        attention's, or a tensor and a weight."""
        sizes = [tensor.bytes + self.zero for tensor in self.tensors]
        largest = np.max([self.zero, *sizes], axis=0)
        weight = np.max([self.zero, *(each + self.zero for each in self.weights)], axis=0)
        attention = self.zero + sum(t.bytes for t in self.tensors if "core_attn" in t.modules)
        result: Int64 = np.maximum(largest + weight, attention)
        return result

    def _tiled_away(self, policy: RecomputePolicy) -> Int64:
        """What of the tensors of tiled modules is not there at once: all pieces but one."""
        inner = self.zero + sum(
            (t.bytes for t in self.tensors if policy.tiled.intersection(t.modules)), self.zero
        )
        tiles = sequence_tiles(self.kind, self.shard)
        return inner - -(-inner // tiles)

    def _of_list(self, policy: RecomputePolicy, keeps: frozenset[OutputKind]) -> Sizes:
        kept = self.listed(policy, (keeps | {LAYER_INPUT}) - policy.offloads)
        kept = np.minimum(kept, self.everything)
        if policy.in_parts:
            kept = -(-kept // self.shard.input_parts)
        working = self.working
        if policy.offloads and not policy.in_turn:
            working = working + self.listed(policy, policy.offloads)
        if policy.to_the_end:
            working = np.maximum(working, _output_again(self.kind, self.shard))
        away = self._tiled_away(policy) if policy.tiled else self.zero
        return kept, working + self.everything - kept - away


def sequence_tiles(kind: LayerKind, shard: Shard) -> Int64:
    """Pieces of a sequence that are as long as a token is wide, or shorter (DeepSpeed, ``TiledMLP``
    of runtime/sequence_parallel/ulysses_sp.py)."""
    tokens = np.maximum(shard.residual_tokens, 1)
    width = np.maximum(kind.boundary_bytes(shard) // (tokens * kind.element_bytes), 1)
    length = shard.sequence // shard.cp
    result: Int64 = -(-length // width)
    return result


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
    ops: tuple[Op, ...], shard: Shard, element_bytes: int
) -> list[tuple[str, OutputKind, Int64]]:
    """Ops, what a save list calls their outputs, and bytes of those on one device."""
    found: list[tuple[str, OutputKind, Int64]] = []
    products, maker = 0, ""

    def add(kind: OutputKind, size: Reals | Ints) -> None:
        whole = np.ceil(np.asarray(size) + np.zeros_like(shard.tp)).astype(np.int64)
        found.append((maker, kind, whole))

    for op in ops:
        maker = op.name
        if op.name == "latent_norm":
            rows = np.asarray(latent_rows(ops))
            for piece in pieces(op, ops):
                add(piece.name, rows * piece.width * element_bytes)
        if isinstance(op, MatMul | GroupedMatMul):
            for piece in pieces(op, ops):
                ways = shard.sp if piece.name in REDUCED and isinstance(op, MatMul) else 1
                if piece.name == "mlp_out" and shard.transposed > 1:
                    ways = shard.sp // shard.transposed  # the product makes a part of the width
                size = _product_elements(op) * element_bytes
                add(piece.name, size * piece.width / (piece.whole * ways))
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
    return np.asarray(op.groups) * op.rows * op.room * op.n


def _used(op: Collective, shard: Shard) -> Bools:
    """Whether the collective's group has more than one rank."""
    used: Bools = group_of(op, shard)[0] > 1
    return used
