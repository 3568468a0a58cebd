"""The parameter tensors of a model, each with its tensor-parallel sharding.

Shardings are those of Megatron-Core: the projections into a block (q, k, v, gate, up) are split by
column, those out of it (attention out, down) by row, the embedding and LM head by vocabulary rows.
Norms, the router and the down-projections of latent attention are whole on every rank. The bias of
a column layer is split with its rows; the bias of a row layer is whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cost_models.graph import Weight, WeightSharding
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a model; a tensor that is tied is counted once."""

    total: int
    """All parameters except those of the multi-token-prediction modules."""
    embedding: int
    """The token embedding matrix."""
    head: int
    """The LM head matrix; 0 when it is tied to the embedding."""
    active: int
    """``total`` without the share of routed experts that a token does not see."""
    mtp: int
    """Multi-token-prediction modules, without the embedding and head that they share."""
    routed_experts: int
    """Matrices and biases of the routed experts."""


def block_weights(model: ModelSpec, block: BlockSpec) -> tuple[Weight, ...]:
    """Weights of one layer of ``block``: norms, mixer, feed-forward."""
    weights = _norm("norm", model.hidden, bias=model.norm_bias, count=block.norms)
    match block.mixer:
        case AttentionSpec():
            weights += _attention(model.hidden, block.mixer)
        case LatentAttentionSpec():
            weights += _latent_attention(model.hidden, block.mixer)
    match block.feed_forward:
        case MlpSpec():
            weights += _mlp(model.hidden, block.feed_forward)
        case MoeSpec():
            weights += _moe(model.hidden, block.feed_forward)
    return tuple(weights)


def embedding_weights(model: ModelSpec) -> tuple[Weight, ...]:
    """Weights before the first layer: token and position tables, projection in, norm."""
    width = model.embedding_dim or model.hidden
    weights = [Weight("embedding", model.vocab, width, "vocab")]
    if width != model.hidden:
        weights += _linear("embedding.project_in", model.hidden, width, "replicated")
    if model.position_embeddings:
        weights.append(Weight("embedding.position", model.position_embeddings, model.hidden))
    if model.embedding_norm:
        weights += _norm("embedding.norm", model.hidden, bias=model.norm_bias)
    return tuple(weights)


def head_weights(model: ModelSpec, *, include_tied: bool = False) -> tuple[Weight, ...]:
    """Weights after the last layer: final norm, projection out, LM head.

    A tied head is the embedding matrix and is left out, unless ``include_tied``: with more than one
    pipeline stage the last stage holds a copy of its own, named ``head.tied``.
    """
    width = model.embedding_dim or model.hidden
    weights: list[Weight] = []
    if model.final_norm:
        weights += _norm("final_norm", model.hidden, bias=model.norm_bias)
    if width != model.hidden:
        weights += _linear("head.project_out", width, model.hidden, "replicated")
    if not model.tied_embeddings:
        weights.append(Weight("head", model.vocab, width, "vocab"))
    elif include_tied:
        weights.append(Weight("head.tied", model.vocab, width, "vocab"))
    if model.head_bias:
        weights.append(Weight("head.bias", model.vocab, 1, "vocab"))
    return tuple(weights)


def mtp_weights(model: ModelSpec) -> tuple[Weight, ...]:
    """Weights of all multi-token-prediction modules; empty when there are none.

    A module (DeepSeek-V3, arXiv 2412.19437, section 2.2) norms the hidden state and the embedding
    of the next token, projects the pair from 2 x hidden to hidden, and runs one block and a final
    norm. Embedding and LM head are the model's.
    """
    weights: list[Weight] = []
    for run in model.mtp:
        module = [
            *_norm("mtp.input_norm", model.hidden, bias=model.norm_bias, count=2),
            *_linear("mtp.projection", model.hidden, 2 * model.hidden, "column"),
            *block_weights(model, model.blocks[run.block]),
            *_norm("mtp.final_norm", model.hidden, bias=model.norm_bias),
        ]
        weights += (replace(weight, count=weight.count * run.count) for weight in module)
    return tuple(weights)


def parameter_counts(model: ModelSpec) -> ParameterCounts:
    """Count the parameters of ``model``, unsharded and without vocabulary padding."""
    embedding, head = embedding_weights(model), head_weights(model)
    total = elements(embedding) + elements(head)
    routed = unseen = 0
    for run in model.layers:
        block = model.blocks[run.block]
        weights = block_weights(model, block)
        total += run.count * elements(weights)
        if isinstance(block.feed_forward, MoeSpec):
            moe = block.feed_forward
            experts = elements(w for w in weights if w.sharding.startswith("expert_"))
            routed += run.count * experts
            unseen += run.count * (experts // moe.experts) * (moe.experts - moe.top_k)
    return ParameterCounts(
        total=total,
        embedding=elements(w for w in embedding if w.name == "embedding"),
        head=elements(w for w in head if w.name == "head"),
        active=total - unseen,
        mtp=elements(mtp_weights(model)),
        routed_experts=routed,
    )


def elements(weights: Iterable[Weight]) -> int:
    """Parameters in ``weights``, unsharded."""
    return sum(weight.elements for weight in weights)


def _norm(name: str, width: int, *, bias: bool, count: int = 1) -> list[Weight]:
    if count == 0:
        return []
    weights = [Weight(name, width, 1, "replicated", count)]
    if bias:
        weights.append(Weight(f"{name}.bias", width, 1, "replicated", count))
    return weights


def _linear(
    name: str,
    rows: int,
    cols: int,
    sharding: WeightSharding,
    *,
    bias: bool = False,
    count: int = 1,
    kv_heads: int = 0,
) -> list[Weight]:
    weights = [Weight(name, rows, cols, sharding, count, kv_heads)]
    if bias:
        # The bias of a row layer is added after the reduction, so every rank has all of it; an
        # expert's stays with the expert, whose rank the ``expert_`` shardings tell.
        of_bias: WeightSharding = "replicated" if sharding == "row" else sharding
        weights.append(Weight(f"{name}.bias", rows, 1, of_bias, count, kv_heads))
    return weights


def _attention(hidden: int, mixer: AttentionSpec) -> list[Weight]:
    q_width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    weights = [
        *_linear("attention.q", q_width, hidden, "column", bias=mixer.qkv_bias),
        *(
            weight
            for name in ("attention.k", "attention.v")
            for weight in _linear(
                name, kv_width, hidden, "column", bias=mixer.qkv_bias, kv_heads=mixer.kv_heads
            )
        ),
        *_linear("attention.out", hidden, q_width, "row", bias=mixer.out_bias),
    ]
    if mixer.qk_norm == "per_head":
        weights += _norm("attention.qk_norm", mixer.head_dim, bias=False, count=2)
    elif mixer.qk_norm == "full":
        weights += _norm("attention.q_norm", q_width, bias=False)
        weights += _norm("attention.k_norm", kv_width, bias=False)
    if mixer.sinks:
        weights.append(Weight("attention.sinks", mixer.heads, 1, "column"))
    return weights


def _latent_attention(hidden: int, mixer: LatentAttentionSpec) -> list[Weight]:
    q_width = mixer.heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    kv_width = mixer.heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
    bias = mixer.qkv_bias
    if mixer.q_lora_rank is None:
        weights = _linear("attention.q", q_width, hidden, "column")
    else:
        rank = mixer.q_lora_rank
        weights = [
            *_linear("attention.q_down", rank, hidden, "replicated", bias=bias),
            *_norm("attention.q_norm", rank, bias=False),
            *_linear("attention.q_up", q_width, rank, "column"),
        ]
    kv_down = mixer.kv_lora_rank + mixer.qk_rope_head_dim
    return [
        *weights,
        *_linear("attention.kv_down", kv_down, hidden, "replicated", bias=bias),
        *_norm("attention.kv_norm", mixer.kv_lora_rank, bias=False),
        *_linear("attention.kv_up", kv_width, mixer.kv_lora_rank, "column"),
        *_linear(
            "attention.out", hidden, mixer.heads * mixer.v_head_dim, "row", bias=mixer.out_bias
        ),
    ]


def _mlp(hidden: int, mlp: MlpSpec) -> list[Weight]:
    return _feed_forward(
        "mlp", hidden, mlp.intermediate, gated=mlp.gated, bias=mlp.bias, shardings=("column", "row")
    )


def _moe(hidden: int, moe: MoeSpec) -> list[Weight]:
    weights = [
        *_linear("moe.router", moe.experts, hidden, "replicated", bias=moe.router_bias),
        *_feed_forward(
            "moe.experts",
            hidden,
            moe.intermediate,
            gated=moe.gated,
            bias=moe.expert_bias,
            shardings=("expert_column", "expert_row"),
            count=moe.experts,
        ),
    ]
    if moe.shared_intermediate:
        weights += _feed_forward(
            "moe.shared",
            hidden,
            moe.shared_intermediate,
            gated=moe.gated,
            bias=False,
            shardings=("column", "row"),
        )
    if moe.shared_gate:
        weights += _linear("moe.shared_gate", 1, hidden, "replicated")
    return weights


def _feed_forward(
    name: str,
    hidden: int,
    intermediate: int,
    *,
    gated: bool,
    bias: bool,
    shardings: tuple[WeightSharding, WeightSharding],
    count: int = 1,
) -> list[Weight]:
    column, row = shardings
    inward = ("gate", "up") if gated else ("up",)
    return [
        *(
            weight
            for part in inward
            for weight in _linear(
                f"{name}.{part}", intermediate, hidden, column, bias=bias, count=count
            )
        ),
        *_linear(f"{name}.down", hidden, intermediate, row, bias=bias, count=count),
    ]
