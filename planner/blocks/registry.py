"""Which module knows a kind of block: a new kind is a new module and one line here."""

from __future__ import annotations

from typing import Any, Protocol

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Op, SavedTensor
from hardware_profiles.stack_words import AttentionSort
from planner.blocks import (
    attention,
    gated_delta_net,
    latent_attention,
    mamba,
    mamba2,
    mlp,
    moe,
    sparse_attention,
)
from planner.blocks.context import BlockContext
from planner.blocks.splits import Split
from planner.models.kinds import Model
from planner.models.sequence import LayerSequenceSpec
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    FeedForward,
    GatedDeltaNetSpec,
    LatentAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    Mixer,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    SparseLatentAttentionSpec,
)


class BlockKind(Protocol):
    """What a module says about its kind of sub-block (a mixer or a feed-forward)."""

    def weights(self, spec: Any, hidden: int, /) -> list[Weight]:
        """Parameter tensors, without the norms around the sub-block."""

    def ops(self, spec: Any, ctx: BlockContext, shard: Shard, /) -> tuple[Op, ...]:
        """Ops after the norm, up to and including the residual add."""

    def saved(self, spec: Any, ctx: BlockContext, shard: Shard, /) -> tuple[SavedTensor, ...]:
        """Tensors kept for the backward, beyond the norm's input and output."""

    def working(self, spec: Any, ctx: BlockContext, shard: Shard, /) -> Int64:
        """Bytes of short-lived buffers at the peak of the backward."""

    def flops_per_token(self, spec: Any, span: int, /) -> float:
        """Forward FLOPs of one token beyond 2 per matrix element; ``span`` is the length within
        which tokens see each other."""

    def splits(self, spec: Any, /) -> tuple[Split, ...]:
        """Sizes that degrees must divide."""

    def assumptions(self, spec: Any, /) -> tuple[str, ...]:
        """What is approximated in its price, for the plan."""


KINDS: dict[type, BlockKind] = {
    AttentionSpec: attention,
    LatentAttentionSpec: latent_attention,
    SparseLatentAttentionSpec: sparse_attention,
    MambaSpec: mamba,
    Mamba2Spec: mamba2,
    GatedDeltaNetSpec: gated_delta_net,
    MlpSpec: mlp,
    MoeSpec: moe,
}

KIND_NAMES = {
    "latent_attention": "latent attention",
    "sparse_latent_attention": "sparse attention with an indexer",
    "mamba": "Mamba layers (selective scan)",
    "mamba2": "Mamba-2 layers",
    "gated_delta_net": "gated delta-rule layers",
    "mlp": "MLPs",
    "moe": "mixtures of experts",
    "vision": "vision towers",
    "layers": "sequences of layers of its own",
}
"""Kinds in words, by their tag."""


def kind_of(part: Mixer | FeedForward) -> BlockKind:
    """The module that knows ``part``."""
    return KINDS[type(part)]


def parts(block: BlockSpec) -> list[Mixer | FeedForward]:
    """The sub-blocks of a block, in order."""
    return [part for part in (block.mixer, block.feed_forward) if part is not None]


def model_parts(model: ModelSpec) -> list[Mixer | FeedForward]:
    """All sub-blocks of a model, those of its vision tower included, each once, in order."""
    blocks = list(model.blocks.values())
    if model.vision is not None:
        blocks.append(model.vision.block)
    return list(dict.fromkeys(part for block in blocks for part in parts(block)))


def model_splits(model: Model) -> list[Split]:
    """How the sub-blocks of a model may be split, each size once, in the order of counting.

    A vision tower is split over tp only: context parallelism leaves its images whole.
    """
    found = {
        split
        for block in model.blocks.values()
        for part in parts(block)
        for split in kind_of(part).splits(part)
    }
    if model.vision is not None:
        for part in parts(model.vision.block):
            found |= {s for s in kind_of(part).splits(part) if s.over in ("tp", "kv")}
    return sorted(found)


def attention_sorts(model: Model) -> list[AttentionSort]:
    """Sorts of attention and of model that not every kind of context parallelism runs, in the
    words of ``StackSpec.cp_kinds_of``. Images of a vision tower stay whole."""
    mixers = [block.mixer for block in model.blocks.values()]
    found: list[AttentionSort] = []
    if any(isinstance(mixer, LatentAttentionSpec) for mixer in mixers):
        found.append("latent attention")
    if any(isinstance(mixer, AttentionSpec) and mixer.window is not None for mixer in mixers):
        found.append("sliding windows")
    if any(isinstance(mixer, AttentionSpec) and mixer.sinks for mixer in mixers):
        found.append("attention sinks")
    experts = any(isinstance(b.feed_forward, MoeSpec) for b in model.blocks.values())
    return [*found, "mixtures of experts" if experts else "models without experts"]


def model_kinds(model: Model) -> list[str]:
    """Tags of the kinds that a model has, each once; ``vision`` for a tower, ``layers`` for a
    network that is a sequence of layers of its own."""
    if isinstance(model, LayerSequenceSpec):
        return [model.format]
    kinds = [part.kind for block in model.blocks.values() for part in parts(block)]
    return list(dict.fromkeys([*kinds, *(["vision"] if model.vision else [])]))
