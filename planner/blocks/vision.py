"""Vision towers: an image encoder that runs with the embedding, on the first pipeline stage.

Its blocks are those of a decoder at another width, over patches that all see each other. Heads and
inner widths are split over tp; patch embedding and projectors are whole on each rank, activations
are not split over the sequence, and each context-parallel rank encodes the images of its samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Elementwise, MatMul, Op, Repeat, SavedTensor
from planner.blocks.context import STATISTICS, BlockContext
from planner.blocks.layer import layer_ops, layer_saved, layer_working
from planner.blocks.registry import kind_of, parts
from planner.blocks.tensors import linear, norm
from planner.models.spec import VisionSpec


@dataclass(frozen=True, slots=True)
class Images:
    """What the job shows to the tower."""

    per_sample: int
    tokens: int
    """Tokens of the decoder that one image becomes."""

    def patches(self, tower: VisionSpec) -> int:
        """Patches of one image."""
        return self.tokens * tower.patches_per_token


def end_weights(tower: VisionSpec) -> list[Weight]:
    """Patch embedding, positions, outer norms and projectors."""
    weights = linear(
        "vision.patch", tower.hidden, tower.patch_inputs, "replicated", bias=tower.patch_bias
    )
    rows = tower.positions + int(tower.class_token)
    if rows:
        # A table that is looked up, not multiplied: a vector to whoever counts matrices.
        weights.append(Weight("vision.positions", rows * tower.hidden, 1))
    weights += norm("vision.norm", tower.hidden, bias=tower.norm_bias, count=tower.outer_norms)
    for projector in tower.projectors:
        inputs = projector.inputs
        if projector.norm:
            weights += norm(
                "vision.projector.norm", projector.norm, bias=tower.norm_bias, count=projector.count
            )
        for width in projector.widths:
            weights += linear(
                "vision.projector", width, inputs, "replicated", bias=projector.bias,
                count=projector.count,
            )  # fmt: skip
            inputs = width
    return weights


def ops(tower: VisionSpec, images: Images, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the tower for the images of one microbatch; none without images."""
    if not images.per_sample:
        return ()
    inner, own = _inside(tower, images, ctx, shard)
    rows = shard.microbatch * images.per_sample * images.tokens
    result: list[Op] = [
        MatMul("vision_patch", own.tokens, tower.hidden, tower.patch_inputs),
        Repeat("vision_blocks", layer_ops(tower.block, inner, own), tower.layers),
    ]
    for index, projector in enumerate(tower.projectors):
        inputs = projector.inputs
        for step, width in enumerate(projector.widths):
            product = MatMul(f"vision_projector{index}.{step}", rows, width, inputs)
            result.append(Repeat(f"vision_projector{index}.{step}", (product,), projector.count))
            inputs = width
    size = 1.0 * rows * ctx.hidden * ctx.element_bytes
    result.append(Elementwise("vision_scatter", 2.0 * size, 2.0 * size))
    return tuple(result)


def saved(
    tower: VisionSpec, images: Images, ctx: BlockContext, shard: Shard
) -> tuple[SavedTensor, ...]:
    """Tensors that all blocks of the tower and its projectors keep."""
    if not images.per_sample:
        return ()
    inner, own = _inside(tower, images, ctx, shard)
    rows = shard.microbatch * images.per_sample * images.tokens
    projected = sum((p.inputs + sum(p.widths)) * p.count for p in tower.projectors)
    return (
        *(
            replace(tensor, name=f"vision.{tensor.name}", bytes=tensor.bytes * tower.layers)
            for tensor in layer_saved(tower.block, inner, own)
        ),
        SavedTensor("vision.projectors", rows * projected * ctx.element_bytes),
    )


def working(tower: VisionSpec, images: Images, ctx: BlockContext, shard: Shard) -> Int64:
    """Short-lived bytes at the peak of one block's backward."""
    if not images.per_sample:
        return np.zeros_like(shard.tp)
    inner, own = _inside(tower, images, ctx, shard)
    return layer_working(tower.block, inner, own)


def flops_per_image(tower: VisionSpec, images: Images, matrices: float) -> float:
    """Forward FLOPs of one image; ``matrices`` are the elements of one block's matrices."""
    patches = images.patches(tower)
    attention = sum(kind_of(part).flops_per_token(part, patches) for part in parts(tower.block))
    per_patch = tower.layers * (2.0 * matrices + attention)
    per_patch += 2.0 * tower.hidden * tower.patch_inputs
    projected = 0
    for projector in tower.projectors:
        sizes = (projector.inputs, *projector.widths)
        steps = zip(sizes, projector.widths, strict=False)
        projected += projector.count * sum(into * out for into, out in steps)
    return patches * per_patch + images.tokens * 2.0 * projected


def assumptions(tower: VisionSpec, images: Images) -> tuple[str, ...]:
    """What the tower is given and how it is placed."""
    if not images.per_sample:
        return (
            "vision tower: held and updated on the first stage, but shown no image (job: "
            "images_per_sample and image_tokens)",
        )
    return (
        f"vision tower: {images.per_sample} image(s) of {images.tokens} tokens "
        f"({images.patches(tower)} patches) per sample, encoded on the first stage by every cp "
        "rank of a sample; its activations are kept whatever the decoder recomputes",
    )


def _inside(
    tower: VisionSpec, images: Images, ctx: BlockContext, shard: Shard
) -> tuple[BlockContext, Shard]:
    """Context and shard of the tower's blocks: images are its samples, patches its tokens."""
    inner = replace(
        ctx, hidden=tower.hidden, dropout=False, document=None, rotary=True,
        norm_statistics=STATISTICS[tower.norm],
    )  # fmt: skip
    own = replace(
        shard,
        sequence=images.patches(tower),
        microbatch=shard.microbatch * images.per_sample,
        cp=np.ones_like(shard.cp),
        sequence_parallel=np.zeros_like(shard.sequence_parallel),
    )
    return inner, own
