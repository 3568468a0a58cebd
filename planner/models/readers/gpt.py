"""Decoders with LayerNorm and a two-matrix MLP: gpt2, gpt_neox, opt, bloom, falcon, phi.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23).
"""

from __future__ import annotations

from planner.errors import UnsupportedError
from planner.models.readers.config import Config
from planner.models.readers.parts import grouped_attention, layer_count, per_head, uniform
from planner.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec


def read_gpt2(config: Config) -> ModelSpec:
    """Learned positions, tied embeddings, MLP of 4 x ``n_embd`` unless ``n_inner``."""
    config.refuse("add_cross_attention", "cross attention")
    hidden = _either(config, "n_embd", "hidden_size")
    heads = _either(config, "n_head", "num_attention_heads")
    layers = layer_count(config, config.first("n_layer", "num_hidden_layers"))
    positions = config.size(config.first("n_positions", "max_position_embeddings", "n_ctx"), 1024)
    block = BlockSpec(
        mixer=_multi_head(config, hidden, heads, keys=("n_embd", "n_head")),
        feed_forward=_mlp(
            config.optional_size("n_inner") or 4 * hidden,
            config.text("activation_function", "gelu_new"),
        ),
    )
    rates = [config.rate(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    return _model(
        config, hidden, block, layers, tied=True, positions=positions, learned=positions,
        dropout=max(rates) > 0,
    )  # fmt: skip


def read_gpt_neox(config: Config) -> ModelSpec:
    """Rotary positions; attention and MLP in parallel unless ``use_parallel_residual`` is false."""
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    bias = config.flag("attention_bias", True)
    block = BlockSpec(
        mixer=_multi_head(config, hidden, heads, bias=bias),
        feed_forward=_mlp(config.size("intermediate_size"), config.text("hidden_act", "gelu")),
        parallel=config.flag("use_parallel_residual", True),
    )
    dropout = max(config.rate("hidden_dropout", 0.0), config.rate("attention_dropout", 0.0)) > 0
    return _model(config, hidden, block, layer_count(config), positions=2048, dropout=dropout)


def read_opt(config: Config) -> ModelSpec:
    """Learned positions with 2 rows more than the sequence; embeddings may be narrower."""
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    bias = config.flag("enable_bias", True)
    if not config.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedError(
            f"{config.where}: layer_norm_elementwise_affine = False asks for norms without "
            "weights, which are not modelled"
        )
    positions = config.size("max_position_embeddings", 2048)
    block = BlockSpec(
        mixer=_multi_head(config, hidden, heads, bias=bias),
        feed_forward=_mlp(
            config.size("ffn_dim"), config.text("activation_function", "relu"), bias=bias
        ),
    )
    before = config.flag("do_layer_norm_before", True)
    width = config.optional_size("word_embed_proj_dim") or hidden
    dropout = max(config.rate("dropout", 0.1), config.rate("attention_dropout", 0.0)) > 0
    model = _model(
        config, hidden, block, layer_count(config), tied=True, positions=positions,
        learned=positions + 2, dropout=dropout,
    )  # fmt: skip
    final_norm = before and not config.flag("_remove_final_layer_norm", False)
    return model.model_copy(
        update={
            "embedding_dim": width if width != hidden else None,
            "final_norm": final_norm,
        }
    )


def read_bloom(config: Config) -> ModelSpec:
    """ALiBi, a norm after the embedding, MLP of 4 x hidden, tied embeddings."""
    hidden = _either(config, "hidden_size", "n_embed")
    heads = _either(config, "n_head", "num_attention_heads")
    layers = layer_count(config, config.first("n_layer", "num_hidden_layers"))
    block = BlockSpec(
        mixer=_multi_head(config, hidden, heads, keys=("hidden_size", "n_head"), alibi=True),
        feed_forward=_mlp(4 * hidden, "gelu"),
    )
    dropout = max(config.rate("hidden_dropout", 0.0), config.rate("attention_dropout", 0.0)) > 0
    sequence = config.optional_size("seq_length")
    model = _model(
        config, hidden, block, layers, tied=True, positions=sequence or 2048, dropout=dropout
    )
    return model.model_copy(update={"embedding_norm": True})


def read_falcon(config: Config) -> ModelSpec:
    """Multi-query, or grouped-query if ``new_decoder_architecture``; MLP in parallel."""
    hidden = config.size(config.first("hidden_size", "n_embed"))
    heads = _either(config, "num_attention_heads", "n_head")
    layers = layer_count(config, config.first("num_hidden_layers", "n_layer"))
    head_dim = per_head(config, hidden, heads, keys=("hidden_size", "num_attention_heads"))
    new = config.flag("new_decoder_architecture", False)
    multi_query = config.flag("multi_query", True)
    given = config.optional_size("num_kv_heads") or heads
    kv_heads = given if new else 1 if multi_query else heads
    if heads % kv_heads:
        raise config.error(
            f"num_attention_heads = {heads} is not a multiple of num_kv_heads = {kv_heads}"
        )
    bias = config.flag("bias", False)
    parallel = config.flag("parallel_attn", True)
    norms = config.size("num_ln_in_parallel_attn", 2 if new else 1) if parallel else 2
    block = BlockSpec(
        mixer=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            alibi=config.flag("alibi", False),
        ),
        feed_forward=_mlp(
            config.optional_size("ffn_hidden_size") or 4 * hidden,
            config.text("activation", "gelu"),
            bias=bias,
        ),
        norms=2 if norms == 2 else 1,
        parallel=parallel,
    )
    dropout = max(config.rate("hidden_dropout", 0.0), config.rate("attention_dropout", 0.0)) > 0
    return _model(config, hidden, block, layers, tied=True, positions=2048, dropout=dropout)


def read_phi(config: Config) -> ModelSpec:
    """One norm for attention and MLP in parallel; bias everywhere, the LM head too."""
    config.refuse("qk_layernorm", "LayerNorm on q and k")
    hidden = config.size("hidden_size")
    block = BlockSpec(
        mixer=grouped_attention(config, hidden, qkv_bias=True, out_bias=True),
        feed_forward=_mlp(config.size("intermediate_size"), config.text("hidden_act", "gelu_new")),
        norms=1,
        parallel=True,
    )
    dropout = max(config.rate("resid_pdrop", 0.0), config.rate("embd_pdrop", 0.0)) > 0
    model = _model(config, hidden, block, layer_count(config), positions=2048, dropout=dropout)
    return model.model_copy(update={"head_bias": True})


def _either(config: Config, key: str, other: str) -> int:
    return config.size(config.first(key, other))


def _multi_head(
    config: Config,
    hidden: int,
    heads: int,
    *,
    bias: bool = True,
    keys: tuple[str, str] = ("hidden_size", "num_attention_heads"),
    alibi: bool = False,
) -> AttentionSpec:
    head_dim = per_head(config, hidden, heads, keys=keys)
    return AttentionSpec(
        heads=heads, kv_heads=heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias, alibi=alibi
    )


def _mlp(intermediate: int, activation: str, *, bias: bool = True) -> MlpSpec:
    return MlpSpec(intermediate=intermediate, gated=False, bias=bias, activation=activation)


def _model(
    config: Config,
    hidden: int,
    block: BlockSpec,
    layers: int,
    *,
    positions: int,
    tied: bool = False,
    learned: int = 0,
    dropout: bool = False,
) -> ModelSpec:
    """A model with LayerNorm; ``learned`` is the number of rows of its position table."""
    decoder = uniform(block, layers)
    return ModelSpec(
        name=config.name,
        family=config.family,
        source=config.source,
        hidden=hidden,
        vocab=config.size("vocab_size"),
        tied_embeddings=config.flag("tie_word_embeddings", tied),
        norm="layer",
        norm_bias=True,
        position_embeddings=learned,
        max_sequence=positions if learned else config.size("max_position_embeddings", positions),
        dropout=dropout,
        blocks=decoder.blocks,
        layers=decoder.layers,
    )
