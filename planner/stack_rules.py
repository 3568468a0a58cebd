"""Rules that a stack's YAML names, each as a sentence and where a mesh breaks it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cost_models.graph import Bools
from planner.blocks.registry import attention_sorts
from planner.meshes import Meshes
from planner.request import Request


def concerns(rule: str, request: Request) -> bool:
    """Whether a rule can bind for the model of a request."""
    if rule in ("no_tied_embeddings", "no_tied_embeddings_in_pipeline"):
        return request.workload.tied_embeddings
    if rule in ("no_prediction_in_pipeline", "no_prediction_with_context"):
        return request.predicts
    if rule == "no_sinks_in_16_bit_pipelines":
        sinks = "attention sinks" in attention_sorts(request.model)
        return sinks and request.job.precision != "fp32"
    return request.workload.expert_count > 0 or rule not in {
        "moe_with_tp_needs_sequence_parallel",
        "ep_with_tp_needs_sequence_parallel",
        "no_experts",
        "no_experts_with_tp",
        "no_expert_parallelism",
        "experts_follow_tp",
        "experts_over_ep_or_tp",
        "experts_over_data_or_context",
    }


STACK_RULES: dict[str, tuple[str | None, Callable[[Meshes], Bools]]] = {
    "no_sinks_in_16_bit_pipelines": (
        "in 16 bits no derivative of a pipeline's loop over layers with attention sinks",
        lambda m: m.pp > 1,
    ),
    "moe_with_tp_needs_sequence_parallel": (
        "experts with tp need sequence parallelism",
        lambda m: (m.tp > 1) & (m.sp == 0),
    ),
    "ep_with_tp_needs_sequence_parallel": (
        "expert parallelism with tp needs sequence parallelism",
        lambda m: (m.tp > 1) & (m.ep > 1) & (m.sp == 0),
    ),
    "no_sequence_parallelism_with_context": (
        "sequence parallelism does not combine with context parallelism",
        lambda m: (m.cp > 1) & (m.sp == 1),
    ),
    "no_experts": ("no mixture of experts", lambda m: m.tp >= 1),
    "no_experts_with_tp": ("no mixture of experts under tp", lambda m: m.tp > 1),
    "no_expert_parallelism": ("no expert parallelism", lambda m: m.ep > 1),
    "experts_follow_tp": ("experts are split as tp splits all else", lambda m: m.etp != m.tp),
    "experts_over_ep_or_tp": (
        "experts are split over ep, or over tp where ep is 1",
        lambda m: m.etp != np.where(m.ep == 1, m.tp, 1),
    ),
    "experts_over_data_or_context": (
        "experts are split over a part of dp, or over a part of cp",
        lambda m: (m.dp % m.ep != 0) & (m.cp % m.ep != 0),
    ),
    "tp_needs_expert_parallelism": (
        "tensor parallelism needs expert parallelism",
        lambda m: (m.tp > 1) & (m.ep == 1),
    ),
    "no_tied_embeddings": ("no tied embeddings", lambda m: m.tp >= 1),
    "no_tied_embeddings_in_pipeline": ("no tied embeddings under a pipeline", lambda m: m.pp > 1),
    "no_prediction_in_pipeline": (
        "no multi-token prediction under a pipeline",
        lambda m: m.pp > 1,
    ),
    "no_prediction_with_context": (
        "no multi-token prediction with context parallelism",
        lambda m: m.cp > 1,
    ),
    "no_pipeline": ("no pipeline parallelism", lambda m: m.pp > 1),
}
"""Rules on meshes by the name that a stack's YAML uses."""
