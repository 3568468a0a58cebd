"""What a model is: runs of equal blocks between an embedding and a head.

Nothing here is specific to one architecture: a block is a mixer (attention, latent attention, state
space, ...) and a feed-forward (dense, mixture of experts, ...), each its own type with a ``kind``
tag. What a kind holds, computes and keeps is one module of ``planner.blocks``, found by its type.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Spec(BaseModel):
    """Base of the request types: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class AttentionSpec(Spec):
    """Multi-head, grouped-query or multi-query softmax attention."""

    kind: Literal["attention"] = "attention"
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "per_head", "full"] = "none"
    """``per_head``: one RMSNorm weight of ``head_dim`` for q and one for k; ``full``: over all."""
    window: Positive | None = None
    """Sliding window in tokens; ``None`` = full causal attention."""
    chunk: Positive | None = None
    """Tokens see only their own chunk of this many (Llama 4); ``None`` = the whole sample."""
    sinks: bool = False
    """Whether each head has a learned logit that takes part in the softmax (gpt-oss)."""
    alibi: bool = False
    """Whether scores get a bias by distance instead of rotated q and k (BLOOM)."""
    softcap: bool = False
    """Whether a tanh bounds the scores (Gemma 2)."""
    output_gate: bool = False
    """Whether q's projection is twice as wide and half of it gates the output (Qwen3.5)."""
    tied_kv: bool = False
    """Whether values are the keys before their norm: no matrix of their own (Gemma 4)."""
    rotary: bool = True
    """Whether q and k are rotated, in a model without a learned position table or ALiBi."""
    causal: bool = True

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}"
            )
        return self


class LatentAttentionSpec(Spec):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: Literal["latent_attention"] = "latent_attention"
    heads: Positive
    q_lora_rank: Positive | None
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive
    qkv_bias: bool = False
    out_bias: bool = False


class SparseLatentAttentionSpec(Spec):
    """Latent attention over the keys that an indexer picks (DeepSeek-V3.2, arXiv 2512.02556)."""

    kind: Literal["sparse_latent_attention"] = "sparse_latent_attention"
    latent: LatentAttentionSpec
    index_heads: Positive
    index_head_dim: Positive
    top_k: Positive
    """Keys that each query attends."""

    @property
    def heads(self) -> int:
        """Query heads of the main attention."""
        return self.latent.heads

    @model_validator(mode="after")
    def _queries_are_compressed(self) -> Self:
        if self.latent.q_lora_rank is None:
            raise ValueError("the indexer reads the compressed query: q_lora_rank must be given")
        return self


class MambaSpec(Spec):
    """Selective state space with one decay per channel and state (Mamba, arXiv 2312.00752)."""

    kind: Literal["mamba"] = "mamba"
    inner: Positive
    """Channels of the scan."""
    state: Positive
    """States of each channel."""
    conv: Positive
    """Taps of the causal convolution."""
    dt_rank: Positive
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False
    """Whether time step, B and C are normed before the scan (Jamba)."""


class Mamba2Spec(Spec):
    """State-space duality: one decay per head (Mamba-2, arXiv 2405.21060)."""

    kind: Literal["mamba2"] = "mamba2"
    heads: Positive
    head_dim: Positive
    state: Positive
    groups: Positive
    """Groups of heads that share B and C."""
    conv: Positive
    chunk: Positive = 256
    """Tokens of one chunk of the scan."""
    conv_bias: bool = True
    bias: bool = False

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(f"heads = {self.heads} is not a multiple of groups = {self.groups}")
        return self


class GatedDeltaNetSpec(Spec):
    """Linear attention with a gated delta rule (Gated DeltaNet, arXiv 2412.06464)."""

    kind: Literal["gated_delta_net"] = "gated_delta_net"
    key_heads: Positive
    value_heads: Positive
    key_dim: Positive
    value_dim: Positive
    conv: Positive
    chunk: Positive = 64
    """Tokens of one chunk of the recurrence (flash-linear-attention's kernels)."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"value_heads = {self.value_heads} is not a multiple of key_heads = "
                f"{self.key_heads}"
            )
        return self


class MlpSpec(Spec):
    """Dense feed-forward: two matrices, or three when ``gated``."""

    kind: Literal["mlp"] = "mlp"
    intermediate: Positive
    gated: bool
    bias: bool = False
    activation: str = "silu"


class MoeSpec(Spec):
    """Mixture of ``experts`` feed-forwards of which ``top_k`` see each token."""

    kind: Literal["moe"] = "moe"
    experts: Positive
    top_k: Positive
    intermediate: Positive
    gated: bool = True
    activation: str = "silu"
    shared_intermediate: NonNegative = 0
    """Width of the shared experts that see every token, summed; 0 = none."""
    shared_gate: bool = False
    """Whether a sigmoid gate (one row of hidden) scales the shared experts."""
    expert_bias: bool = False
    router_bias: bool = False
    routing_groups: Positive = 1
    """Equal groups of experts; a token's ``top_k`` come from ``routing_group_limit`` of them."""
    routing_group_limit: Positive = 1
    latent: Positive | None = None
    """Width in which the routed experts work, projected to and from (Nemotron 3 Super)."""
    router_scales: bool = False
    """Whether the router scales its input and each expert's weight by learned vectors (Gemma 4)."""

    @model_validator(mode="after")
    def _top_k_exists(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} is more than experts = {self.experts}")
        if self.routing_group_limit > self.routing_groups or self.experts % self.routing_groups:
            raise ValueError(
                f"{self.experts} experts cannot be routed to {self.routing_group_limit} of "
                f"{self.routing_groups} groups"
            )
        if self.top_k > self.experts // self.routing_groups * self.routing_group_limit:
            raise ValueError(
                f"top_k = {self.top_k} is more than the experts in {self.routing_group_limit} of "
                f"{self.routing_groups} groups of {self.experts}"
            )
        return self


Mixer = Annotated[
    AttentionSpec
    | LatentAttentionSpec
    | SparseLatentAttentionSpec
    | MambaSpec
    | Mamba2Spec
    | GatedDeltaNetSpec,
    Field(discriminator="kind"),
]
FeedForward = Annotated[MlpSpec | MoeSpec, Field(discriminator="kind")]


class BlockSpec(Spec):
    """One residual block: norms, mixer, feed-forward."""

    mixer: Mixer | None
    feed_forward: FeedForward | None
    norms: NonNegative = 2
    """Norms of width hidden in the block (those inside the mixer are the mixer's)."""
    parallel: bool = False
    """Whether mixer and feed-forward read the same input (GPT-NeoX)."""


class LayerRun(Spec):
    """``count`` consecutive layers of the same block."""

    block: str
    count: Positive


class ProjectorSpec(Spec):
    """Linear layers after a tower: from ``inputs`` to each of ``widths`` in turn."""

    inputs: Positive
    widths: tuple[Positive, ...]
    bias: bool = True
    norm: NonNegative = 0
    """Width of the norm before it; 0 = none."""
    count: Positive = 1


class VisionSpec(Spec):
    """An image encoder before the decoder: equal blocks over patches, then projectors."""

    hidden: Positive
    layers: Positive
    block: BlockSpec
    norm: Literal["rms", "layer"]
    norm_bias: bool
    patch_inputs: Positive
    """Numbers in one patch: channels x frames x height x width."""
    patch_bias: bool
    positions: NonNegative = 0
    """Rows of learned position tables; 0 = none."""
    class_token: bool = False
    outer_norms: NonNegative = 0
    """Norms before the first and after the last block."""
    patches_per_token: Positive
    """Patches that become one token of the decoder."""
    projectors: tuple[ProjectorSpec, ...]


class ModelSpec(Spec):
    """A decoder as the planner understands it."""

    name: str
    family: str
    source: str
    """Where the dimensions are from."""
    hidden: Positive
    vocab: Positive
    tied_embeddings: bool
    norm: Literal["rms", "layer"]
    norm_bias: bool
    position_embeddings: NonNegative = 0
    """Rows of a learned position table; 0 = none (rotary, ALiBi, ...)."""
    embedding_dim: Positive | None = None
    """Width of the token embedding where it differs from hidden (projected in and out)."""
    embedding_norm: bool = False
    final_norm: bool = True
    head_bias: bool = False
    logit_softcap: bool = False
    """Whether a tanh bounds the logits (Gemma 2)."""
    max_sequence: Positive | None = None
    dropout: bool = False
    blocks: dict[str, BlockSpec]
    layers: tuple[LayerRun, ...]
    mtp: tuple[LayerRun, ...] = ()
    """Multi-token-prediction modules: each a block with its own norms and projection."""
    vision: VisionSpec | None = None
    """An image encoder whose output takes the place of some token embeddings."""
    keys_used: tuple[str, ...] = ()
    keys_ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _blocks_exist(self) -> Self:
        for run in (*self.layers, *self.mtp):
            if run.block not in self.blocks:
                known = ", ".join(sorted(self.blocks)) or "none"
                raise ValueError(
                    f"layers name block {run.block!r}, which is not in blocks ({known})"
                )
        if not self.layers:
            raise ValueError("layers is empty: a model has at least one layer")
        return self

    @property
    def layer_count(self) -> int:
        """Layers, without MTP modules."""
        return sum(run.count for run in self.layers)

    @property
    def fixed_sequence(self) -> int | None:
        """Tokens per sample are the job's to say."""
        return None

    @property
    def default_batch(self) -> int | None:
        """Samples per step follow from a number of tokens."""
        return None

    @property
    def splits_sequence(self) -> bool:
        """Whether context and sequence parallelism apply."""
        return True

    @property
    def tensor_split(self) -> int | None:
        """What tp must divide, beyond what the blocks say themselves."""
        return None
