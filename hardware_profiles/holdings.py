"""What a stack holds on a device besides activations: state layout, libraries, allocator."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hardware_profiles.sourced import Profile, Sourced
from hardware_profiles.stack_words import OptimizerName

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "nvfp4"]
ByPrecision = dict[Precision, Annotated[int, Field(ge=0)]]
"""Bytes per parameter by the precision of the job; what is not named is 0."""


class StateSpec(Profile):
    """How weights, gradients and optimizer state are laid out over data parallelism.

    ``layout`` says what is split and how it is padded (``cost_models.state``): ``contiguous`` is
    Megatron-Core's param-and-grad buffer, ``flat`` one flattened tensor per group or unit,
    ``per_parameter`` each flattened parameter by itself, ``dim0`` the first dimension of each
    parameter. Gradient and master precision are ``StackSpec.gradient_dtype`` and
    ``StackSpec.master_weights``; here is what a precision changes.
    """

    layout: Literal["contiguous", "flat", "per_parameter", "dim0"]
    source: str
    master_bytes: Annotated[int, Field(ge=0, le=4)] = 4
    """Bytes per parameter of the copy of 16-bit weights that the optimizer keeps: fp32, the lower
    16 bits of it, or none where it rounds the weights themselves stochastically."""
    weights_follow_gradients: bool = False
    """Whether stage 2 splits the weights too, gathers them in the forward and keeps them for the
    backward (FSDP without resharding in between), whatever they are held in."""
    casts_whole_weights: bool = False
    """Whether stage 0 has a 16-bit copy of the unit that runs beside its whole fp32 weights, and
    reduces its gradients with every microbatch (FSDP1's NO_SHARD)."""
    reduces_each_backward: bool = False
    """Whether gradients of stage 2 are reduced with every microbatch of a pipeline too."""
    reduces_last_backward: bool = False
    """Whether, without a pipeline, gradients of stages 2 and 3 wait whole for the last of several
    microbatches, which alone reduces them (FSDP2's ``set_requires_gradient_sync``)."""
    keeps_after_backward: bool = False
    """Whether stage 3 under a pipeline gives a unit's weights back behind its forwards only: what a
    backward has gathered stays for the next pass of the stage, and gradients wait whole for the end
    of the step, as in stage 2 (PyTorch 2.13, distributed/pipelining/stage.py,
    ``backward_maybe_with_nosync``: ``set_reshard_after_backward(False)``)."""
    unit_gradients: bool = False
    """Whether a sharded unit's gradients are whole until they are reduced, two units' at a time
    (``dim0`` always is)."""
    held_gradient_bytes: ByPrecision = Field(default_factory=dict)
    """Bytes per gradient held through the step, where it is not the dtype that is reduced."""
    whole_gradient_bytes: ByPrecision = Field(default_factory=dict)
    """The same of gradients that are whole until a pipeline's last microbatch: in the dtype of the
    reduction, unless named."""
    backward_gradient_bytes: ByPrecision = Field(default_factory=dict)
    """Gradients that the backward leaves beside the held ones, whole on each rank."""
    expert_shards: Literal["experts", "rows"] = "experts"
    """In ``dim0``: whether as many experts as ranks are split by expert, or all by their rows."""
    step_bytes: ByPrecision = Field(default_factory=dict)
    """Flat buffers of the optimizer step that cached activation blocks cannot serve, sharded as
    the optimizer state is."""
    norm_bytes: ByPrecision = Field(default_factory=dict)
    """Wider copies of the gradients, tensor by tensor, that their norm is taken of: flat buffers of
    the step fit into none of those blocks. In stage 3 the step works by tensor too and takes them
    over."""
    split_over_replicas: bool = False
    """Whether optimizer state, and fp32 weights that it updates, are split over groups that hold
    the same shards too: where weights are sharded in groups, each group then keeps a copy of its
    shards as they are gathered, which comes together over the groups once per step."""
    graph_keeps_gathered: bool = False
    """Whether autograd holds the gathered weights of a layer, in stage 3, until its backward has
    run, where its activations are kept."""
    quantised_bytes_per_64: ByPrecision = Field(default_factory=dict)
    """Low-precision copies of 64 elements of a linear layer's weight, scales included, kept
    between microbatches."""
    gathered_bytes_per_64: ByPrecision = Field(default_factory=dict)
    """Of 64 elements of a sharded linear layer's weight as it is gathered, scales included, where
    it is quantised before; what is not named travels in 16 bits."""
    reduction_elements: Annotated[int, Field(ge=0)] = 0
    """Elements of the flat copy in which held gradients are reduced."""
    reduction_copies: Annotated[int, Field(ge=1)] = 1
    """How many of those exist at once."""
    live_elements: Annotated[int, Field(ge=0)] = 0
    """Gathered parameters that ZeRO stage 3 keeps before it releases the first."""
    copies_weights: bool = False
    """Whether weights are made tensor by tensor, then copied to the buffer that sharded state goes
    with: their first blocks stay with the caching allocator."""
    dummy_wgrad: bool = False
    """Whether one 16-bit placeholder per shape of weight stands in for the gradient that went into
    the main gradient."""
    bucket_elements: Annotated[int, Field(ge=1)] | None = None
    """Least elements of a bucket of the contiguous buffer on the first stage; None: one bucket."""
    bucket_elements_per_rank: Annotated[int, Field(ge=0)] = 0
    """The least bucket also holds this many elements for each data-parallel rank."""


OffloadedInput = Literal[
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"
]
"""Modules by Megatron-Core's names (``--offload-modules``), as ``planner.blocks`` tags them."""


class DrivesSpec(Profile):
    """State on a node's NVMe drives, of which the host holds what is in work (ZeRO-Infinity)."""

    holds: tuple[Literal["optimizer", "parameters"], ...] = ("optimizer", "parameters")
    """Of what a job offloads, what goes on to the drives; the host's memory holds the rest."""
    read_bytes: Annotated[int, Field(ge=1)]
    """Bytes per parameter of a shard that the optimizer step reads: fp32 master weight, AdamW's
    moments, gradient; less if an optimizer's moments are fewer."""
    write_bytes: Annotated[int, Field(ge=1)]
    """The same of what a step writes: gradients, then weights and moments."""
    gradient_bytes: Annotated[int, Field(ge=0)] = 0
    """Of ``write_bytes``, gradients, which are written before the update."""
    overlaps: tuple[Literal["reads", "writes"], ...] = ()
    """What is swapped beside the update of another group of parameters: reads of the next, writes
    of the one before."""
    groups: Annotated[int, Field(ge=1)] = 1
    """Groups into which a rank's parameters are cut for that."""
    buffer_elements: Annotated[int, Field(ge=1)]
    """Most parameters of a group."""
    buffer_bytes: Annotated[int, Field(ge=1)]
    """Host bytes for each of those."""
    parameter_buffer_bytes: Annotated[int, Field(ge=0)] = 0
    """Host bytes per device for weights on their way, where they are on the drives too."""
    momentum_bytes: Annotated[int, Field(ge=0)] = 0
    """Per element of a matrix, of Muon's momentum there. It iterates with each reduction, which
    reads and writes whole groups."""
    part_elements: Annotated[int, Field(ge=0)] = 0
    """A rank's part of a matrix with fewer keeps its gradient in memory, which that loses."""
    part_multiple: Annotated[int, Field(ge=1)] = 1
    """Elements of such a part beyond a multiple of this stay in memory too."""


LoopName = Literal["sgd", "rmsprop", "adamax", "adadelta", "adafactor", "muon"]
"""Entries of ``cost_models.host_loops``."""


class OffloadSpec(Profile):
    """What a stack can keep on the host, and how fast it works there."""

    updates_on: Literal["host", "device"] = "host"
    """Where the optimizer runs. On the device its state comes over the link for the update and
    leaves behind it, in turn, and all of it is there at once."""
    optimizer_bytes: Annotated[int, Field(ge=1)] | None = None
    """Host bytes per parameter of a shard: fp32 master weight, AdamW's moments, gradient; less if
    an optimizer's moments are fewer. None, where the device updates: what the optimizer keeps."""
    least_zero_stage: Literal[0, 1, 2] = 0
    """ZeRO stage from which several ranks offload: below it, only a rank that shares nothing."""
    muon_zero_stage: Literal[3] | None = None
    """That of Muon, where it is a later one: it iterates with each reduction there, on one rank
    too."""
    share_zero_stage: Literal[3] | None = None
    """ZeRO stage from which a share of the optimizer state may stay on the device, which updates
    it; None: all of it leaves, or none."""
    gradients: bool = False
    """Whether reduced gradients go to the host during the backward and leave the device."""
    waiting_gradient_bytes: Annotated[int, Field(ge=0)] = 0
    """With ``gradients``: bytes of each that waits whole on the device for the last microbatch, in
    ZeRO stage 1 and under a pipeline; in place of what the backward leaves without offload."""
    norm_bytes: Annotated[int, Field(ge=0)] = 0
    """Device bytes per element of a copy of one reduced gradient at a time, of which its norm is
    taken before it leaves."""
    parameter_bytes: Annotated[int, Field(ge=1)] | None = None
    """Host bytes per parameter of a shard of the weights; None: they stay on the device."""
    with_weights: bool = False
    """Whether optimizer state leaves with the weights only, which are its fp32 copy (FSDP)."""
    fetch_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes per parameter of a shard that come for each gather; None: as many as are gathered."""
    reduced_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes per parameter of a shard that leave with each reduction of gradients, beside
    ``link_bytes`` of the step."""
    takes_experts: bool | Literal["without_ep"] = True
    """Whether it is there for mixtures of experts too, or only where ep is 1."""
    optimizers: tuple[OptimizerName, ...] = ()
    """Optimizers that update on the host in one pass; empty: all of the stack's."""
    loops: tuple[LoopName, ...] = ()
    """Those that run there as PyTorch's loops instead (``cost_models.host_loops``)."""
    loop_elements: Annotated[int, Field(ge=1)] = 1
    """Most parameters of a rank that these update at once in ZeRO stage 3."""
    lacks: dict[OptimizerName, str] = Field(default_factory=dict)
    """Why others of the stack's do not run there."""
    checkpoints: bool = False
    """Whether the host can hold the layer inputs that full recomputation keeps."""
    checkpoints_wait: bool = False
    """Whether every pass waits for their way, there and back: copies in the stream of the layers
    (``Tensor.cpu()`` and ``Tensor.to``), none ahead."""
    inputs: tuple[OffloadedInput, ...] = ()
    """Modules whose inputs wait on the host for their backward, in every layer: fixed at launch."""
    drives: DrivesSpec | None = None
    """Set where what leaves the device goes on to NVMe drives; None: the host's memory holds it."""
    link_bytes: Annotated[int, Field(ge=0)] = 4
    """Bytes per parameter that cross the link in a step: the gradient there, the weight back."""
    adam_efficiency: Sourced | None = None
    """Share of the host memory's bandwidth that an optimizer there reaches."""
    source: str

    def streamed_bytes(self, state: int, weight: int) -> int:
        """Bytes per parameter that come for the update, of ``state`` and ``weight`` kept there."""
        return state + weight if self.updates_on == "device" else 0

    @model_validator(mode="after")
    def _host_that_updates(self) -> Self:
        if self.updates_on == "host" and None in (self.optimizer_bytes, self.adam_efficiency):
            raise ValueError("offload: the host updates, so give optimizer_bytes, adam_efficiency")
        if self.updates_on == "device" and (self.drives is not None or self.gradients):
            raise ValueError("offload: drives and gradients belong to updates_on: host")
        if self.loops and self.updates_on == "device":
            raise ValueError("offload.loops: optimizers that the host updates")
        return self

    @model_validator(mode="after")
    def _core_reads_its_output(self) -> Self:
        if "attn_proj" in self.inputs and "core_attn" not in self.inputs:
            raise ValueError(
                "offload.inputs: attn_proj without core_attn, whose backward reads the same tensor"
            )
        return self


class MuonSpec(Profile):
    """How a stack runs Muon (``cost_models.orthogonalise``)."""

    iterations: Literal["standard", "gram"] = "standard"
    """Of the whole matrix, or of its product with itself."""
    momentum_bytes: ByPrecision = Field(default_factory=dict)
    """Per element of a matrix, where its momentum is not fp32."""
    exchange: Literal["all_gather", "all_to_all"] = "all_gather"
    """How matrices that a stack splits itself come together: on all ranks, or each on its own, with
    the update sent back in the same way."""
    exchange_bytes: Literal[2, 4] = 2
    """Per element on the way."""
    precisions: tuple[Precision, ...] = ()
    """Precisions in which it orthogonalises at all; empty: all of the stack's."""
    experts: bool = True
    """Whether it orthogonalises experts; else they are AdamW's."""
    tensor_parallel: bool = True
    """Whether it runs matrices that tp splits."""
    pipeline: bool = True
    """Whether it runs where a rank has some of the layers only."""
    each_reduction: bool = False
    """Whether stage 3 sums gradients whole and iterates with each reduction of them."""
    least_zero_stage: Literal[0, 1] = 0
    """ZeRO stage below which it runs no iterations at all."""
    source: str = ""


class ReserveSpec(Profile):
    """Named terms beside tensors; each is bytes per device unless it says otherwise."""

    context: Sourced
    """Driver context and loaded kernels."""
    communicator_pair: Sourced
    """Buffers of a communicator of two ranks."""
    communicator: Sourced
    """Buffers of a communicator of more ranks."""
    multicast_rank: Sourced | None = None
    """What a communicator of three ranks or more in a node holds beside that for each of them,
    where the node's link can multicast; None: nothing."""
    loss_group: bool = False
    """Whether the loss is averaged over data-parallel ranks by a communicator of its own."""
    exchange_peer: Sourced
    """Send and receive buffers for each peer in the node of an all-to-all."""
    pipeline_peer: Sourced
    """Send and receive buffers for each neighbour in a pipeline."""
    workspace: Sourced
    """Workspaces of the matrix-product libraries, taken from the allocator."""
    fragmentation: Sourced
    """What the caching allocator holds beyond what is allocated at the peak."""
