"""What a user asks for: the job. Models are in ``planner.models.spec``, clusters in
``hardware_profiles.schema``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hardware_profiles.stack_words import ContextKind, Schedule
from planner.models.spec import Positive, Spec

DEGREES = (
    "tp", "cp", "pp", "vpp", "dp_replicate", "dp_shard", "ep", "etp", "microbatch_size",
    "zero_stage", "round_size", "layers_outside",
)  # fmt: skip
"""What ``--fix``, ``--max`` and ``--forbid`` may name."""
LEAST = {"zero_stage": 0, "layers_outside": 0}
"""What is left of a degree that is forbidden, where it is not 1."""

Size = Annotated[int, Field(ge=1, le=10**9)]
"""Samples, or tokens of one; what is larger is a slip."""
Tokens = Annotated[int, Field(ge=1, le=10**12)]

Precision = Literal["bf16", "fp16", "fp32", "fp8", "int8", "nvfp4"]
Optimizer = Literal[
    "adamw", "adamw_bf16", "sgd", "lion", "adagrad", "rmsprop", "novograd", "adamax", "adadelta",
    "rprop", "adam8bit", "adafactor", "muon",
]  # fmt: skip


class ConstraintSpec(Spec):
    """Limits on the space: fixed values, upper bounds, degrees that must stay 1."""

    fix: dict[str, int] = Field(default_factory=dict)
    max: dict[str, int] = Field(default_factory=dict)
    forbid: tuple[str, ...] = ()
    schedule: Schedule | None = None
    recompute: str | None = None
    """Allow this mode only: ``none``, ``selective``, ``full`` or modules of the stack joined by
    ``+``."""
    sequence_parallel: bool | None = None
    virtual_stages: Literal["even", "free"] = "even"
    """Layers of the virtual stages of an interleaved pipeline: equally many, lighter at the ends
    (on a V by ranks); or any numbers, of which there are too many to prove the best in general."""


class FineTuneSpec(Spec):
    """Training of a part of the model; the rest has no gradient and no optimizer state."""

    lora_rank: Positive | None = None
    """Rank of adapters beside the linear layers of blocks; all other weights are then frozen."""
    lora_targets: tuple[str, ...] = ()
    """Products that get adapters (``qkv``, ``proj``, ``fc1``, ``fc2`` ...); default: all of dense
    sub-blocks. Routers and routed experts get none."""
    base_bits: Literal[16, 4] = 16
    """4: frozen linear layers are stored in 4 bits (NF4) and dequantised where they run (QLoRA)."""
    freeze_layers: Annotated[int, Field(ge=0)] = 0
    """The embedding and so many first layers are not trained and have no backward."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.lora_rank is None and not self.freeze_layers:
            raise ValueError("give lora_rank, or freeze_layers")
        if self.lora_rank is not None and self.freeze_layers:
            raise ValueError("lora_rank freezes all layers already: leave freeze_layers out")
        if self.lora_rank is None and (self.base_bits != 16 or self.lora_targets):
            raise ValueError("base_bits and lora_targets belong to lora_rank")
        return self

    @property
    def method(self) -> str:
        """What a stack must be able to do."""
        if self.lora_rank is None:
            return "freeze"
        return "qlora" if self.base_bits == 4 else "lora"


class JobSpec(Spec):
    """One training job. Every field has a default, printed with the plan."""

    sequence_length: Size | None = None
    """Tokens per sample; default: the model's maximum, at most 4096 (8192 where the maximum is
    larger than 8192)."""
    global_batch: Size | None = None
    """Samples per step; default: ``global_batch_tokens``."""
    global_batch_tokens: Tokens | None = None
    """Tokens per step, an alternative to ``global_batch``; default about 4 M."""
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    stack: str | None = None
    """Software that runs the plan; default: megatron-core, or, where that cannot run the job on
    these devices, the first stack that can (``planner.stacks.DEFAULTS``)."""
    allow_recompute: bool = True
    optimizer_offload: bool = False
    """Whether the host holds and updates the optimizer state."""
    optimizer_offload_share: Annotated[float, Field(gt=0, le=1, multiple_of=0.001)] = 1.0
    """How much of the optimizer state that is, where the stack can leave the rest on the devices,
    which update it (DeepSpeed's ``offload_optimizer.ratio``); to a thousandth."""
    parameter_offload: bool = False
    """Whether the host holds the weights; needs ZeRO stage 3, or FSDP's 2, and, unless the device
    updates them, ``optimizer_offload``."""
    activation_offload: bool = False
    """Whether the host holds the layer inputs that full recomputation keeps, from forward to
    backward."""
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
    finetune: FineTuneSpec | None = None
    """Train a part of the model only; default: all of it."""
    schedule_csv: str | None = None
    """File with the order of work of every pipeline rank: a row of actions each, as
    ``torch.distributed.pipelining`` reads them. A plan holds what is in it."""
    schedule_actions: tuple[str, ...] = ()
    """The rows of such a file; they stand for ``schedule_csv``."""
    cp_kinds: tuple[ContextKind, ...] = ()
    """Kinds of context parallelism of the layers, in order and over again where there are fewer
    than layers; default: one for all of them, which is searched."""
    tensor_transpose: Positive = 1
    """Of tp's ranks, a factor that splits feed-forwards' matrices along the other dimension, where
    the stack can (MaxText's axis of that name), beside one other axis; default: none."""
    constraints: ConstraintSpec = ConstraintSpec()
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Relative gap within which a plan is called optimal."""
