"""Vision towers by family: qwen2_vl, qwen3_vl (and qwen3_5), gemma4, llama4.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23). ``hidden``
is the decoder's width.
"""

from __future__ import annotations

from planner.models.readers.config import MAX_LAYERS, Config
from planner.models.readers.parts import per_head
from planner.models.spec import AttentionSpec, BlockSpec, MlpSpec, ProjectorSpec, VisionSpec


def read_qwen2_vl(config: Config, hidden: int) -> VisionSpec:
    """LayerNorm blocks with bias; patches of two frames; one merger of 2 x 2 patches."""
    width = config.size("embed_dim", 1280)
    ratio = config.size("mlp_ratio", 4)
    mlp = MlpSpec(
        intermediate=ratio * width, gated=False, bias=True,
        activation=config.text("hidden_act", "quick_gelu"),
    )  # fmt: skip
    merged = width * config.size("spatial_merge_size", 2) ** 2
    out = config.size("hidden_size", hidden)
    if out != hidden:
        raise config.error(f"hidden_size = {out}, and the decoder's is {hidden}")
    return VisionSpec(
        hidden=width,
        layers=config.size("depth", 32, limit=MAX_LAYERS),
        block=BlockSpec(mixer=_attention(config, width, "num_heads"), feed_forward=mlp),
        norm="layer",
        norm_bias=True,
        patch_inputs=_patch(config, size=14),
        patch_bias=False,
        patches_per_token=config.size("spatial_merge_size", 2) ** 2,
        projectors=(ProjectorSpec(inputs=merged, widths=(merged, out), norm=width),),
    )


def read_qwen3_vl(config: Config, hidden: int) -> VisionSpec:
    """As qwen2_vl, with learned positions, and mergers also of the layers that
    ``deepstack_visual_indexes`` names."""
    width = config.size("hidden_size", 1152)
    mlp = MlpSpec(
        intermediate=config.size("intermediate_size", 4304), gated=False, bias=True,
        activation=config.text("hidden_act", "gelu_pytorch_tanh"),
    )  # fmt: skip
    square = config.size("spatial_merge_size", 2) ** 2
    merged, out = width * square, config.size("out_hidden_size", hidden)
    if out != hidden:
        raise config.error(f"out_hidden_size = {out}, and the decoder's hidden_size is {hidden}")
    deep = len(config.items("deepstack_visual_indexes") or [])
    projectors = [ProjectorSpec(inputs=merged, widths=(merged, out), norm=width)]
    if deep:
        # Their norm is over the merged patches.
        projectors.append(
            ProjectorSpec(inputs=merged, widths=(merged, out), norm=merged, count=deep)
        )
    return VisionSpec(
        hidden=width,
        layers=config.size("depth", 27, limit=MAX_LAYERS),
        block=BlockSpec(mixer=_attention(config, width, "num_heads"), feed_forward=mlp),
        norm="layer",
        norm_bias=True,
        patch_inputs=_patch(config, size=16),
        patch_bias=True,
        positions=config.size("num_position_embeddings", 2304),
        patches_per_token=square,
        projectors=tuple(projectors),
    )


def read_gemma4(config: Config, hidden: int) -> VisionSpec:
    """RMSNorm blocks without bias and with four norms; positions per axis; average pooling."""
    config.refuse("use_clipped_linears", "clipped linear layers")
    width = config.size("hidden_size", 768)
    heads = config.size("num_attention_heads", 12)
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", 64),
        qk_norm="per_head",
        causal=False,
    )
    mlp = MlpSpec(
        intermediate=config.size("intermediate_size", 3072), gated=True,
        activation=config.text("hidden_activation", "gelu_pytorch_tanh"),
    )  # fmt: skip
    patch = config.size("patch_size", 16)
    return VisionSpec(
        hidden=width,
        layers=config.size("num_hidden_layers", 16, limit=MAX_LAYERS),
        block=BlockSpec(mixer=mixer, feed_forward=mlp, norms=4),
        norm="rms",
        norm_bias=False,
        patch_inputs=3 * patch**2,
        patch_bias=False,
        positions=2 * config.size("position_embedding_size", 10240),
        patches_per_token=config.size("pooling_kernel_size", 3) ** 2,
        projectors=(ProjectorSpec(inputs=width, widths=(hidden,), bias=False),),
    )


def read_llama4(config: Config, hidden: int) -> VisionSpec:
    """LayerNorm blocks with bias, a class token and learned positions; pixel shuffle, two-layer
    adapter, projection."""
    config.refuse("multi_modal_projector_bias", "a bias in the projector")
    width = config.size("hidden_size", 768)
    mlp = MlpSpec(
        intermediate=config.size("intermediate_size", 5632), gated=False, bias=True,
        activation=config.text("hidden_act", "gelu"),
    )  # fmt: skip
    patch = config.size("patch_size", 14)
    image = config.size("image_size", 448)
    ratio = config.rate("pixel_shuffle_ratio", 0.5)
    if not ratio or round(1 / ratio) ** 2 != round(1 / ratio**2):
        raise config.error(f"pixel_shuffle_ratio = {ratio}, and must be one over a whole number")
    inner, out = config.size("projector_input_dim", 4096), config.size("projector_output_dim", 4096)
    shuffled = config.size("intermediate_size", 5632)
    top = config.size("vision_output_dim", 7680)
    adapter = ProjectorSpec(inputs=shuffled, widths=(inner,), bias=False)
    second = ProjectorSpec(inputs=out, widths=(out,), bias=False)
    return VisionSpec(
        hidden=width,
        layers=config.size("num_hidden_layers", 34, limit=MAX_LAYERS),
        block=BlockSpec(mixer=_attention(config, width, "num_attention_heads"), feed_forward=mlp),
        norm="layer",
        norm_bias=True,
        patch_inputs=config.size("num_channels", 3) * patch**2,
        patch_bias=False,
        positions=(image // patch) ** 2 + 1,
        class_token=True,
        outer_norms=2,
        patches_per_token=round(1 / ratio) ** 2,
        projectors=(adapter, second, ProjectorSpec(inputs=top, widths=(hidden,), bias=False)),
    )


def _attention(config: Config, width: int, key: str) -> AttentionSpec:
    heads = config.size(key, 16)
    return AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=per_head(config, width, heads, keys=("the tower's width", key)),
        qkv_bias=True,
        out_bias=True,
        causal=False,
    )


def _patch(config: Config, *, size: int) -> int:
    """Numbers in a patch of two frames."""
    return (
        config.size("in_channels", 3)
        * config.size("temporal_patch_size", 2)
        * config.size("patch_size", size) ** 2
    )
