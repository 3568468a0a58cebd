"""What a user asks for: the job. Models are in ``planner.models.spec``, clusters in
``hardware_profiles.schema``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from planner.models.spec import Positive, Spec

DEGREES = (
    "tp", "cp", "pp", "vpp", "dp_replicate", "dp_shard", "ep", "etp", "microbatch_size",
    "zero_stage",
)  # fmt: skip
"""What ``--fix``, ``--max`` and ``--forbid`` may name."""

Precision = Literal["bf16", "fp16", "fp32", "fp8", "nvfp4"]
Optimizer = Literal["adamw", "sgd", "lion", "adam8bit", "adafactor", "muon"]


class ConstraintSpec(Spec):
    """Limits on the space: fixed values, upper bounds, degrees that must stay 1."""

    fix: dict[str, int] = Field(default_factory=dict)
    max: dict[str, int] = Field(default_factory=dict)
    forbid: tuple[str, ...] = ()
    schedule: Literal["gpipe", "1f1b", "interleaved"] | None = None
    recompute: str | None = None
    """Allow this mode only: ``none``, ``selective``, ``full`` or modules of the stack joined by
    ``+``."""
    sequence_parallel: bool | None = None


class JobSpec(Spec):
    """One training job. Every field has a default, printed with the plan."""

    sequence_length: Positive | None = None
    """Tokens per sample; default: the model's maximum, at most 4096 (8192 where the maximum is
    larger than 8192)."""
    global_batch: Positive | None = None
    """Samples per step; default: ``global_batch_tokens``."""
    global_batch_tokens: Positive | None = None
    """Tokens per step, an alternative to ``global_batch``; default about 4 M."""
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    stack: str = "megatron-core"
    allow_recompute: bool = True
    optimizer_offload: bool = False
    """Whether the host holds and updates the optimizer state."""
    parameter_offload: bool = False
    """Whether the host also holds the weights; needs ``optimizer_offload`` and ZeRO stage 3."""
    memory_reserve_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes per device to leave free; default: none."""
    memory_margin: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the predicted peak that a device must have beyond it; default: what published runs
    earn the stack, for a plan that fits with 95 % confidence."""
    expert_imbalance: Annotated[float, Field(ge=0)] = 0.0
    """Routing skew: alpha of the hottest rank's rows (0 = balanced)."""
    document_length: Positive | None = None
    """Mean tokens per document where samples are packed: attention stays inside documents. Default:
    a sample is one document."""
    document_length_cv: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Standard deviation of the document length over its mean."""
    padding_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of positions that are padding: computed, but no tokens of the model."""
    images_per_sample: Annotated[int, Field(ge=0)] = 0
    """Images that a model with a vision tower sees in each sample."""
    image_tokens: Positive | None = None
    """Tokens of the decoder that one image becomes; they are part of the sample."""
    dropout: bool | None = None
    """Whether dropout is on; default: as the model and the stack have it."""
    loss: Literal["whole", "chunked"] = "whole"
    """Whether head and loss take the sequence whole or, where the stack can, in pieces."""
    mtp: bool = True
    """Whether multi-token-prediction modules are trained, where the model has them."""
    constraints: ConstraintSpec = ConstraintSpec()
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Relative gap within which a plan is called optimal."""
