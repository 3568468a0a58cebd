"""Lower a model under a job and a stack to the graph that the cost models price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cost_models.graph import (
    Int64,
    LayerKind,
    Shard,
    Weight,
    WeightSharding,
    WorkloadGraph,
    no_bytes,
)
from cost_models.ops import Op, SavedTensor
from hardware_profiles.schema import DeviceSpec, StackSpec
from hardware_profiles.stack_words import EVERYTHING
from planner.blocks import autodiff, ends, latent_attention, prediction, vision
from planner.blocks.context import STATISTICS, BlockContext
from planner.blocks.flops import model_flops_per_token
from planner.blocks.layer import (
    layer_buffers,
    layer_ops,
    layer_saved,
    layer_working,
    with_scalars,
)
from planner.blocks.quantised import Quantiser
from planner.blocks.registry import kind_of, model_parts
from planner.blocks.weights import (
    block_weights,
    embedding_weights,
    head_weights,
    mtp_weights,
    prediction_tables,
)
from planner.kernels import attention_kernel
from planner.layer_contexts import by_context, contexts_of_layers, said
from planner.models.spec import AttentionSpec, BlockSpec, ModelSpec, MoeSpec
from planner.recompute import searched_policies
from planner.specs import JobSpec
from planner.tied_ends import tied_unit

SIGMOID_ROUTERS = ("deepseek_v3",)
"""Families whose experts' scores are sigmoids (``--moe-router-score-function``)."""


def build_workload(
    model: ModelSpec, job: JobSpec, stack: StackSpec, device: DeviceSpec
) -> WorkloadGraph:
    """The workload graph of ``model`` under ``job``, for ``stack`` on ``device``.

    ``job.sequence_length`` must be set (``planner.pipeline`` fills defaults).
    """
    assert job.sequence_length is not None, "job defaults are filled before lowering"
    model = model if job.mtp else model.model_copy(update={"mtp": ()})
    has_dropout = model.dropout and stack.dropout if job.dropout is None else job.dropout
    document = _document(job)
    images = vision.Images(job.images_per_sample, job.image_tokens or 0)
    ctx = BlockContext(
        hidden=model.hidden,
        element_bytes=4 if job.precision == "fp32" else 2,
        attention_kernel=attention_kernel(model, job, stack, device),
        fused=frozenset(stack.fused),
        dropout=has_dropout,
        vocab=model.vocab,
        vocab_divisor=stack.vocab_divisor,
        logit_saved_bytes=stack.logit_saved_bytes.value,
        norms_again=stack.norms_again,
        loss_traffic=(stack.loss_traffic["forward"], stack.loss_traffic["backward"]),
        logit_working_bytes=stack.logit_working_bytes.value,
        logit_working_bytes_split=(
            None
            if stack.logit_working_bytes_split is None
            else stack.logit_working_bytes_split.value
        ),
        loss_gradient_bytes=_loss_gradient_bytes(stack, job),
        expert_buffer_bytes=stack.expert_buffer_bytes,
        rotary_cache_bytes=stack.rotary_cache_bytes.get(
            model.family, stack.rotary_cache_bytes["default"]
        ),
        saved_input_bytes_per_64=stack.saved_input_bytes_per_64.get(job.precision),
        original_inputs=frozenset(stack.original_inputs),
        optimizer_scalar_bytes=stack.optimizer_scalar_bytes,
        norm_copy_bytes=stack.norm_copy_bytes,
        norm_statistics=STATISTICS[model.norm],
        loss_chunks=stack.loss_chunks if job.loss == "chunked" else 1,
        loss_again=stack.loss_again > 0 and job.loss == "chunked",
        rotary=model.position_embeddings == 0,
        expert_imbalance=job.expert_imbalance,
        moe_dispatcher=stack.dispatcher(device.name),
        document=document,
        dtensor=stack.layers.tensor_parallel == "dtensor",
        keeps_gathered_context=stack.layers.gathered_context == "kept",
        copies_context_output=stack.layers.gathered_context_output == "twice",
        values_are_views=stack.layers.latent_values == "view",
        sums_expert_outputs=stack.layers.expert_outputs == "summed",
        sigmoid_router=model.family in SIGMOID_ROUTERS,
        maps_routing=stack.layers.routing_maps == "megatron",
        splits_latent_down=stack.layers.latent_down == "split",
        separate=frozenset(stack.layers.separate_projections),
        sliced_experts=stack.layers.experts == "sliced",
        folded_experts=stack.layers.experts == "folded",
        expert_room=stack.layers.expert_rows == "any",
        balanced_context=stack.balanced_context,
        whole_prediction=stack.layers.prediction_projection == "whole",
        whole_vocabulary=stack.layers.vocabulary == "whole",
        exchanges_output_again=stack.layers.exchanged_output == "again",
        merges_ring=stack.layers.ring_merge != "unknown",
        orders_gathered=stack.layers.ring_merge == "transformer_engine",
        keeps_gathered=stack.layers.gathered_inputs == "kept",
        gathers_heads=stack.kv_head_replication == "gathered",
        quantiser=_quantiser(stack, job, device),
        own_operand_bytes=(
            autodiff.own_operand_bytes(job.precision, device.vendor)
            if EVERYTHING in stack.recompute
            else None
        ),
        whole_embedding_in_context=stack.layers.vocabulary == "split_without_context",
    )
    kinds = {name: _layer_kind(name, block, model, ctx) for name, block in model.blocks.items()}
    layers = tuple(run.block for run in model.layers for _ in range(run.count))
    embedding = _embedding(model, images, ctx)
    head = _head(model, ctx, tuple(kinds[r.block] for r in model.mtp for _ in range(r.count)))
    embedding, head = tied_unit(embedding, head, model, job, stack)
    layers, kinds = by_context(layers, kinds, job, model)
    return WorkloadGraph(
        name=model.name,
        sequence=job.sequence_length,
        hidden=model.hidden,
        layers=layers,
        kinds={name: with_scalars(kind, ctx) for name, kind in kinds.items()},
        embedding=with_scalars(embedding, ctx),
        head=with_scalars(head, ctx),
        tied_embeddings=model.tied_embeddings,
        model_flops_per_token=model_flops_per_token(
            model, job.sequence_length, document=document, images=images
        ),
        expert_count=max(
            (b.feed_forward.experts for b in model.blocks.values()
             if isinstance(b.feed_forward, MoeSpec)), default=0,
        ),
        boundary_bytes_per_token=model.hidden * ctx.element_bytes,
        vocab_divisor=stack.vocab_divisor,
        vocabulary_over_pipeline=stack.layers.vocabulary == "over_pipeline",
        uneven_routing=ctx.expert_imbalance > 0 and not ctx.expert_room,
        policies=searched_policies(stack, job, kinds.values(), len(layers)),
        global_batch=job.global_batch,
        transposed=job.tensor_transpose,
        assumptions=_assumptions(model, job, images, ctx),
    )  # fmt: skip


def _quantiser(stack: StackSpec, job: JobSpec, device: DeviceSpec) -> Quantiser | None:
    """How linear layers quantise, where the job is low-precision and the stack says it."""
    spec = stack.quantisation
    if spec is None or job.precision not in ("fp8", "nvfp4"):
        return None
    return Quantiser(
        spec.scaling_on(device.name),
        job.precision == "nvfp4",
        spec.transposes_on(device.name),
        spec.pipelines(job.precision),
    )


def _loss_gradient_bytes(stack: StackSpec, job: JobSpec) -> int:
    """None of adapters' runs, whose head is not trained."""
    adapters = job.finetune is not None and job.finetune.lora_rank is not None
    again = stack.loss_again if job.loss == "chunked" else 0
    return 0 if adapters else stack.loss_gradient_bytes + again


def _document(job: JobSpec) -> int | None:
    """Length of the documents that give the job's number of visible pairs.

    A token of a packed sample sees its own document. Over documents of mean m and standard
    deviation v m, tokens see ``E[L^2] / (2 E[L]) = m (1 + v^2) / 2`` keys on average.
    """
    if job.document_length is None:
        return None
    return round(job.document_length * (1 + job.document_length_cv**2))


def _layer_kind(name: str, block: BlockSpec, model: ModelSpec, ctx: BlockContext) -> LayerKind:
    weights = latent_attention.as_split(block_weights(model, block), ctx)
    if ctx.gathers_heads:
        weights = tuple(replace(weight, kv_heads=0) for weight in weights)
    kept = autodiff.counted(block, ctx)
    return LayerKind(
        name,
        weights,
        lambda shard: layer_ops(block, ctx, shard),
        lambda shard: layer_saved(block, ctx, shard),
        ctx.residual_bytes,
        lambda shard: layer_working(block, ctx, shard),
        ctx.element_bytes,
        buffer_bytes=lambda shard: layer_buffers(block, ctx, shard),
        everything=(lambda shard: autodiff.everything(block, ctx, shard)) if kept else None,
        pass_weight_bytes=ctx.own_operand_bytes or ctx.element_bytes,
    )


def _embedding(model: ModelSpec, images: vision.Images, ctx: BlockContext) -> LayerKind:
    """Token embedding, and the vision tower that feeds it."""
    tower = model.vision

    def ops(shard: Shard) -> tuple[Op, ...]:
        encoder = vision.ops(tower, images, ctx, shard) if tower else ()
        return (*encoder, *ends.embedding_ops(ctx, shard))

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        encoder = vision.saved(tower, images, ctx, shard) if tower else ()
        return (*encoder, *ends.embedding_saved(ctx, shard))

    def working(shard: Shard) -> Int64:
        own = ctx.gathered_bytes(shard)
        return np.maximum(own, vision.working(tower, images, ctx, shard)) if tower else own

    return LayerKind(
        "embedding",
        _held(embedding_weights(model), ctx, embedding=True),
        ops,
        saved,
        lambda shard: shard.tokens * 8,
        working,
    )


def _held(
    weights: tuple[Weight, ...], ctx: BlockContext, *, embedding: bool = False
) -> tuple[Weight, ...]:
    """The weights of an end as the stack's tensor parallelism shards them."""
    if ctx.whole_vocabulary:
        sharding: WeightSharding = "replicated"
    elif embedding and ctx.whole_embedding_in_context:
        sharding = "vocab_without_context"
    else:
        return weights
    return tuple(replace(w, sharding=sharding) if w.sharding == "vocab" else w for w in weights)


def _logits(ctx: BlockContext) -> Callable[[Shard], Int64]:
    """Logits that exist at once, all of them, where they are an output of their own."""
    return no_bytes if ctx.loss_again else lambda shard: ends.head_output(ctx, shard)


def _head(model: ModelSpec, ctx: BlockContext, mtp: tuple[LayerKind, ...]) -> LayerKind:
    """Final norm, LM head and loss; each MTP module adds its block and a pass through the head."""

    blocks = [model.blocks[run.block] for run in model.mtp for _ in range(run.count)]

    def ops(shard: Shard) -> tuple[Op, ...]:
        modules = [op for kind in mtp for op in prediction.module_ops(kind, ctx, shard)]
        return (*ends.head_ops(ctx, shard), *modules)

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        modules = [each for kind in mtp for each in prediction.module_saved(kind, ctx, shard)]
        return (*ends.head_saved(ctx, shard), *modules)

    return LayerKind(
        "head",
        (
            *_held(prediction_tables(model), ctx, embedding=True),
            *_held(head_weights(model, include_tied=True), ctx),
            *latent_attention.as_split(mtp_weights(model, whole=ctx.whole_prediction), ctx),
        ),
        ops,
        saved,
        ctx.residual_bytes,
        lambda shard: prediction.working(mtp, ctx, shard),
        ctx.element_bytes,
        in_pieces=ctx.loss_chunks > 1 and not ctx.loss_again,
        buffer_bytes=lambda shard: (
            ends.head_buffers(ctx, shard) + prediction.buffers(blocks, ctx, shard)
        ),
        output_bytes=_logits(ctx),
    )


def _assumptions(
    model: ModelSpec, job: JobSpec, images: vision.Images, ctx: BlockContext
) -> tuple[str, ...]:
    notes = list(model.notes)
    for part in model_parts(model):
        if isinstance(part, AttentionSpec) and ctx.attention_kernel == "unfused":
            # Windows and chunks are masks of the whole score matrices.
            part = part.model_copy(update={"window": None, "chunk": None})
        notes += (note for note in kind_of(part).assumptions(part) if note not in notes)
    if model.logit_softcap:
        notes.append("softcapped logits: the tanh between head and loss is not priced")
    if model.vision is not None:
        notes += vision.assumptions(model.vision, images)
    if job.cp_kinds:
        notes.append(said(kind for _, kind in contexts_of_layers(job, model)))
    if job.tensor_transpose > 1:
        notes.append(
            f"tensor_transpose {job.tensor_transpose}: that many of tp's ranks split feed-forwards "
            "along the other dimension, tensor the rest; beside fsdp, in a pipeline and of "
            "mixtures, bytes of calls are to 4 % those of 42 programs that XLA compiled (of two on "
            "64 ranks 1.2 and 1.5 times); with tensor and fsdp beside data or context 0.79 to 1.3 "
            "times those of 22 (of one 1.76, and arithmetic up to 2.1 times); else beside context "
            "0.59 to 0.99 (0.75 without it), beside data 0.78 to 1.04, where heads are exchanged "
            "0.85 to 2.2, of latents 0.82 to 0.97; temporaries 0.8 to 4 times"
        )
    notes += _data_assumptions(job, ctx)
    if any(isinstance(b.feed_forward, MoeSpec) for b in model.blocks.values()):
        if job.expert_imbalance == 0:
            notes.append("expert routing is assumed balanced (job: expert_imbalance = 0)")
        else:
            notes.append(
                f"expert imbalance alpha = {job.expert_imbalance:g}: a law fitted on serving "
                "kernels, assumed for training"
            )
    if job.precision in ("fp8", "int8", "nvfp4"):
        notes.append(
            f"{job.precision}: LM head, router and attention stay in bf16; weights kept in bf16"
        )
    if job.precision == "nvfp4":
        notes.append(
            "nvfp4: every layer's products run in 4 bits; recipes that keep some in bf16 are slower"
        )
    if job.precision == "fp32":
        notes.append("fp32: no fused attention kernel; batched products and a softmax instead")
    elif ctx.attention_kernel == "unfused":
        notes.append("attention is unfused: full, not causal, score matrices are computed")
    return tuple(notes)


def _data_assumptions(job: JobSpec, ctx: BlockContext) -> list[str]:
    notes = []
    longest = job.sequence_length or 0
    if ctx.document is not None and ctx.document >= longest:
        notes.append(f"documents of {ctx.document:,} tokens: each fills a sample of {longest:,}")
    elif ctx.document is not None and ctx.attention_kernel == "unfused":
        notes.append("packed samples: unfused attention computes all pairs, documents or not")
    elif ctx.document is not None:
        notes.append(
            f"packed samples: attention is priced as documents of {ctx.document:,} tokens, equal "
            "and dealt out evenly over cp"
        )
    if job.padding_share:
        notes.append(
            f"{100 * job.padding_share:g} % of positions are padding: computed like any, but left "
            "out of tokens/s and MFU"
        )
    return notes
