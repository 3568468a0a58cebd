"""Decoders that mix attention with recurrent layers, or have recurrent layers only: qwen3_5,
qwen3_next, jamba, nemotron_h, mamba, mamba2.

Defaults of absent keys are those of the ``transformers`` config classes (version 5.23).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.models.readers.config import Config
from planner.models.readers.parts import (
    Stack,
    gated_mlp,
    grouped_attention,
    layer_count,
    mtp_modules,
    routed_experts,
    uniform,
)
from planner.models.readers.rotary import rotary_model
from planner.models.spec import (
    BlockSpec,
    FeedForward,
    GatedDeltaNetSpec,
    Mamba2Spec,
    MambaSpec,
    Mixer,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)

PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
"""Letters of nemotron_h's ``hybrid_override_pattern``."""
LAYER_NAMES = {
    "linear_attention": "mamba", "mamba": "mamba", "moe": "moe", "full_attention": "attention",
    "attention": "attention", "mlp": "mlp",
}  # fmt: skip
"""Entries of nemotron_h's ``layers_block_type``."""


def read_qwen3_5(config: Config) -> ModelSpec:
    """Every fourth layer full attention with a gated output, the others a gated delta rule."""
    return _qwen(config, gated_mlp(config), interval=4)


def read_qwen3_5_moe(config: Config) -> ModelSpec:
    """As qwen3_5, every feed-forward a mixture with one gated shared expert."""
    return _qwen(config, _qwen_moe(config), interval=4)


def read_qwen3_next(config: Config) -> ModelSpec:
    """The layers of qwen3_5_moe under other names."""
    if config.items("mlp_only_layers") or config.size("decoder_sparse_step", 1) != 1:
        raise config.error("dense layers among the routed ones of qwen3_next are not read")
    return _qwen(config, _qwen_moe(config), interval=4)


def _qwen_moe(config: Config) -> MoeSpec:
    return routed_experts(
        config,
        experts=config.size(config.first("num_experts", "num_local_experts")),
        intermediate=config.size("moe_intermediate_size"),
        top_k_default=8,
        shared_intermediate=config.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen(config: Config, feed_forward: FeedForward, *, interval: int) -> ModelSpec:
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(
        config, hidden, kv_default=4, head_dim_default=256, qkv_bias=bias, out_bias=bias,
        qk_norm="per_head",
    ).model_copy(update={"output_gate": config.flag("attn_output_gate", True)})  # fmt: skip
    delta = GatedDeltaNetSpec(
        key_heads=config.size("linear_num_key_heads", 16),
        value_heads=config.size("linear_num_value_heads", 32),
        key_dim=config.size("linear_key_head_dim", 128),
        value_dim=config.size("linear_value_head_dim", 128),
        conv=config.size("linear_conv_kernel_dim", 4),
    )
    layers = layer_count(config)
    step = config.size("full_attention_interval", interval)
    full = _layer_kinds(
        config, layers, {"full_attention": True, "linear_attention": False},
        [(index + 1) % step == 0 for index in range(layers)],
    )  # fmt: skip
    decoder = Stack()
    for is_full in full:
        name, mixer = ("full", attention) if is_full else ("linear", delta)
        decoder.add(name, BlockSpec(mixer=mixer, feed_forward=feed_forward))
    modules = config.count("mtp_num_hidden_layers", 0)
    if modules:
        # A module is one layer of full attention (Qwen3-Next's modelling code).
        decoder.blocks.setdefault("full", BlockSpec(mixer=attention, feed_forward=feed_forward))
    return rotary_model(
        config, hidden, decoder, positions=32768, mtp_modules=modules, mtp_block="full"
    )


def _layer_kinds(
    config: Config, layers: int, known: dict[str, bool], default: Sequence[bool]
) -> Sequence[bool]:
    kinds = config.items("layer_types")
    if kinds is None:
        return default
    if len(kinds) != layers:
        raise config.error(f"layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise config.error(
                f"layer_types names {str(kind)[:40]!r}; family {config.family} has "
                f"{' and '.join(known)}"
            )
    return [known[kind] for kind in kinds]


def read_jamba(config: Config) -> ModelSpec:
    """Attention every ``attn_layer_period`` layers and experts every ``expert_layer_period``,
    from their offsets on; Mamba and a gated MLP elsewhere; no positions."""
    hidden = config.size("hidden_size")
    attention = grouped_attention(config, hidden, kv_default=8).model_copy(update={"rotary": False})
    rank = config.get("mamba_dt_rank")
    mamba = MambaSpec(
        inner=config.size("mamba_expand", 2) * hidden,
        state=config.size("mamba_d_state", 16),
        conv=config.size("mamba_d_conv", 4),
        dt_rank=-(-hidden // 16) if rank in (None, "auto") else config.size("mamba_dt_rank"),
        conv_bias=config.flag("mamba_conv_bias", True),
        bias=config.flag("mamba_proj_bias", False),
        inner_norms=True,
    )
    experts = config.size(config.first("num_experts", "num_local_experts"), 16)
    moe = routed_experts(
        config, experts=experts, intermediate=config.size("intermediate_size"), top_k_default=2
    )
    mlp = gated_mlp(config)
    period, offset = config.size("attn_layer_period", 8), config.count("attn_layer_offset", 4)
    routed_period = config.size("expert_layer_period", 2)
    routed_offset = config.count("expert_layer_offset", 1)
    decoder = Stack()
    for index in range(layer_count(config)):
        attends = index % period == offset
        routed = experts > 1 and index % routed_period == routed_offset
        name = f"{'attention' if attends else 'mamba'}_{'moe' if routed else 'dense'}"
        mixer: Mixer = attention if attends else mamba
        decoder.add(name, BlockSpec(mixer=mixer, feed_forward=moe if routed else mlp))
    return rotary_model(config, hidden, decoder, positions=262144)


def read_nemotron_h(config: Config) -> ModelSpec:
    """One sub-block per layer, by the letters of ``hybrid_override_pattern``; no positions."""
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    parts: dict[str, Mixer | FeedForward] = {}
    names = _nemotron_layers(config)
    for name in dict.fromkeys(names):
        match name:
            case "mamba":
                parts[name] = _nemotron_mamba(config)
            case "attention":
                parts[name] = grouped_attention(
                    config, hidden, kv_default=8, head_dim_default=128, qkv_bias=bias,
                    out_bias=bias,
                ).model_copy(update={"rotary": False})  # fmt: skip
            case "mlp":
                parts[name] = _squared_relu(config, config.size("intermediate_size"))
            case _:
                parts[name] = _nemotron_moe(config)
    decoder = Stack()
    for name in names:
        part = parts[name]
        if isinstance(part, MlpSpec | MoeSpec):
            decoder.add(name, BlockSpec(mixer=None, feed_forward=part, norms=1))
        else:
            decoder.add(name, BlockSpec(mixer=part, feed_forward=None, norms=1))
    modules = mtp_modules(config, 0)
    if modules:
        _nemotron_mtp(config, decoder)
    return rotary_model(
        config, hidden, decoder, positions=4096, mtp_modules=modules, mtp_block="mtp"
    )


def _nemotron_mtp(config: Config, decoder: Stack) -> None:
    """Add the block of an MTP module: one attention and one routed layer."""
    pattern = config.get("mtp_hybrid_override_pattern")
    listed = config.items("mtp_layers_block_type") or ["attention", "moe"]
    kinds = [LAYER_NAMES.get(str(kind)) for kind in listed]
    blocks = decoder.blocks
    if pattern not in (None, "*E") or kinds != ["attention", "moe"]:
        raise config.error("MTP modules of other layers than attention and experts are not read")
    if not {"attention", "moe"} <= blocks.keys():
        raise config.error("MTP modules have attention and experts, and the decoder has not both")
    blocks["mtp"] = BlockSpec(
        mixer=blocks["attention"].mixer, feed_forward=blocks["moe"].feed_forward, norms=2
    )


def _nemotron_layers(config: Config) -> list[str]:
    pattern = config.get("hybrid_override_pattern")
    listed = config.items(config.first("layers_block_type", "layer_types"))
    known: dict[str, str] = LAYER_NAMES
    letters: Sequence[object] = listed or ()
    if isinstance(pattern, str) and not listed:
        known, letters = PATTERN, pattern
    if not letters:
        raise config.error(
            "config has neither 'hybrid_override_pattern' nor 'layers_block_type'",
            hint="one letter per layer: M Mamba, * attention, E experts, - MLP",
        )
    for letter in letters:
        if not isinstance(letter, str) or letter not in known:
            raise config.error(f"layer {str(letter)[:40]!r} is none of {', '.join(known)}")
    count = config.optional_size("num_hidden_layers")
    if count is not None and count != len(letters):
        raise config.error(f"the pattern has {len(letters)} layers, num_hidden_layers = {count}")
    return [known[str(letter)] for letter in letters]


def _nemotron_mamba(config: Config) -> Mamba2Spec:
    return Mamba2Spec(
        heads=config.size("mamba_num_heads", 128),
        head_dim=config.size("mamba_head_dim", 64),
        state=config.size("ssm_state_size", 128),
        groups=config.size(config.first("n_groups", "mamba_n_groups"), 8),
        conv=config.size(config.first("conv_kernel", "mamba_d_conv"), 4),
        chunk=config.size(config.first("chunk_size", "mamba_chunk_size"), 128),
        conv_bias=config.flag(config.first("use_conv_bias", "mamba_conv_bias"), True),
        bias=config.flag("use_bias", False) or config.flag("mamba_proj_bias", False),
    )


def _squared_relu(config: Config, width: int) -> MlpSpec:
    return MlpSpec(
        intermediate=width,
        gated=False,
        bias=config.flag("mlp_bias", False),
        activation=config.text("mlp_hidden_act", "relu2"),
    )


def _nemotron_moe(config: Config) -> MoeSpec:
    moe = routed_experts(
        config,
        experts=config.size(config.first("n_routed_experts", "num_local_experts"), 8),
        intermediate=config.size("moe_intermediate_size", 7688),
        top_k_default=2,
        shared_intermediate=config.count("n_shared_experts", 1)
        and config.size("moe_shared_expert_intermediate_size", 7688),
    )
    activation = config.text("mlp_hidden_act", "relu2")
    latent = config.optional_size("moe_latent_size")
    return moe.model_copy(update={"gated": False, "activation": activation, "latent": latent})


def read_mamba(config: Config) -> ModelSpec:
    """Mamba layers only, each with one norm; no feed-forward, no positions."""
    hidden = config.size("hidden_size")
    inner = config.optional_size("intermediate_size") or config.size("expand", 2) * hidden
    rank = config.get("time_step_rank")
    mamba = MambaSpec(
        inner=inner,
        state=config.size("state_size", 16),
        conv=config.size("conv_kernel", 4),
        dt_rank=-(-hidden // 16) if rank in (None, "auto") else config.size("time_step_rank"),
        conv_bias=config.flag("use_conv_bias", True),
        bias=config.flag("use_bias", False),
    )
    return _mamba_only(config, hidden, mamba, tied=True)


def read_mamba2(config: Config) -> ModelSpec:
    """Mamba-2 layers only, each with one norm; no feed-forward, no positions."""
    hidden = config.size("hidden_size")
    inner = config.size("expand", 2) * hidden
    head_dim = config.size("head_dim", 64)
    heads = config.size("num_heads", inner // head_dim)
    if heads * head_dim != inner:
        raise config.error(
            f"expand x hidden_size = {inner} is not num_heads x head_dim = {heads} x {head_dim}"
        )
    mamba = Mamba2Spec(
        heads=heads,
        head_dim=head_dim,
        state=config.size("state_size", 128),
        groups=config.size("n_groups", 8),
        conv=config.size("conv_kernel", 4),
        chunk=config.size("chunk_size", 256),
        conv_bias=config.flag("use_conv_bias", True),
        bias=config.flag("use_bias", False),
    )
    return _mamba_only(config, hidden, mamba, tied=False)


def _mamba_only(
    config: Config, hidden: int, mixer: MambaSpec | Mamba2Spec, *, tied: bool
) -> ModelSpec:
    block = BlockSpec(mixer=mixer, feed_forward=None, norms=1)
    decoder = uniform(block, layer_count(config))
    return rotary_model(config, hidden, decoder, positions=1 << 20, tied=tied)
