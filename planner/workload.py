"""Lower a model under a job and a stack to the graph that the cost models price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cost_models.graph import Int64, LayerKind, Shard, Weight, WorkloadGraph
from cost_models.ops import Op, SavedTensor
from hardware_profiles.schema import DeviceSpec, StackSpec
from planner.blocks import attention, ends, latent_attention, mlp, moe
from planner.blocks.context import (
    BlockContext,
    enter_tensor_parallel,
    norm,
    residual_saved,
)
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.models.weights import block_weights, embedding_weights, head_weights, mtp_weights
from planner.specs import JobSpec

_SUB_BLOCKS = {
    AttentionSpec: attention,
    LatentAttentionSpec: latent_attention,
    MlpSpec: mlp,
    MoeSpec: moe,
}


def build_workload(
    model: ModelSpec, job: JobSpec, stack: StackSpec, device: DeviceSpec
) -> WorkloadGraph:
    """The workload graph of ``model`` under ``job``, for ``stack`` on ``device``.

    ``job.sequence_length`` must be set (``planner.pipeline`` fills defaults).
    """
    assert job.sequence_length is not None, "job defaults are filled before lowering"
    ctx = BlockContext(
        hidden=model.hidden,
        element_bytes=4 if job.precision == "fp32" else 2,
        attention_kernel=(
            "unfused" if job.precision == "fp32" else stack.attention_kernel(device.name)
        ),
        fused=frozenset(stack.fused),
        dropout=model.dropout and stack.dropout,
        vocab=model.vocab,
        vocab_divisor=stack.vocab_divisor,
        logit_saved_bytes=stack.logit_saved_bytes.value,
        logit_working_bytes=stack.logit_working_bytes.value,
        rotary=model.position_embeddings == 0,
        expert_imbalance=job.expert_imbalance,
    )
    kinds = {name: _layer_kind(name, block, model, ctx) for name, block in model.blocks.items()}
    mtp_runs = model.mtp if job.mtp else ()
    return WorkloadGraph(
        name=model.name,
        sequence=job.sequence_length,
        hidden=model.hidden,
        layers=tuple(run.block for run in model.layers for _ in range(run.count)),
        kinds=kinds,
        embedding=_embedding(model, ctx),
        head=_head(model, ctx, tuple(kinds[r.block] for r in mtp_runs for _ in range(r.count))),
        tied_embeddings=model.tied_embeddings,
        model_flops_per_token=model_flops_per_token(model, job.sequence_length, mtp=job.mtp),
        expert_count=max(
            (b.feed_forward.experts for b in model.blocks.values()
             if isinstance(b.feed_forward, MoeSpec)), default=0,
        ),
        heads=_common(model, "heads"),
        kv_heads=_common(model, "kv_heads"),
        boundary_bytes_per_token=model.hidden * ctx.element_bytes,
        vocab_divisor=stack.vocab_divisor,
        assumptions=_assumptions(model, job, ctx),
    )  # fmt: skip


def model_flops_per_token(model: ModelSpec, sequence: int, *, mtp: bool = True) -> float:
    """Forward plus backward FLOPs per token, without recomputation.

    Three times the forward: 2 per matrix parameter that a token meets (routed experts by top-k,
    the LM head included, the embedding look-up not), plus causal attention
    ``2 * heads * (qk_dim + v_dim) * sequence / 2`` per layer, windows respected.
    """
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
        forward += count * _attention_flops(block, sequence)
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


def _attention_flops(block: BlockSpec, sequence: int) -> float:
    mixer = block.mixer
    if isinstance(mixer, AttentionSpec):
        window = mixer.window
        keys = sequence / 2 if window is None or window >= sequence else float(window)
        return 2.0 * mixer.heads * 2 * mixer.head_dim * keys
    if isinstance(mixer, LatentAttentionSpec):
        width = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + mixer.v_head_dim
        return 2.0 * mixer.heads * width * sequence / 2
    return 0.0


def _common(model: ModelSpec, field: str) -> int:
    """The greatest common divisor of a head count over all attention blocks: what tp may split."""
    import math

    counts = [
        getattr(block.mixer, field, getattr(block.mixer, "heads", 0))
        for block in model.blocks.values()
        if block.mixer is not None
    ]
    return math.gcd(*counts) if counts else 0


def _layer_kind(name: str, block: BlockSpec, model: ModelSpec, ctx: BlockContext) -> LayerKind:
    parts = [part for part in (block.mixer, block.feed_forward) if part is not None]
    modules = [_SUB_BLOCKS[type(part)] for part in parts]
    shared_norm = block.parallel and block.norms < 2

    def ops(shard: Shard) -> tuple[Op, ...]:
        result: list[Op] = []
        for index, (part, module) in enumerate(zip(parts, modules, strict=True)):
            if not (shared_norm and index):
                result.append(norm(f"norm{index}", ctx, shard))
            result += module.ops(part, ctx, shard)
        for index in range(len(parts), block.norms):
            result.append(norm(f"post_norm{index}", ctx, shard))
        return tuple(result)

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        result: list[SavedTensor] = []
        for index, (part, module) in enumerate(zip(parts, modules, strict=True)):
            if not (shared_norm and index):
                result += residual_saved(f"sub{index}", ctx, shard)
            result += module.saved(part, ctx, shard)
        for index in range(len(parts), block.norms):
            result.append(SavedTensor(f"post_norm{index}", ctx.residual_bytes(shard)))
        return tuple(result)

    def working(shard: Shard) -> Int64:
        import numpy as np

        largest = ctx.residual_bytes(shard)
        for part, module in zip(parts, modules, strict=True):
            largest = np.maximum(largest, module.working(part, ctx, shard))
        return largest

    return LayerKind(
        name, block_weights(model, block), ops, saved, ctx.residual_bytes, working
    )  # fmt: skip


def _embedding(model: ModelSpec, ctx: BlockContext) -> LayerKind:
    return LayerKind(
        "embedding",
        embedding_weights(model),
        lambda shard: ends.embedding_ops(ctx, shard),
        lambda shard: ends.embedding_saved(ctx, shard),
        lambda shard: shard.tokens * 8,
        lambda shard: ctx.gathered_bytes(shard),
    )


def _head(model: ModelSpec, ctx: BlockContext, mtp: tuple[LayerKind, ...]) -> LayerKind:
    """Final norm, LM head and loss; each MTP module adds its block and a pass through the head."""
    if not mtp:
        return LayerKind(
            "head", head_weights(model, include_tied=True),
            lambda shard: ends.head_ops(ctx, shard), lambda shard: ends.head_saved(ctx, shard),
            ctx.residual_bytes, lambda shard: ends.head_working(ctx, shard),
        )  # fmt: skip
    wide = replace(ctx, hidden=2 * ctx.hidden)

    def once(each: Callable[[LayerKind], tuple[Op, ...]], shard: Shard) -> tuple[Op, ...]:
        from cost_models.ops import MatMul

        result: list[Op] = [*ends.head_ops(ctx, shard)]
        for kind in mtp:
            result += [norm("mtp_norm", wide, shard)]
            result += enter_tensor_parallel("mtp_projection", wide, shard)
            result.append(
                MatMul("mtp_projection", shard.tokens, ctx.hidden // shard.tp, 2 * ctx.hidden)
            )
            result += each(kind)
            result += ends.head_ops(ctx, shard)
        return tuple(result)

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        result = [*ends.head_saved(ctx, shard)]
        for kind in mtp:
            result.append(SavedTensor("mtp_input", 4 * ctx.residual_bytes(shard)))
            result += kind.saved(shard)
            result += ends.head_saved(ctx, shard)
        return tuple(result)

    return LayerKind(
        "head",
        (*head_weights(model, include_tied=True), *mtp_weights(model)),
        lambda shard: once(lambda kind: kind.ops(shard), shard),
        saved,
        ctx.residual_bytes,
        lambda shard: ends.head_working(ctx, shard),
    )


def _assumptions(model: ModelSpec, job: JobSpec, ctx: BlockContext) -> tuple[str, ...]:
    notes = list(model.notes)
    if any(isinstance(b.feed_forward, MoeSpec) for b in model.blocks.values()):
        if job.expert_imbalance == 0:
            notes.append("expert routing is assumed balanced (job: expert_imbalance = 0)")
        else:
            notes.append(
                f"expert imbalance alpha = {job.expert_imbalance:g}: a law fitted on serving "
                "kernels, assumed for training"
            )
    if job.precision == "fp8":
        notes.append("fp8: LM head, router and attention stay in bf16; weights kept in bf16")
    if job.precision == "fp32":
        notes.append("fp32: no fused attention kernel; batched products and a softmax instead")
    elif ctx.attention_kernel == "unfused":
        notes.append("attention is unfused: full, not causal, score matrices are computed")
    return tuple(notes)
