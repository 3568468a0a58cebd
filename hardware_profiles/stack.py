"""The shape of the YAML that describes a stack: the software that runs a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hardware_profiles.holdings import (
    ByPrecision,
    MuonSpec,
    OffloadSpec,
    Precision,
    ReserveSpec,
    StateSpec,
)
from hardware_profiles.layers_spec import LayersSpec as LayersSpec
from hardware_profiles.quantisation import QuantisationSpec
from hardware_profiles.sourced import Profile, Sourced
from hardware_profiles.stack_consistency import require_consistent
from hardware_profiles.stack_words import (
    AttentionSort,
    ContextKind,
    Dispatcher,
    Fusion,
    LayerOffload,
    ModelFeature,
    Module,
    OptimizerName,
    RankDimension,
    SaveLists,
    Schedule,
    SelectiveRecompute,
    StackRule,
    Trainable,
    ZeroStages,
    by_prefix,
)


def _joined_loss() -> dict[Literal["forward", "backward"], int]:
    """Cast to fp32 (6), maximum (4), subtracted and exponentiated (8), summed (4), divided (4);
    scaled (8), cast back (6)."""
    return {"forward": 26, "backward": 14}


def _plain_dispatcher() -> dict[str, Dispatcher]:
    return {"default": "alltoall"}


class StackSpec(Profile):
    """The software that runs the plan: it bounds the space and shapes the price.

    Which values of a degree the stack can run is data here; the rules that combine degrees (for
    example that experts with tp need sequence parallelism) are named in ``rules`` and
    implemented by name in ``planner.rules``.
    """

    name: str
    title: str
    version: str
    aliases: tuple[str, ...] = ()
    source: str
    runs_on: dict[str, str] = Field(default_factory=dict)
    """Vendors whose devices it runs on, each with where that is said; empty: any device."""
    launchable: bool = True
    """Whether it is a way out where another stack's plan does not fit: software that people start
    new runs on, not a past version and not a variant of another file."""
    schedules: Annotated[tuple[Schedule, ...], Field(min_length=1)]
    rounds: Literal["pp", "equal", "at_least_pp", "any"] = "equal"
    """How many microbatches go through a virtual stage before the next has its turn, where a
    schedule takes them in rounds: pp, of which their number is a multiple; the fewest from pp on
    that make equal rounds; any number from pp on that leaves none or at least pp for the last
    round; or any such number, and fewer microbatches than ranks in one round."""
    outside_layers: bool = False
    """Whether layers may stay outside a pipeline whose forwards all come first: all ranks run them,
    the stages as data parallelism (``cost_models.outside``)."""
    recompute: tuple[str, ...]
    """Modes that are searched: ``none``, ``selective``, ``full``, ``partitioned`` (full, of inputs
    that tp splits, which needs ``full`` too), ``tiled`` (full, MLPs in pieces), ``tiled_mlp`` (MLPs
    in pieces alone), ``offload`` (all numbers of ``layer_offload``), modules joined by ``+``, names
    of ``save_lists``, and ``custom`` for all lists of its outputs. The first is what the stack does
    where nobody says."""
    recompute_modules: tuple[Module, ...] = ()
    """Modules that may be run again, in any combination."""
    recompute_refused: dict[Precision, tuple[Module, ...]] = Field(default_factory=dict)
    """Modules of these that cannot run again in some precisions, as this version and its recipe of
    scaling have them."""
    selective_recompute: SelectiveRecompute = SelectiveRecompute(modules=("core_attn",))
    """What the stack means by ``selective``."""
    save_lists: SaveLists | None = None
    """Lists of outputs that are kept while the rest of a layer runs again."""
    recompute_needed_only: bool = False
    """Whether what no gradient needs is left out of what runs again: a compiler drops it, or
    PyTorch's checkpoint, from 2.1 and without reentrant autograd, stops before it."""
    recompute_groups: Annotated[int, Field(ge=1)] = 1
    """Most layers that the search runs again together from one kept input (``full:N``); a job may
    name more. 1: the stack runs each layer again by itself, or the next field."""
    recompute_groups_named: bool = False
    """Whether ``full:N`` runs where a job or a layout names it, although none is searched."""
    layer_offload: LayerOffload | None = None
    """How ``offload:N`` runs where a job or a layout names it; None: it does not."""
    recompute_layer_count: bool
    """Whether full recompute may be limited to a number of layers per virtual stage."""
    recompute_mixed: bool = False
    """Whether a stage's first layers may run more again than the rest: other modules, or all."""
    recompute_per_stage: bool
    """Whether mode and number may differ from stage to stage (1F1B and GPipe; interleaved virtual
    stages always share them)."""
    zero_stages: ZeroStages
    zero_stages_of: dict[Precision, ZeroStages] = Field(default_factory=dict)
    """The same in some precisions, where they differ."""
    hybrid_sharding: bool
    """Whether ``dp_replicate`` and ``dp_shard`` may both exceed 1."""
    cp_kinds: tuple[ContextKind, ...]
    cp_kinds_of: dict[AttentionSort, tuple[ContextKind, ...]] = Field(default_factory=dict)
    """Those of ``cp_kinds`` that run some sort of attention or of model, where it is not all."""
    tensor_transpose: bool = False
    """Whether a factor of tp may split feed-forwards' matrices along the other dimension, as a job
    names it (``JobSpec.tensor_transpose``)."""
    cp_kinds_by_layer: bool = False
    """Whether each layer may have a kind of its own, as a job lists them (``JobSpec.cp_kinds``)."""
    balanced_context: bool | Literal["where_it_splits"] = True
    """Whether context parallelism deals each rank an early and a late piece of the sequence, so
    that all have as much of a causal mask; else one piece in order, and all wait for the last.
    ``where_it_splits``: the first where the sequence has so many pieces, or else the second."""
    sequence_parallel: Literal["optional", "always", "never"]
    expert_tensor_parallel: bool | Literal["any"]
    """Whether ranks that tp joins may share an expert, as many as divide tp; ``any``: experts have
    a mesh of their own, and any ranks of a pipeline stage may."""
    layers: LayersSpec = LayersSpec()
    """What decides the collectives of a layer."""
    kv_head_replication: bool | Literal["gathered"] = False
    """Whether tp may exceed the KV heads, each then held by several ranks; ``gathered``: ranks hold
    parts of them, and gather all columns of queries, keys and values to take their heads out."""
    uneven_stages: bool
    """Whether stages may hold different numbers of layers."""
    free_virtual_stages: bool = False
    """Whether each virtual stage may hold any number of layers: then a job may ask for it."""
    longest_pattern: int | None = Field(default=None, ge=1)
    """Layers of different kinds are piped as whole patterns that they repeat, of so many at most;
    None: a virtual stage may begin anywhere in one."""
    spare_layers: Literal["middle", "last", "filled"] = "middle"
    """Where the layers go that an even split leaves over, when nobody says: to the middle (the
    first stage has the embedding, the last the head), to the last stages, or every stage filled
    until none are left, so that the last one is short."""
    tensor_parallel_max: int | None = None
    rules: tuple[StackRule, ...] = ()
    layer_kinds: tuple[Trainable, ...] = ("attention", "latent_attention", "mlp", "moe")
    """Kinds of sub-block that it can train, and ``vision`` for a vision tower."""
    lacks: dict[ModelFeature, str] = Field(default_factory=dict)
    """Features of models that this version cannot run although it has the kinds of sub-block: each
    with where that is seen. A stack that extends another states all of its own, or none."""
    rank_order: tuple[RankDimension, ...]
    """Innermost dimension first, for the attention mesh."""
    attention_kernels: dict[str, str]
    """Best attention kernel generation per device name prefix; ``default`` is the fallback.
    ``unfused`` means batched matrix products and a masked softmax."""
    attention_kernels_of: dict[ModelFeature, Literal["unfused"]] = Field(default_factory=dict)
    """What runs on every device for models with a feature that its own kernel does not take."""
    fused: tuple[Fusion, ...] = ()
    """Fusions on by default."""
    launch_overhead: Sourced
    """Host seconds per op that the cost model counts: dispatch, autograd, hooks, and the views and
    casts around it. It binds where the kernels of a layer are shorter (see ``cost_models.step``);
    next to nothing for replayed graphs and compiled programs."""
    blocking_launches: bool = False
    """Whether the host waits for each kernel (``CUDA_LAUNCH_BLOCKING=1``): its time then comes
    before the device's instead of beside it."""
    heads_need_alignment: bool = False
    """Whether unfused attention leaves the tensor cores where heads do not start on 16 bytes: no
    kernel of the matrix library takes such slices of a larger tensor."""
    expert_launch: Sourced
    """Host seconds per expert of a rank in each product of a grouped matrix multiplication: library
    calls, one per expert, and their hooks; 0 where one kernel serves all experts."""
    expert_sync: Sourced
    """Seconds for which the device idles when the host waits for the experts' row counts, once per
    forward of such a layer."""
    overlap_dp_gradients: bool
    overlap_dp_parameters: bool
    blocking_transfers: tuple[Schedule, ...]
    """Schedules in which a pipeline rank waits for the transfer of each output and gradient before
    it goes on; in the others a transfer runs beside the rank's next pass."""
    deferred_head_gradients: Annotated[int, Field(ge=0)] = 0
    """Microbatches of a step, the first ones, of which the last pipeline stage multiplies the
    output layer's weight gradient behind all its passes, while other stages drain; until then it
    keeps both operands."""
    scattered_transfers: bool = False
    """Whether a boundary that every tensor-parallel rank holds is sent in tp parts, one by each,
    and gathered behind the transfer."""
    tensor_parallel_overlap: Literal["none", "asynchronous", "pipelined"] = "asynchronous"
    """``asynchronous``: the backward of a column-parallel layer communicates beside its products.
    ``pipelined``: moreover, gathers and scatters of sequence parallelism run in tp chunks with the
    chunks of the product they belong to (user buffers, asynchronous tensor parallelism)."""
    overlap_buffers: Annotated[int, Field(ge=0)] = 0
    """User buffers of tensor-parallel overlap, each one gathered activation of a microbatch."""
    graph_pool: Sourced | None = None
    """Private pool of captured CUDA graphs beyond the buffers that they replay on."""
    moe_dispatcher: dict[str, Dispatcher] = Field(default_factory=_plain_dispatcher)
    """Per device name prefix, as ``attention_kernels``."""
    moe_dispatch_bytes: Annotated[int, Field(ge=1, le=2)] = 2
    """Bytes per element of tokens on their way to the experts; outputs and gradients travel in 16
    bits."""
    expert_overlap: Literal["none", "shared_expert", "across_nodes"] = "none"
    """What expert exchanges hide behind: the products of the shared expert; or, in a pipeline and
    where the group spans nodes, the other pass of another microbatch."""
    overlap_contention: Sourced
    """Factor on compute while a collective runs beside it, minus one."""
    gradient_dtype: Literal["fp32", "bf16"]
    """Accumulation and reduction dtype of gradients."""
    master_weights: bool
    """Whether a separate fp32 copy of the weights is kept beside 16-bit ones."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    """Optimizers that it runs."""
    precisions: tuple[Precision, ...] = (
        "fp32", "bf16", "fp16", "fp8", "nvfp4",
    )  # fmt: skip
    """Arithmetic that it trains in; the device may have less."""
    quantisation_reads: ByPrecision = Field(default_factory=dict)
    """How often an 8-bit recipe reads an operand that it quantises: 2 where the scale comes from
    the operand itself; what is not named reads it once, with a scale of earlier steps or blocks."""
    quantisation: QuantisationSpec | None = None
    """How its linear layers quantise; None: each operand whole, in a kernel of its own."""
    cast_products: dict[Literal["fp32"], Literal["bf16"]] = Field(default_factory=dict)
    """Arithmetic of products whose operands and results keep the job's precision in memory: a
    compiler casts them on their way."""
    fine_tuning: tuple[Literal["lora", "qlora", "freeze"], ...] = ()
    """Ways in which it trains a part of a model only."""
    separate_adapters: tuple[Literal["qkv", "gate_up"], ...] = ()
    """Projections of one input that are linear layers, and so have adapters, of their own."""
    dropout: bool = False
    """Whether dropout is on where the model has it and the job does not say."""
    trains_dropout: bool = True
    """Whether its layers have dropout at all."""
    vocab_divisor: int = 1
    """The vocabulary is padded to a multiple of this times tp (1: no padding)."""
    logit_saved_bytes: Sourced
    """Bytes per logit that the loss keeps from forward to backward."""
    norms_again: bool = False
    """Whether residual additions and norms run again in the backward of a layer that keeps its
    activations."""
    loss_traffic: dict[Literal["forward", "backward"], Annotated[int, Field(ge=0)]] = Field(
        default_factory=_joined_loss, min_length=2
    )
    """Bytes moved per logit by the kernels of a loss that is not fused."""
    logit_working_bytes: Sourced
    """Short-lived bytes per logit at the peak of the loss."""
    logit_working_bytes_split: Sourced | None = None
    """The same where the vocabulary is split over tp, if it differs."""
    loss_gradient_bytes: Annotated[int, Field(ge=0)] = 0
    """Per weight of the head, of a loss that makes their whole gradient in its forward: what it
    sums in, and a piece's product on its way there."""
    pipeline_buffers: bool = False
    """Whether a pipeline stage has a receive buffer for every microbatch of a step, and the last
    one holds the logits beside their loss: PyTorch's stages."""
    keeps_outputs: bool = False
    """Whether the last stage keeps the logits of all microbatches until the step ends, where the
    schedule joins and returns them."""
    reshard_group: Annotated[int, Field(ge=2)] | Literal["node", "any"] | None = None
    """In stage 3, ranks over which a 16-bit copy of the weights stays split for the backward, which
    gathers it from these alone (FSDP2's ``reshard_after_forward`` as a number, hpZ of ZeRO++);
    ``node``: as many as a node has; ``any``: any number that divides them, or no such copy. None:
    the backward gathers from all that share them."""
    reshards_unasked: bool = False
    """With ``any``: whether no rank keeps a copy where a layout does not say; else a node's do."""
    replica_reduction: Literal["microbatch", "step"] = "microbatch"
    """When gradients that are reduced with every microbatch are summed over ``dp_replicate``: with
    each, or with the last one of the step only (MiCS)."""
    prefetched_units: Annotated[int, Field(ge=0)] = 1
    """Layers whose weights are gathered ahead of the one that runs, where weights are sharded."""
    stream_pools: bool = False
    """Whether gathered weights and reduced gradients are allocated on streams of their own: the
    allocator keeps free blocks per stream, so what they leave serves nothing else."""
    idle_passes_stay: bool = False
    """Whether a pipeline is one differentiated loop, which keeps as much of the passes that ranks
    run on padding, in the bubble, as of others (``cost_models.idle_passes``)."""
    idle_forward: bool = False
    """Whether what the last layers' forward worked with and did not keep lies idle under the loss,
    whose tensors are larger than those blocks: the caching allocator splits blocks, it joins none
    that were asked for apart."""
    splits_blocks: bool = False
    """Whether layer inputs that wait for a recomputation lie in blocks of score matrices, which the
    caching allocator splits for them (``cost_models.fragments``): with unfused attention."""
    idle_logits: bool = False
    """Whether the block of the 16-bit logits lies idle under a loss that works on fp32 copies: none
    of those fits into it."""
    routing_fragmentation: Sourced | None = None
    """Blocks that the caching allocator holds idle, beside ``reserve.fragmentation``, where each
    microbatch sends experts other numbers of rows; None: its segments grow, or shapes are fixed."""
    loss_reads_head: bool = False
    """Whether the loss multiplies by the head's weights itself, outside their module, under a stage
    3 that gathers modules' weights ahead of them."""
    expert_buffer_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes per expert that a layer of experts keeps beside its weights (counts, routing bias)."""
    loss_chunks: Annotated[int, Field(ge=1)] = 1
    """Pieces of the sequence of a chunked loss; 1: the stack has none."""
    loss_again: Annotated[int, Field(ge=0)] = 0
    """Where a chunked loss makes its logits again in the backward, instead of their gradient in the
    forward: bytes per weight of the head of the gradient that it sums there and of a piece's."""
    saved_input_bytes_per_64: ByPrecision = Field(default_factory=dict)
    """Bytes of 64 elements of a linear layer's input between forward and backward, scales included,
    by precision of the job; what is not named keeps its 16 bits."""
    new_gradients: bool = False
    """Whether each step makes its gradients anew (set to None between steps) instead of
    accumulating in buffers that stay."""
    optimizer_step_copies: Annotated[int, Field(ge=0)] = 0
    """fp32 copies of the local parameters that the optimizer step makes for a moment."""
    delayed_scaling: bool = False
    """Whether fp8 scales by the largest values of earlier steps, which are reduced over tensor and
    data parallel ranks: a communicator of their own."""
    original_inputs: tuple[Literal["attn_proj", "shared_experts"], ...] = ()
    """Low-precision products that keep the 16-bit input which attention or router keep anyway,
    instead of a low-precision copy of their own."""
    norm_copy_bytes: Annotated[int, Field(ge=2, le=4)] = 4
    """Per element of the normalised copy that a norm run op by op keeps: 2 where it is cast back
    before it is scaled."""
    rotary_cache_bytes: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: {"default": 0}
    )
    """Per attention layer, position and head dimension: rotary factors that each layer holds, by
    family of models."""
    optimizer_scalar_bytes: Annotated[int, Field(ge=0)] = 0
    """What the optimizer keeps per parameter tensor beside its moments: the count of steps."""
    accumulation_bytes: ByPrecision = Field(default_factory=dict)
    """Bytes moved per parameter in each backward to add the 16-bit gradient that a product wrote to
    the one that is kept; none where the product adds it itself (``wgrad_accumulation``)."""
    gradient_pass_bytes: ByPrecision = Field(default_factory=dict)
    """Bytes moved per parameter in each step by passes over the kept gradient beside those that its
    norm and the update take: copied to fp32, unscaled, clipped, zeroed."""
    gradient_buffer_bytes: dict[
        Literal["zeroed", "checked", "averaged"], Annotated[int, Field(ge=0)]
    ] = Field(default_factory=dict)
    """Bytes moved per parameter of a device in each step by passes over the whole gradient buffer,
    however the update is split: ``averaged``, where several ranks sum it."""
    unsharded_copy_bytes: dict[
        Literal["gather", "reduce", "gather_alone", "reduce_alone", "wait", "whole"],
        Annotated[int, Field(ge=0)],
    ] = Field(default_factory=dict)
    """Bytes copied per parameter at each gathering and reduction of a microbatch, between the
    collectives' buffers and the tensors that the layer uses; ``*_alone``: the same where a group
    has one rank, if it differs; ``wait``: in each backward, in place of ``reduce``, where gradients
    wait whole for the last one (``state.reduces_last_backward``); ``whole``: in each backward of
    layouts that do not reduce in it."""
    gradient_bucket_bytes: Sourced
    """Size of the buckets in which gradients are reduced; the last one is never hidden."""
    state: StateSpec
    """How weights, gradients and optimizer state are laid out."""
    reserve: ReserveSpec
    """What context, communicators, workspaces and the allocator add."""
    offload: OffloadSpec | None = None
    """What the host can hold; None: nothing."""
    muon: MuonSpec = MuonSpec()
    """How it runs Muon, where that is one of ``optimizers``."""
    given_orders: bool = False
    """Whether it runs an order of work that the user gives as a file of actions; one with a split
    backward where ``schedules`` has another of the kind."""
    not_priced: dict[str, str] = Field(default_factory=dict)
    """What this version runs and no layout of the space has: each with why, and where it is
    documented."""
    not_described: dict[str, str] = Field(default_factory=dict)
    """What else this version has that is no choice of layout: other mathematics, other models,
    other kernels or transports of the same layout. Each is a job or a stack of its own, which the
    catalogue does not have; with why, and where it is documented."""
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require_consistent(self)
        return self

    def attention_kernel(self, device: str, features: Iterable[ModelFeature] = ()) -> str:
        """The kernel for a device: that of the longest matching name prefix, else ``default``; of a
        model whose ``features`` have one, that."""
        refused = any(feature in self.attention_kernels_of for feature in features)
        return "unfused" if refused else by_prefix(self.attention_kernels, device)

    def dispatcher(self, device: str) -> Dispatcher:
        """How the experts' tokens travel on a device."""
        return by_prefix(self.moe_dispatcher, device)
