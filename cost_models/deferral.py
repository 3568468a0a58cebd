"""Weight gradients of the output layer that wait until the last stage's backwards are over.

A pipeline's last stage ends before the others, which still drain. Megatron-Core's
``--defer-embedding-wgrad-compute`` keeps, of the first microbatches of a step, the input of the
output layer and the gradient of its output, and multiplies them behind the stage's last backward
(0.16.1: ``tensor_parallel/layers.py``, ``embedding_activation_buffer`` and ``grad_output_buffer``;
``utils.py``, ``drain_embedding_wgrad_compute``). The exposed reduction of gradients follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layout import Schedule
from cost_models.ops import MatMul, Op
from cost_models.step import Machine, price_layer

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved")
"""Schedules with idle time behind the last stage's backwards, and one backward per microbatch."""
OUTPUT_LAYER = "lm_head"
"""The product whose weights' gradients wait (``planner.blocks.ends``)."""


@dataclass(frozen=True, slots=True)
class Deferral:
    """What waits on the last virtual stage."""

    microbatches: int = 0
    """The first so many of a step have their product put off."""
    each_ns: int = 0
    """By which a backward without the product is shorter, and the rank's end behind its last
    backward later."""
    each_bytes: int = 0
    """The product's operands, of one microbatch."""

    @property
    def total_ns(self) -> int:
        """All products that wait."""
        return self.microbatches * self.each_ns

    def beside_loss_bytes(self, microbatches: int) -> int:
        """Operands that wait when the last of ``microbatches`` has its loss: a rank has as many
        activations in flight then as ever."""
        return self.each_bytes * min(self.microbatches, microbatches - 1)

    def left_bytes(self, microbatches: int) -> int:
        """Of what the head kept, what stays after its last backward too."""
        return self.each_bytes if self.microbatches == microbatches else 0

    def in_trips_ns(self, trips: int, apart: int, rest: int = 0) -> int:
        """Products that do not wait in ``trips`` passes of the last stage: of the first microbatch,
        and, ``rest`` later, of every ``apart``-th one."""
        waiting = max(1, -(-(self.microbatches - rest) // apart))
        return self.each_ns * (trips - min(trips, waiting))


NOTHING = Deferral()


@dataclass(frozen=True)
class PutOff:
    """What the last stage of each configuration may put off."""

    each_ns: Int64
    each_bytes: Int64
    most: int
    """In so many microbatches at most."""


def deferral_of(
    put_off: PutOff | None, index: int, schedule: Schedule, microbatches: int
) -> Deferral:
    """What waits in configuration ``index`` under a schedule."""
    if put_off is None or schedule not in SCHEDULES or not put_off.each_ns[index]:
        return NOTHING
    count = min(put_off.most, microbatches)
    return Deferral(count, int(put_off.each_ns[index]), int(put_off.each_bytes[index]))


def waiting_in(
    put_off: PutOff | None, config: Int64, microbatches: Int64
) -> tuple[NDArray[np.float64], Int64]:
    """Of layouts, what each microbatch puts off at most, and in how many it does."""
    if put_off is None:
        return np.zeros(len(config)), np.zeros_like(config)
    return put_off.each_ns[config].astype(np.float64), np.minimum(put_off.most, microbatches)


def put_off_ns(workload: WorkloadGraph, machine: Machine, shards: Shard) -> Int64:
    """By how much the head's backward is shorter without the product, per configuration. What hid
    behind the product (the reduction of the input's gradient) no longer does."""
    whole, short = (
        price_layer(kind, shards, machine).nanoseconds("backward")
        for kind in (workload.head, _without_product(workload.head))
    )
    each: Int64 = np.maximum(whole - short, 0)
    return each


def _without_product(head: LayerKind) -> LayerKind:
    def ops(shard: Shard) -> tuple[Op, ...]:
        return tuple(
            replace(op, frozen=True) if isinstance(op, MatMul) and op.name == OUTPUT_LAYER else op
            for op in head.ops(shard)
        )

    return replace(head, ops=ops)


def put_off_bytes(workload: WorkloadGraph, shard: Shard) -> Int64:
    """The input of the output layer and the gradient of the logits of one microbatch."""
    total = np.zeros_like(shard.tp)
    for tensor in workload.head.saved(shard):
        if tensor.name == f"{OUTPUT_LAYER}_input":
            total = total + tensor.bytes + workload.head.output_bytes(shard)
    return total
