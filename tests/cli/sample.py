"""Plans built by hand through the document's classes, to render and export without a search.

The figures are made up (round numbers that sum as the document promises); only their shape matters.
"""

from __future__ import annotations

from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    LayerRun,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.plan import (
    Alternative,
    Certificate,
    Chunk,
    Infeasibility,
    Input,
    Inputs,
    Layout,
    Plan,
    Prediction,
    ProgramCertificate,
    RecomputeLayers,
    Stage,
    StagePrediction,
    Target,
    Term,
    WayOut,
    digest,
)

GIB = 2**30


def dense_model() -> ModelSpec:
    """A Llama-3.1-405B-shaped model: 126 layers, GQA, SwiGLU, untied embeddings."""
    block = BlockSpec(
        mixer=AttentionSpec(heads=128, kv_heads=8, head_dim=128),
        feed_forward=MlpSpec(intermediate=53248, gated=True),
    )
    return ModelSpec(
        name="llama-3.1-405b",
        family="llama",
        source="config.json",
        hidden=16384,
        vocab=128256,
        tied_embeddings=False,
        norm="rms",
        norm_bias=False,
        max_sequence=131072,
        blocks={"dense": block},
        layers=(LayerRun(block="dense", count=126),),
    )


def gpt2_model() -> ModelSpec:
    """A GPT-2-XL-shaped model: learned positions, biases, layer norm, tied embeddings."""
    block = BlockSpec(
        mixer=AttentionSpec(heads=25, kv_heads=25, head_dim=64, qkv_bias=True, out_bias=True),
        feed_forward=MlpSpec(intermediate=6400, gated=False, bias=True, activation="gelu"),
    )
    return ModelSpec(
        name="gpt2-xl",
        family="gpt2",
        source="config.json",
        hidden=1600,
        vocab=50257,
        tied_embeddings=True,
        norm="layer",
        norm_bias=True,
        position_embeddings=1024,
        max_sequence=1024,
        dropout=True,
        blocks={"dense": block},
        layers=(LayerRun(block="dense", count=48),),
    )


def moe_model() -> ModelSpec:
    """A DeepSeek-V3-shaped model: MLA, 3 dense then 58 MoE layers, one MTP module."""
    mixer = LatentAttentionSpec(
        heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    moe = MoeSpec(
        experts=256, top_k=8, intermediate=2048, shared_intermediate=2048, router_bias=True
    )
    return ModelSpec(
        name="deepseek-v3",
        family="deepseek_v3",
        source="config.json",
        hidden=7168,
        vocab=129280,
        tied_embeddings=False,
        norm="rms",
        norm_bias=False,
        max_sequence=163840,
        blocks={
            "dense": BlockSpec(mixer=mixer, feed_forward=MlpSpec(intermediate=18432, gated=True)),
            "moe": BlockSpec(mixer=mixer, feed_forward=moe),
        },
        layers=(LayerRun(block="dense", count=3), LayerRun(block="moe", count=58)),
        mtp=(LayerRun(block="moe", count=1),),
    )


def job(**changes: object) -> dict[str, object]:
    """A job document with every default filled."""
    return {
        "sequence_length": 8192,
        "global_batch": 512,
        "global_batch_tokens": None,
        "precision": "bf16",
        "optimizer": "adamw",
        "stack": "megatron-core",
        "allow_recompute": True,
        **changes,
    }


def stages(
    counts: list[list[int]], *, recompute: list[tuple[RecomputeLayers, ...]] | None = None
) -> tuple[Stage, ...]:
    """Stages from ``counts[virtual stage][pipeline rank]``, layers dealt in model order."""
    pp, first = len(counts[0]), 0
    chunks: list[list[Chunk]] = [[] for _ in range(pp)]
    for virtual, row in enumerate(counts):
        for rank, count in enumerate(row):
            chunks[rank].append(
                Chunk(
                    layers=(first, first + count),
                    has_embedding=virtual == 0 and rank == 0,
                    has_head=virtual == len(counts) - 1 and rank == pp - 1,
                )
            )
            first += count
    return tuple(
        Stage(chunks=tuple(held), recompute=recompute[rank] if recompute else ())
        for rank, held in enumerate(chunks)
    )


def prediction(layout: Layout, *, fits: bool = True) -> Prediction:
    """Terms that sum to their totals; the first stage is the fullest."""
    per_stage = []
    for rank, stage in enumerate(layout.stages):
        layers = sum(chunk.layers[1] - chunk.layers[0] for chunk in stage.chunks)
        parts = {
            "weights": 6 * GIB,
            "gradients": 12 * GIB,
            "optimizer state": 9 * GIB,
            "activations": (36 if fits else 66) * GIB - rank * GIB,
            "communication buffers": GIB // 2,
            "framework": 3 * GIB,
        }
        per_stage.append(
            StagePrediction(
                peak_bytes=sum(parts.values()),
                allocated_bytes=sum(parts.values()) - 3 * GIB,
                reserved_bytes=sum(parts.values()) - 2 * GIB,
                device_bytes=sum(parts.values()),
                memory=tuple(Term(name=name, bytes=size) for name, size in parts.items()),
                compute_s=14.0 + 0.25 * (rank == 0),
                layers=layers,
                parameters=3_221_225_472,
            )
        )
    seconds = {
        "compute": 13.9,
        "recompute": 0.6,
        "tensor parallel": 1.55,
        "pipeline bubble": 1.2,
        "pipeline transfer": 0.05,
        "data parallel (exposed)": 0.5,
        "optimizer": 0.2,
    }
    largest = max(stage.peak_bytes for stage in per_stage)
    return Prediction(
        step_time_s=18.0,
        step_time_band_s=(16.6, 19.8),
        band_source="90 % of 41 measured runs with megatron-core",
        tokens_per_s_per_device=28.4,
        mfu=0.412,
        mfu_convention="causal attention, bf16 peak 989 TFLOP/s",
        outside_measured_region=False,
        max_peak_bytes=largest,
        allocated_bytes=largest - 3 * GIB,
        reserved_bytes=largest - 2 * GIB,
        device_bytes=largest,
        capacity_bytes=80 * GIB,
        memory_margin=0.0,
        memory_margin_source="as asked",
        usable_bytes=80 * GIB,
        fits=fits,
        time=tuple(Term(name=name, seconds=value) for name, value in seconds.items()),
        stages=tuple(per_stage),
        assumptions=("expert routing is balanced (alpha = 0)",),
    )


def certificate(**changes: object) -> Certificate:
    """An optimal certificate whose counts sum."""
    body: dict[str, object] = {
        "status": "optimal",
        "objective_s": 18.0,
        "lower_bound_s": 17.93,
        "relative_gap": 0.00389,
        "tolerance": 0.01,
        "program": ProgramCertificate(
            surrogate="1F1B steady state",
            objective_s=17.8,
            bound_s=17.8,
            gap=0.0,
            solver="dynamic program",
            termination="optimal",
        ),
        "space_size": 182_440,
        "removed": {
            "microbatch does not divide the batch": 90_000,
            "does not fit in memory": 41_000,
            "tp exceeds the node": 22_000,
            "layers do not divide into virtual stages": 11_000,
        },
        "priced": 18_440,
        "pruned_by_bound": 18_321,
        "quantum": "1 ns, 1 KiB",
        "simulated_count": 37,
        "statement": "optimal within 0.39 %: no layout of the space is faster than 17.9 s.",
        **changes,
    }
    return Certificate.model_validate(body)


def plan_of(
    model: ModelSpec,
    layout: Layout,
    *,
    cluster: str,
    job_document: dict[str, object] | None = None,
    fits: bool = True,
) -> Plan:
    """A plan for ``model`` with ``layout`` on the named cluster."""
    documents = {
        "model": (model.name, model.model_dump(mode="json")),
        "cluster": (cluster, {"name": cluster}),
        "job": ("job", job_document or job()),
    }
    inputs = {
        key: Input(name=name, digest=digest(body), document=body)
        for key, (name, body) in documents.items()
    }
    others = (
        ("fastest with a larger microbatch", {"microbatch_size": 2, "num_microbatches": 2}, 19.1),
        ("simplest sharding", {"zero_stage": 0}, 19.4),
        ("least memory", {"optimizer_offload": True}, 21.0),
    )
    return Plan(
        planner_version="0.1.0",
        inputs=Inputs(**inputs),
        target=Target(stack="megatron-core", version="0.16"),
        cost_model_digest="sha256:0123456789abcdef",
        layout=layout,
        prediction=prediction(layout, fits=fits),
        certificate=certificate(),
        alternatives=tuple(
            Alternative(
                reason=reason,
                layout=layout.model_copy(update=change),
                step_time_s=seconds,
                step_time_band_s=(0.9 * seconds, 1.1 * seconds),
                tie=True,
                max_peak_bytes=61 * GIB,
                fits=True,
            )
            for reason, change, seconds in others
        ),
        warnings=("the cluster has 2 devices more than the layout uses",),
    )


def dense_plan() -> Plan:
    """126 layers on 16 uneven stages: the first and last hold 7, the rest 8."""
    recompute = [(RecomputeLayers(kind="dense", mode="full", layers=2),) for _ in range(16)]
    layout = Layout(
        dp_replicate=1,
        dp_shard=128,
        tp=8,
        sequence_parallel=True,
        pp=16,
        microbatch_size=1,
        num_microbatches=4,
        zero_stage=1,
        stages=stages([[7, *[8] * 14, 7]], recompute=recompute),
    )
    return plan_of(dense_model(), layout, cluster="dgx-h100:2048")


def interleaved_plan() -> Plan:
    """The same model with equal chunks would need 126 = pp x vpp x n: 7 stages of 2 x 9."""
    layout = Layout(
        dp_replicate=2,
        dp_shard=8,
        cp=2,
        tp=8,
        sequence_parallel=True,
        pp=7,
        vpp=2,
        microbatch_size=1,
        num_microbatches=32,
        zero_stage=1,
        schedule="interleaved",
        stages=stages([[9] * 7, [9] * 7]),
    )
    return plan_of(dense_model(), layout, cluster="dgx-h100:224")


def moe_plan() -> Plan:
    """61 layers and an MTP module on 16 stages with expert parallelism 32."""
    counts = [[4] * 13 + [3, 3, 3]]
    kinds = (RecomputeLayers(kind="moe", mode="selective", layers=1),)
    selective: list[tuple[RecomputeLayers, ...]] = []
    for rank, count in enumerate(counts[0]):
        dense = 3 if rank == 0 else 0
        held = [RecomputeLayers(kind="dense", mode="selective", layers=3)] if dense else []
        held.append(kinds[0].model_copy(update={"layers": count - dense}))
        selective.append(tuple(held))
    layout = Layout(
        dp_replicate=1,
        dp_shard=128,
        tp=1,
        pp=16,
        ep=32,
        expert_dp=4,
        microbatch_size=1,
        num_microbatches=120,
        zero_stage=1,
        stages=stages(counts, recompute=selective),
    )
    return plan_of(
        moe_model(),
        layout,
        cluster="dgx-h800:256",
        job_document=job(sequence_length=4096, global_batch=15360),
    )


def single_device_plan() -> Plan:
    """One device, no parallelism at all."""
    layout = Layout(
        dp_replicate=1,
        dp_shard=1,
        microbatch_size=4,
        num_microbatches=128,
        stages=stages([[48]]),
    )
    return plan_of(
        gpt2_model(),
        layout,
        cluster="rtx-4090:1",
        job_document=job(sequence_length=1024),
    )


def infeasibility() -> Infeasibility:
    """A request that cannot fit, with its fullest device and two ways out."""
    plan = dense_plan()
    full = prediction(plan.layout, fits=False).stages[0]
    return Infeasibility(
        planner_version="0.1.0",
        inputs=plan.inputs,
        target=plan.target,
        cost_model_digest=plan.cost_model_digest,
        certificate=certificate(
            status="infeasible",
            objective_s=None,
            lower_bound_s=None,
            relative_gap=None,
            program=None,
            priced=0,
            pruned_by_bound=0,
            simulated_count=0,
            removed={"does not fit in memory": 182_440},
            statement="none of the 182,440 layouts fits in 80.0 GiB per device.",
        ),
        message="no layout fits",
        binding="memory: the closest layout needs 96.5 GiB of 80.0 GiB per device",
        closest_layout=plan.layout,
        needed_bytes=full.peak_bytes,
        capacity_bytes=80 * GIB,
        usable_bytes=80 * GIB,
        memory=full.memory,
        ways_out=(
            WayOut(change="double the nodes to 4096", effect="fits", step_time_s=9.4),
            WayOut(change="allow full recompute", effect="fits in 71.0 GiB", step_time_s=22.0),
        ),
    )
