"""A factor of tp that splits feed-forwards the other way: the planner equals brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hardware_profiles.loader import load_stack
from planner.models.spec import AttentionSpec, LatentAttentionSpec, MlpSpec, MoeSpec
from planner.request import Request
from tests.oracle import amount
from tests.oracle.compare import agreed
from tests.oracle.instances import draw

SEEDS = range(5000, 5200)
DATA = {"dp_shard": 2, "dp_replicate": 2, "zero_stage": 3}
CASES: tuple[tuple[dict[str, int], bool], ...] = (
    ({"tp": 4}, False), ({}, True), ({"dp_shard": 2, "zero_stage": 3}, False), (DATA, True),
    ({"pp": 2, "cp": 2}, False), ({"pp": 2}, True), (DATA, False), ({"cp": 2}, True),
    ({"tp": 4}, True), ({"cp": 2}, False), ({"pp": 2}, False), ({}, False),
    ({"dp_shard": 2, "zero_stage": 3}, True), ({"pp": 2, "cp": 2}, True),
)  # fmt: skip
"""What a job fixes, and whether of a mixture; the quick run has three."""


def transposed(seed: int, stack: str, wish: dict[str, int], *, mixes: bool) -> Request | None:
    """The instance of ``seed`` whose job names a factor; None where its layers or devices do not
    split that way."""
    request = replace(draw(seed, "maxtext-gpu"), stack=load_stack(stack))
    device = request.machine.device
    if request.stack.attention_kernel(device.name) not in device.kernels.attention:
        return None
    blocks = request.model.blocks
    parts = {type(part) for block in blocks.values() for part in (block.mixer, block.feed_forward)}
    if not parts <= {AttentionSpec, LatentAttentionSpec, MlpSpec, MoeSpec}:
        return None
    ways = next((n for n in (2, 3) if request.devices % n == 0), 1)
    if ways == 1 or request.model.hidden % ways or (MoeSpec in parts) != mixes:
        return None
    least = math.prod(n for name, n in wish.items() if name != "zero_stage")
    if request.devices % (least * (1 if "tp" in wish else ways)):
        return None
    limits = request.job.constraints.model_copy(
        update={"fix": wish, "max": {}, "forbid": (), "schedule": None}
    )
    heads = {"heads": 4, "kv_heads": 4} if AttentionSpec in parts else {"heads": 4}
    several = {
        name: block.model_copy(update={"mixer": block.mixer.model_copy(update=heads)})
        for name, block in blocks.items()
    }
    changes = {"constraints": limits, "sequence_length": 96, "tensor_transpose": ways}
    return replace(
        request, model=request.model.model_copy(update={"blocks": several}),
        job=request.job.model_copy(update=changes), capacity_bytes=10**15,
    )  # fmt: skip


@pytest.mark.parametrize(("wish", "mixes"), CASES[: amount.of(len(CASES), 3)], ids=str)
def test_the_planner_finds_the_best_transposed_layout(wish: dict[str, int], mixes: bool) -> None:
    """Once, with both stacks in turn; mixtures have no other tp."""
    stack = ("maxtext-tpu", "maxtext-gpu")[CASES.index((wish, mixes)) % 2]
    for seed in SEEDS:
        request = transposed(seed, stack, wish, mixes=mixes)
        if request is None:
            continue
        x, ways = agreed(seed, request).layout, request.job.tensor_transpose
        if mixes and "tp" in wish:
            assert x is None
            return
        if x is None:
            continue
        assert x.tp % ways == 0
        assert x.tp == ways or not mixes
        return
    raise AssertionError("no instance has such a layout")
