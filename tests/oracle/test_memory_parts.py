"""Parts of a device's memory by hand: what single tensors and terms add, in plain integers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cost_models.graph import Shard
from hardware_profiles.loader import load_cluster, load_stack
from planner.blocks.context import BlockContext
from planner.blocks.moe import imbalance
from planner.models.reader import read_model
from planner.models.spec import MoeSpec
from planner.pipeline import evaluate
from planner.plan import StagePrediction
from planner.request import Request
from planner.specs import JobSpec


def first_stage(
    model: str, layout: dict[str, Any], *, pipeline_peer: float | None = None, **job: Any
) -> StagePrediction:
    """The first stage on 8 devices, under Megatron-Core."""
    stack = load_stack("megatron-core")
    if pipeline_peer is not None:
        peer = stack.reserve.pipeline_peer.model_copy(update={"value": pipeline_peer})
        reserve = stack.reserve.model_copy(update={"pipeline_peer": peer})
        stack = stack.model_copy(update={"reserve": reserve})
    spec = JobSpec(sequence_length=2048, global_batch=8, stack=stack.name, **job)
    request = Request(read_model(model), load_cluster("dgx-h100:1"), spec, stack)
    return evaluate(request, {"microbatch_size": 1, **layout}).prediction.stages[0]


def term(stage: StagePrediction, name: str) -> int:
    return sum(each.bytes or 0 for each in stage.memory if each.name == name)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_dropout_keeps_a_byte_for_each_element_behind_both_sub_blocks(tp: int) -> None:
    """Korthikanti et al. (arXiv 2205.05198, section 4.1): one byte of mask for each element behind
    attention and behind the MLP of each layer, and behind the embedding; sequence parallelism
    splits them. The mask of the scores stays inside the fused kernel."""
    layout = {"tp": tp, "sequence_parallel": tp > 1, "recompute": "none"}
    masked, plain = (first_stage("gpt3-6.7b", layout, dropout=dropout) for dropout in (True, False))
    masks = 2 * 32 * (2048 // tp) * 4096
    found = term(masked, "activations") - term(plain, "activations")
    assert found == masks + (2048 // tp) * 4096


@pytest.mark.parametrize(("pp", "neighbours"), [(1, 0), (2, 1), (4, 2), (8, 2)])
def test_each_neighbour_in_the_pipeline_has_nccl_buffers(pp: int, neighbours: int) -> None:
    layout = {"pp": pp, "recompute": "full"}
    mib = 64 * 2**20
    with_peers = first_stage("llama-3.2-1b", layout)
    none = first_stage("llama-3.2-1b", layout, pipeline_peer=0.0)
    assert with_peers.device_bytes - none.device_bytes == neighbours * mib


@pytest.mark.parametrize(
    ("alpha", "ep", "experts", "top_k", "factor"),
    [
        (0.0, 8, 8, 2, 1.0),
        (1.0, 8, 8, 2, 2**1.35),  # 8^0.45
        (2.0, 8, 8, 2, 4.0),  # 8^0.9 is more than all tokens on one rank: 8 x min(2, 1) / 2
        (0.5, 16, 64, 6, 2**0.9),
        (1.0, 1, 64, 6, 1.0),
    ],
)
def test_the_hottest_rank_by_the_power_law(
    alpha: float, ep: int, experts: int, top_k: int, factor: float
) -> None:
    one = np.array([1])
    shard = Shard(128, one, one, one, one * ep, one, np.array([False]), 0 * one)
    spec = MoeSpec(experts=experts, top_k=top_k, intermediate=64)
    context = cast("BlockContext", SimpleNamespace(expert_imbalance=alpha))
    assert imbalance(spec, context, shard)[0] == pytest.approx(factor, rel=1e-12)


def test_latent_attention_keeps_queries_keys_and_values() -> None:
    """DeepSeek-V2-Lite: 16 heads of 128 + 64 for queries and keys, 128 for values; 16 bits."""
    model = read_model("deepseek-v2-lite")
    job = JobSpec(sequence_length=2048, global_batch=8, stack="megatron-core")
    request = Request(model, load_cluster("dgx-h100:1"), job, load_stack("megatron-core"))
    one = np.array([1])
    for tp in (1, 2, 4):
        shard = Shard(2048, one, tp * one, one, one, one, np.array([tp > 1]), 0 * one)
        for kind in request.workload.kinds.values():
            kept = {tensor.name: np.ravel(tensor.bytes)[0] for tensor in kind.saved(shard)}
            assert kept["qkv"] == 2 * 2048 * (16 // tp) * (192 + 192 + 128)
            assert kept["attention_output"] == 2 * 2048 * (16 // tp) * 128


def test_buffers_take_room_at_the_peak_of_every_rank() -> None:
    """Rotary factors of twice the bytes: each rank needs as much more as its layers' factors take
    (2,048 tokens, 128 wide, 8 bytes more for each pair of them and 16 layers, and no weight)."""
    stages = []
    for size in (4, 8):
        stack = load_stack("torchtitan")
        stack = stack.model_copy(update={"rotary_cache_bytes": {"default": size}})
        job = JobSpec(sequence_length=2048, global_batch=32, stack=stack.name)
        request = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:1"), job, stack)
        found = evaluate(request, {"pp": 2, "zero_stage": 2, "recompute": "full"})
        stages.append(found.prediction.stages)
    for small, large in zip(*stages, strict=True):
        more = 4 * 2048 * 128 * 16
        assert term(large, "buffers") - term(small, "buffers") == more
        assert large.peak_bytes - small.peak_bytes == more
