"""From a planner's request and layout to what the tracer builds: one case per pipeline rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hardware_profiles.loader import load_stack
from planner import pipeline
from planner.certify import request_of
from planner.errors import InputError, UnsupportedError
from planner.models.spec import (
    AttentionSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.pipeline import EvaluatedLayout, Request
from planner.plan import Layout, Plan

MICROBATCHES_WITHOUT_PIPELINE = 2
"""Microbatches traced without a pipeline: the second meets the gradients of the first, and every
later one is like it."""

TARGET = "torchtitan"
STACK = "torchtitan-decomposed"
"""What is traced is predicted as: a CPU has no fused norm, so PyTorch runs it op by op."""


@dataclass(frozen=True)
class Study:
    """One layout of one model."""

    id: str
    request: Request
    layout: dict[str, Any]
    ranks: tuple[int, ...] | None = None
    """Pipeline ranks to trace; None: all."""

    def evaluated(self) -> EvaluatedLayout:
        """The planner's prediction."""
        return pipeline.evaluate(self.request, self.layout)


def read_studies(path: Path) -> list[Study]:
    """Studies of a JSON file: a list of objects with model, cluster, job and layout."""
    return [study_of(entry) for entry in json.loads(path.read_text())]


def study_of(entry: Mapping[str, Any]) -> Study:
    """One study; ``depth`` truncates each run of equal layers to so many."""
    job = {"stack": STACK, **entry["job"]}
    request = pipeline.read_request(entry["model"], entry["cluster"], None, job)
    ranks = tuple(entry["ranks"]) if "ranks" in entry else None
    # A variant of torchtitan is traced on a CPU too.
    stack = request.stack.model_copy(update={"fused": load_stack(STACK).fused})
    request = replace(request, stack=stack)
    return Study(entry["id"], truncated(request, entry.get("depth")), dict(entry["layout"]), ranks)


def study_of_plan(plan: Plan, depth: Sequence[int] | None) -> Study:
    """The study of a plan for torchtitan; a truncated model is split over its stages evenly."""
    if plan.target.stack != TARGET:
        raise UnsupportedError(
            f"the plan is for {plan.target.stack}; traces are made with {TARGET}",
            hint=f"plan with --stack {TARGET}",
        )
    layout = plan.layout.model_dump(mode="json")
    if depth is not None:
        modes = {part.mode for stage in plan.layout.stages for part in stage.recompute}
        layout |= {"stages": (), "recompute": modes.pop() if len(modes) == 1 else "none"}
    asked = request_of(plan)
    request = replace(
        asked, job=asked.job.model_copy(update={"stack": STACK}), stack=load_stack(STACK)
    )
    return Study("plan", truncated(request, depth), layout)


def truncated(request: Request, depth: Sequence[int] | None) -> Request:
    """``request`` with ``depth[i]`` layers in the model's run ``i`` of equal layers."""
    if depth is None:
        return request
    runs = request.model.layers
    if len(depth) != len(runs):
        raise InputError(
            f"depth {list(depth)} has {len(depth)} numbers, but {request.model.name} has "
            f"{len(runs)} runs of equal layers"
        )
    layers = tuple(
        run.model_copy(update={"count": count})
        for run, count in zip(runs, depth, strict=True)
        if count
    )
    return replace(request, model=request.model.model_copy(update={"layers": layers}))


def cases_of(study: Study, layout: Layout) -> list[dict[str, Any]]:
    """What the tracer needs for each pipeline rank of a complete layout."""
    request = study.request
    fields = (
        "dp_replicate", "dp_shard", "tp", "sequence_parallel", "cp", "pp", "ep",
        "microbatch_size", "schedule",
    )  # fmt: skip
    per_stage = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp
    microbatches = layout.num_microbatches
    if layout.pp == 1:
        microbatches = min(microbatches, MICROBATCHES_WITHOUT_PIPELINE)
    if layout.etp > 1:
        raise UnsupportedError("torchtitan 0.3.0 does not shard experts over etp")
    modes = {part.mode for stage in layout.stages for part in stage.recompute}
    if len(modes) > 1:
        raise UnsupportedError(f"torchtitan recomputes all layers alike, not {sorted(modes)}")
    return [
        {
            "model": model_of(request.model, request.sequence),
            "world": request.devices,
            "rank": rank * per_stage,
            "stage": rank,
            "layout": {name: getattr(layout, name) for name in fields},
            "chunks": [chunk.model_dump(mode="json") for chunk in layout.stages[rank].chunks],
            "sequence": request.sequence,
            "microbatches": microbatches,
            "recompute": modes.pop() if modes else "none",
            "reshard": _resharding(layout),
            "loss": "plain" if request.job.loss == "whole" else request.job.loss,
            "optimizer": "foreach",
            **({"dtype": "bfloat16"} if request.machine.rules.weight_bytes == 2 else {}),
        }
        for rank, modes in [(rank, set(modes)) for rank in range(layout.pp)]
        if study.ranks is None or rank in study.ranks
    ]


def _resharding(layout: Layout) -> str:
    """``fsdp_reshard_after_forward``, whose default keeps weights under a pipeline."""
    if layout.pp > 1:
        return "always" if layout.zero_stage == 3 else "default"
    return "default" if layout.zero_stage == 3 else "never"


def model_of(model: ModelSpec, sequence: int) -> dict[str, Any]:
    """The arguments of torchtitan's builder for a model of a family that it has."""
    blocks = [model.blocks[run.block] for run in model.layers]
    mixer, count = blocks[0].mixer, model.layer_count
    wide = [b.feed_forward for b in blocks if isinstance(b.feed_forward, MoeSpec)]
    dense = [b.feed_forward for b in blocks if isinstance(b.feed_forward, MlpSpec)]
    layers: dict[str, Any] = {"n_layers": count, "n_heads": getattr(mixer, "heads", 0)}
    if isinstance(mixer, LatentAttentionSpec) and wide:
        family, moe = "deepseek_v3", wide[0]
        layers |= {
            "n_dense_layers": sum(
                run.count for run, block in zip(model.layers, blocks, strict=True)
                if isinstance(block.feed_forward, MlpSpec)
            ),
            "q_lora_rank": mixer.q_lora_rank or 0, "kv_lora_rank": mixer.kv_lora_rank,
            "qk_nope_head_dim": mixer.qk_nope_head_dim,
            "qk_rope_head_dim": mixer.qk_rope_head_dim, "v_head_dim": mixer.v_head_dim,
            "dense_hidden_dim": dense[0].intermediate if dense else 1,
            "moe_hidden_dim": moe.intermediate, "num_experts": moe.experts,
            "num_shared_experts": moe.shared_intermediate // moe.intermediate,
            "router_top_k": moe.top_k, "router_score_func": "sigmoid",
        }  # fmt: skip
    elif isinstance(mixer, AttentionSpec) and not mixer.qkv_bias and mixer.window is None:
        layers |= {"n_kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim}
        if mixer.qk_norm == "per_head" and wide and not dense:
            family, moe = "qwen3_moe", wide[0]
            layers |= {
                "moe_hidden_dim": moe.intermediate, "num_experts": moe.experts,
                "top_k": moe.top_k,
            }  # fmt: skip
        elif dense and not wide and dense[0].gated and not dense[0].bias:
            family = "qwen3" if mixer.qk_norm == "per_head" else "llama3"
            layers["hidden_dim"] = dense[0].intermediate
        else:
            raise _no_family(model)
    else:
        raise _no_family(model)
    return {
        "family": family, "dim": model.hidden, "vocab": model.vocab,
        "tied": model.tied_embeddings, "max_sequence": sequence, "layers": layers,
    }  # fmt: skip


def _no_family(model: ModelSpec) -> UnsupportedError:
    return UnsupportedError(
        f"torchtitan 0.3.0 has no model with the layers of {model.name}",
        hint="families that can be traced: Llama 3, Qwen3, Qwen3 MoE, DeepSeek V2 and V3",
    )
