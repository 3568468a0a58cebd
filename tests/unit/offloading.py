"""Predictions of jobs that offload, for the tests of what is offloaded where."""

from __future__ import annotations

from typing import Any

from hardware_profiles.loader import load_cluster, load_stack
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.plan import Prediction
from planner.request import Request
from planner.specs import JobSpec

PARAMETERS = 8_030_261_248
BOTH = {"optimizer_offload": True, "parameter_offload": True}


def predicted(
    cluster: str = "dgx-h100:1", layout: dict[str, Any] | None = None, **job: Any
) -> Prediction:
    spec = JobSpec(sequence_length=2048, stack="deepspeed-hf", **job)
    request = Request(
        read_model("llama-3.1-8b"), load_cluster(cluster), spec, load_stack("deepspeed-hf")
    )
    chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"} | (layout or {})
    return evaluate(request, chosen).prediction


def term(found: Prediction, name: str) -> int:
    return sum(each.bytes or 0 for each in found.stages[0].memory if each.name == name)
