"""The shapes of the YAML that describes devices, nodes, networks, clusters and stacks.

Every physical number is a :class:`Sourced`: value, unit, where it is from, and how it is known.
SI units throughout (bytes, seconds, FLOP/s, bytes/s per direction); the loader converts what a
file writes with another unit. The models are frozen: a profile is a fact, not a variable.

Homogeneous clusters are the one-group case of :class:`ClusterSpec`, not another type.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from hardware_profiles.holdings import ReserveSpec, StateSpec
from hardware_profiles.sourced import Kind as Kind
from hardware_profiles.sourced import Profile as Profile
from hardware_profiles.sourced import Sourced as Sourced

Value = TypeVar("Value")

Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
"""How tokens reach the ranks of their experts; see ``cost_models.expert_exchange``."""
EXCHANGE_LIBRARIES = ("deepep", "hybridep")
"""Dispatchers that send one copy per node, with a share of link bandwidth of their own."""


class MatmulConstants(Profile):
    """Smooth-roofline constants of one dtype's matrix products; see ``cost_models.compute``.

    ``e_compute`` and ``e_memory`` are fractions of the device's peak FLOP/s and bytes/s, ``t0_s``
    the fixed time per kernel, ``k0`` the reduction length at which half the rate is reached, ``p``
    the exponent of the smooth maximum of compute and memory time, ``wave_share`` the part of the
    last wave's idle time that is paid (1: full wave quantisation, 0: none).
    ``error_median`` and ``error_p90`` are relative errors on left-out shapes with all of m, n and
    k at least 1024.
    """

    e_compute: Annotated[float, Field(gt=0, le=1.2)]
    e_memory: Annotated[float, Field(gt=0, le=1.2)]
    t0_s: Annotated[float, Field(ge=0)]
    k0: Annotated[float, Field(ge=0)]
    p: Annotated[float, Field(ge=1)]
    wave_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    sustained: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rate that lasts under a training load over the rate of short benchmarks (``e_compute``)."""
    misaligned: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rate where rows of an operand or of the output do not start on 16 bytes, over the rate where
    they do: tensor units are then fed by narrower loads."""
    kind: Kind
    source: str
    error_median: float | None = None
    error_p90: float | None = None
    borrowed_from: str | None = None
    note: str | None = None


class AttentionConstants(Profile):
    """Achieved fractions of peak of one attention kernel generation; see ``cost_models.compute``.

    ``e_forward`` and ``e_backward`` are fractions of the dtype's peak on the FLOPs the kernel
    executes (half of full attention when it skips masked blocks), reached for long sequences and
    large heads; ``half_length`` (``half_length_backward``: its own value in the backward pass) is
    the mean number of keys per query, ``half_head_dim`` the head dimension, at which half
    of it is reached in the forward pass. ``wave_share`` is as for matrix products.
    ``error_median`` and ``error_p90`` are relative errors on left-out forward shapes.
    """

    e_forward: Annotated[float, Field(gt=0, le=1.2)]
    e_backward: Annotated[float, Field(gt=0, le=1.2)]
    half_length: Annotated[float, Field(ge=0)]
    half_length_backward: Annotated[float, Field(ge=0)] | None = None
    half_head_dim: Annotated[float, Field(ge=0)] = 0.0
    wave_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    t0_s: Annotated[float, Field(ge=0)]
    kind: Kind
    source: str
    error_median: float | None = None
    error_p90: float | None = None
    borrowed_from: str | None = None
    note: str | None = None


class KernelProfile(Profile):
    """Measured or borrowed kernel efficiencies of a device.

    ``matmul`` is keyed by dtype (``bf16``, ``fp16``, ``fp32``, ``fp8``, ``nvfp4``); ``attention``
    by kernel generation (``flash1`` is its Triton kernel, ``flash2``, ``flash3``, ``flash4``) then
    dtype. ``fp8`` and ``nvfp4`` products take operands that are quantised already.
    """

    matmul: dict[str, MatmulConstants]
    attention: dict[str, dict[str, AttentionConstants]]
    memory_bound_efficiency: Sourced
    memory_bound_latency: Sourced


class DeviceSpec(Profile):
    """One accelerator as the software sees it."""

    name: str
    title: str
    vendor: str
    aliases: tuple[str, ...] = ()
    peak_flops: dict[str, Sourced]
    """Dense peak by dtype (``fp32``, ``tf32``, ``bf16``, ``fp16``, ``fp8``, ``nvfp4``)."""
    memory_capacity: Sourced
    """Bytes that the driver reports, before the context is created."""
    memory_bandwidth: Sourced
    compute_units: Sourced
    l2_capacity: Sourced | None = None
    power: Sourced | None = None
    price_per_hour: Sourced | None = None
    """List price in USD per device hour."""
    best_matmul_flops: dict[str, Sourced] = Field(default_factory=dict)
    """Highest matrix-product rate published for this device, by dtype."""
    best_run_mfu: dict[str, Sourced] = Field(default_factory=dict)
    """Highest model FLOPs utilisation of a published training run, by precision: causal attention,
    no recomputation counted, over the dense peak."""
    kernels: KernelProfile


class CollectiveConstants(Profile):
    """Two-protocol law of one collective in one node with ``devices`` members.

    ``t = min(latency_s + w / ll_bandwidth, simple_latency_s + w / bandwidth)`` with ``w`` the wire
    bytes: payload times the collective's bus factor (as nccl-tests defines it).
    """

    collective: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    devices: Annotated[int, Field(ge=2)]
    latency_s: Annotated[float, Field(ge=0)]
    ll_bandwidth: Annotated[float, Field(gt=0)]
    """Bytes/s of the protocol for small messages."""
    simple_latency_s: Annotated[float, Field(ge=0)]
    bandwidth: Annotated[float, Field(gt=0)]
    """Bytes/s of the protocol for large messages."""
    kind: Kind
    source: str
    borrowed_from: str | None = None


class LinkSpec(Profile):
    """One kind of link: what it carries in one direction, per device or per port."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    bandwidth: Sourced
    """Bytes/s, one direction, per device (scale-up) or per port (scale-out)."""
    latency: Sourced
    """Seconds per step across this link with the protocol for small messages."""
    simple_latency: Sourced | None = None
    """Seconds per step with the protocol for large messages; default: ``latency``."""
    efficiency: Sourced
    """Share of ``bandwidth`` that large transfers reach."""
    efficiencies: dict[
        Literal["all_to_all", "send_recv", "deepep", "hybridep", "in_network"], Sourced
    ] = Field(default_factory=dict)
    """The same for a pattern or a library that reaches another share; ``in_network``: switches of
    this fabric reduce (SHARP), and an all-reduce of the whole node reaches this share."""
    collectives: tuple[CollectiveConstants, ...] = ()
    scale: tuple[tuple[int, float], ...] = ()
    """Pairs (nodes, factor on bandwidth) where a fabric was measured at size; log-interpolated."""
    scale_source: str | None = None
    all_to_all_scale: tuple[tuple[int, float], ...] = ()
    """The same for all-to-all, where it falls further; default: ``scale``."""

    @model_validator(mode="after")
    def _physical(self) -> Self:
        if not self.bandwidth.si > 0:
            raise ValueError(f"bandwidth must be > 0, got {self.bandwidth.value:g}")
        for share in (self.efficiency, *self.efficiencies.values()):
            if not 0 < share.si <= 1:
                raise ValueError(f"an efficiency must be in (0, 1], got {share.value:g}")
        for name, pairs in (("scale", self.scale), ("all_to_all_scale", self.all_to_all_scale)):
            if any(nodes < 1 or not 0 < share <= 1 for nodes, share in pairs):
                raise ValueError(f"{name} needs pairs of nodes >= 1 and a factor in (0, 1]")
            if [nodes for nodes, _ in pairs] != sorted({nodes for nodes, _ in pairs}):
                raise ValueError(f"{name} needs its node counts in rising order")
        return self


class TorusSpec(Profile):
    """Devices joined to their nearest neighbours along axes, two links to an axis.

    A slice of the torus has the shape that its number of devices is allotted
    (``cost_models.torus.slice_shape``). ``scale_up.bandwidth`` is that of all links of a device.
    """

    axes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """Extents of the largest slice."""
    closes_at: Annotated[int, Field(ge=2)]
    """An axis closes to a ring where its extent is a multiple of this ..."""
    closes: Literal["each", "all"] = "each"
    """... each by itself, or only where all axes do."""
    joins_nodes: bool = False
    """Whether the nodes of a cluster make up one slice, or as few as they can; otherwise each node
    is a slice. Slices meet over ``scale_out``."""
    link_bandwidth: tuple[Sourced, ...] = ()
    """Bytes/s of one link in one direction, by axis, where axes differ."""

    @model_validator(mode="after")
    def _axes_agree(self) -> Self:
        if self.link_bandwidth and len(self.link_bandwidth) != len(self.axes):
            raise ValueError(
                f"{len(self.link_bandwidth)} link bandwidths for {len(self.axes)} axes"
            )
        return self


class NodeSpec(Profile):
    """A server: how many devices, how they are joined, and what leaves the box."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    device: DeviceSpec
    devices_per_node: Annotated[int, Field(ge=1)]
    scale_up: LinkSpec
    scale_out: LinkSpec
    nics: Annotated[int, Field(ge=1)]
    """Scale-out ports per node, each with ``scale_out.bandwidth``."""
    torus: TorusSpec | None = None
    """Set where ``scale_up`` joins neighbours only, instead of any two devices."""
    host_link: Sourced
    """Bytes/s between one device and the host, one direction."""
    host_memory: Sourced | None = None
    """Bytes of host memory of the node."""
    host_memory_bandwidth: Sourced | None = None
    """Bytes/s of the node's host memory, reads and writes together."""
    price_per_hour: Sourced | None = None
    """List price in USD per node hour; where there is none, the device's times the devices."""
    source: str | None = None
    """Where the counts of devices and ports are from."""


class NetworkTier(Profile):
    """A level of the network above the node: ``nodes`` nodes meet here."""

    name: Literal["rail", "leaf", "spine", "core", "site"]
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Nodes below one switch group of this tier; ``None`` = the rest of the cluster."""
    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    """Down-link over up-link bandwidth above this tier's nodes."""
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Added to each message that crosses this tier."""


class NodeGroup(Profile):
    """``count`` equal nodes."""

    node: NodeSpec
    count: Annotated[int, Field(ge=1)]


class ClusterSpec(Profile):
    """One or more groups of nodes below a tree of network tiers (innermost first)."""

    name: str
    groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1)]
    tiers: tuple[NetworkTier, ...] = ()
    link_matrix: tuple[tuple[float, ...], ...] | None = None
    """Measured bytes/s between nodes; overrides the tree where given."""

    @model_validator(mode="after")
    def _shape(self) -> Self:
        bounds = [tier.nodes for tier in self.tiers if tier.nodes is not None]
        if bounds != sorted(bounds) or any(tier.nodes is None for tier in self.tiers[:-1]):
            raise ValueError(
                "tiers go from the innermost out: each needs at least the 'nodes' of the one "
                "before, and only the last may leave 'nodes' out"
            )
        matrix = self.link_matrix
        if matrix is not None:
            if len(matrix) != self.nodes or any(len(row) != self.nodes for row in matrix):
                raise ValueError(f"link_matrix must be {self.nodes} x {self.nodes}, a row per node")
            off = (v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j)
            if not all(0 < value < math.inf for value in off):
                raise ValueError("link_matrix needs bytes/s > 0 between any two nodes")
        return self

    @property
    def nodes(self) -> int:
        """Nodes in all groups."""
        return sum(group.count for group in self.groups)

    @property
    def devices(self) -> int:
        """Devices in all groups."""
        return sum(group.count * group.node.devices_per_node for group in self.groups)

    @property
    def is_homogeneous(self) -> bool:
        """Whether every node is the same."""
        return len(self.groups) == 1


def _plain_dispatcher() -> dict[str, Dispatcher]:
    return {"default": "alltoall"}


class SelectiveRecompute(Profile):
    """Selective recomputation: of some modules, or of all but the outputs of some ops."""

    modules: tuple[str, ...] = ()
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


class StackSpec(Profile):
    """The software that runs the plan: it bounds the space and shapes the price.

    Which values of a degree the stack can run is data here; the rules that combine degrees (for
    example that interleaving needs a multiple of pp microbatches) are named in ``rules`` and
    implemented by name in ``planner.rules``.
    """

    name: str
    title: str
    version: str
    aliases: tuple[str, ...] = ()
    source: str
    launchable: bool = True
    """Whether people start new runs on it; past stacks ship to price published measurements."""
    schedules: tuple[Literal["gpipe", "1f1b", "interleaved"], ...]
    recompute: tuple[str, ...]
    """Modes that are searched: ``none``, ``selective``, ``full``, modules joined by ``+``."""
    recompute_modules: tuple[str, ...] = ()
    """Modules that may be run again, in any combination."""
    selective_recompute: SelectiveRecompute = SelectiveRecompute(modules=("core_attn",))
    """What the stack means by ``selective``."""
    recompute_layer_count: bool
    """Whether full recompute may be limited to a number of layers per virtual stage."""
    recompute_per_stage: bool
    """Whether mode and number may differ from stage to stage (1F1B and GPipe; interleaved virtual
    stages always share them)."""
    zero_stages: tuple[Literal[0, 1, 2, 3], ...]
    hybrid_sharding: bool
    """Whether ``dp_replicate`` and ``dp_shard`` may both exceed 1."""
    cp_kinds: tuple[Literal["p2p", "all_gather", "a2a", "a2a_p2p"], ...]
    sequence_parallel: Literal["optional", "always", "never"]
    expert_tensor_parallel: bool
    kv_head_replication: bool = False
    """Whether tp may exceed the KV heads, each then held by several ranks."""
    uneven_stages: bool
    """Whether stages may hold different numbers of layers."""
    tensor_parallel_max: int | None = None
    rules: tuple[str, ...] = ()
    layer_kinds: tuple[str, ...] = ("attention", "latent_attention", "mlp", "moe")
    """Kinds of sub-block that it can train, and ``vision`` for a vision tower."""
    rank_order: tuple[str, ...]
    """Innermost dimension first, for the attention mesh."""
    attention_kernels: dict[str, str]
    """Best attention kernel generation per device name prefix; ``default`` is the fallback.
    ``unfused`` means batched matrix products and a masked softmax."""
    fused: tuple[str, ...] = ()
    """Fusions on by default: ``bias_gelu``, ``swiglu``, ``bias_dropout_add``, ``rope``,
    ``cross_entropy``, ``wgrad_accumulation``, ``masked_softmax``, ``grouped_gemm``, ``norm``."""
    launch_overhead: Sourced
    """Host seconds per op that the cost model counts: dispatch, autograd, hooks, and the views and
    casts around it. It binds where the kernels of a layer are shorter (see ``cost_models.step``);
    next to nothing for replayed graphs and compiled programs."""
    expert_launch: Sourced
    """Host seconds per expert of a rank in each product of a grouped matrix multiplication: library
    calls, one per expert, and their hooks; 0 where one kernel serves all experts."""
    expert_sync: Sourced
    """Seconds for which the device idles when the host waits for the experts' row counts, once per
    forward of such a layer."""
    overlap_dp_gradients: bool
    overlap_dp_parameters: bool
    gathers_each_tensor: bool = False
    """Whether sharded weights are gathered tensor by tensor instead of a layer at once: each then
    pays the latency of a ring over all ranks."""
    overlap_pipeline: bool
    """Whether stage transfers hide behind compute in the interleaved schedule."""
    tensor_parallel_overlap: Literal["none", "pipelined"] = "none"
    """``pipelined``: gathers and scatters of sequence parallelism run in tp chunks with the chunks
    of the product they belong to (user buffers, asynchronous tensor parallelism)."""
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
    dropout: bool = False
    vocab_divisor: int = 1
    """The vocabulary is padded to a multiple of this times tp (1: no padding)."""
    logit_saved_bytes: Sourced
    """Bytes per logit that the loss keeps from forward to backward."""
    logit_working_bytes: Sourced
    """Short-lived bytes per logit at the peak of the loss."""
    gradient_bucket_bytes: Sourced
    """Size of the buckets in which gradients are reduced; the last one is never hidden."""
    state: StateSpec
    """How weights, gradients and optimizer state are laid out."""
    reserve: ReserveSpec
    """What context, communicators, workspaces and the allocator add."""
    notes: tuple[str, ...] = ()

    def attention_kernel(self, device: str) -> str:
        """The kernel for a device: that of the longest matching name prefix, else ``default``."""
        return _by_prefix(self.attention_kernels, device)

    def dispatcher(self, device: str) -> Dispatcher:
        """How the experts' tokens travel on a device."""
        return _by_prefix(self.moe_dispatcher, device)


def _by_prefix(table: dict[str, Value], name: str) -> Value:
    """The entry of the longest prefix of ``name``, else ``default``."""
    matches = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(matches, key=len) if matches else "default"]
