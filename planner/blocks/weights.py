"""The parameter tensors of a model, each with its tensor-parallel sharding; those of a kind of
block are in its own module.

Shardings are those of Megatron-Core: the projections into a block (q, k, v, gate, up) are split by
column, those out of it (attention out, down) by row, the embedding and LM head by vocabulary rows.
Norms, the router and the down-projections of latent attention are whole on every rank. The bias of
a column layer is split with its rows; the bias of a row layer is whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cost_models.graph import Weight, WeightSharding
from planner.blocks import vision
from planner.blocks.registry import kind_of, parts
from planner.blocks.tensors import linear, norm
from planner.models.kinds import Model
from planner.models.sequence import LayerSequenceSpec
from planner.models.spec import BlockSpec, ModelSpec, MoeSpec, VisionSpec

PARTS = ("total", "embedding", "active", "mtp", "vision")
"""The counts that people are shown; ``mtp`` is outside the total."""


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
    vision: int
    """The vision tower, part of ``total``; 0 where the model has none."""


def block_weights(model: ModelSpec, block: BlockSpec) -> tuple[Weight, ...]:
    """Weights of one layer of ``block``: norms, mixer, feed-forward."""
    return layer_weights(block, hidden=model.hidden, norm_bias=model.norm_bias)


def layer_weights(block: BlockSpec, *, hidden: int, norm_bias: bool) -> tuple[Weight, ...]:
    """As :func:`block_weights`, for a block of any width."""
    weights = norm("norm", hidden, bias=norm_bias, count=block.norms)
    for part in parts(block):
        weights += kind_of(part).weights(part, hidden)
    return tuple(weights)


def embedding_weights(model: ModelSpec) -> tuple[Weight, ...]:
    """Weights before the first layer: token and position tables, projection in, norm, and those
    of a vision tower, which runs with them."""
    width = model.embedding_dim or model.hidden
    shared = model.tied_embeddings or bool(model.mtp)
    weights = [Weight("embedding", model.vocab, width, "vocab", shared=shared)]
    if width != model.hidden:
        weights += linear("embedding.project_in", model.hidden, width, "replicated")
    if model.position_embeddings:
        weights.append(Weight("embedding.position", model.position_embeddings, model.hidden))
    if model.embedding_norm:
        weights += norm("embedding.norm", model.hidden, bias=model.norm_bias)
    if model.vision is not None:
        weights += vision_weights(model.vision)
    return tuple(weights)


def vision_weights(tower: VisionSpec) -> tuple[Weight, ...]:
    """Weights of a vision tower: its ends, and its blocks ``layers`` times."""
    block = layer_weights(tower.block, hidden=tower.hidden, norm_bias=tower.norm_bias)
    blocks = (replace(w, name=f"vision.{w.name}", count=w.count * tower.layers) for w in block)
    return (*vision.end_weights(tower), *blocks)


def head_weights(model: ModelSpec, *, include_tied: bool = False) -> tuple[Weight, ...]:
    """Weights after the last layer: final norm, projection out, LM head.

    A tied head is the embedding matrix and is left out, unless ``include_tied``: with more than one
    pipeline stage the last stage holds a copy of its own, named ``head.tied``.
    """
    width = model.embedding_dim or model.hidden
    weights: list[Weight] = []
    if model.final_norm:
        weights += norm("final_norm", model.hidden, bias=model.norm_bias)
    if width != model.hidden:
        weights += linear("head.project_out", width, model.hidden, "replicated")
    if not model.tied_embeddings:
        weights.append(Weight("head", model.vocab, width, "vocab"))
    elif include_tied:
        # Megatron-Core's output layer has a weight of its own beside prediction modules, which
        # nothing reads or sums: logits are made with the copy that they look rows up in.
        summed = not model.mtp
        weights.append(Weight("head.tied", model.vocab, width, "vocab", shared=summed, copy=True))
    if model.head_bias:
        weights.append(Weight("head.bias", model.vocab, 1, "vocab"))
    return tuple(weights)


def mtp_weights(model: ModelSpec, *, whole: bool = False) -> tuple[Weight, ...]:
    """Weights of all multi-token-prediction modules; empty when there are none.

    A module (DeepSeek-V3, arXiv 2412.19437, section 2.2) norms the hidden state and the embedding
    of the next token, projects the pair from 2 x hidden to hidden, and runs one block and a final
    norm. Embedding and LM head are the model's. ``whole``: whether tp leaves the projection whole.
    """
    split: WeightSharding = "replicated" if whole else "column"
    weights: list[Weight] = []
    for run in model.mtp:
        module = [
            *norm("mtp.input_norm", model.hidden, bias=model.norm_bias, count=2),
            *linear("mtp.projection", model.hidden, 2 * model.hidden, split),
            *block_weights(model, model.blocks[run.block]),
            *norm("mtp.final_norm", model.hidden, bias=model.norm_bias),
        ]
        weights += (replace(weight, count=weight.count * run.count) for weight in module)
    return tuple(weights)


def prediction_tables(model: ModelSpec) -> tuple[Weight, ...]:
    """The embedding tables again, where prediction modules are not on the first stage.

    Megatron-Core makes a ``LanguageModelEmbedding`` on the stage that holds them and sums the
    gradient of its word table with the first stage's (core/models/gpt/gpt_model.py,
    ``mtp_process``; core/distributed/finalize_model_grads.py; alike from 0.13.1 to 0.16.1).
    """
    if not model.mtp:
        return ()
    tables = [w for w in embedding_weights(model) if w.name in ("embedding", "embedding.position")]
    return tuple(
        replace(w, name=w.name.replace("embedding", "embedding.mtp"), copy=True) for w in tables
    )


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
        vision=elements(vision_weights(model.vision)) if model.vision is not None else 0,
    )


def elements(weights: Iterable[Weight]) -> int:
    """Parameters in ``weights``, unsharded."""
    return sum(weight.elements for weight in weights)


def parameters_of(model: Model) -> dict[str, int]:
    """Parameters by part: total, embedding, active per token, multi-token prediction, vision."""
    if isinstance(model, LayerSequenceSpec):
        return {**dict.fromkeys(PARTS, 0), "total": model.parameters, "active": model.parameters}
    counts = parameter_counts(model)
    return {name: int(getattr(counts, name)) for name in PARTS}
