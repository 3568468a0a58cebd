"""deepseek_v2, deepseek_v3, deepseek_v32, glm_moe_dsa: latent attention, shared experts, MTP.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23), except that
``moe_layer_freq``, which those classes dropped, is read as in the models' own code.
"""

from __future__ import annotations

from planner.models.readers.config import Config
from planner.models.readers.parts import (
    dense_or_routed,
    gated_mlp,
    layer_count,
    mtp_modules,
    routed_experts,
    stack,
)
from planner.models.readers.rotary import rotary_model
from planner.models.spec import (
    BlockSpec,
    LatentAttentionSpec,
    Mixer,
    ModelSpec,
    MoeSpec,
    SparseLatentAttentionSpec,
)


def read_deepseek_v2(config: Config) -> ModelSpec:
    """No MTP modules; every layer routed unless ``first_k_dense_replace``."""
    return _read(config, first_dense=0, shared=2, top_k=None, mtp=0, positions=2048)


def read_deepseek_v3(config: Config) -> ModelSpec:
    """``num_nextn_predict_layers`` MTP modules, each with the block of a layer after the last."""
    return _read(config, first_dense=3, shared=1, top_k=8, mtp=1, positions=4096)


def read_deepseek_v32(config: Config) -> ModelSpec:
    """As deepseek_v3, with an indexer in every layer that picks the keys attended."""
    return _read(
        config, first_dense=3, shared=1, top_k=8, mtp=1, positions=4096, mixer=_indexed(config)
    )


def read_glm_moe_dsa(config: Config) -> ModelSpec:
    """As deepseek_v32, with other sizes; layers that share an indexer are not read."""
    kinds = config.items("indexer_types") or []
    if any(kind != "full" for kind in kinds):
        raise config.error("indexer_types names layers that share an indexer: not read")
    return _read(
        config, first_dense=3, shared=1, top_k=8, mtp=1, positions=202752, mixer=_indexed(config)
    )


def _indexed(config: Config) -> SparseLatentAttentionSpec:
    latent = _latent(config)
    if latent.q_lora_rank is None:
        raise config.error("q_lora_rank is null, and the indexer reads the compressed query")
    return SparseLatentAttentionSpec(
        latent=latent,
        index_heads=config.size("index_n_heads"),
        index_head_dim=config.size("index_head_dim", 128),
        top_k=config.size("index_topk", 2048),
    )


def _latent(config: Config) -> LatentAttentionSpec:
    bias = config.flag("attention_bias", False)
    return LatentAttentionSpec(
        heads=config.size("num_attention_heads"),
        q_lora_rank=config.optional_size("q_lora_rank", 1536),
        kv_lora_rank=config.size("kv_lora_rank", 512),
        qk_nope_head_dim=config.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=config.size("qk_rope_head_dim", 64),
        v_head_dim=config.size("v_head_dim", 128),
        qkv_bias=bias,
        out_bias=bias,
    )


def _read(
    config: Config, *, first_dense: int, shared: int, top_k: int | None, mtp: int, positions: int,
    mixer: Mixer | None = None,
) -> ModelSpec:  # fmt: skip
    config.refuse("mlp_bias", "bias in the MLP and its shared experts")
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    attention = mixer or _latent(config)
    modules = mtp_modules(config, mtp)
    first = config.count("first_k_dense_replace", first_dense)
    step = config.size("moe_layer_freq", 1)
    # An MTP module has the block of a layer after the last.
    routed = [index >= first and index % step == 0 for index in range(layers + (modules > 0))]
    feed_forwards = dense_or_routed(
        routed,
        dense=lambda: gated_mlp(config),
        moe=lambda: _experts(config, shared=shared, top_k=top_k),
    )
    decoder = stack([attention] * layers, feed_forwards[:layers])
    name = ""
    if modules:
        name, feed_forward = feed_forwards[layers]
        decoder.blocks.setdefault(name, BlockSpec(mixer=attention, feed_forward=feed_forward))
    return rotary_model(
        config, hidden, decoder, positions=positions, mtp_modules=modules, mtp_block=name
    )


def _experts(config: Config, *, shared: int, top_k: int | None) -> MoeSpec:
    width = config.size("moe_intermediate_size")
    # A null here means no shared experts in the models' own code, not the default of the class.
    shared = 0 if config.is_null("n_shared_experts") else config.count("n_shared_experts", shared)
    return routed_experts(
        config,
        experts=config.size(config.first("n_routed_experts", "num_local_experts", "num_experts")),
        intermediate=width,
        top_k_default=top_k,
        shared_intermediate=shared * width,
    )
