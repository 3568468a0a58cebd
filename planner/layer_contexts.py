"""A kind of context parallelism for each layer, where a job lists them (``JobSpec.cp_kinds``).

Megatron-Core from 0.17 on takes a kind per layer (``--cp-comm-type p2p a2a ...``). A mesh then has
one kind in its column all the same: that of two levels where the list has one, whose inner groups
are searched, else the list's first. Every other layer overrides it in its own shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cost_models.cp_kinds import TWO_LEVELS
from cost_models.graph import LayerKind
from hardware_profiles.stack_words import AttentionSort, ContextKind
from planner.blocks.registry import kind_of, parts
from planner.errors import InputError
from planner.models.spec import AttentionSpec, BlockSpec, LatentAttentionSpec, ModelSpec
from planner.specs import JobSpec

if TYPE_CHECKING:
    from planner.request import Request


def column_kind(kinds: tuple[ContextKind, ...]) -> ContextKind:
    """What the column of a mesh says of a list."""
    return next((kind for kind in kinds if kind in TWO_LEVELS), kinds[0])


def contexts_of_layers(job: JobSpec, model: ModelSpec) -> list[tuple[str, ContextKind]]:
    """Block and kind of each layer, in order; empty where the job lists none."""
    blocks = [run.block for run in model.layers for _ in range(run.count)]
    listed = job.cp_kinds
    return [(b, listed[place % len(listed)]) for place, b in enumerate(blocks)] if listed else []


def by_context(
    layers: tuple[str, ...], kinds: dict[str, LayerKind], job: JobSpec, model: ModelSpec
) -> tuple[tuple[str, ...], dict[str, LayerKind]]:
    """Layers and their kinds, those with attention apart by their context parallelism."""
    if not job.cp_kinds:
        return layers, kinds
    named, found = [], dict[str, LayerKind]()
    for block, context in contexts_of_layers(job, model):
        apart = isinstance(model.blocks[block].mixer, AttentionSpec | LatentAttentionSpec)
        name = f"{block}.{context}" if apart else block
        named.append(name)
        if name not in found:
            found[name] = _within(kinds[block], name, context) if apart else kinds[block]
    return tuple(named), found


def _within(kind: LayerKind, name: str, context: ContextKind) -> LayerKind:
    """``kind`` whose ops and tensors are those of its own context parallelism."""
    counted = kind.everything
    own = replace(kind, name=name, context=None if context in TWO_LEVELS else context)
    return replace(
        own,
        ops=lambda shard: kind.ops(own.shard(shard)),
        saved=lambda shard: kind.saved(own.shard(shard)),
        working_bytes=lambda shard: kind.working_bytes(own.shard(shard)),
        everything=None if counted is None else lambda shard: counted(own.shard(shard)),
    )


def exchanging(request: Request, heads: int) -> tuple[ContextKind | None, ...]:
    """Kinds in which layers that deal out so many heads run; ``(None,)``: as the mesh says."""
    job, model = request.job, request.model
    if not job.cp_kinds or not isinstance(model, ModelSpec):
        return (None,)
    return tuple(
        dict.fromkeys(
            context
            for block, context in contexts_of_layers(job, model)
            if heads in dealt_heads(model.blocks[block])
        )
    )


def dealt_heads(block: BlockSpec) -> set[int]:
    """Heads of a block that all-to-all context parallelism deals out."""
    found = (split for part in parts(block) for split in kind_of(part).splits(part))
    return {split.size for split in found if split.over == "exchange"}


def contexts_of_sort(request: Request, sort: AttentionSort) -> set[ContextKind]:
    """Kinds that a job lists for layers of a sort of attention, or of model."""
    job, model = request.job, request.model
    if not isinstance(model, ModelSpec):
        return set()
    layers = contexts_of_layers(job, model)
    if sort == "sliding windows":
        return {kind for block, kind in layers if _window(model.blocks[block])}
    if sort == "attention sinks":
        return {kind for block, kind in layers if _sinks(model.blocks[block])}
    if sort == "latent attention":
        latent = LatentAttentionSpec
        return {kind for block, kind in layers if isinstance(model.blocks[block].mixer, latent)}
    return {kind for _, kind in layers}


def _window(block: BlockSpec) -> bool:
    return isinstance(block.mixer, AttentionSpec) and block.mixer.window is not None


def _sinks(block: BlockSpec) -> bool:
    return isinstance(block.mixer, AttentionSpec) and block.mixer.sinks


def context_faults(request: Request) -> Iterator[InputError]:
    """Why the stack or the model cannot have the job's list."""
    listed, stack, model = request.job.cp_kinds, request.stack, request.model
    if not listed:
        return
    label = f"{stack.name} {stack.version}"
    foreign = [kind for kind in dict.fromkeys(listed) if kind not in stack.cp_kinds]
    if foreign:
        known = ", ".join(stack.cp_kinds) or "none"
        yield InputError(f"{label} has no {foreign[0]} context parallelism (it has {known})")
    if len(set(listed)) > 1 and not stack.cp_kinds_by_layer:
        yield InputError(
            f"{label} has one kind of context parallelism for all layers, and cp_kinds lists "
            f"{len(set(listed))}",
            hint="one kind in cp_kinds, or a stack with cp_kinds_by_layer (megatron-core-offload)",
        )
    if model.layer_count % len(listed):
        yield InputError(
            f"cp_kinds lists {len(listed)} kinds, which do not repeat evenly over the "
            f"{model.layer_count} layers of {model.name}",
            hint="as many kinds as layers, or as a divisor of them",
        )
    if len(set(listed)) > 1 and request.predicts:
        yield InputError(
            f"cp_kinds lists kinds of layers, and none for the prediction modules of {model.name}",
            hint="mtp: false in the job, or one kind",
        )


def said(contexts: Iterable[ContextKind]) -> str:
    """How many layers run which kind."""
    counts = Counter(contexts)
    return "context parallelism by layer, as the job lists it: " + ", ".join(
        f"{kind} in {count}" for kind, count in counts.items()
    )
