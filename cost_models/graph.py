"""A workload as the cost models see it: layer kinds with weights, ops and saved tensors.

A layer kind's *weights* are plain data. Its ops and saved tensors depend on how it is sharded, so
they are functions of :class:`Shard`, whose fields are numpy arrays: the same code prices one
configuration or a million.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models import cp_kinds
from cost_models.layout import CpKind, RecomputePolicy
from cost_models.ops import Op, SavedTensor

Int64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

WeightSharding = Literal[
    "column", "row", "replicated", "vocab", "vocab_without_context", "expert_column", "expert_row"
]
"""How tensor parallelism splits a weight.

``column`` splits the output dimension over tp, ``row`` the input dimension, ``vocab`` the rows of
an embedding or head over tp, ``vocab_without_context`` only where there is no context parallelism;
``replicated`` is whole on each tp rank. ``expert_*`` weights are
split over ep by expert and over etp by column or row.
"""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter tensor (or ``count`` equal ones).

    ``rows`` x ``cols`` is (output features, input features) as stored; a vector has ``cols = 1``.
    ``kv_heads`` > 0 marks a column weight that cannot be split below one KV head: with more tp
    ranks than KV heads it is replicated.
    """

    name: str
    rows: int
    cols: int
    sharding: WeightSharding = "replicated"
    count: int = 1
    kv_heads: int = 0
    frozen: bool = False
    """Whether it is not trained."""
    bytes_per_64: int = 0
    """Bytes of 64 elements where a frozen weight is stored in few bits; 0: as weights are."""
    shared: bool = False
    """Whether the first and the last stage of a pipeline both hold it, and sum its gradients."""
    twice: bool = False
    """Whether two modules use it, each with a parameter of its own where tp splits it: sharded data
    parallelism then gathers and reduces both, and one is held."""
    copy: bool = False
    """Whether it stands for another weight, which serves for both where they are on one stage."""

    @property
    def elements(self) -> int:
        """Parameters in all ``count`` tensors, unsharded."""
        return self.rows * self.cols * self.count


@dataclass(frozen=True, slots=True)
class Shard:
    """How a layer is split, one entry per configuration (all arrays of one length)."""

    sequence: int
    """Tokens per sample."""
    microbatch: Int64
    tp: Int64
    cp: Int64
    ep: Int64
    etp: Int64
    sequence_parallel: Bools
    cp_kind: Int64
    """Codes of ``cost_models.cp_kinds``."""
    vocabulary: Int64 | None = None
    """Ranks that share the rows of the vocabulary, where it is not tp."""
    transposed: int = 1
    """Of tp, a factor that splits the residual stream and feed-forwards' matrices along its width;
    the rest splits what these are wide inside (``planner.blocks.transposed``)."""
    fsdp: Int64 | None = None
    """Ranks that split weights beside ``transposed`` (ZeRO stage 3); None: nothing is transposed,
    or none do."""
    replicas: Int64 | None = None
    """Data-parallel ranks beside those; None as that of ``fsdp``."""

    piped: Bools | None = None
    """Where there is a pipeline; None as that of ``fsdp``."""

    @property
    def shards(self) -> Int64:
        """Ranks of an fsdp axis that a layer's own calls go over."""
        return np.ones_like(self.tp) if self.fsdp is None else self.fsdp

    @property
    def sharing(self) -> Int64:
        """Ranks that share out the tokens of a step, where a layer's own calls go over them."""
        return self.shards * self.cp * (1 if self.replicas is None else self.replicas)

    @property
    def beside(self) -> Bools:
        """Where an fsdp axis splits the dimension too that ``transposed`` splits, or a pipeline's
        loop is around a layer: XLA then splits the residual stream over all of tp."""
        piped = False if self.piped is None else self.piped & (self.straight > 1)
        result: Bools = (self.shards > 1) | piped
        return result

    @property
    def straight(self) -> Int64:
        """By how much the inner width of a feed-forward is split."""
        return self.tp // self.transposed

    @property
    def vocabulary_ranks(self) -> Int64:
        """Ranks that share the rows of the vocabulary."""
        return self.tp if self.vocabulary is None else self.vocabulary

    @property
    def tokens(self) -> Int64:
        """Tokens of one microbatch on one context-parallel rank."""
        return self.microbatch * (self.sequence // self.cp)

    @property
    def sp(self) -> Int64:
        """By how much the residual stream is split over tp."""
        if self.transposed > 1:
            return np.where(self.beside, self.tp, self.transposed)
        return np.where(self.sequence_parallel, self.tp, 1)

    @property
    def input_parts(self) -> Int64:
        """Tensor-parallel ranks that hold the same residual stream: each can keep a part of it."""
        return self.tp // self.sp

    @property
    def cp_exchange(self) -> Int64:
        """Context-parallel ranks that exchange heads for sequence; neighbours."""
        return cp_kinds.exchange_ways(self.cp_kind, self.cp)

    @property
    def cp_ring(self) -> Int64:
        """Context-parallel ranks that pass keys and values round."""
        return cp_kinds.ring_ways(self.cp_kind, self.cp)

    @property
    def cp_gather(self) -> Int64:
        """Context-parallel ranks that gather keys and values."""
        return cp_kinds.gather_ways(self.cp_kind, self.cp)

    @property
    def residual_tokens(self) -> Int64:
        """Tokens of the residual stream on one rank."""
        return self.tokens // self.sp


def no_bytes(shard: Shard) -> Int64:
    """Nothing."""
    return np.zeros_like(shard.tp)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its weights, and its ops and saved tensors as functions of the shard."""

    name: str
    weights: tuple[Weight, ...]
    ops: Callable[[Shard], tuple[Op, ...]]
    saved: Callable[[Shard], tuple[SavedTensor, ...]]
    boundary_bytes: Callable[[Shard], Int64]
    """Bytes of the layer's input on one device: what full recomputation keeps."""
    working_bytes: Callable[[Shard], Int64]
    """Largest short-lived buffers of one layer's backward, beyond the saved tensors."""
    element_bytes: int = 2
    """Bytes per activation element."""
    backward: bool = True
    """Whether a gradient flows through it: not below the first trained weight."""
    ends_unit: bool = False
    """Whether its weights are those of both ends of the model, in one unit of sharded data
    parallelism that stays gathered until the backward is over."""
    in_pieces: bool = False
    """Whether the backward runs piece by piece, and reduces gradients after each."""
    buffer_bytes: Callable[[Shard], Int64] = no_bytes
    """Tensors that stay on the device and are no parameters."""
    context: CpKind | None = None
    """Its own kind of context parallelism; None: as the configuration says."""
    everything: Callable[[Shard], Int64] | None = None
    """Bytes that autodiff of a compiled program keeps (``cost_models.autodiff``); None where they
    were not counted."""
    pass_weight_bytes: int = 2
    """Per element of a weight that a pass of such a program keeps."""
    output_bytes: Callable[[Shard], Int64] = no_bytes
    """Logits, which a pipeline's schedule may hold beside their loss."""

    def shard(self, shard: Shard) -> Shard:
        """How this layer is split: with the context parallelism of its own, if it has one."""
        if self.context is None:
            return shard
        code = cp_kinds.cp_kind_code(self.context)
        return replace(shard, cp_kind=np.full_like(shard.cp_kind, code))

    @property
    def whole_logits(self) -> bool:
        """Whether it makes the logits of all its tokens at once."""
        return self.output_bytes is not no_bytes and not self.in_pieces


@dataclass(frozen=True)
class WorkloadGraph:
    """A model under a job: a sequence of layers between an embedding and a head."""

    name: str
    sequence: int
    hidden: int
    layers: tuple[str, ...]
    """Kind of each layer, in order."""
    kinds: dict[str, LayerKind]
    embedding: LayerKind
    head: LayerKind
    tied_embeddings: bool
    model_flops_per_token: float
    """Forward and backward FLOPs per token of the model itself, attention counted causal."""
    expert_count: int
    """Routed experts of the widest layer; 0 for a dense model."""
    vocab_divisor: int
    """Vocabulary rows are padded to a multiple of this times tp."""
    boundary_bytes_per_token: int
    """Bytes per token of what a pipeline stage sends to the next; the least where they differ."""
    boundaries: tuple[tuple[int, int], ...] = ()
    """Where not all cuts carry the same: bytes per token sent on, and sent back as gradients, at
    each cut from before the first layer to after the last."""
    policies: tuple[RecomputePolicy, ...] = ()
    """Recomputation that is priced, beside none."""
    vocabulary_over_pipeline: bool = False
    """Whether the ranks of a pipeline share embedding and head (``cost_models.vocabulary``)."""
    uneven_routing: bool = False
    """Whether expert-parallel ranks get other numbers of rows in each microbatch."""
    transposed: int = 1
    """``Shard.transposed`` of every layer."""
    global_batch: int | None = None
    """Samples per step, which under a pipeline decide what waits on the hosts; None: nothing is
    refused for that."""
    assumptions: tuple[str, ...] = ()

    @property
    def shares_table(self) -> bool:
        """Whether the first and the last stage of a pipeline train copies of one embedding table,
        for a tied head or for the lookups of prediction modules."""
        return any(weight.shared and not weight.frozen for weight in self.embedding.weights)


_HIGH_PRECISION = ("embedding", "head", "moe.router", "moe.shared_gate")


def is_quantised(weight: Weight) -> bool:
    """Whether low-precision recipes run this weight's products: linear layers, but not the ends,
    the router or the gate."""
    return weight.cols > 1 and not weight.name.startswith(_HIGH_PRECISION)
