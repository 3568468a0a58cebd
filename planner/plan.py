"""The plan document: one JSON object, versioned, the same bytes for the same inputs.

No timestamps in the body; floats are rounded to nine significant digits; key order is the order
of the fields here. Its JSON Schema is generated from these classes (``planner schema plan``).
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cost_models.layout import Schedule
from hardware_profiles.stack_words import ContextKind

SCHEMA_VERSION: Final = "1.0"
SIGNIFICANT_DIGITS = 9


class Document(BaseModel):
    """Base of everything in a plan: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Chunk(Document):
    """Consecutive layers held by one virtual pipeline stage."""

    layers: tuple[int, int]
    """``[first, last_exclusive]`` in the model's layer order."""
    has_embedding: bool = False
    """Or, where the ranks share the vocabulary, a part of it; likewise the head."""
    has_head: bool = False


class RecomputeLayers(Document):
    """``layers`` layers of block ``kind`` on a stage are recomputed in ``mode``."""

    kind: str
    mode: str
    """``full``, ``selective``, or the modules that are run again, joined by ``+``."""
    layers: Annotated[int, Field(ge=1)]


class Stage(Document):
    """What one pipeline rank holds."""

    chunks: tuple[Chunk, ...]
    recompute: tuple[RecomputeLayers, ...] = ()
    activation_offload_layers: Annotated[int, Field(ge=0)] = 0
    devices: tuple[int, int] | None = None
    """``[first, last_exclusive]`` device ranks of this stage; derived where left out."""


class Layout(Document):
    """Degrees, schedule, recompute and stages of one way to run the job.

    In the input of ``evaluate`` everything may be left out: degrees default to 1, ``dp_shard`` to
    what the cluster leaves, stages to an even split, and ``recompute`` fills the stages.
    """

    dp_replicate: Annotated[int, Field(ge=1)]
    dp_shard: Annotated[int, Field(ge=1)]
    cp: Annotated[int, Field(ge=1)] = 1
    cp_kind: ContextKind = "p2p"
    cp_inner: Annotated[int, Field(ge=1)] = 1
    """Under the kinds of two levels, ranks that exchange heads; rings or gathers join
    ``cp / cp_inner`` of them."""
    tp: Annotated[int, Field(ge=1)] = 1
    sequence_parallel: bool = False
    pp: Annotated[int, Field(ge=1)] = 1
    vpp: Annotated[int, Field(ge=1)] = 1
    ep: Annotated[int, Field(ge=1)] = 1
    etp: Annotated[int, Field(ge=1)] = 1
    expert_dp: Annotated[int, Field(ge=1)] = 1
    microbatch_size: Annotated[int, Field(ge=1)] = 1
    num_microbatches: Annotated[int, Field(ge=1)] = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    reshard_after_forward: bool | int = False
    schedule: Schedule = "1f1b"
    round_size: Annotated[int, Field(ge=0)] = 0
    """Microbatches that go through a virtual stage before the next has its turn, where the schedule
    takes them in rounds; in the input of ``evaluate`` 0 is the least that the stack can run."""
    layers_outside: Annotated[int, Field(ge=0)] = 0
    """Layers outside the pipeline, which all ranks run with the stages as data parallelism: the
    first ones where a model starts with another kind of layer, else the last; in the input of
    ``evaluate`` the fewest that leave equal stages."""
    rank_order: tuple[str, ...] = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
    optimizer_offload: bool = False
    parameter_offload: bool = False
    stages: tuple[Stage, ...] = ()

    @property
    def reshard_group(self) -> int:
        """Ranks that keep a copy of the weights for the backward; 0: none does."""
        return 0 if isinstance(self.reshard_after_forward, bool) else self.reshard_after_forward


class Term(Document):
    """One named part of a total, in seconds (time) or bytes (memory)."""

    name: str
    seconds: float | None = None
    bytes: int | None = None
    detail: str = ""
    """Which op or tensor, by which formula, from which source."""


class StagePrediction(Document):
    """Prediction for one pipeline rank."""

    peak_bytes: int
    """What the device must have: ``device_bytes`` and what the user keeps free."""
    allocated_bytes: int
    """Most bytes in tensors at once (``torch.cuda.max_memory_allocated``)."""
    reserved_bytes: int
    """Most bytes the caching allocator holds (``torch.cuda.max_memory_reserved``)."""
    device_bytes: int
    """What the driver shows: reserved, context, communicators."""
    memory: tuple[Term, ...]
    """Terms sum exactly to ``peak_bytes``."""
    compute_s: float
    """Forward, backward and recompute of all microbatches on this rank."""
    layers: int
    parameters: int
    """Parameters held by one device of the stage."""


class HostPrediction(Document):
    """What a layout keeps in host memory, or on the hosts' drives."""

    place: Literal["memory", "drives"] = "memory"
    bytes_per_node: int
    """Of the fullest node: which stages its devices belong to decides."""
    capacity_bytes_per_node: int | None
    """Of that place."""
    buffer_bytes_per_node: int = 0
    """Of memory beside the drives: what is on its way to them and back, and what stays there."""
    link_bytes_per_step: int
    """Across the link of one device to its host, both directions; the busiest device's."""
    link_bytes_per_node_per_step: int = 0
    """Across all links of one node; the busiest node's."""


class Prediction(Document):
    """What the cost model says of a layout."""

    step_time_s: float
    step_time_band_s: tuple[float, float]
    band_source: str
    tokens_per_s_per_device: float
    mfu: float
    mfu_convention: str
    outside_measured_region: bool
    max_peak_bytes: int
    allocated_bytes: int
    """Of the stage with the most; likewise the next two."""
    reserved_bytes: int
    device_bytes: int
    capacity_bytes: int
    memory_margin: float
    """Share of the predicted peak that a device must have beyond it."""
    memory_margin_source: str
    usable_bytes: int
    """``capacity_bytes / (1 + memory_margin)``: the most that counts as fitting."""
    fits: bool
    """Whether every stage's ``peak_bytes`` is at most ``usable_bytes``."""
    time: tuple[Term, ...]
    """Terms sum exactly to ``step_time_s`` (in integer nanoseconds)."""
    stages: tuple[StagePrediction, ...]
    assumptions: tuple[str, ...] = ()
    price_usd_per_step: float | None = None
    price_source: str | None = None
    """What the price is made of, and whose it is where the node has none of its own."""
    host: HostPrediction | None = None
    """Present where something is offloaded."""

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Peak per stage."""
        return tuple(stage.peak_bytes for stage in self.stages)


class ProgramCertificate(Document):
    """The integer program of the chosen leaf: an optimum of a named surrogate."""

    surrogate: str
    objective_s: float
    bound_s: float
    gap: float
    solver: str
    termination: str


class Certificate(Document):
    """What is proved about the plan, under the cost model named in ``cost_model_digest``."""

    status: Literal["optimal", "feasible", "infeasible"]
    objective_s: float | None
    lower_bound_s: float | None
    relative_gap: float | None
    tolerance: float
    program: ProgramCertificate | None = None
    space_size: int
    """Layouts in the space, before and including every one that was removed."""
    removed: dict[str, int]
    """Layouts removed, by reason; with ``priced`` they sum to ``space_size``."""
    priced: int
    pruned_by_bound: int
    quantum: str
    simulated_count: int
    statement: str
    """The claim in a sentence."""


class Alternative(Document):
    """Another layout worth a look: why it is listed, and its price."""

    reason: str
    layout: Layout
    step_time_s: float
    step_time_band_s: tuple[float, float]
    tie: bool
    """Whether its band and the plan's overlap: the model cannot tell which of them is faster."""
    max_peak_bytes: int
    fits: bool


class Input(Document):
    """One input as understood, with a digest of its canonical JSON."""

    name: str
    digest: str
    document: dict[str, Any]


class Inputs(Document):
    """The three inputs."""

    model: Input
    cluster: Input
    job: Input


class Target(Document):
    """The software that the plan is for."""

    stack: str
    version: str
    not_priced: tuple[str, ...] = ()
    """What this version runs and no layout of the space has; the stack's YAML says why."""


class Plan(Document):
    """The whole document."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    planner_version: str
    inputs: Inputs
    target: Target
    cost_model_digest: str
    layout: Layout
    prediction: Prediction
    certificate: Certificate
    alternatives: tuple[Alternative, ...] = ()
    tie_break: str | None = None
    """Why this layout was taken, where alternatives tie with it."""
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stages_match(self) -> Plan:
        if len(self.layout.stages) != self.layout.pp:
            raise ValueError(
                f"layout has {len(self.layout.stages)} stages but pp = {self.layout.pp}"
            )
        return self


def round_floats(value: object) -> object:
    """``value`` with every float at nine significant digits; NaN and infinity are refused."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a plan holds finite numbers only")
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(item) for item in value]
    return value


def to_json(document: Document, *, indent: int | None = 2) -> str:
    """Canonical JSON text of a document, ending in a newline."""
    return json.dumps(round_floats(document.model_dump(mode="json")), indent=indent) + "\n"


def digest(document: object) -> str:
    """SHA-256 (first 16 hex digits) of the canonical, key-sorted JSON of plain data."""
    import hashlib

    text = json.dumps(round_floats(document), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


class WayOut(Document):
    """A change that would make an infeasible request feasible, and what it costs."""

    change: str
    effect: str
    step_time_s: float | None = None


class Infeasibility(Document):
    """Proof and diagnosis of a request that no layout satisfies (exit code 3)."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    planner_version: str
    inputs: Inputs
    target: Target
    cost_model_digest: str
    certificate: Certificate
    message: str
    binding: str
    """The constraint that binds, in words with numbers."""
    closest_layout: Layout | None = None
    needed_bytes: int | None = None
    capacity_bytes: int | None = None
    usable_bytes: int | None = None
    """What the memory margin leaves of ``capacity_bytes``."""
    memory: tuple[Term, ...] = ()
    """The fullest device of the closest layout, by category; sums to ``needed_bytes``."""
    ways_out: tuple[WayOut, ...] = ()
