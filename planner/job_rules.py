"""What a stack cannot run of a job: batch, precision, optimizer or recomputation on some meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cost_models.graph import Bools
from cost_models.recompute import in_parts
from hardware_profiles.stack_words import EVERYTHING
from planner.hosting import loses_gradients, on_drives
from planner.meshes import Meshes
from planner.recompute import FIRST_LAYERS, IN_PIPELINES, WHOLE_INPUTS, first_layers
from planner.request import Request


def job_rules(request: Request) -> Iterator[tuple[str, Callable[[Meshes], Bools]]]:
    """Sentences, each with a predicate that is True where a mesh breaks it."""
    stack, batch = request.stack, request.global_batch
    label = f"{stack.name} {stack.version}"
    if "no_accumulation_in_fp8" in stack.rules and request.job.precision == "fp8":
        yield (
            f"{label}: no fp8 with gradient accumulation (one microbatch, or a pipeline)",
            lambda m: (m.pp == 1) & (m.dp * m.microbatch != batch),
        )
    if "no_pipeline_in_fp8" in stack.rules and request.job.precision == "fp8":
        yield f"{label}: layers of a pipeline are not quantised in fp8", lambda m: m.pp > 1
    if "no_experts_in_fp8" in stack.rules and request.job.precision == "fp8":
        experts = request.workload.expert_count > 0
        yield f"{label}: no mixture of experts in fp8", lambda m: (m.tp > 0) & experts
    if "no_accumulation" in stack.rules:
        yield f"{label}: a step is one microbatch", lambda m: m.dp * m.microbatch != batch
    if request.job.optimizer == "muon" and not stack.muon.tensor_parallel:
        yield f"{label} runs muon on matrices that tp does not split", lambda m: m.tp > 1
    if request.job.optimizer == "muon" and not stack.muon.pipeline:
        yield f"{label} runs muon without a pipeline only", lambda m: m.pp > 1
    drives = on_drives(request)
    if request.job.optimizer == "muon" and drives is not None:
        least, multiple = drives.part_elements, drives.part_multiple
        yield (
            f"{label} loses gradients on the drives of matrices whose part on a rank has less than "
            f"{least:,} elements, or no multiple of {multiple}",
            lambda m: _loses(request, m),
        )
    ways = request.job.tensor_transpose
    if ways > 1:
        yield f"tensor_transpose {ways} does not divide tp", lambda m: m.tp % ways != 0
        experts_too = request.workload.expert_count > 0
        yield (
            f"{label}: mixtures have neither tensor nor an expert axis beside tensor_transpose",
            lambda m: experts_too & ((m.tp != ways) | (m.ep > 1)),
        )
    asked = request.job.constraints.recompute or "none"
    sent = first_layers(asked)
    if sent:
        too_many = sent >= request.model.layer_count
        yield FIRST_LAYERS, lambda m: (m.pp > 1) | too_many
    if asked == EVERYTHING:
        yield IN_PIPELINES, lambda m: m.pp == 1
    if in_parts(asked):
        yield WHOLE_INPUTS, lambda m: (m.tp == 1) | (m.sp == 1)


def _loses(request: Request, m: Meshes) -> Bools:
    ways, inverse = np.unique(m.dp * m.cp, return_inverse=True)
    return np.array([loses_gradients(request, int(n)) for n in ways], dtype=np.bool_)[inverse]
