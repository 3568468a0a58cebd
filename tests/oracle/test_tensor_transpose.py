"""A factor of tp that splits feed-forwards the other way: the planner equals brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hardware_profiles.loader import load_stack
from planner.models.spec import MlpSpec
from planner.refute import better_layout
from planner.request import Request
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw

SEEDS = (5078, *range(5000, 5078))
"""One that splits over a pipeline first."""
ENOUGH = 6
"""Instances of each stack."""


def transposed(seed: int, stack: str) -> Request | None:
    """The instance of ``seed`` whose job names a factor; None where its layers or devices do not
    split that way."""
    request = replace(draw(seed, "maxtext-gpu"), stack=load_stack(stack))
    device = request.machine.device
    if request.stack.attention_kernel(device.name) not in device.kernels.attention:
        return None
    blocks = request.model.blocks.values()
    if not all(isinstance(block.feed_forward, MlpSpec) for block in blocks):
        return None
    ways = next((n for n in (2, 3) if request.devices % n == 0), 1)
    whole: dict[str, int] = {} if request.devices % 4 or ways == 1 else {"tp": 4}
    if seed % 3 and request.devices % (2 * ways) == 0:
        whole = {"cp": 1, "dp_replicate": 1, "zero_stage": 3} if seed % 3 == 1 else {"pp": 2}
    if ways == 1 or request.model.hidden % ways or request.job.optimizer == "muon":
        return None
    limits = request.job.constraints.model_copy(
        update={"fix": whole, "max": {}, "forbid": (), "schedule": None}
    )
    if "pp" in whole:
        heads = {"heads": 4, "kv_heads": 4}
        several = {
            name: block.model_copy(update={"mixer": block.mixer.model_copy(update=heads)})
            for name, block in request.model.blocks.items()
        }
        request = replace(request, model=request.model.model_copy(update={"blocks": several}))
    changes = {"constraints": limits, "sequence_length": 96, "tensor_transpose": ways}
    stacked = request.stack.model_copy(update={"zero_stages": (0, 1, 3)})
    return replace(
        request, stack=stacked, job=request.job.model_copy(update=changes), capacity_bytes=10**15
    )


def test_the_planner_finds_the_best_transposed_layout() -> None:
    found = Counter[str]()
    for stack in ("maxtext-tpu", "maxtext-gpu"):
        for seed in SEEDS:
            request = transposed(seed, stack)
            if request is None:
                continue
            each = compare(seed, request=request)
            assert not differences(each), seed
            if each.answer.time is None:
                continue
            x, ways = each.answer.layout, request.job.tensor_transpose
            assert x is not None
            assert x.tp % ways == 0
            assert x.cp == 1 or x.pp == 1
            assert x.zero != 2
            assert better_layout(request, each.answer.time) is None
            assert better_layout(request, each.answer.time + 1) is not None
            found[stack] += 1
            found[f"{ways} of {x.tp}"] += 1
            found["fsdp"] += x.zero == 3 and x.dp_shard > 1
            found["pipeline"] += x.pp > 1
            found["context"] += x.cp > 1
            if found[stack] >= ENOUGH:
                break
    assert found["fsdp"], found
    assert found["pipeline"], found
    assert found["context"], found
    assert {"maxtext-tpu", "maxtext-gpu", "2 of 2", "2 of 4"} <= {*found}, found
