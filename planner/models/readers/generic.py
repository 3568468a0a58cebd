"""A decoder of an unseen architecture, read by the usual keys; refused where they leave doubt.

What is read: rotary (or no) positions, RMSNorm or LayerNorm, grouped-query attention, a gated or
plain MLP, a mixture of experts in every layer or after some dense ones. Every key of the config is
then one of three: used, known not to change any tensor (token ids, rotary base, scales, ...), or
unknown. An unknown key that is set, a size that is absent, or an MLP whose number of matrices the
activation does not tell is an error: a count would be a guess. A bias or a norm that an
architecture has without a key for it is missed; such vectors are less than a thousandth of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError, UnknownModelError
from planner.models.readers import unknown
from planner.models.readers.config import Config
from planner.models.readers.parts import (
    Stack,
    dense_or_routed,
    layer_count,
    per_head,
    routed_experts,
    sliding_layers,
)
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LayerRun,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)

NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_key_value_heads", "n_kv_heads", "num_kv_heads", "num_query_groups",
    ),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_width": ("moe_intermediate_size", "expert_intermediate_size"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
}  # fmt: skip
"""The usual names of one value; the first that a config holds is read."""
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GATED = ("silu", "swish", "swiglu", "geglu")
"""Activations that stand for three matrices wherever they are used in published decoders."""
PLAIN = ("relu", "gelu_new", "gelu_fast")
"""Activations that stand for two. Squared ReLU does in most, but BitNet gates it."""
DROPOUT = (
    "dropout", "hidden_dropout", "hidden_dropout_prob", "attention_dropout",
    "attention_probs_dropout_prob", "resid_dropout", "attn_dropout", "embedding_dropout",
    "resid_pdrop", "attn_pdrop", "embd_pdrop",
)  # fmt: skip
"""Rates under their usual names: any above zero keeps masks."""

HARMLESS = re.compile(
    r"""
    .*_token_(id|index|ids) | .*token_id | rope_.* | rotary_.* | .*rope.* | partial_rotary_factor
    | initializer.* | init_.* | .*use_cache.* | cache_.* | torch_dtype | dtype
    | transformers_version
    | .*_eps | .*epsilon | .*_scale | .*_scaling | .*_scaling_factor | .*multiplier | .*softcap.*
    | .*_coef | .*_alpha | .*dropout.* | .*pdrop | pretraining_tp | auto_map | quantization_config
    | causal | is_causal
    | _name_or_path | id2label | label2id | torchscript | return_dict | output_.* | problem_type
    | norm_topk_prob | norm_top_k_prob | scoring_func | score_function | topk_method | n_group
    | topk_group | .*gating.* | max_position_embeddings | max_sequence_length | seq_length
    | model_max_length | n_positions | original_max_position_embeddings | attn_implementation
    | _attn_implementation | .*attention_implementation | use_bfloat16 | tokenizer_class | task.*
    | max_window_layers | chunk_size_feed_forward | is_decoder | logits_to_keep | num_logits_to_keep
    | .*_loss.* | router_jitter_noise | ep_size | .*_std | unsloth.* | .*flash.* | fused_.*
    """,
    re.VERBOSE,
)
"""Keys that change no tensor of a decoder."""


def read_unknown(data: Mapping[str, Any], *, where: str, name: str, source: str) -> ModelSpec:
    """``data`` by its usual keys. Raises :class:`UnknownModelError` with what is in doubt."""
    config = Config(data, family=str(data.get("model_type") or "decoder")[:60], name=name,
                    source=source, where=where)  # fmt: skip
    for key in ("name", "source", "model_type", "architectures"):
        config.get(key)
    doubts = unknown.features(data) or _absent(data)
    if doubts:
        raise unknown.error(data, where, doubts)
    model = _read(config)
    strange = [
        key for key in config.keys_ignored if not HARMLESS.fullmatch(key) and _is_set(data[key])
    ]
    if strange:
        shown = ", ".join(repr(key[:40]) for key in strange[:6])
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise unknown.error(
            data, where, [f"what these keys do to the parameter count: {shown}{more}"]
        )
    return model.model_copy(
        update={
            "keys_used": config.keys_used,
            "keys_ignored": config.keys_ignored,
            "notes": (
                f"{config.family}: an unknown architecture, read by its usual keys (catalog model "
                "shows which); a bias or norm that it has without a key is missed",
                *config.notes,
            ),
        }
    )


def _is_set(value: object) -> bool:
    return value not in (None, False, 0, "", [], {})


def _absent(data: Mapping[str, Any]) -> list[str]:
    missing = [
        key for key in REQUIRED if all(data.get(name) is None for name in NAMES.get(key, (key,)))
    ]
    if data.get("tie_word_embeddings") is None:
        missing.append("tie_word_embeddings")
    if not any(data.get(key) is not None for key in NAMES["activation"]):
        missing.append("hidden_act")
    return [repr(key) for key in missing]


def _size(config: Config, value: str) -> int:
    return config.size(config.first(*NAMES[value]))


def _read(config: Config) -> ModelSpec:
    hidden = _size(config, "hidden_size")
    layers = layer_count(config, config.first(*NAMES["num_hidden_layers"]))
    attention = _attention(config, hidden)
    routed, modules = _routed(config, layers), config.count("num_nextn_predict_layers", 0)
    feed_forwards = dense_or_routed(
        [*routed, *(routed[-1:] if modules else [])],
        dense=lambda: _mlp(config),
        moe=lambda: _experts(config),
    )
    windows = _windows(config, layers)
    decoder = Stack()
    for window, (name, feed_forward) in zip(windows, feed_forwards, strict=False):
        suffix = "" if len(set(windows)) == 1 else "_full" if window is None else "_sliding"
        mixer = attention.model_copy(update={"window": window})
        decoder.add(name + suffix, BlockSpec(mixer=mixer, feed_forward=feed_forward))
    layer_norm = not _is_set(config.get("rms_norm_eps")) and any(
        config.get(key) is not None
        for key in ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
    )
    return ModelSpec(
        name=config.name,
        family=config.family,
        source=config.source,
        hidden=hidden,
        vocab=config.size("vocab_size"),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        norm="layer" if layer_norm else "rms",
        norm_bias=layer_norm,
        max_sequence=config.optional_size("max_position_embeddings"),
        dropout=max(config.rate(key, 0.0) for key in DROPOUT) > 0,
        blocks=decoder.blocks,
        layers=decoder.layers,
        mtp=(LayerRun(block=decoder.names[-1], count=modules),) if modules else (),
    )


def _attention(config: Config, hidden: int) -> AttentionSpec:
    heads = _size(config, "num_attention_heads")
    key = config.first(*NAMES["num_key_value_heads"])
    kv_heads = config.optional_size(key) or heads
    if heads % kv_heads:
        raise config.error(f"{heads} attention heads are not a multiple of {key} = {kv_heads}")
    bias = config.flag(config.first("attention_bias", "use_bias", "bias"), False)
    norm = config.flag(config.first("use_qk_norm", "qk_norm", "qk_layernorm"), False)
    head_dim = config.optional_size("head_dim") or per_head(
        config, hidden, heads, keys=("hidden_size", "num_attention_heads")
    )
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias or config.flag(config.first("qkv_bias", "attention_qkv_bias"), False),
        out_bias=bias or config.flag("attention_out_bias", False),
        qk_norm="per_head" if norm else "none",
    )


def _windows(config: Config, layers: int) -> list[int | None]:
    """The window of each layer: where ``layer_types`` says, else on all or none."""
    window = config.optional_size("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    if window is None:
        slides = sliding_layers(config, layers, lambda _: False)
        if any(slides) and config.get("use_sliding_window") is not False:
            raise config.error(
                "layer_types has sliding_attention, and nothing says how wide its window is",
                hint="add sliding_window: TOKENS",
            )
        return [None] * layers
    slides = sliding_layers(config, layers, lambda _: True)
    if config.get("layer_types") is None:
        config.notes.append("sliding_window without layer_types: taken to be on every layer")
    return [window if each else None for each in slides]


def _activation(config: Config) -> str:
    return config.text(config.first(*NAMES["activation"]), "silu")


def _mlp(config: Config) -> MlpSpec:
    activation = _activation(config)
    stated = config.get(config.first("mlp_gated", "gated_mlp", "use_glu", "glu"))
    if isinstance(stated, bool):
        gated = stated
    elif activation in GATED + PLAIN:
        gated = activation in GATED
    else:
        raise UnknownModelError(
            f"{config.where}: an MLP with activation {activation[:40]!r} has two or three matrices "
            f"in different architectures, and nothing says which {config.family} has",
            hint="add mlp_gated: true (three matrices) or false (two)",
        )
    return MlpSpec(
        intermediate=_size(config, "intermediate_size"),
        gated=gated,
        bias=config.flag(config.first("mlp_bias", "use_bias", "bias"), False),
        activation=activation,
    )


def _routed(config: Config, layers: int) -> list[bool]:
    """Which layers are routed: all from ``first_k_dense_replace`` on, every so many."""
    key = config.first(*NAMES["experts"])
    experts = config.get(key)
    if experts in (None, 0, 1):
        return [False] * layers
    if any(config.get(name) is not None for name in ("mlp_only_layers", "first_k_dense_replace")):
        # The config says which layers are dense, so their width belongs to those, if any.
        config.get(config.first(*NAMES["intermediate_size"]))
    first = config.count("first_k_dense_replace", 0)
    step = config.size(config.first("decoder_sparse_step", "moe_layer_freq"), 1)
    dense = set(config.items("mlp_only_layers") or [])
    if step != 1:
        raise config.error(
            f"experts on every {step}. layer: which ones is not the same in all architectures",
            hint="list the dense layers in mlp_only_layers, with a step of 1",
        )
    return [index >= first and index not in dense for index in range(layers)]


def _experts(config: Config) -> MoeSpec:
    width_key = config.first(*NAMES["expert_width"], *NAMES["intermediate_size"])
    width = config.size(width_key)
    shared = config.count("shared_expert_intermediate_size", 0)
    if not shared:
        shared = config.count(config.first("n_shared_experts", "num_shared_experts"), 0) * width
    if _activation(config) not in GATED:
        raise InputError(
            f"{config.where}: experts with activation {_activation(config)[:40]!r}: nothing says "
            "whether they have two or three matrices",
            hint="give the model in the planner's own schema (planner schema model)",
        )
    return routed_experts(
        config,
        experts=_size(config, "experts"),
        intermediate=width,
        top_k_key=config.first(*NAMES["top_k"]),
        shared_intermediate=shared,
    )
