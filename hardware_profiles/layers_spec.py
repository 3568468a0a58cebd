"""What a stack's layers and their weights send: ``layers`` of its YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from hardware_profiles.sourced import Profile


class LayersSpec(Profile):
    """Facts that decide the collectives of a layer."""

    tensor_parallel: Literal["megatron", "dtensor"] = "megatron"
    """Megatron's asynchronous layers gather their input again in the backward and hide reductions
    behind products; DTensor's keep the gathered input and hide nothing."""
    replicated_gradients: Literal["step", "backward", "reduction"] = "step"
    """When gradients of weights that tp replicates (norms under sequence parallelism, routers) are
    summed over tp: all at once per step, which is not priced; one by one in every backward, as
    FSDP2 needs them (under a pipeline once per step); or those of all such weights, one by one in
    fp32, whenever they are reduced over data parallelism (AutoEP under AutoTP)."""
    separate_projections: tuple[Literal["qkv", "gate_up"], ...] = ()
    """Projections of one input that are products of their own: without sequence parallelism each
    has its own reduction of the input's gradient."""
    vocabulary: Literal["split", "whole", "split_without_context", "over_pipeline"] = "split"
    """Whether tp splits embedding and head by rows of the vocabulary; every rank has them whole and
    computes all logits (AutoTP); context parallelism takes the embedding whole, not the head; or
    the ranks of a pipeline share them besides (``cost_models.vocabulary``)."""
    prediction_projection: Literal["gathered", "whole"] = "gathered"
    """Whether the projection in front of a prediction module's block is split by columns over tp,
    its output gathered and under sequence parallelism cut again into views (Megatron-Core,
    core/transformer/multi_token_prediction.py); or every rank has it whole and projects its own
    rows (torchtitan)."""
    experts: Literal["dealt", "sliced", "folded"] = "dealt"
    """Whether tokens are sent to ranks that hold some experts (or, under expert tensor parallelism,
    parts of some); tp slices every expert as it does other layers: etp is tp then (AutoTP); or
    tensor-parallel ranks, which all have the same tokens, deal the tokens' copies out among
    themselves, send them to ranks that hold some experts, and gather all outputs again (AutoEP
    under AutoTP)."""
    expert_rows: Literal["arriving", "any"] = "arriving"
    """What a rank's experts have buffers for: the rows that arrive, or whatever their group might
    send, where a compiled program's shapes cannot depend on how tokens are routed (MaxText)."""
    weight_wire_bytes_per_64: Annotated[int, Field(ge=0)] = 0
    """Bytes of 64 elements of sharded weights on their way, scales included, where they are
    quantised for that alone (qwZ of ZeRO++); 0: they travel as they are gathered."""
    gradient_wire_bytes_per_64: Annotated[int, Field(ge=0)] = 0
    """The same of gradients, which then go through two all-to-alls instead of a reduce-scatter,
    inside nodes and across, where their ranks fill several nodes (qgZ of ZeRO++)."""
    hierarchical_gathers: bool = False
    """Whether weights whose ranks fill several nodes are gathered across nodes first, then inside
    (MiCS)."""
    gathered_inputs: Literal["again", "kept"] = "again"
    """What Megatron-style layers keep of an input that sequence parallelism gathers: their part,
    and gather it again beside the backward's products; or all of it, unless the module
    ``sp_gather`` is run again."""
    exchanged_output: Literal["again", "kept"] = "again"
    """What context parallelism of two levels does with attention's output between its passes: keep
    it as it left and exchange it again for the backward (Transformer Engine), or keep it as the
    kernel wrote it."""
    gathered_context: Literal["again", "kept"] = "again"
    """What attention keeps of keys and values that context parallelism gathers: this rank's, which
    are gathered again for the backward, or all of them."""
    ring_merge: Literal["transformer_engine", "transformer_engine_p2p", "unknown"] = "unknown"
    """Whose passes join the results of a ring's blocks, or order gathered keys and values:
    Transformer Engine's, for ``p2p`` alone (somebody else gathers), or those of a source
    that was not read, which are not priced."""
    gathered_context_output: Literal["once", "twice"] = "once"
    """Whether attention over gathered keys and values keeps its output as the output projection
    does; or keeps that of each half of its queries, beside what these are copied into
    (Transformer Engine, AttnFuncWithCPAndKVAllGather)."""
    latent_values: Literal["copied", "view"] = "copied"
    """Whether values of latent attention are copied out of the product that they share with the
    keys, or stay a view of it: the keys' columns then wait for the backward with them."""
    expert_outputs: Literal["weighed", "summed"] = "weighed"
    """Whether routing probabilities multiply the experts' outputs, which the gradients of the
    probabilities need; or what goes into the experts' last products, so that outputs are only
    summed and nothing keeps them (Megatron-Core from 0.13)."""
    routing_maps: Literal["unread", "megatron"] = "unread"
    """What a router and an all-to-all dispatcher leave of who goes where, beside two fp32 numbers
    for each token and expert: nothing that was read; or what Megatron-Core's do
    (``planner.blocks.routing``)."""
    latent_down: Literal["whole", "split"] = "whole"
    """Whether every tp rank has the down-projections of latent attention; or tp splits them by
    columns, and their outputs are gathered (Megatron-Core up to 0.13, and its layer spec without
    Transformer Engine in any version)."""
    gathers_each_tensor: bool = False
    """Whether sharded weights are gathered tensor by tensor instead of a layer at once: each then
    pays the latency of a ring over all ranks."""
    broadcasts_each_tensor: bool = False
    """Whether weights that are sharded in the update alone go to the other ranks tensor by tensor,
    each broadcast by its owner around the ring."""
    tied_ends: Literal["apart", "one_unit"] = "apart"
    """Whether an embedding and a head that share their table are units of sharded data parallelism
    by themselves; or one with the final norm, which stays gathered from the lookup to the end of
    the backward and is reduced behind all layers. Tensor parallelism gives each of the two a
    parameter of its own there: the unit then gathers and reduces the table twice."""
    gradient_sums: Literal["scattered", "whole", "whole_below_2"] = "scattered"
    """Whether stages 1 and 2 leave each rank its part of the summed gradients, or both or the first
    all of them: one all-reduce over shards and replicas, as without sharding."""


_SHARED_VOCABULARY = ("1f1b_vocab", "1f1b_interlaced")
"""How the names of schedules begin whose ranks share the vocabulary."""


def require_shared_vocabulary(
    layers: LayersSpec, schedules: Sequence[str], *, new_gradients: bool
) -> None:
    """Raise :class:`ValueError` where schedules and the vocabulary's place disagree."""
    shares = [name.startswith(_SHARED_VOCABULARY) for name in schedules]
    if any(shares) != (layers.vocabulary == "over_pipeline") or any(shares) != all(shares):
        raise ValueError(
            f"layers.vocabulary over_pipeline goes with schedules {_SHARED_VOCABULARY}, "
            f"and they with nothing else: schedules {schedules}"
        )
    if any(shares) and new_gradients:
        raise ValueError("layers.vocabulary over_pipeline: gradients are buffers that stay")
