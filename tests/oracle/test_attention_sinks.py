"""Layers with attention sinks, which kernels and pipelines refuse: the planner equals brute
force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hardware_profiles.loader import load_stack
from hardware_profiles.stack_words import EVERYTHING
from planner.models.spec import AttentionSpec, BlockSpec
from planner.request import Request
from tests.oracle.amount import of
from tests.oracle.compare import agreed
from tests.oracle.instances import draw

SEEDS = range(9100, 9100 + of(18, 6))


def with_sinks(block: BlockSpec) -> BlockSpec:
    if not isinstance(block.mixer, AttentionSpec):
        return block
    return block.model_copy(update={"mixer": block.mixer.model_copy(update={"sinks": True})})


def sunk(seed: int, stack: str) -> Request | None:
    """The instance of a seed on a stack as it ships, in a pipeline without a policy or with context
    parallelism where its devices allow it; None where its device has no figures of the kernel."""
    try:
        request = replace(draw(seed, stack), stack=load_stack(stack))
    except ValueError:
        return None
    blocks = {name: with_sinks(block) for name, block in request.model.blocks.items()}
    model = request.model.model_copy(update={"blocks": blocks})
    most = max(n for n in (1, 2, 3, 4) if request.devices % n == 0)
    piped = seed % 3 == 1 and most > 1 and stack != "maxtext-tpu"
    limits = request.job.constraints.model_copy(
        update={
            "fix": {"cp": most} if seed % 3 == 0 else {"pp": most} if piped else {},
            "max": {}, "forbid": (), "schedule": None, "sequence_parallel": None,
            "recompute": EVERYTHING if piped else None,
        }
    )  # fmt: skip
    changes = {"constraints": limits, "sequence_length": 96, "global_batch": request.devices}
    job = request.job.model_copy(update=changes)
    request = replace(request, model=model, job=job, capacity_bytes=10**15)
    return None if request.unsupported is not None else request


def test_the_planner_finds_the_best_layout_of_layers_with_sinks() -> None:
    found = Counter[str]()
    for stack in ("maxtext-gpu", "maxtext-tpu", "maxtext-tpu-dot-product"):
        for seed in SEEDS:
            request = sunk(seed, stack)
            if request is None:
                continue
            answer = agreed(seed, request)
            x = answer.layout
            if x is None:
                continue
            found[stack] += 1
            found[f"{stack} {request.job.precision}"] += 1
            found["context"] += x.cp > 1
            found["pipelines"] += x.pp > 1
            found[EVERYTHING] += answer.options[0][0] == EVERYTHING
    assert found["maxtext-gpu bf16"]
    assert found["maxtext-tpu bf16"]
    assert found["context"]
    assert found["pipelines"]
    assert found[EVERYTHING]
