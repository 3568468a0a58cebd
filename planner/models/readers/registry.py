"""Which reader understands which config, by ``model_type``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError, UnknownModelError
from planner.models.readers.config import Config
from planner.models.spec import ModelSpec

_LLAMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act",
)  # fmt: skip
_GEMMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim", "hidden_activation", "query_pre_attn_scalar",
)  # fmt: skip
_LATENT = (
    *_LLAMA, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_intermediate_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: its ``model_type``, where its reader is, and how to recognise it."""

    model_type: str
    module: str
    architecture: str
    keys: tuple[str, ...]
    """Keys by which the nearest family of an unknown config is found."""


_FAMILIES = (
    Family("llama", "rotary", "LlamaForCausalLM", _LLAMA),
    Family("mistral", "rotary", "MistralForCausalLM", (*_LLAMA, "sliding_window")),
    Family("qwen2", "rotary", "Qwen2ForCausalLM", (*_LLAMA, "use_sliding_window")),
    Family("qwen3", "rotary", "Qwen3ForCausalLM", (*_LLAMA, "use_sliding_window", "head_dim")),
    Family("phi3", "rotary", "Phi3ForCausalLM", (*_LLAMA, "original_max_position_embeddings")),
    Family("gemma2", "rotary", "Gemma2ForCausalLM", (*_GEMMA, "attn_logit_softcapping")),
    Family("gemma3_text", "rotary", "Gemma3ForCausalLM", (*_GEMMA, "sliding_window_pattern")),
    Family(
        "mixtral", "sparse", "MixtralForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        "qwen3_moe", "sparse", "Qwen3MoeForCausalLM",
        (*_LLAMA, "num_experts", "num_experts_per_tok", "moe_intermediate_size",
         "decoder_sparse_step", "mlp_only_layers"),
    ),
    Family(
        "qwen2_moe", "sparse", "Qwen2MoeForCausalLM",
        (*_LLAMA, "num_experts", "num_experts_per_tok", "moe_intermediate_size",
         "decoder_sparse_step", "shared_expert_intermediate_size"),
    ),
    Family(
        "glm4_moe", "sparse", "Glm4MoeForCausalLM",
        (*_LLAMA, "n_routed_experts", "n_shared_experts", "first_k_dense_replace",
         "moe_intermediate_size", "use_qk_norm"),
    ),
    Family(
        "minimax_m2", "sparse", "MiniMaxM2ForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok", "use_qk_norm"),
    ),
    Family(
        "gpt_oss", "sparse", "GptOssForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok", "swiglu_limit"),
    ),
    Family("deepseek_v2", "deepseek", "DeepseekV2ForCausalLM", _LATENT),
    Family(
        "deepseek_v3", "deepseek", "DeepseekV3ForCausalLM", (*_LATENT, "num_nextn_predict_layers")
    ),
    Family(
        "gpt2", "gpt", "GPT2LMHeadModel",
        ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "activation_function"),
    ),
    Family(
        "gpt_neox", "gpt", "GPTNeoXForCausalLM",
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size", "rotary_pct", "use_parallel_residual", "layer_norm_eps"),
    ),
    Family(
        "opt", "gpt", "OPTForCausalLM",
        ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size",
         "word_embed_proj_dim", "do_layer_norm_before", "activation_function"),
    ),
    Family(
        "bloom", "gpt", "BloomForCausalLM",
        ("hidden_size", "n_layer", "n_head", "vocab_size", "layer_norm_epsilon",
         "apply_residual_connection_post_layernorm"),
    ),
    Family(
        "falcon", "gpt", "FalconForCausalLM",
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "multi_query",
         "parallel_attn", "new_decoder_architecture", "alibi", "bias"),
    ),
    Family(
        "phi", "gpt", "PhiForCausalLM",
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size", "partial_rotary_factor", "layer_norm_eps", "qk_layernorm"),
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _FAMILIES}

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
_META = ("name", "source", "model_type", "architectures")


def read_config(data: Mapping[str, Any], *, where: str, name: str, source: str) -> ModelSpec:
    """A Hugging Face config as a model.

    ``where`` names the config in errors, ``name`` and ``source`` those of the model unless the
    config has its own. Raises :class:`UnknownModelError` for an architecture without a reader and
    :class:`InputError` for values that make no model.
    """
    data = _text_part(data, where)
    family = _family(data, where)
    config = Config(
        data,
        family=family.model_type,
        name=_string(data, "name", name),
        source=_string(data, "source", source),
        where=where,
    )
    for key in _META:
        config.get(key)
    module = importlib.import_module(f"planner.models.readers.{family.module}")
    reader_name = f"read_{family.model_type.removesuffix('_text')}"
    reader: Callable[[Config], ModelSpec] = getattr(module, reader_name)
    try:
        model = reader(config)
    except ValidationError as error:
        raise InputError(f"{where}: {error.errors()[0]['msg']}") from None
    return model.model_copy(
        update={
            "keys_used": config.keys_used,
            "keys_ignored": config.keys_ignored,
            "notes": tuple(config.notes),
        }
    )


def _string(data: Mapping[str, Any], key: str, default: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) and value else default


def _text_part(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The ``text_config`` of a config that has nothing beside it, else ``data``."""
    text = data.get("text_config")
    if not isinstance(text, Mapping) or data.get("model_type") in FAMILIES:
        return data
    towers = any(data.get(key) for key in ("vision_config", "audio_config", "vision_tower"))
    if towers or text.get("model_type") not in FAMILIES:
        raise _unknown({**text, **data}, where)
    inherited = {key: data[key] for key in ("tie_word_embeddings", "name", "source") if key in data}
    return {**inherited, **text}


def _family(data: Mapping[str, Any], where: str) -> Family:
    model_type = data.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        for family in _FAMILIES:
            if family.architecture in _architectures(data):
                return family
    raise _unknown(data, where)


def _architectures(data: Mapping[str, Any]) -> list[str]:
    names = data.get("architectures")
    return [str(name)[:60] for name in names[:5]] if isinstance(names, list) else []


def _unknown(data: Mapping[str, Any], where: str) -> UnknownModelError:
    model_type, architectures = data.get("model_type"), _architectures(data)
    seen = [f"model_type {str(model_type)[:60]!r}"] if model_type is not None else []
    seen += [f"architecture {', '.join(architectures)}"] if architectures else []
    if not seen and not any(key in family.keys for key in data for family in _FAMILIES):
        return UnknownModelError(
            f"{where}: not a model: it has neither 'model_type' nor 'architectures', nor any size "
            "that a model has",
            hint="give a config.json, or dimensions under 'format: megatron_gpt'",
        )
    what = " (".join(seen) + (")" if len(seen) > 1 else "")
    return UnknownModelError(
        f"{where}: no reader for {what or 'a config without model_type and architectures'}; "
        f"{_missing(data)}",
        hint=_nearest(data),
    )


def _missing(data: Mapping[str, Any]) -> str:
    """What the planner lacks to read ``data``, in words."""
    found = _features(data)
    if found:
        return "missing here: " + ", ".join(found)
    if data.get("model_type") is None:
        return "missing in it: 'model_type'"
    return "missing here: a reader that knows which layers this architecture has"


def _features(data: Mapping[str, Any]) -> list[str]:
    """Parts of ``data`` that no reader understands."""
    found = []
    for what, keys in _FEATURES:
        present = [key for key in keys if data.get(key)]
        if present:
            found.append(f"{what} ({', '.join(present)})")
    kinds = data.get("layer_types")
    if isinstance(kinds, list) and not found:
        known = {"full_attention", "sliding_attention"}
        odd = sorted({str(kind)[:40] for kind in kinds} - known)
        found += [f"layers of type {', '.join(odd[:5])}"] if odd else []
    return found


def _nearest(data: Mapping[str, Any]) -> str:
    """The known family closest by name and by keys."""
    import difflib

    model_type = str(data.get("model_type") or "")[:60]

    def closeness(family: Family) -> float:
        # A key that only some families have says more than one that nearly all have.
        shared = sum(1 / _RARITY[key] for key in family.keys if key in data)
        overlap = shared / sum(1 / _RARITY[key] for key in family.keys)
        named = difflib.SequenceMatcher(None, model_type, family.model_type).ratio()
        return overlap + (named if model_type else 0.0)

    def shared_keys(family: Family) -> int:
        return sum(key in data for key in family.keys)

    best = max(_FAMILIES, key=lambda family: (closeness(family), shared_keys(family)))
    advice = (
        f"nearest known family: {best.model_type} (the config has {shared_keys(best)} of its "
        f"{len(best.keys)} typical keys)"
    )
    if not _features(data):
        advice += f"; if its layers are the same, set model_type to {best.model_type!r}"
    return f"{advice}; known: {', '.join(FAMILIES)}"


_RARITY = {
    key: sum(key in family.keys for family in _FAMILIES)
    for key in {key for family in _FAMILIES for key in family.keys}
}
