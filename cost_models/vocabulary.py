"""Embedding and head where all ranks of a pipeline hold a part of the vocabulary.

Weights, gradients and optimizer state of both ends are divided by rows over tp x pp. Each rank
looks up its rows of every microbatch (the sum over ranks runs beside other work) and makes its part
of every microbatch's logits. Of a part nothing is kept per microbatch in flight: the softmax of one
microbatch waits for the next pass of the head, and buffers of the head's and the embedding's inputs
and gradients stay for the step.

Source: Yeung et al., arXiv 2411.05288, and the authors' fork of Megatron-LM (sail-sg's
VocabularyParallelism: ``vocab_parallel_schedule.py``, ``interlaced_schedule.py``,
``vocab_output.py``). The final norm is counted on every rank; the fork runs it on the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cost_models import interconnect
from cost_models.compute import memory_bound_time_s
from cost_models.graph import Bools, Int64, Shard, WorkloadGraph
from cost_models.layer_times import to_ns
from cost_models.layout import Schedule
from cost_models.step import Field, Machine
from cost_models.vocabulary_orders import most_alive
from cost_models.vocabulary_timeline import HeadTimes

if TYPE_CHECKING:
    from cost_models.configs import Configs

Row = tuple[int, ...]

SCALARS = 3
"""Sums of one number per token: the largest logit, the target's, the sum of exponentials."""
HELD_COPIES = {"1f1b_vocab_1": 3, "1f1b_vocab_2": 4, "1f1b_interlaced": 3}
"""16-bit tensors of a microbatch's hidden states that stay on every rank: the looked-up rows, their
gradient, and the gradient of the head's input, which algorithm 2 keeps in two parts until they are
scaled and summed."""
HELD_WIDE = {"1f1b_vocab_1": 2, "1f1b_vocab_2": 2, "1f1b_interlaced": 0}
"""Such tensors in fp32: the last output is sent in fp32 with the gradient of the loss in one
tensor, and the one before is held until its gradient was used."""
RESCALED, CAST = 8, 6
"""Bytes moved per logit to bring a part's softmax to the sum of all ranks, in place in fp32; and to
make 16 bits of it, which algorithm 2 does in its first pass besides (``vocab_output.py``)."""


@dataclass(frozen=True)
class VocabularyTables:
    """What a divided vocabulary adds to a table of configurations."""

    divided: Bools
    """Where there is a pipeline to divide it over."""
    hidden: Int64
    """Elements of a microbatch's hidden states on one rank."""
    element_bytes: int
    arrive_ns: Int64
    """The last stage's output, in 16 bits, to all ranks."""
    arrive_wide_ns: Int64
    """The same in fp32."""
    gradient_ns: Int64
    """Sum over the ranks of the gradient of the head's input."""
    scalar_ns: Int64
    """Sum of one number per token."""
    rescale_ns: Int64
    """Softmax of a part, brought to the sum of all."""
    cast_ns: Int64
    """The same in 16 bits."""


def vocabulary_tables(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> VocabularyTables | None:
    """The tables of a stack that divides the vocabulary over the pipeline; None of others."""
    if not workload.vocabulary_over_pipeline:
        return None
    stride = configs.tp * configs.cp * configs.dp_replicate * configs.dp_shard
    boundary = shard.residual_tokens * workload.boundary_bytes_per_token
    element = workload.head.element_bytes
    logits = workload.head.output_bytes(shard) // element

    def seconds(kind: interconnect.CollectiveKind, payload: Int64) -> Int64:
        return to_ns(
            interconnect.collective_time_s(
                machine.fabric, kind, payload.astype(np.float64), size=configs.pp, stride=stride
            )
        )

    return VocabularyTables(
        divided=configs.pp > 1,
        hidden=boundary // element,
        element_bytes=element,
        # A broadcast around a ring takes as long as an all-gather to as many bytes.
        arrive_ns=seconds("all_gather", boundary),
        arrive_wide_ns=seconds("all_gather", boundary // element * 4),
        gradient_ns=seconds("all_reduce", boundary),
        scalar_ns=seconds("all_reduce", shard.residual_tokens * 4),
        rescale_ns=to_ns(memory_bound_time_s(machine.device, logits * RESCALED)),
        cast_ns=to_ns(memory_bound_time_s(machine.device, logits * CAST)),
    )


@dataclass(frozen=True, slots=True)
class SharedEnds:
    """One configuration's parts of embedding and head under a schedule, the same on every rank."""

    embedding: Row
    head: Row
    times: HeadTimes
    held_bytes: int
    """Activations and buffers that stay for the step."""
    rescaling_ns: int = 0
    """Of the head's passes, what a loss on one rank does not do."""

    @property
    def forward_ns(self) -> int:
        """Of a microbatch's forward: its lookup."""
        return self.embedding[Field.FORWARD]

    @property
    def backward_ns(self) -> int:
        """Of a microbatch's backward: the lookup's."""
        return self.embedding[Field.BACKWARD]

    @property
    def head_ns(self) -> int:
        """Passes of the head, per microbatch."""
        return self.times.own + self.times.later

    def total(self, *fields: Field) -> int:
        """Fields of both ends."""
        return sum(self.embedding[field] + self.head[field] for field in fields)

    @property
    def static_bytes(self) -> int:
        """State, and what stays for the step."""
        return self.total(Field.STATIC, Field.NEW_GRADIENTS) + self.held_bytes

    @property
    def working_bytes(self) -> int:
        """Most short-lived bytes of a pass of the head or a lookup's backward."""
        return max(self.embedding[Field.WORK_NONE], self.head[Field.WORK_NONE])


def shared_ends(
    tables: VocabularyTables, index: int, schedule: Schedule, pp: int, microbatches: int,
    embedding: Row, head: Row,
) -> SharedEnds:  # fmt: skip
    """The ends of configuration ``index``, whose rows are those of one rank's part."""
    weights = head[Field.WEIGHT_BACKWARD]
    forward, backward = head[Field.FORWARD], head[Field.BACKWARD]
    gradient, scalars = int(tables.gradient_ns[index]), SCALARS * int(tables.scalar_ns[index])
    arrive = int(tables.arrive_wide_ns[index])
    together = 0
    if schedule == "1f1b_interlaced":
        # The gradient's sum runs beside the products for the weights'.
        arrive = int(tables.arrive_ns[index])
        together = arrive + scalars + max(gradient - weights, 0)
    own = forward if schedule == "1f1b_vocab_1" else forward + backward - weights
    later = forward + backward - own
    scaled = cast = 0
    if schedule != "1f1b_interlaced":
        scaled = int(tables.rescale_ns[index])
    if schedule == "1f1b_vocab_2":
        cast = int(tables.cast_ns[index])
    hidden, element = int(tables.hidden[index]), tables.element_bytes
    held = HELD_COPIES[schedule] * element + HELD_WIDE[schedule] * 4
    return SharedEnds(
        embedding=embedding,
        head=head,
        times=HeadTimes(own + cast, later + scaled, arrive, scalars + gradient, together),
        rescaling_ns=cast + scaled,
        held_bytes=head[Field.ACT_NONE] + held * hidden
        + embedding[Field.ACT_NONE] * most_alive(schedule, pp, microbatches, 0),
    )  # fmt: skip
