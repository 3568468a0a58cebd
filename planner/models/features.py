"""What a model asks of software beyond its kinds of sub-block, in the words of a stack's ``lacks``.

A kind (``planner.blocks.registry``) is a module that some software has as a whole or not at all; a
feature is what a version of it may lack inside a module that it has.
"""

from __future__ import annotations

from collections.abc import Callable

from hardware_profiles.stack_words import ModelFeature
from planner.models.kinds import Model
from planner.models.spec import (
    AttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    MoeSpec,
)

STATE_SPACE = (MambaSpec, Mamba2Spec)
PREDICTION: ModelFeature = "multi-token prediction"
SANDWICHED = 3
"""Norms of a block from which on some lie behind its sub-blocks: one before each makes two."""


def model_features(model: Model) -> list[ModelFeature]:
    """Features that ``model`` needs, in the order of :data:`FEATURES`; none of a network that is a
    sequence of layers of its own. A vision tower's are not told."""
    if not isinstance(model, ModelSpec):
        return []
    return [name for name, present in FEATURES.items() if present(model)]


def _attention(model: ModelSpec) -> list[AttentionSpec]:
    mixers = [block.mixer for block in model.blocks.values()]
    return [mixer for mixer in mixers if isinstance(mixer, AttentionSpec)]


def _experts(model: ModelSpec) -> list[MoeSpec]:
    parts = [block.feed_forward for block in model.blocks.values()]
    return [part for part in parts if isinstance(part, MoeSpec)]


def _any_attention(
    holds: Callable[[AttentionSpec], bool],
) -> Callable[[ModelSpec], bool]:
    return lambda model: any(holds(mixer) for mixer in _attention(model))


def _any_experts(holds: Callable[[MoeSpec], bool]) -> Callable[[ModelSpec], bool]:
    return lambda model: any(holds(part) for part in _experts(model))


def _hybrid_experts(model: ModelSpec) -> bool:
    mixers = [block.mixer for block in model.blocks.values()]
    return any(isinstance(mixer, STATE_SPACE) for mixer in mixers) and bool(_experts(model))


FEATURES: dict[ModelFeature, Callable[[ModelSpec], bool]] = {
    "ALiBi": _any_attention(lambda mixer: mixer.alibi),
    "attention sinks": _any_attention(lambda mixer: mixer.sinks),
    "softcapped scores": _any_attention(lambda mixer: mixer.softcap),
    "softcapped logits": lambda model: model.logit_softcap,
    "sliding windows": _any_attention(lambda mixer: mixer.window is not None),
    "windows by layer": lambda model: len({mixer.window for mixer in _attention(model)}) > 1,
    "chunked attention": _any_attention(lambda mixer: mixer.chunk is not None),
    "layers without positions": lambda model: (
        len({mixer.rotary for mixer in _attention(model)}) > 1
    ),
    "gated attention outputs": _any_attention(lambda mixer: mixer.output_gate),
    "values that are keys": _any_attention(lambda mixer: mixer.tied_kv),
    "norms over all heads": _any_attention(lambda mixer: mixer.qk_norm == "full"),
    "norms behind sub-blocks": lambda model: any(
        block.norms >= SANDWICHED for block in model.blocks.values()
    ),
    "normed embeddings": lambda model: model.embedding_norm,
    "projected embeddings": lambda model: model.embedding_dim not in (None, model.hidden),
    "biases of the head": lambda model: model.head_bias,
    "biases of experts": _any_experts(lambda part: part.expert_bias),
    "parallel blocks": lambda model: any(block.parallel for block in model.blocks.values()),
    "shared experts": _any_experts(lambda part: part.shared_intermediate > 0),
    "latent experts": _any_experts(lambda part: part.latent is not None),
    "experts in state-space hybrids": _hybrid_experts,
    PREDICTION: lambda model: bool(model.mtp),
    "RMS norms": lambda model: model.norm == "rms",
    "grouped queries": _any_attention(lambda mixer: mixer.kv_heads < mixer.heads),
}
"""Whether a model has each of them."""
