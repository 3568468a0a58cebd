"""What is said about a config that cannot be read: what is missing, and the nearest family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.errors import UnknownModelError
from planner.models.readers.families import FAMILIES, TOWERS, Family

_FEATURES = (
    ("a vision tower", ("vision_config", "vision_tower")),
    ("an audio tower", ("audio_config",)),
    ("an encoder", ("encoder_layers", "num_encoder_layers", "encoder", "is_encoder_decoder")),
    ("state-space (Mamba) layers", (
        "state_size", "time_step_rank", "ssm_state_size", "mamba_d_state", "mamba_num_heads",
        "ssm_cfg", "hybrid_override_pattern",
    )),
    ("linear-attention layers", ("linear_num_key_heads", "linear_num_value_heads")),
    ("a sparse-attention indexer", ("index_topk", "index_n_heads")),
    ("recurrent (RWKV) layers", ("attention_hidden_size", "rescale_every")),
    ("experts on every n-th layer", ("interleave_moe_layer_step",)),
)  # fmt: skip

_BOTH_WAYS = re.compile(r"MaskedLM|Encoder|TokenClassification|QuestionAnswering")
"""Classes of models whose attention looks ahead."""


def _architectures(data: Mapping[str, Any]) -> list[str]:
    names = data.get("architectures")
    return [str(name)[:60] for name in names[:5]] if isinstance(names, list) else []


def error(data: Mapping[str, Any], where: str, doubts: list[str]) -> UnknownModelError:
    """Why ``data`` is not read: ``doubts`` are what is missing to count its parameters."""
    model_type, architectures = data.get("model_type"), _architectures(data)
    seen = [f"model_type {str(model_type)[:60]!r}"] if model_type is not None else []
    seen += [f"architecture {', '.join(architectures)}"] if architectures else []
    known_keys = {key for family in FAMILIES.values() for key in family.keys}
    if not seen and not any(key in known_keys for key in data):
        return UnknownModelError(
            f"{where}: not a model: it has neither 'model_type' nor 'architectures', nor any size "
            "that a model has",
            hint="give a config.json, or dimensions under 'format: megatron_gpt'",
        )
    what = " (".join(seen) + (")" if len(seen) > 1 else "")
    return UnknownModelError(
        f"{where}: no reader for {what or 'a config without model_type and architectures'}; "
        f"missing here: {', '.join(doubts)}",
        hint=_nearest(data),
    )


def features(data: Mapping[str, Any]) -> list[str]:
    """Parts of ``data`` that no reader understands."""
    found = []
    for what, keys in _FEATURES:
        present = [key for key in keys if data.get(key)]
        if present:
            found.append(f"{what} ({', '.join(present)})")
    found += _looks_ahead(data)
    kinds = data.get("layer_types")
    if isinstance(kinds, list) and not found:
        known = {"full_attention", "sliding_attention"}
        odd = sorted({str(kind)[:40] for kind in kinds} - known)
        found += [f"layers of type {', '.join(odd[:5])}"] if odd else []
    return found


def _looks_ahead(data: Mapping[str, Any]) -> list[str]:
    """What says that attention is not causal, as that of every decoder here is."""
    names = _architectures(data)
    said = [f"architecture {name}" for name in names if _BOTH_WAYS.search(name)]
    said += [f"{key}: false" for key in ("causal", "is_causal") if data.get(key) is False]
    said += ["use_bidirectional_attention"] if data.get("use_bidirectional_attention") else []
    if data.get("is_decoder") is False and not any("CausalLM" in name for name in names):
        said.append("is_decoder: false")
    return [f"attention that looks ahead ({', '.join(said)})"] if said else []


def _nearest(data: Mapping[str, Any]) -> str:
    """The known family closest by name and by keys."""
    import difflib

    model_type = str(data.get("model_type") or "")[:60]

    def closeness(family: Family) -> float:
        # A key that only some families have says more than one that nearly all have.
        shared = sum(1 / _RARITY[key] for key in family.keys if key in data)
        overlap = shared / sum(1 / _RARITY[key] for key in family.keys)
        # Keys that other families read and this one would not speak against it.
        overlap += shared / max(sum(1 / _RARITY[key] for key in _RARITY if key in data), 1e-9)
        named = difflib.SequenceMatcher(None, model_type, family.model_type).ratio()
        # The decoder of a multimodal model is what few mean whose config does not say so.
        inner = family.model_type.endswith("_text") and not model_type.endswith("_text")
        return overlap + (named if model_type else 0.0) - (0.2 if inner else 0.0)

    def shared_keys(family: Family) -> int:
        return sum(key in data for key in family.keys)

    best = max(FAMILIES.values(), key=lambda family: (closeness(family), shared_keys(family)))
    advice = (
        f"nearest known family: {best.model_type} (the config has {shared_keys(best)} of its "
        f"{len(best.keys)} typical keys)"
    )
    if not features(data):
        advice += f"; if its layers are the same, set model_type to {best.model_type!r}"
    return f"{advice}; known: {', '.join((*FAMILIES, *TOWERS))}"


_RARITY = {
    key: sum(key in family.keys for family in FAMILIES.values())
    for key in {key for family in FAMILIES.values() for key in family.keys}
}
