"""What the YAML of a stack is written in: its words, and how it states recomputation."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field

from hardware_profiles.sourced import Profile

AttentionSort = Literal[
    "sliding windows", "attention sinks", "latent attention", "mixtures of experts",
    "models without experts",
]  # fmt: skip
ContextKind = Literal["p2p", "all_gather", "a2a", "a2a_p2p", "a2a_all_gather"]
Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
"""How tokens reach the ranks of their experts; see ``cost_models.expert_exchange``."""
EXCHANGE_LIBRARIES = ("deepep", "hybridep")
"""Dispatchers that send one copy per node, with a share of link bandwidth of their own."""


Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev",
    "1f1b_vocab_1", "1f1b_vocab_2", "1f1b_interlaced", "gpipe_delayed", "looped_bfs_delayed",
]  # fmt: skip
"""Orders of work of a pipeline that have a name; see ``cost_models.orders``."""
StackRule = Literal[
    "pipeline_needs_multiple_of_pp",
    "moe_with_tp_needs_sequence_parallel", "ep_with_tp_needs_sequence_parallel",
    "no_expert_parallelism", "no_experts",
    "no_experts_with_tp", "no_pipeline", "no_zero_2_with_pipeline", "no_zero_3_with_pipeline",
    "no_zero_3_with_split_backward",
    "no_zero_3_with_context", "zero_2_needs_expert_parallelism",
    "zero_0_is_replicate_only", "zero_1_shards_over_all", "no_sequence_parallelism_with_context",
    "no_tied_embeddings", "no_tied_embeddings_in_pipeline", "needs_block_scaled_products",
    "shards_fill_nodes", "experts_follow_tp", "experts_over_ep_or_tp",
    "tp_needs_expert_parallelism", "experts_over_data_or_context", "no_accumulation_in_fp8",
    "no_pipeline_in_fp8", "no_experts_in_fp8", "no_sinks_in_16_bit_pipelines",
    "no_accumulation", "hybrid_shards_are_nodes", "replicas_share_weights",
    "muon_takes_whole_query_groups",
    "shards_over_one_rank", "whole_gradients_need_one_microbatch",
    "zero_2_needs_pipeline", "no_prediction_in_pipeline", "no_prediction_with_context",
    "no_prediction_in_chunks",
]  # fmt: skip
"""What degrees a stack cannot combine, implemented by name in ``planner.rules``, or what it needs
of a device (``planner.stacks``)."""
Fusion = Literal[
    "bias_gelu", "swiglu", "bias_dropout_add", "rope", "cross_entropy", "wgrad_accumulation",
    "masked_softmax", "grouped_gemm", "norm", "norm_linear", "gradient_sums",
]  # fmt: skip
Module = Literal[
    "core_attn", "layernorm", "mla_up_proj", "mlp", "mlp_act", "moe", "moe_act", "shared_experts",
    "sp_gather",
]  # fmt: skip
"""Parts of a layer that can be run again, by the tags of ``planner.blocks``."""
OptimizerName = Literal[
    "adamw", "adamw_bf16", "sgd", "lion", "adagrad", "rmsprop", "novograd", "adamax", "adadelta",
    "rprop", "adam8bit", "adafactor", "muon",
]  # fmt: skip
"""Entries of ``cost_models.optimizers``."""
Trainable = Literal[
    "attention", "latent_attention", "sparse_latent_attention", "mamba", "mamba2",
    "gated_delta_net", "mlp", "moe", "vision", "layers",
]  # fmt: skip
"""Kinds of sub-block (``planner.blocks.registry``), vision towers, and sequences of layers."""
ModelFeature = Literal[
    "ALiBi", "attention sinks", "softcapped scores", "softcapped logits", "sliding windows",
    "windows by layer", "chunked attention", "layers without positions", "gated attention outputs",
    "values that are keys", "norms over all heads", "norms behind sub-blocks", "normed embeddings",
    "projected embeddings", "biases of the head", "biases of experts", "parallel blocks",
    "shared experts", "latent experts", "experts in state-space hybrids", "multi-token prediction",
    "RMS norms", "grouped queries",
]  # fmt: skip
"""What some software lacks for a model whose kinds of sub-block it has; see
``planner.models.features``."""
TILED = "tiled"
"""Full recomputation of layers whose MLPs run piece by piece of the sequence."""
TILED_MLP = "tiled_mlp"
"""MLPs that run piece by piece of the sequence and once more for their backward, all else kept."""
PARTITIONED = "partitioned"
"""Full recomputation of layers of whose input each tensor-parallel rank keeps a part;
``partitioned:N`` of N layers at a time, where ``full:N`` runs."""
OFFLOAD = "offload"
"""``offload:N``: activations of a model's first N layers wait on the host, nothing runs again."""
EVERYTHING = "everything_saveable"
"""Layers of a pipeline without a policy (``SaveLists.outside_pipeline``): all autodiff saves stays.
JAX's name of the policy that saves as much."""
ZeroStages = Annotated[tuple[Literal[0, 1, 2, 3], ...], Field(min_length=1)]
RankDimension = Literal["tp", "cp", "dp_shard", "dp_replicate", "pp"]
OutputName = Literal["attention", "qkv", "out_proj", "mlp_in", "mlp_out"]
"""Outputs of a layer by what they are; ``attention`` with its statistics."""

SavedOp = Literal["reduce_scatter", "all_to_all", "odd_matmul", "grouped_matmul", "router"]
"""Ops whose outputs a list may keep where a framework tells ops, not tensors, apart."""


class SelectiveRecompute(Profile):
    """Selective recomputation: of some modules, or of all but the outputs of some ops."""

    modules: tuple[Module, ...] = ()
    keeps: (
        tuple[
            Literal[
                "attention", "reduce_scatter", "all_to_all", "matmul", "odd_matmul",
                "grouped_matmul",
            ],
            ...,
        ]
        | None
    ) = None  # fmt: skip
    """Ops whose outputs are kept while the rest of the layer is run again; ``odd_matmul`` is every
    second product of a layer, the first included."""


class SaveLists(Profile):
    """Recomputation of a layer but for named outputs, as frameworks on XLA state it, or but for
    those of some ops, as PyTorch does."""

    policies: dict[str, tuple[OutputName, ...]] = Field(default_factory=dict)
    """Outputs kept under each mode of the stack's own names."""
    offloaded: dict[str, tuple[OutputName | Literal["layer_input", "saved"], ...]] = Field(
        default_factory=dict
    )
    """Outputs that wait on the host under further modes; ``saved`` is all that autograd saves of a
    layer, of which then nothing runs again."""
    in_turn: bool = False
    """Whether what leaves and comes back does so in turn with the layer's work, not beside it."""
    outputs: tuple[OutputName | SavedOp, ...] = ()
    """What a list of one's own may keep: the modes ``custom:`` and names joined by ``+``."""
    searched: bool = True
    """Whether the search looks at lists of one's own; else they run where a job asks for one."""
    separate: tuple[Literal["qkv", "mlp_in"], ...] = ()
    """Of those, the ones that a list may keep a part of: ``query``, ``key`` and ``value``;
    ``mlp_gate`` and ``mlp_up``."""
    latents: tuple[Literal["mla_q", "mla_kv"], ...] = ()
    """Latents of queries, and of keys and values, behind their norms, that a list may name too."""
    hosted: tuple[OutputName | Literal["layer_input", "mla_q", "mla_kv"], ...] = ()
    """What a list may send to the host, as ``NAME@host``; ``layer_input`` is what a layer starts
    from, which stays on the device else."""
    outside_pipeline: str | None = None
    """The mode of ``policies`` that layers outside a pipeline have where its own have none
    (``everything_saveable``); None: layers of a pipeline always have one."""
    source: str


class LayerOffload(Profile):
    """How the activations of a model's first layers wait on the host
    (``cost_models.layer_offload``)."""

    spread: bool = True
    """Whether the copies share the passes of all layers; else each has the next layer's."""
    swiglu: bool
    """Whether what a fused SwiGLU reads leaves too."""
    double_buffered: bool
    """Whether fetched layers have two buffers of their own, for the whole run."""


Value = TypeVar("Value")


def by_prefix(table: dict[str, Value], name: str) -> Value:
    """The entry of the longest prefix of ``name``, else ``default``."""
    matches = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(matches, key=len) if matches else "default"]
