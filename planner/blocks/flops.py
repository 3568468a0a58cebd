"""FLOPs of the model itself: what MFU is measured in."""

from __future__ import annotations

from cost_models.graph import Weight
from planner.blocks import vision
from planner.blocks.registry import kind_of, parts
from planner.blocks.weights import block_weights, head_weights, layer_weights
from planner.models.spec import BlockSpec, ModelSpec, MoeSpec


def model_flops_per_token(
    model: ModelSpec,
    sequence: int,
    *,
    mtp: bool = True,
    document: int | None = None,
    images: vision.Images | None = None,
) -> float:
    """Forward plus backward FLOPs per token, without recomputation.

    Three times the forward: 2 per matrix parameter that a token meets (routed experts by top-k,
    the LM head included, the embedding look-up not), plus what each kind of block adds: causal
    attention ``2 * heads * (qk_dim + v_dim) * span / 2`` per layer with windows respected, the
    recurrence of state-space and linear-attention layers, index scores. ``span`` is the sample,
    or a packed ``document`` of it. ``images`` add their encoder's FLOPs, spread over the tokens
    of a sample.
    """
    span = sequence if document is None else min(document, sequence)
    runs = [(run.block, run.count) for run in model.layers]
    head = _matrix_elements(head_weights(model, include_tied=True), None)
    forward = 2.0 * head
    if mtp and model.mtp:
        runs += [(run.block, run.count) for run in model.mtp]
        modules = sum(run.count for run in model.mtp)
        forward += 2.0 * modules * (head + 2 * model.hidden * model.hidden)
    for name, count in runs:
        block = model.blocks[name]
        forward += count * 2.0 * _matrix_elements(block_weights(model, block), block)
        for part in parts(block):
            forward += count * kind_of(part).flops_per_token(part, span)
    tower = model.vision
    if tower is not None and images is not None and images.per_sample:
        weights = layer_weights(tower.block, hidden=tower.hidden, norm_bias=tower.norm_bias)
        each = vision.flops_per_image(tower, images, _matrix_elements(weights, tower.block))
        forward += images.per_sample * each / sequence
    return 3.0 * forward


def _matrix_elements(weights: tuple[Weight, ...], block: BlockSpec | None) -> float:
    total = 0.0
    for weight in weights:
        if weight.cols == 1:
            continue
        share = 1.0
        feed_forward = block.feed_forward if block else None
        if weight.sharding.startswith("expert_") and isinstance(feed_forward, MoeSpec):
            share = feed_forward.top_k / feed_forward.experts
        total += weight.elements * share
    return total
