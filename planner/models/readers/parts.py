"""Parts that the readers share: attention, feed-forwards, and the order of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from planner.models.readers.config import MAX_LAYERS, Config
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    FeedForward,
    LayerRun,
    Mixer,
    MlpSpec,
    MoeSpec,
)


@dataclass
class Stack:
    """Blocks by name, and the layers that use them, in order."""

    blocks: dict[str, BlockSpec] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, block: BlockSpec) -> None:
        """Add one layer of ``block``."""
        self.blocks.setdefault(name, block)
        self.names.append(name)

    @property
    def layers(self) -> tuple[LayerRun, ...]:
        """Runs of equal layers, in order."""
        return tuple(
            LayerRun(block=name, count=len(list(run))) for name, run in groupby(self.names)
        )


def uniform(block: BlockSpec, layers: int) -> Stack:
    """``layers`` layers of one block."""
    return Stack(blocks={"decoder": block}, names=["decoder"] * layers)


def layer_count(config: Config, key: str = "num_hidden_layers") -> int:
    """The number of layers."""
    return config.size(key, limit=MAX_LAYERS)


def per_head(config: Config, hidden: int, heads: int, *, keys: tuple[str, str]) -> int:
    """Width of one head where the config does not give it: ``hidden / heads``, whole."""
    if hidden % heads:
        raise config.error(
            f"{keys[0]} = {hidden} is not a multiple of {keys[1]} = {heads}",
            hint=f"use a multiple of {heads}, or give head_dim",
        )
    return hidden // heads


def grouped_attention(
    config: Config,
    hidden: int,
    *,
    kv_default: int | None = None,
    head_dim_default: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: Literal["none", "per_head", "full"] = "none",
    window: int | None = None,
    sinks: bool = False,
) -> AttentionSpec:
    """Attention from ``num_attention_heads``, ``num_key_value_heads`` and ``head_dim``.

    ``kv_default`` and ``head_dim_default`` are those of the config class for an absent key (None:
    as many KV heads as heads, and hidden / heads).
    """
    heads = config.size("num_attention_heads")
    kv_heads = config.optional_size("num_key_value_heads", kv_default) or heads
    if config.get("num_key_value_heads") is None and kv_heads != heads:
        config.notes.append(f"num_key_value_heads is absent: {kv_heads}, the default of the family")
    if heads % kv_heads:
        raise config.error(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    head_dim = config.optional_size("head_dim", head_dim_default) or per_head(
        config, hidden, heads, keys=("hidden_size", "num_attention_heads")
    )
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        window=window,
        sinks=sinks,
    )


def gated_mlp(
    config: Config, *, bias: bool = False, activation_key: str = "hidden_act",
    activation: str = "silu",
) -> MlpSpec:  # fmt: skip
    """The three-matrix feed-forward of ``intermediate_size``; ``activation`` unless it is named."""
    return MlpSpec(
        intermediate=config.size("intermediate_size"),
        gated=True,
        bias=bias,
        activation=config.text(activation_key, activation),
    )


def routed_experts(
    config: Config,
    *,
    experts: int,
    intermediate: int,
    top_k_key: str = "num_experts_per_tok",
    top_k_default: int | None = None,
    shared_intermediate: int = 0,
    shared_gate: bool = False,
    expert_bias: bool = False,
    router_bias: bool = False,
) -> MoeSpec:
    """A mixture of gated experts; checks that each token can have its ``top_k``."""
    top_k = config.optional_size(top_k_key, top_k_default) or config.size(top_k_key)
    if top_k > experts:
        raise config.error(f"{top_k_key} = {top_k} is more than the {experts} experts")
    groups = config.optional_size("n_group", 1) or 1
    limit = config.optional_size("topk_group", 1) or 1
    if experts % groups or limit > groups or top_k > experts // groups * limit:
        raise config.error(
            f"{top_k} of {experts} experts cannot come from topk_group = {limit} of "
            f"n_group = {groups}"
        )
    return MoeSpec(
        experts=experts,
        top_k=top_k,
        intermediate=intermediate,
        activation=config.text("hidden_act", "silu"),
        shared_intermediate=shared_intermediate,
        shared_gate=shared_gate,
        expert_bias=expert_bias,
        router_bias=router_bias,
        routing_groups=groups,
        routing_group_limit=limit,
    )


def sliding_layers(config: Config, layers: int, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers have sliding-window attention: ``layer_types``, else ``default`` by index."""
    kinds = config.items("layer_types")
    if kinds is None:
        return tuple(default(index) for index in range(layers))
    known = {"full_attention": False, "sliding_attention": True}
    if len(kinds) != layers:
        raise config.error(f"layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise config.error(
                f"layer_types names {kind!r}; family {config.family} has {' and '.join(known)}"
            )
    return tuple(known[kind] for kind in kinds)


def dense_or_routed(
    routed: Sequence[bool], *, dense: Callable[[], MlpSpec], moe: Callable[[], MoeSpec]
) -> list[tuple[str, FeedForward]]:
    """The named feed-forward of each layer; ``dense`` and ``moe`` are read only where needed."""
    by_kind: dict[bool, tuple[str, FeedForward]] = {}
    if True in routed:
        by_kind[True] = ("moe", moe())
    if False in routed:
        by_kind[False] = ("dense", dense())
    return [by_kind[is_routed] for is_routed in routed]


def mtp_modules(config: Config, default: int) -> int:
    """The number of multi-token-prediction modules; a default other than 0 is noted."""
    key = config.first("num_nextn_predict_layers", "num_mtp_layers")
    if config.get(key) is None and default:
        config.notes.append(f"{key} is absent: {default}, the default of the family")
    return config.count(key, default)


def stack(
    attention: Sequence[Mixer],
    feed_forward: Sequence[tuple[str, FeedForward]],
    *,
    norms: int = 2,
) -> Stack:
    """Layers from one mixer and one named feed-forward each.

    Blocks are named after the feed-forward; where a window differs between the layers, also after
    the mixer (``dense_full``, ``moe_sliding``).
    """
    windows = {getattr(mixer, "window", None) for mixer in attention}
    result = Stack()
    for mixer, (name, feed) in zip(attention, feed_forward, strict=True):
        if len(windows) > 1:
            name += "_full" if getattr(mixer, "window", None) is None else "_sliding"
        result.add(name, BlockSpec(mixer=mixer, feed_forward=feed, norms=norms))
    return result
