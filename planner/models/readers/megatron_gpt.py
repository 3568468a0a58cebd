"""``format: megatron_gpt``: a GPT as Megatron-LM describes one, by its dimensions.

The defaults are Megatron-LM's: LayerNorm, bias on every linear layer, a GELU MLP of 4 x hidden,
a learned position table as long as the sequence, and an LM head tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hardware_profiles.documents import DocumentError, validate
from planner.errors import InputError
from planner.models.readers.config import MAX_LAYERS, MAX_SIZE
from planner.models.readers.parts import uniform
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    ModelSpec,
    NonNegative,
    Positive,
    Spec,
)

ARGUMENTS = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_hidden",
    "vocab_size": "vocab",
    "padded_vocab_size": "vocab",
    "seq_length": "sequence",
    "max_position_embeddings": "positions",
}
"""Megatron-LM's argument names, accepted for ours."""

SEQUENCE = 2048
"""Longest sequence in tokens of a model that states neither it nor a table of positions."""


class MegatronGpt(Spec):
    """The dimensions of one GPT."""

    format: Literal["megatron_gpt"]
    name: str
    source: str
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive | None = None
    head_dim: Positive | None = None
    """Width of one head; default hidden / heads."""
    vocab: Positive
    """Rows of the embedding, padding included."""
    ffn_hidden: Positive | None = None
    """Width of the MLP; default 4 x hidden."""
    sequence: Positive | None = None
    """Longest sequence in tokens; default ``positions``, or 2048 without a position table."""
    positions: NonNegative | None = None
    """Rows of the learned position table; default the longest sequence; 0 = none (rotary)."""
    tied: bool = True
    bias: bool = True
    gated: bool = False
    activation: str | None = None
    """Default ``gelu``, or ``silu`` when gated."""
    norm: Literal["layer", "rms"] = "layer"
    dropout: bool = True


def read_megatron_gpt(data: Mapping[str, Any], *, where: str, name: str, source: str) -> ModelSpec:
    """``data`` as a model. Raises :class:`InputError` that names the key and the rule."""
    renamed: dict[str, Any] = {"name": name, "source": source}
    for key, value in data.items():
        ours = ARGUMENTS.get(key, key)
        if ours in renamed and ours not in ("name", "source"):
            raise InputError(f"{where}: {ours!r} is given twice, once as {key!r}")
        renamed[ours] = value
    try:
        gpt = validate(MegatronGpt, renamed, where=where)
    except DocumentError as error:
        raise InputError(error.message, hint=error.hint) from None
    return _model(gpt, where, tuple(sorted(data)))


def _model(gpt: MegatronGpt, where: str, keys: tuple[str, ...]) -> ModelSpec:
    if gpt.head_dim is None and gpt.hidden % gpt.heads:
        raise InputError(
            f"{where}: hidden = {gpt.hidden} is not a multiple of heads = {gpt.heads}",
            hint=f"use a multiple of {gpt.heads}, or give head_dim",
        )
    kv_heads = gpt.kv_heads or gpt.heads
    if gpt.heads % kv_heads:
        raise InputError(f"{where}: heads = {gpt.heads} is not a multiple of kv_heads = {kv_heads}")
    if gpt.layers > MAX_LAYERS:
        raise InputError(f"{where}: layers = {gpt.layers:,}, and must be at most {MAX_LAYERS:,}")
    for key in ("hidden", "heads", "head_dim", "vocab", "ffn_hidden", "sequence", "positions"):
        if (getattr(gpt, key) or 0) > MAX_SIZE:
            raise InputError(f"{where}: {key} must be at most {MAX_SIZE:,}")
    block = BlockSpec(
        mixer=AttentionSpec(
            heads=gpt.heads,
            kv_heads=kv_heads,
            head_dim=gpt.head_dim or gpt.hidden // gpt.heads,
            qkv_bias=gpt.bias,
            out_bias=gpt.bias,
        ),
        feed_forward=MlpSpec(
            intermediate=gpt.ffn_hidden or 4 * gpt.hidden,
            gated=gpt.gated,
            bias=gpt.bias,
            activation=gpt.activation or ("silu" if gpt.gated else "gelu"),
        ),
    )
    sequence = gpt.sequence or gpt.positions or SEQUENCE
    decoder = uniform(block, gpt.layers)
    return ModelSpec(
        name=gpt.name,
        family="megatron_gpt",
        source=gpt.source,
        hidden=gpt.hidden,
        vocab=gpt.vocab,
        tied_embeddings=gpt.tied,
        norm=gpt.norm,
        norm_bias=gpt.norm == "layer",
        position_embeddings=sequence if gpt.positions is None else gpt.positions,
        max_sequence=sequence,
        dropout=gpt.dropout,
        blocks=decoder.blocks,
        layers=decoder.layers,
        keys_used=keys,
    )
