"""The data-parallel collectives of a layer: which, over which ranks, how many bytes.

``cost_models.data_parallel`` prices them, ``cost_models.traffic`` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.interconnect import CollectiveKind
from cost_models.lanes import replica_stride
from cost_models.placed import Placed
from cost_models.state import (
    frozen_per_64,
    is_expert,
    local_tensor,
    narrower_bytes,
    state_over_replicas,
    weights_sharded,
)
from cost_models.state_rules import StateRules
from hardware_profiles.schema import LayersSpec

Payload: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel side of each configuration (arrays of one length)."""

    replicate: Int64
    shard: Int64
    pp: Int64
    zero_stage: Int64
    reshard: Int64
    """Ranks that keep a copy of the weights for the backward in stage 3; 0: none does."""
    stages: Int64 | int = 1
    """Among the replicas, pipeline stages: no state is split over them."""
    waits: Int64 | int = 0
    """Whether gradients wait for the step's last microbatch though there is no pipeline: 0 or 1."""

    @property
    def deferred(self) -> Bools:
        """``waits`` of each configuration."""
        result: Bools = np.broadcast_to(self.waits, self.pp.shape) > 0
        return result


@dataclass(frozen=True)
class Mesh:
    """Groups over which parameters are replicated, and their rank strides."""

    ways: Int64
    """Ranks that shard the state."""
    stride: Int64
    replicas: Int64
    replica_stride: Int64
    stages: Int64 | int = 1
    """Among the replicas, those that no state is split over."""

    @property
    def state_replicas(self) -> Int64:
        """Replicas that may split what they all would hold."""
        return self.replicas // self.stages


@dataclass(frozen=True)
class DataCall:
    """Calls of a collective for the parameters of one layer; bytes of the whole buffer of one."""

    role: Literal["gradient", "parameter"]
    kind: CollectiveKind
    bytes: Payload
    size: Int64
    stride: Int64
    active: Bools
    count: int = 1
    """Equal calls."""
    over_replicas: bool = False
    """Whether it sums shards that other groups hold too, or brings those together that groups
    have updated parts of: once per step."""


@dataclass(frozen=True)
class Wire:
    """How weights and gradients travel: ``StackSpec.layers``, and the devices of a node."""

    layers: LayersSpec
    per_node: int
    whole_sums: bool = False
    """Whether gradients are summed whole in stage 3 (``cost_models.orthogonalise``)."""

    def levels(self, mesh: Mesh) -> tuple[Int64, Bools]:
        """Ranks of a node that share the state, and where several whole nodes of them do."""
        inner = np.maximum(self.per_node // mesh.stride, 1)
        aligned = (self.per_node % mesh.stride == 0) & (mesh.ways % inner == 0)
        return inner, aligned & (mesh.ways > inner) & (inner > 1)

    def exchanges(
        self, elements: Int64, mesh: Mesh, wanted: Bools
    ) -> tuple[Bools, tuple[DataCall, ...]]:
        """Where gradients are exchanged in few bits instead of reduced, and the two exchanges: all
        of them inside the nodes, then each rank's part of the sum across."""
        per_64 = self.layers.gradient_wire_bytes_per_64
        if not per_64:
            return np.zeros_like(wanted), ()
        inner, split = self.levels(mesh)
        active, sent = split & wanted, elements * (per_64 / 64)
        across = sent / inner, np.maximum(mesh.ways // inner, 1), mesh.stride * inner
        return active, (
            DataCall("gradient", "all_to_all", sent, inner, mesh.stride, active),
            DataCall("gradient", "all_to_all", *across, active),
        )

    def crossings(
        self, weights: Payload, pieces: int, mesh: Mesh, wanted: Bools
    ) -> tuple[Int64, tuple[DataCall, ...]]:
        """Ranks of the gathers of ``weights`` bytes each, and what comes before those inside the
        nodes: a node's part of them from the others."""
        if not self.layers.hierarchical_gathers:
            return mesh.ways, ()
        inner, split = self.levels(mesh)
        call = DataCall(
            "parameter", "all_gather", weights / inner, np.maximum(mesh.ways // inner, 1),
            mesh.stride * inner, split & wanted, pieces,
        )  # fmt: skip
        return np.where(split, inner, mesh.ways), (call,)


@dataclass(frozen=True)
class Pieces:
    """Collectives in which the weights of a layer, or of its experts, come together."""

    updated: int
    """After the update, in stages 1 and 2."""
    used: int
    """Before they are used, in stage 3."""

    def by_stage(self, zero_stage: Int64) -> tuple[tuple[int, Bools], ...]:
        """Each number with where it holds."""
        used: Bools = zero_stage >= 3
        if self.updated == self.used:
            return ((self.used, np.ones_like(used)),)
        return (self.updated, ~used), (self.used, used)


def gathered_pieces(kind: LayerKind, layers: LayersSpec, *, experts: bool) -> Pieces:
    """Of the weights of a layer, or of its experts."""
    tensors = max(1, sum(w.count for w in kind.weights if is_expert(w) == experts))
    each = layers.gathers_each_tensor
    return Pieces(
        updated=tensors if each or layers.broadcasts_each_tensor else 1,
        used=tensors if each else 1,
    )


def reduces_each(data: DataParallel, rules: StateRules) -> Bools:
    """Whether gradients are reduced with every microbatch: where units come and go with each,
    unless the stack lets gradients wait for the last one."""
    return in_each(data, rules) & ~data.deferred


def in_each(data: DataParallel, rules: StateRules) -> Bools:
    """Whether sharded units come and go with every microbatch: in stage 3, and in stage 2 but under
    a pipeline, which keeps the weights for the whole step (Megatron-FSDP reduces there too); FSDP1
    without sharding too."""
    reduced = (data.pp == 1) | rules.reduces_each_backward
    whole = (data.zero_stage == 0) & rules.casts_whole_weights
    every: Bools = (data.zero_stage >= 3) | ((data.zero_stage == 2) & reduced) | whole
    return every & ~gathers_between(data, rules)


def gathers_between(data: DataParallel, rules: StateRules) -> Bools:
    """Whether a pipeline gathers weights for the pass that follows a forward, and no others.

    A forward gives them back, a backward keeps them, so each pass of a stage that follows one of
    its forwards gathers them: one pass per microbatch, whatever their order, and the first.
    """
    result: Bools = (data.zero_stage >= 3) & (data.pp > 1) & rules.keeps_after_backward
    return result


def gathers_each(data: DataParallel, rules: StateRules) -> Bools:
    """Whether weights are gathered with every microbatch, not once after the update: not where
    stage 2 leaves them whole (DeepSpeed)."""
    return in_each(data, rules) & weights_sharded(data.zero_stage, rules)


def gathers_again(kind: LayerKind, zero_stage: Int64) -> Bools:
    """Whether a layer's weights are gathered for its backward too: not the head's, which starts
    where its forward ends (torchtitan 0.3.0 keeps them: ``apply_fsdp_to_decoder``), nor those of
    a unit of both ends."""
    kept = kind.name == "head" or kind.ends_unit
    return (zero_stage >= 3) & (kind.backward and not kept)


def meshes(
    shard: Shard, data: DataParallel, layers: LayersSpec, per_node: int
) -> tuple[Mesh, Mesh]:
    """The attention mesh and the expert mesh of each configuration, on nodes of ``per_node``."""
    span = shard.tp * shard.cp * data.shard
    apart = shard.ep * shard.etp
    expert_ranks = np.maximum(span // apart, 1)
    if layers.experts == "folded":
        apart = replica_stride(shard.tp, shard.ep, data.shard * data.replicate, per_node)
    return (
        Mesh(data.shard * shard.cp, shard.tp, data.replicate, span, data.stages),
        Mesh(expert_ranks, apart, data.replicate, span, data.stages),
    )


def state_mesh(mesh: Mesh, zero_stage: Int64, rules: StateRules) -> Mesh:
    """The mesh over which the optimizer's state is split: replicas of it lie side by side."""
    if not rules.split_over_replicas:
        return mesh
    deeper = state_over_replicas(zero_stage, mesh.state_replicas, rules)
    return replace(mesh, ways=np.where(deeper, mesh.ways * mesh.state_replicas, mesh.ways))


def backward_mesh(mesh: Mesh, data: DataParallel) -> Mesh:
    """The mesh over which the backward gathers weights: of neighbours that keep a copy, if any."""
    if not data.reshard.any():
        return mesh
    kept = np.where(data.reshard > 0, np.minimum(mesh.ways, data.reshard), mesh.ways)
    return replace(mesh, ways=kept)


def calls(
    elements: Int64, mesh: Mesh, zero_stage: Int64, rules: StateRules, pieces: Pieces,
    gathered: GatheredBytes, wire: Wire, apart: Placed | None = None,
) -> tuple[DataCall, ...]:  # fmt: skip
    """Reductions and gathers of ``elements`` parameters held on a device before sharding.

    Those of weights that are not trained are gathered where weights are sharded.

    Unsharded, or summed whole all the same: one all-reduce of gradients. Sharded: reduce-scatter
    of gradients in their dtype over the shards, all-reduce of the shard over replicas, all-gather
    of weights in so many ``pieces``; where the state is split over replicas, an all-gather of the
    updated shard over those. Quantised gradients are exchanged instead, inside nodes and
    across (DeepSpeed, runtime/comm/coalesced_collectives.py, ``all_to_all_quant_reduce``).
    ``apart``: of dense weights, what the layer's own calls bring together.
    """
    gradient = each = elements * float(rules.gradient_bytes)
    weights = elements * float(rules.gather_bytes) - gathered.narrower
    if apart is not None:
        gradient = gradient - apart.gradients * float(rules.gradient_bytes)
        weights = weights - apart.weights * float(rules.gather_bytes)
    sharded = zero_stage > 0
    whole = (zero_stage < 3) & (wire.layers.gradient_sums == "whole") | ~sharded
    whole |= (zero_stage < 2) & (wire.layers.gradient_sums == "whole_below_2")
    whole = whole | (zero_stage == 3) & wire.whole_sums
    some = elements > 0
    ranks = mesh.ways * mesh.replicas
    narrow = wire.layers.weight_wire_bytes_per_64
    weights = elements * (narrow / 64) if narrow else weights
    exchanged, exchanges = wire.exchanges(elements, mesh, ~whole & some)
    near, crossings = wire.crossings(weights / pieces.used, pieces.used, mesh, sharded & some)
    return (
        DataCall("gradient", "all_reduce", gradient, ranks, mesh.stride, whole & some),
        DataCall(
            "gradient", "reduce_scatter", gradient, mesh.ways, mesh.stride,
            ~whole & some & ~exchanged,
        ),
        *exchanges,
        *crossings,
        DataCall(
            "gradient", "all_reduce", each / mesh.ways, mesh.replicas, mesh.replica_stride,
            ~whole & some, over_replicas=True,
        ),
        *(
            DataCall(
                "parameter", "all_gather", weights / count, near, mesh.stride, sharded & some & at,
                count,
            )
            for count, at in pieces.by_stage(zero_stage)
        ),
        DataCall(
            "parameter", "all_gather", gathered.frozen.astype(np.float64), mesh.ways, mesh.stride,
            weights_sharded(zero_stage, rules) & (gathered.frozen > 0),
        ),
        DataCall(
            "parameter", "all_gather", weights / mesh.ways, mesh.state_replicas,
            mesh.replica_stride, state_over_replicas(zero_stage, mesh.state_replicas, rules) & some,
            over_replicas=True,
        ),
    )  # fmt: skip


def tensor_parallel_sums(
    kind: LayerKind, shard: Shard, data: DataParallel, layers: LayersSpec, rules: StateRules
) -> tuple[DataCall, ...]:
    """Sums over tp of the gradients of weights that every tp rank holds whole, tensor by tensor.

    With sequence parallelism each rank has a part of the sum; without, those inside the attention
    do, whose heads tp splits. FSDP2 needs the sums in every backward, in the dtype of the weights;
    under a pipeline, or where they wait, once per step, in that of the reduction. Megatron sums all
    weights of a stage in one piece once per step: about 1 MB, not counted. DeepSpeed averages all
    of them in fp32 where experts are folded over tp, the ends' too
    (``reduce_autoep_folding_gradient``).
    """
    if layers.replicated_gradients == "step":
        return ()
    folded = layers.replicated_gradients == "reduction"
    soon = (data.pp == 1) & ~data.deferred
    each = np.where(soon, rules.gather_bytes, rules.gradient_bytes)
    each = np.full_like(each, 4) if folded else each
    return tuple(
        DataCall(
            "gradient", "all_reduce", 1.0 * each * (weight.elements // weight.count), shard.tp,
            np.ones_like(shard.tp),
            shard.sequence_parallel | weight.name.startswith("attention.") | folded, weight.count,
        )
        for weight in kind.weights
        if weight.sharding == "replicated" and not weight.frozen
    )  # fmt: skip


def sums_each(data: DataParallel, layers: LayersSpec, rules: StateRules) -> Bools:
    """Whether those sums come with every microbatch, not once per step."""
    if layers.replicated_gradients == "reduction":
        return reduces_each(data, rules)
    every: Bools = (data.pp == 1) & ~data.deferred
    return every


@dataclass(frozen=True)
class GatheredBytes:
    """What of a layer, or of its experts, is gathered otherwise than in 16 bits."""

    frozen: Int64
    """Of weights that are not trained."""
    narrower: Int64
    """By how much less trained weights take that are quantised before."""


def gathered_bytes(
    kind: LayerKind, shard: Shard, rules: StateRules, vocab_divisor: int, *, experts: bool
) -> GatheredBytes:
    """The bytes of a layer's weights, or of its experts'."""
    frozen, narrower = np.zeros_like(shard.tp), np.zeros_like(shard.tp)
    for weight in kind.weights:
        if is_expert(weight) == experts:
            local = local_tensor(weight, shard, vocab_divisor)
            narrower = narrower + narrower_bytes(weight, local, rules)
            if weight.frozen:
                frozen = frozen + -(-local.total * frozen_per_64(weight, rules) // 64)
    return GatheredBytes(frozen, narrower)
