"""A backward in two halves: gradients of inputs, and later those of weights.

As ``torch.distributed.pipelining`` does it (torch 2.13.0, ``_backward.py``; forwards that run again
and tensors that wait were counted on it): the first half runs the whole autograd graph but for the
weights, keeps it with all saved activations, and keeps the gradient of the output of every op that
has a weight. The second half is one backward pass per weight from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models import state
from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layout import RecomputeMode
from cost_models.ops import Elementwise, GroupedMatMul, MatMul, Op, Reals, Repeat
from cost_models.step import Field

SPLIT_MODES: tuple[RecomputeMode, ...] = ("none", "full")
"""Recomputation that a split backward can run: PyTorch refuses to go back twice through a region
with a save list ("You are only allowed to backward once on any region computed under selective
activation checkpoint")."""


@dataclass(frozen=True, slots=True)
class SplitBackward:
    """A virtual stage's backward in its two halves."""

    inputs_ns: int
    weights_ns: int
    deferred_bytes: int
    """Gradients of outputs that wait with the activations from the one to the other."""


def split_backward(
    backward_ns: int, kinds: Sequence[Sequence[int]], held: Sequence[int], front: Sequence[int],
    *, extra: int, head: Sequence[int] | None, at_start: bool,
) -> SplitBackward:  # fmt: skip
    """The halves of the backward of ``held`` layers per kind, the ``front`` ones of them recomputed
    at the cost in row ``extra``, and of the model's ``head`` where the stage has it.

    The first virtual stage has no input that needs a gradient: all of its backward is the second
    half. Elsewhere a recomputed layer runs its forward again in the first half, and in the second
    once more for every weight.
    """
    if at_start:
        return SplitBackward(0, backward_ns, 0)
    weights = deferred = again = 0
    for kind, total, changed in zip(kinds, held, front, strict=True):
        weights += total * kind[Field.WEIGHT_BACKWARD]
        deferred += total * kind[Field.DEFERRED]
        again += changed * kind[extra] * kind[Field.WEIGHT_GROUPS]
    if head is not None:
        weights += head[Field.WEIGHT_BACKWARD]
        deferred += head[Field.DEFERRED]
    return SplitBackward(backward_ns - weights, weights + again, deferred)


def weight_groups(kind: LayerKind) -> int:
    """Backward passes of the second half for one layer: one per trained weight, with its bias."""
    return sum(
        1 if state.is_expert(weight) else weight.count
        for weight in kind.weights
        if not weight.frozen and not weight.name.endswith(".bias")
    )


def deferred_bytes(kind: LayerKind, shard: Shard) -> Int64:
    """Gradients of the outputs of ops with trained weights, in bytes on one device."""
    total = _outputs(kind.ops(shard), kind.element_bytes) + np.zeros(len(shard.tp))
    return np.ceil(total).astype(np.int64)


def _outputs(ops: Sequence[Op], element_bytes: int) -> Reals:
    total: Reals = 0.0
    for op in ops:
        match op:
            case MatMul() if op.weight and op.backward and not op.frozen:
                total = total + np.asarray(op.m) * op.n * op.batch * element_bytes
            case GroupedMatMul() if not op.frozen:
                total = total + np.asarray(op.groups) * op.rows * op.n * element_bytes
            case Elementwise() if "layernorm" in op.modules:
                # Reads its input and writes an output of the same size.
                total = total + np.asarray(op.forward_bytes) / 2
            case Repeat():
                total = total + _outputs(op.ops, element_bytes) * op.count
    return total
