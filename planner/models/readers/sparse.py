"""Mixtures of experts with grouped-query attention: mixtral, qwen2_moe, qwen3_moe and others.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23).
"""

from __future__ import annotations

from planner.models.readers.config import Config
from planner.models.readers.parts import (
    dense_or_routed,
    gated_mlp,
    grouped_attention,
    layer_count,
    mtp_modules,
    routed_experts,
    sliding_layers,
    stack,
    uniform,
)
from planner.models.readers.rotary import rotary_model
from planner.models.spec import AttentionSpec, BlockSpec, ModelSpec


def read_mixtral(config: Config) -> ModelSpec:
    """Every layer routed; the experts have ``intermediate_size``."""
    hidden = config.size("hidden_size")
    window = config.optional_size("sliding_window")
    moe = routed_experts(
        config,
        experts=config.size(config.first("num_local_experts", "num_experts"), 8),
        intermediate=config.size("intermediate_size"),
        top_k_default=2,
    )
    block = BlockSpec(
        mixer=grouped_attention(config, hidden, kv_default=8, window=window), feed_forward=moe
    )
    return rotary_model(config, hidden, uniform(block, layer_count(config)), positions=131072)


def read_qwen3_moe(config: Config) -> ModelSpec:
    """Dense layers by ``mlp_only_layers`` and ``decoder_sparse_step``; no shared experts."""
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(
        config, hidden, kv_default=4, qkv_bias=bias, out_bias=bias, qk_norm="per_head",
        window=_qwen_window(config),
    )  # fmt: skip
    return _qwen_moe(config, hidden, attention, experts=128, top_k=8)


def read_qwen2_moe(config: Config) -> ModelSpec:
    """As qwen3_moe, with bias on q, k and v and a gated shared expert."""
    hidden = config.size("hidden_size")
    config.refuse("use_sliding_window", "windows on every second layer")
    attention = grouped_attention(
        config, hidden, kv_default=16, qkv_bias=config.flag("qkv_bias", True)
    )
    shared = config.size("shared_expert_intermediate_size")
    return _qwen_moe(config, hidden, attention, experts=60, top_k=4, shared=shared)


def read_glm4_moe(config: Config) -> ModelSpec:
    """Dense layers first; ungated shared experts; ``attention_bias`` on q, k and v only."""
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    first = config.count("first_k_dense_replace", 1)
    attention = grouped_attention(
        config, hidden, kv_default=8, qkv_bias=config.flag("attention_bias", False),
        qk_norm="per_head" if config.flag("use_qk_norm", False) else "none",
    )  # fmt: skip
    width = config.size("moe_intermediate_size")
    modules = mtp_modules(config, 1)
    # An MTP module has the block of a layer after the last.
    feed_forwards = dense_or_routed(
        [index >= first for index in range(layers + 1)],
        dense=lambda: gated_mlp(config),
        moe=lambda: routed_experts(
            config,
            experts=config.size(config.first("n_routed_experts", "num_local_experts")),
            intermediate=width,
            top_k_default=8,
            shared_intermediate=config.count("n_shared_experts", 1) * width,
        ),
    )
    decoder = stack([attention] * layers, feed_forwards[:layers])
    name, feed_forward = feed_forwards[layers]
    if modules:
        decoder.blocks.setdefault(name, BlockSpec(mixer=attention, feed_forward=feed_forward))
    return rotary_model(
        config, hidden, decoder, positions=131072, mtp_modules=modules, mtp_block=name
    )


def read_minimax_m2(config: Config) -> ModelSpec:
    """Every layer routed; RMSNorm over all of q and all of k."""
    hidden = config.size("hidden_size")
    attention = grouped_attention(
        config, hidden, kv_default=8, head_dim_default=128, qk_norm="full"
    )
    moe = routed_experts(
        config,
        experts=config.size(config.first("num_local_experts", "num_experts"), 256),
        intermediate=config.size("intermediate_size"),
        top_k_default=8,
    )
    if config.get("use_mtp") and config.get("num_mtp_modules"):
        config.notes.append("MTP modules are left out: their layers are not in the public model")
    block = BlockSpec(mixer=attention, feed_forward=moe)
    return rotary_model(config, hidden, uniform(block, layer_count(config)), positions=196608)


def read_gpt_oss(config: Config) -> ModelSpec:
    """Bias everywhere, attention sinks, a window on every second layer from the first on."""
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    bias = config.flag("attention_bias", True)
    attention = grouped_attention(
        config, hidden, kv_default=8, head_dim_default=64, qkv_bias=bias, out_bias=bias, sinks=True
    )
    moe = routed_experts(
        config,
        experts=config.size(config.first("num_local_experts", "num_experts"), 128),
        intermediate=config.size("intermediate_size"),
        top_k_key=config.first("num_experts_per_tok", "experts_per_token"),
        top_k_default=4,
        expert_bias=True,
        router_bias=True,
    )
    window = config.optional_size("sliding_window", 128)
    sliding = sliding_layers(config, layers, lambda index: index % 2 == 0)
    mixers = [
        attention.model_copy(update={"window": window if slides else None}) for slides in sliding
    ]
    decoder = stack(mixers, [("moe", moe)] * layers)
    return rotary_model(config, hidden, decoder, positions=131072)


def _qwen_window(config: Config) -> int | None:
    window = config.optional_size("sliding_window", 4096)
    return window if config.flag("use_sliding_window", False) else None


def _qwen_moe(
    config: Config,
    hidden: int,
    attention: AttentionSpec,
    *,
    experts: int,
    top_k: int,
    shared: int = 0,
) -> ModelSpec:
    layers = layer_count(config)
    experts = config.count(config.first("num_experts", "num_local_experts"), experts)
    step = config.size("decoder_sparse_step", 1)
    dense = config.items("mlp_only_layers") or []
    routed = [
        experts > 0 and index not in dense and (index + 1) % step == 0 for index in range(layers)
    ]
    feed_forwards = dense_or_routed(
        routed,
        dense=lambda: gated_mlp(config),
        moe=lambda: routed_experts(
            config,
            experts=experts,
            intermediate=config.size("moe_intermediate_size"),
            top_k_default=top_k,
            shared_intermediate=shared,
            shared_gate=shared > 0,
        ),
    )
    decoder = stack([attention] * layers, feed_forwards)
    return rotary_model(config, hidden, decoder, positions=32768)
