"""Decoders whose layers differ in attention and feed-forward by position: llama4, gemma4.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23).
"""

from __future__ import annotations

from planner.models.readers.config import Config
from planner.models.readers.parts import (
    Stack,
    gated_mlp,
    grouped_attention,
    layer_count,
    routed_experts,
    sliding_layers,
)
from planner.models.readers.rotary import rotary_model
from planner.models.spec import AttentionSpec, BlockSpec, FeedForward, MlpSpec, ModelSpec, MoeSpec


def read_llama4(config: Config) -> ModelSpec:
    """Chunked attention with positions on three layers of four, full attention without on the
    fourth; experts on every ``interleave_moe_layer_step``-th layer, one shared beside them."""
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    bias = config.flag("attention_bias", False)
    # Queries and keys are normed without weights; that is priced as a norm by nobody.
    config.flag("use_qk_norm", True)
    attention = grouped_attention(
        config, hidden, kv_default=8, head_dim_default=128, qkv_bias=bias, out_bias=bias
    )
    chunk = config.optional_size("attention_chunk_size", 8192)
    local = _chunked_layers(config, layers)
    width = config.size("intermediate_size", 8192)
    experts = config.size(config.first("num_local_experts", "num_experts"), 16)
    moe = routed_experts(
        config, experts=experts, intermediate=width, top_k_default=1, shared_intermediate=width
    )
    dense = MlpSpec(
        intermediate=config.size("intermediate_size_mlp", 16384),
        gated=True,
        activation=config.text("hidden_act", "silu"),
    )
    step = config.size("interleave_moe_layer_step", 1)
    listed = config.items("moe_layers")
    routed = set(range(step - 1, layers, step)) if listed is None else set(listed)
    decoder = Stack()
    for index, is_local in enumerate(local):
        mixer = attention.model_copy(
            update={"chunk": chunk if is_local else None, "rotary": is_local}
        )
        feed_forward: FeedForward = moe if index in routed else dense
        name = f"{'moe' if index in routed else 'dense'}_{'chunked' if is_local else 'full'}"
        decoder.add(name, BlockSpec(mixer=mixer, feed_forward=feed_forward))
    return rotary_model(config, hidden, decoder, positions=131072)


def _chunked_layers(config: Config, layers: int) -> list[bool]:
    """Which layers attend in chunks: ``layer_types``, else those that have positions."""
    kinds = config.items("layer_types")
    if kinds is not None:
        known = {"chunked_attention": True, "full_attention": False}
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise config.error(f"layer_types must name {' or '.join(known)} for {layers} layers")
        return [known[kind] for kind in kinds]
    listed = config.items("no_rope_layers")
    if listed:
        if len(listed) < layers:
            raise config.error(f"no_rope_layers has {len(listed)} entries for {layers} layers")
        return [bool(flag) for flag in listed[:layers]]
    interval = config.size("no_rope_layer_interval", 4)
    return [(index + 1) % interval != 0 for index in range(layers)]


def read_gemma4(config: Config) -> ModelSpec:
    """Five sliding layers, then a full one with wider heads whose values are its keys; with
    ``enable_moe_block`` a mixture beside each dense MLP, each with norms of its own."""
    config.refuse("hidden_size_per_layer_input", "embeddings per layer", unless=0)
    config.refuse("num_kv_shared_layers", "layers that share keys and values", unless=0)
    config.refuse("use_double_wide_mlp", "MLPs of twice the width")
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    window = config.size("sliding_window", 512)
    sliding = list(sliding_layers(config, layers, lambda index: (index + 1) % 6 != 0))
    sliding[-1] = False
    local = grouped_attention(
        config, hidden, kv_default=4, head_dim_default=256, qk_norm="per_head", window=window,
        qkv_bias=config.flag("attention_bias", False),
        out_bias=config.flag("attention_bias", False),
    )  # fmt: skip
    feed_forward = _gemma4_feed_forward(config)
    norms = 7 if isinstance(feed_forward, MoeSpec) else 4
    kind = "moe" if isinstance(feed_forward, MoeSpec) else "dense"
    decoder = Stack()
    for slides in sliding:
        name, mixer = ("sliding", local) if slides else ("full", _gemma4_full(config, local))
        decoder.add(
            f"{kind}_{name}", BlockSpec(mixer=mixer, feed_forward=feed_forward, norms=norms)
        )
    model = rotary_model(config, hidden, decoder, positions=131072, tied=True)
    capped = config.given("final_logit_softcapping", False)
    return model.model_copy(update={"logit_softcap": capped})


def _gemma4_full(config: Config, local: AttentionSpec) -> AttentionSpec:
    tied_kv = config.flag("attention_k_eq_v", False)
    kv_heads = config.optional_size("num_global_key_value_heads") if tied_kv else None
    return local.model_copy(
        update={
            "head_dim": config.size("global_head_dim", 512),
            "kv_heads": kv_heads or local.kv_heads,
            "tied_kv": tied_kv,
            "window": None,
        }
    )


def _gemma4_feed_forward(config: Config) -> FeedForward:
    if not config.flag("enable_moe_block", False):
        return gated_mlp(config, activation_key="hidden_activation")
    moe = routed_experts(
        config,
        experts=config.size("num_experts"),
        intermediate=config.size("moe_intermediate_size"),
        top_k_key="top_k_experts",
        shared_intermediate=config.size("intermediate_size"),
    )
    activation = config.text("hidden_activation", "gelu_pytorch_tanh")
    return moe.model_copy(update={"activation": activation, "router_scales": True})
