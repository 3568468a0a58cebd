"""A backward in two halves: gradients of inputs, and later those of weights.

As ``torch.distributed.pipelining`` does it (torch 2.13.0, ``_backward.py``; forwards that run again
and tensors that wait were counted on it): the first half runs the whole autograd graph but for the
weights, keeps it with all saved activations but those behind the last weight, and keeps the
gradient of the output of every op that has a weight. The second half is one backward pass per
weight from there.

A layer that is recomputed whole runs again in the first half, which leaves nothing but its input
and those gradients, and once more in each pass of the second: ``torch.utils.checkpoint`` keeps what
it recomputes per autograd pass. What a pass does not read (all but the inputs of ops with weights)
stays until the graph of the stage is gone. A save list cannot run ("You are only allowed to
backward once on any region computed under selective activation checkpoint").
``tests/validation/test_split_recompute.py`` has the counts.

FSDP2 sums a unit's gradients in fp32 when the unit's input has its gradient:
what a second half made stays in 16 bits beside the sum until the next microbatch's first half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models import state
from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layout import SPLIT_BACKWARD, RecomputeMode, codes_of
from cost_models.ops import Elementwise, GroupedMatMul, MatMul, Op, Reals, Repeat
from cost_models.repeat import Real
from cost_models.state_rules import StateRules
from cost_models.step import Field

SPLIT_MODES: tuple[RecomputeMode, ...] = ("none", "full")
"""Recomputation that goes with a split backward."""


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
    *, again: Sequence[int], again_ns: int, head: Sequence[int] | None, at_start: bool,
) -> SplitBackward:  # fmt: skip
    """The halves of the backward of ``held`` layers per kind, and of the model's ``head`` where the
    stage has it; ``again`` of the layers run again, ``again_ns`` of the backward for their weights
    alone. The first virtual stage has no input that needs a gradient: all of its backward is the
    second half."""
    if at_start:
        return SplitBackward(0, backward_ns, 0, 0)
    parts = [*zip(kinds, held, strict=True), *([(head, 1)] if head is not None else [])]
    weights, deferred, late = (
        sum([row[field] * count for row, count in parts])
        for field in (Field.WEIGHT_BACKWARD, Field.DEFERRED, Field.LATE_GRADIENTS)
    )
    weights += again_ns
    for row, count in zip(kinds, again, strict=True):
        deferred += count * (row[Field.DEFERRED_AGAIN] - row[Field.DEFERRED])
    return SplitBackward(backward_ns - weights, weights, max(deferred, 0), late)


def layers_for_weights(
    schedule: Int64, recomputed: Int64, layers: int, stages: Int64, *, free: bool
) -> Int64:
    """Least number of layers that run again for each of their weights too, of at least
    ``recomputed`` ones; arrays of layouts, ``schedule`` as code.

    All do but those of the first virtual stage. It has half of the layers at most, as another one
    is no lighter, where there are three or more; of ``free`` stages all but a layer on each stage
    between the ends.
    """
    split = np.isin(schedule, codes_of(SPLIT_BACKWARD))
    later = np.where(stages > 2, np.maximum(recomputed - -(-layers // 2), 0), 0)
    if free:
        later = np.minimum(recomputed, stages - 2)
    return np.where(split, later, 0)


def weight_passes_ns(kinds: Sequence[Sequence[int]], again: Sequence[int], extra: int) -> int:
    """Time of running ``again`` layers per kind once more for each of their weights; ``extra`` is
    the row with the time of once."""
    return sum([n * k[Field.WEIGHT_PASSES] * k[extra] for k, n in zip(kinds, again, strict=True)])


def write_halves(rows: Int64, kind: LayerKind, shard: Shard, *, weights_ns: Real) -> None:
    """Fill the rows of a layer's split backward, behind those of its modes; ``weights_ns`` of the
    products for gradients of weights."""
    sides = _sides(kind.ops(shard), kind.element_bytes)
    outputs = np.ceil(sides.outputs + np.zeros(len(shard.tp))).astype(np.int64)
    rows[Field.WEIGHT_BACKWARD] = np.floor(weights_ns)
    rows[Field.DEFERRED_AGAIN] = outputs
    rows[Field.DEFERRED] = outputs - sum(t.bytes for t in kind.saved(shard) if t.last)
    rows[Field.WEIGHT_PASSES] = passes = _weights(kind, shard)
    inputs = np.floor(sides.inputs + np.zeros(len(shard.tp))).astype(np.int64)
    rows[Field.LEFT_AGAIN] = passes * np.maximum(rows[Field.ACT_NONE] - inputs, 0)


def late_gradient_bytes(parameters: Int64, rules: StateRules) -> Int64:
    """Gradients of so many weights on one device that wait for FSDP2 to sum them."""
    wider = rules.layout == "dim0" and rules.whole_gradient_bytes > rules.gather_bytes
    return parameters * (rules.gather_bytes if wider else 0)


def _weights(kind: LayerKind, shard: Shard) -> int:
    """Trained tensors of a layer that its products and norms read: one per separate product, one
    per matrix of all experts."""
    trained = [weight for weight in kind.weights if not weight.frozen]
    norms = sum(weight.count for weight in trained if weight.cols == 1)
    return norms + sum(map(state.is_expert, trained)) + _products(kind.ops(shard))


def _products(ops: Sequence[Op]) -> int:
    """Separate products with trained weights."""
    total = 0
    for op in ops:
        match op:
            case MatMul() if op.weight and op.backward and not op.frozen:
                total += len(op.parts)
            case Repeat():
                total += _products(op.ops) * op.count
    return total


@dataclass(frozen=True)
class _Sides:
    """Bytes of the inputs and of the outputs of ops with trained weights."""

    inputs: Reals = 0.0
    outputs: Reals = 0.0

    def plus(self, inputs: Reals, outputs: Reals) -> _Sides:
        return _Sides(self.inputs + inputs, self.outputs + outputs)


def _sides(ops: Sequence[Op], element_bytes: int) -> _Sides:
    total = _Sides()
    for op in ops:
        match op:
            case MatMul() if op.weight and op.backward and not op.frozen:
                rows = np.asarray(op.m) * op.batch * element_bytes
                total = total.plus(rows * op.k, rows * op.n)
            case GroupedMatMul() if not op.frozen:
                rows = np.asarray(op.groups) * op.rows * element_bytes
                total = total.plus(rows * op.k, rows * op.n)
            case Elementwise() if "layernorm" in op.modules:
                # Reads its input and writes an output of the same size.
                each = np.asarray(op.forward_bytes) / 2
                total = total.plus(each, each)
            case Repeat():
                inner = _sides(op.ops, element_bytes)
                total = total.plus(inner.inputs * op.count, inner.outputs * op.count)
    return total
