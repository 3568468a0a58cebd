"""A backward in two halves: gradients of inputs, and later those of weights.

As ``torch.distributed.pipelining`` does it (torch 2.13.0, ``_backward.py``; forwards that run again
and tensors that wait were counted on it): the first half runs the whole autograd graph but for the
weights, keeps it with all saved activations but those behind the last weight, and keeps the
gradient of the output of every op that has a weight. The second half is one backward pass per
weight from there. FSDP2 sums a unit's gradients in fp32 when the unit's input has its gradient:
what a second half made stays in 16 bits beside the sum until the next microbatch's first half.
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

SPLIT_MODES: tuple[RecomputeMode, ...] = ("none",)
"""Recomputation that goes with a split backward. PyTorch refuses to go back twice through a region
with a save list ("You are only allowed to backward once on any region computed under selective
activation checkpoint"); through a layer that is recomputed whole it goes, and runs its forward
again for every weight, with the inputs of all products kept: not worth a search."""


@dataclass(frozen=True, slots=True)
class SplitBackward:
    """A virtual stage's backward in its two halves."""

    inputs_ns: int
    weights_ns: int
    deferred_bytes: int
    """Gradients of outputs that wait with the activations from the one to the other."""
    late_gradient_bytes: int
    """Gradients of weights that wait to be summed, of one microbatch."""


def split_backward(
    backward_ns: int, kinds: Sequence[Sequence[int]], held: Sequence[int],
    *, head: Sequence[int] | None, at_start: bool,
) -> SplitBackward:  # fmt: skip
    """The halves of the backward of ``held`` layers per kind, and of the model's ``head`` where the
    stage has it. The first virtual stage has no input that needs a gradient: all of its backward is
    the second half."""
    if at_start:
        return SplitBackward(0, backward_ns, 0, 0)
    parts = [*zip(kinds, held, strict=True), *([(head, 1)] if head is not None else [])]
    weights, deferred, late = (
        sum([row[field] * count for row, count in parts])
        for field in (Field.WEIGHT_BACKWARD, Field.DEFERRED, Field.LATE_GRADIENTS)
    )
    return SplitBackward(backward_ns - weights, weights, max(deferred, 0), late)


def deferred_bytes(kind: LayerKind, shard: Shard) -> Int64:
    """Gradients of the outputs of ops with trained weights, in bytes on one device, less what the
    ops behind them keep."""
    total = _outputs(kind.ops(shard), kind.element_bytes) + np.zeros(len(shard.tp))
    gone = sum(tensor.bytes for tensor in kind.saved(shard) if tensor.last)
    return np.ceil(total).astype(np.int64) - gone


def late_gradient_bytes(parameters: Int64, rules: state.StateRules) -> Int64:
    """Gradients of so many weights on one device that wait for FSDP2 to sum them."""
    wider = rules.layout == "dim0" and rules.held_gradient_bytes > rules.gather_bytes
    return parameters * (rules.gather_bytes if wider else 0)


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
