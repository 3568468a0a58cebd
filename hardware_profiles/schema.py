"""The shapes of the YAML that describes devices, nodes, networks, clusters and stacks.

Every physical number is a :class:`Sourced`: value, unit, where it is from, and how it is known.
SI units throughout (bytes, seconds, FLOP/s, bytes/s per direction); the loader converts what a
file writes with another unit. The models are frozen: a profile is a fact, not a variable.

Homogeneous clusters are the one-group case of :class:`ClusterSpec`, not another type.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from hardware_profiles.sourced import Kind as Kind
from hardware_profiles.sourced import Profile as Profile
from hardware_profiles.sourced import Sourced as Sourced
from hardware_profiles.stack import LayersSpec as LayersSpec
from hardware_profiles.stack import StackSpec as StackSpec
from hardware_profiles.stack_words import EXCHANGE_LIBRARIES as EXCHANGE_LIBRARIES
from hardware_profiles.stack_words import Dispatcher as Dispatcher
from hardware_profiles.stack_words import SelectiveRecompute as SelectiveRecompute


class MatmulConstants(Profile):
    """Smooth-roofline constants of one dtype's matrix products; see ``cost_models.laws``.

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
    accumulate_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the traffic of adding to an fp32 gradient that the product does not hide."""
    tile_latency: Annotated[float, Field(ge=0)] = 0.0
    """Time of a tile's reduction on a unit by itself, over a full wave's: what idle units do not
    take over."""
    split_k: Annotated[float, Field(gt=0)] = 2000.0
    """Reduction length at which splitting it over idle units saves half of that."""
    heating: Annotated[float, Field(ge=0)] = 0.0
    """How much longer lasting kernels of a benchmark compute than short ones, as a share: the clock
    falls at the power limit. A training step has ``sustained`` instead."""
    heating_s: Annotated[float, Field(gt=0)] = 1e-3
    """Compute time of a kernel that pays half of ``heating``."""
    cache_share: Annotated[float, Field(ge=0)] = 0.0
    """Traffic, as a share of the last-level cache, of which a benchmark's repeats find half there;
    no part of a training step."""
    kind: Kind
    source: str
    error_median: float | None = None
    error_p90: float | None = None
    borrowed_from: str | None = None
    note: str | None = None


class AttentionConstants(Profile):
    """Achieved fractions of peak of one attention kernel generation; see ``cost_models.laws``.

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

    ``matmul`` is keyed by dtype (``bf16``, ``fp16``, ``fp32``, ``fp8``, ``int8``, ``nvfp4``);
    ``attention`` by kernel generation (``flash1`` is its Triton kernel, ``flash2``, ``flash3``,
    ``flash4``; or ``cudnn``, what PyTorch and Transformer Engine run on Blackwell) then dtype.
    8- and 4-bit products take operands that are quantised already.
    """

    matmul: dict[str, MatmulConstants]
    attention: dict[str, dict[str, AttentionConstants]]
    memory_bound_efficiency: Sourced
    memory_bound_latency: Sourced


DIMENSIONS = {
    "bandwidth": "B/s", "memory_bandwidth": "B/s", "host_memory_bandwidth": "B/s",
    "host_link": "B/s", "link_bandwidth": "B/s", "memory_capacity": "B", "l2_capacity": "B",
    "host_memory": "B", "drives": "B", "drives_read_bandwidth": "B/s",
    "drives_write_bandwidth": "B/s", "latency": "s", "simple_latency": "s",
    "memory_bound_latency": "s",
    "peak_flops": "FLOP/s", "best_matmul_flops": "FLOP/s", "power": "W", "price_per_hour": "USD/h",
    "compute_units": "", "efficiency": "", "efficiencies": "", "memory_bound_efficiency": "",
    "best_run_mfu": "", "launch_overhead": "s", "expert_launch": "s", "expert_sync": "s",
    "graph_pool": "B", "gradient_bucket_bytes": "B", "overlap_contention": "",
    "logit_saved_bytes": "", "logit_working_bytes": "", "logit_working_bytes_split": "",
}  # fmt: skip
"""What the unit of a field measures (``hardware_profiles.units.dimension``), by name."""


POSITIVE = frozenset(
    {"bandwidth", "memory_bandwidth", "memory_capacity", "peak_flops", "compute_units"}
)
"""Fields of which nothing can be made where they are 0."""
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "nvfp4")


class DeviceSpec(Profile):
    """One accelerator as the software sees it."""

    name: str
    title: str
    vendor: str
    aliases: tuple[str, ...] = ()
    peak_flops: dict[str, Sourced]
    """Dense peak by dtype, a word of :data:`DTYPES`; operations of ``int8`` count as FLOPs."""
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

    @field_validator("peak_flops")
    @classmethod
    def _known_dtypes(cls, peaks: dict[str, Sourced]) -> dict[str, Sourced]:
        for dtype in peaks:
            if dtype not in DTYPES:
                raise ValueError(f"no arithmetic is called {dtype!r}: {', '.join(DTYPES)}")
        return peaks


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
    multicast: bool = False
    """Whether its switches send one write to several devices (NVLink SHARP)."""
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
    drives: Sourced | None = None
    """Bytes of the node's local NVMe drives that training may fill."""
    drives_read_bandwidth: Sourced | None = None
    """Bytes/s that all of them read together."""
    drives_write_bandwidth: Sourced | None = None
    """Bytes/s that all of them write together."""
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
