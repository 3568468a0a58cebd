"""Dense decoders with rotary positions, RMSNorm and a gated MLP: llama and its close relatives.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23).
"""

from __future__ import annotations

from planner.models.readers.config import Config
from planner.models.readers.parts import (
    Stack,
    gated_mlp,
    grouped_attention,
    layer_count,
    sliding_layers,
    stack,
    uniform,
)
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, ModelSpec


def read_llama(config: Config) -> ModelSpec:
    """``attention_bias`` is on q, k, v and out; ``mlp_bias`` on all three matrices."""
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    block = BlockSpec(
        mixer=grouped_attention(config, hidden, qkv_bias=bias, out_bias=bias),
        feed_forward=gated_mlp(config, bias=config.flag("mlp_bias", False)),
    )
    return rotary_model(config, hidden, uniform(block, layer_count(config)), positions=2048)


def read_mistral(config: Config) -> ModelSpec:
    """Sliding window on every layer unless ``sliding_window`` is null; absent, it is 4096."""
    hidden = config.size("hidden_size")
    window = config.optional_size("sliding_window", 4096)
    block = BlockSpec(
        mixer=grouped_attention(config, hidden, kv_default=8, window=window),
        feed_forward=gated_mlp(config),
    )
    return rotary_model(config, hidden, uniform(block, layer_count(config)), positions=131072)


def read_qwen2(config: Config) -> ModelSpec:
    """Bias on q, k and v; an optional window on the layers from ``max_window_layers`` on."""
    hidden = config.size("hidden_size")
    attention = grouped_attention(config, hidden, kv_default=32, qkv_bias=True)
    return _windowed(config, hidden, attention)


def read_qwen3(config: Config) -> ModelSpec:
    """RMSNorm on each head's q and k; no bias unless ``attention_bias``."""
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(
        config,
        hidden,
        kv_default=32,
        head_dim_default=128,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
    )
    return _windowed(config, hidden, attention)


def read_phi3(config: Config) -> ModelSpec:
    """Llama's block; q, k, v and gate, up are stored fused."""
    hidden = config.size("hidden_size")
    attention = grouped_attention(config, hidden, window=config.optional_size("sliding_window"))
    block = BlockSpec(mixer=attention, feed_forward=gated_mlp(config))
    dropout = max(config.rate("resid_pdrop", 0.0), config.rate("embd_pdrop", 0.0)) > 0
    decoder = uniform(block, layer_count(config))
    return rotary_model(config, hidden, decoder, positions=4096, dropout=dropout)


def read_gemma2(config: Config) -> ModelSpec:
    """Four norms per block; every second layer slides, from the first on; scores and logits are
    bounded unless the config says null."""
    return _gemma(config, qk_norm=False, pattern=2, positions=8192, caps=True)


def read_gemma3(config: Config) -> ModelSpec:
    """As gemma2, with q and k norms; every sixth layer sees everything."""
    pattern = config.size("sliding_window_pattern", 6)
    return _gemma(config, qk_norm=True, pattern=pattern, positions=131072, caps=False)


def _gemma(config: Config, *, qk_norm: bool, pattern: int, positions: int, caps: bool) -> ModelSpec:
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(
        config,
        hidden,
        kv_default=4,
        head_dim_default=256,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head" if qk_norm else "none",
    )
    if config.given("attn_logit_softcapping", caps):
        attention = attention.model_copy(update={"softcap": True})
    window = config.optional_size("sliding_window", 4096)
    sliding = sliding_layers(config, layers, lambda index: (index + 1) % pattern != 0)
    mlp = gated_mlp(config, activation_key="hidden_activation", activation="gelu_pytorch_tanh")
    mixers = [_with_window(attention, window if slides else None) for slides in sliding]
    decoder = stack(mixers, [("dense", mlp)] * layers, norms=4)
    model = rotary_model(config, hidden, decoder, positions=positions, tied=True)
    return model.model_copy(update={"logit_softcap": config.given("final_logit_softcapping", caps)})


def _windowed(config: Config, hidden: int, attention: AttentionSpec) -> ModelSpec:
    layers = layer_count(config)
    use = config.flag("use_sliding_window", False)
    window = config.optional_size("sliding_window", 4096) if use else None
    first = config.count("max_window_layers", 28)
    sliding = sliding_layers(config, layers, lambda index: index >= first)
    mixers = [_with_window(attention, window if slides else None) for slides in sliding]
    decoder = stack(mixers, [("dense", gated_mlp(config))] * layers)
    return rotary_model(config, hidden, decoder, positions=32768)


def _with_window(attention: AttentionSpec, window: int | None) -> AttentionSpec:
    return attention.model_copy(update={"window": window})


def rotary_model(
    config: Config,
    hidden: int,
    decoder: Stack,
    *,
    positions: int,
    tied: bool = False,
    dropout: bool = False,
    mtp_modules: int = 0,
    mtp_block: str = "",
) -> ModelSpec:
    """A model with rotary positions and RMSNorm.

    ``positions`` and ``tied`` are the family's defaults of ``max_position_embeddings`` and
    ``tie_word_embeddings``.
    """
    return ModelSpec(
        name=config.name,
        family=config.family,
        source=config.source,
        hidden=hidden,
        vocab=config.size("vocab_size"),
        tied_embeddings=config.flag("tie_word_embeddings", tied),
        norm="rms",
        norm_bias=False,
        max_sequence=config.size("max_position_embeddings", positions),
        dropout=dropout or config.rate("attention_dropout", 0.0) > 0,
        blocks=decoder.blocks,
        layers=decoder.layers,
        mtp=(LayerRun(block=mtp_block, count=mtp_modules),) if mtp_modules else (),
    )
