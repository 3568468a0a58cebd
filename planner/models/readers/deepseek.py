"""deepseek_v2 and deepseek_v3: latent attention, shared experts, dense first layers, MTP.

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
    ModelSpec,
    MoeSpec,
)


def read_deepseek_v2(config: Config) -> ModelSpec:
    """No MTP modules; every layer routed unless ``first_k_dense_replace``."""
    return _read(config, first_dense=0, shared=2, top_k=None, mtp=0, positions=2048)


def read_deepseek_v3(config: Config) -> ModelSpec:
    """``num_nextn_predict_layers`` MTP modules, each with the block of a layer after the last."""
    return _read(config, first_dense=3, shared=1, top_k=8, mtp=1, positions=4096)


def _read(
    config: Config, *, first_dense: int, shared: int, top_k: int | None, mtp: int, positions: int
) -> ModelSpec:
    config.refuse("mlp_bias", "bias in the MLP and its shared experts")
    hidden = config.size("hidden_size")
    layers = layer_count(config)
    bias = config.flag("attention_bias", False)
    attention = LatentAttentionSpec(
        heads=config.size("num_attention_heads"),
        q_lora_rank=config.optional_size("q_lora_rank", 1536),
        kv_lora_rank=config.size("kv_lora_rank", 512),
        qk_nope_head_dim=config.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=config.size("qk_rope_head_dim", 64),
        v_head_dim=config.size("v_head_dim", 128),
        qkv_bias=bias,
        out_bias=bias,
    )
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
