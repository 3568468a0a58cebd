"""Persistent state, against Megatron-Core's own layout and against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models import state
from cost_models.buffers import contiguous_elements
from cost_models.graph import Int64, Shard, Weight
from cost_models.state import Sharding, StateBytes, state_bytes
from cost_models.state_rules import state_rules
from hardware_profiles.loader import load_cluster, load_stack
from planner.buffer_sizes import exact_state
from planner.layouts import complete_layout
from planner.models.reader import read_model
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, MlpSpec, ModelSpec, MoeSpec
from planner.predict import predict, price
from planner.request import Request
from planner.specs import JobSpec

CASES = json.loads((Path(__file__).parent / "data" / "megatron_buffers.json").read_text())
"""Made by benchmarks/memory/megatron_buffers.py with Megatron-Core 0.19.2."""


def one(value: int) -> Int64:
    return np.array([value], dtype=np.int64)


def shard(**degrees: int) -> Shard:
    values = {"microbatch": 1, "tp": 1, "cp": 1, "ep": 1, "etp": 1, **degrees}
    return Shard(
        sequence=128, sequence_parallel=np.array([False]), cp_kind=one(0),
        **{name: one(value) for name, value in values.items()},
    )  # fmt: skip


def held(
    weights: list[Weight], stack: str, *, ways: int, zero: int, precision: Any = "bf16",
    tp: int = 1, pp: int = 1, optimizer: str = "adamw",
) -> StateBytes:  # fmt: skip
    profile = load_stack(stack)
    rules = state_rules(
        spec=profile.state, precision=precision, optimizer=optimizer,
        master_weights=profile.master_weights, gradient_dtype=profile.gradient_dtype,
    )  # fmt: skip
    sharding = Sharding(one(ways), one(zero), np.array([pp > 1]))
    return state_bytes(weights, shard(tp=tp), sharding, rules, vocab_divisor=1)


def numbers(found: StateBytes) -> tuple[int, int, int, int]:
    parts = (found.weights, found.gradients, found.optimizer, found.step)
    return tuple(int(part[0]) for part in parts)  # type: ignore[return-value]


def model_of(case: dict[str, Any]) -> ModelSpec:
    experts = case.get("experts")
    feed_forward = (
        MoeSpec(experts=experts, top_k=2, intermediate=case["moe_ffn"])
        if experts
        else MlpSpec(intermediate=case["ffn"], gated=True)
    )
    mixer = AttentionSpec(
        heads=case["heads"], kv_heads=case["kv"], head_dim=case["hidden"] // case["heads"]
    )
    return ModelSpec(
        name="case", family="test", source="test", hidden=case["hidden"], vocab=case["vocab"],
        tied_embeddings=False, norm="rms", norm_bias=False,
        blocks={"layer": BlockSpec(mixer=mixer, feed_forward=feed_forward)},
        layers=(LayerRun(block="layer", count=case["layers"]),),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"world {c['world']} rank {c['rank']}" for c in CASES])
def test_distributed_optimizer_buffers_are_megatrons_to_the_byte(case: dict[str, Any]) -> None:
    world, pp = case["world"], case["pp"]
    stack = load_stack("megatron-core").model_copy(update={"vocab_divisor": 1})
    job = JobSpec(sequence_length=128, global_batch=world, memory_margin=0.0)
    request = Request(model_of(case), load_cluster(f"dgx-h100:{world // 8}"), job, stack)
    degrees = {name: case.get(name, 1) for name in ("tp", "pp", "cp", "ep")}
    raw = {**degrees, "zero_stage": 1, "sequence_parallel": False}
    priced = price(complete_layout(raw, request), request)
    rank = case["rank"] * pp // world
    exact = exact_state(priced, rank)
    assert exact is not None
    # 2 bytes of bf16 weights and 4 of fp32 gradients whole; 4 of fp32 masters and 8 of moments on
    # one of the ranks that share the buffer: dp x cp for dense, the expert mesh's for experts.
    whole = case["dense"] + case["expert"]
    split = case["dense"] // case["dp"] + case["expert"] // case["edp"]
    assert exact == {"weights": 2 * whole, "gradients": 4 * whole, "optimizer": 12 * split}
    terms = {t.name: t.bytes or 0 for t in predict(priced, request).stages[rank].memory}
    assert {name: terms[name] for name in exact} == exact
    # What a search adds layer by layer is an upper bound, and a close one.
    assert 0 <= terms["alignment"] <= 18 * 128 * case["dp"] * (case["layers"] + 2) * 40


def test_buffer_by_hand() -> None:
    # From the last parameter: 100 -> [0, 100), next start 128, 50 -> [128, 178): 178 >= 150 ends a
    # bucket, padded to lcm(6, 128) = 384. The first parameter starts there: 384 + 10 = 394 -> 768.
    assert contiguous_elements([10, 50, 100], 6, 150) == 768
    assert contiguous_elements([10, 50, 100], 6, None) == 384
    assert contiguous_elements([], 6, None) == 0


def test_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    """Megatron-Core 0.16.1's ``_ParamAndGradBuffer`` on meta tensors, ``shared_embedding`` set as
    ``setup_embeddings_and_output_layer`` does: sizes in, ``numel`` out."""
    table, h = 391 * 128 * 1000, 1000
    layer = [h * 500, h, h * 700, h, 2 * h * 3000, h * 3000]
    first, last = [table, *5 * layer], [*4 * layer, h, table]
    assert contiguous_elements(first, 12, 40_000_000, alone={0}) == 101_059_200
    assert contiguous_elements(last, 12, None, alone={len(last) - 1}) == 90_857_856
    assert contiguous_elements(last, 12, None) != 90_857_856
    h = 1600
    layer = [h * h, h, h, h, 3 * h * h, 3 * h, h, h, 4 * h * h, 4 * h, 4 * h * h, h]
    both = [393 * 128 * h, 1024 * h, *12 * layer]
    assert contiguous_elements(both, 12, 40_000_000, alone={0}) == 451_016_064


def test_a_tied_models_buffers_are_megatrons() -> None:
    """GPT-2's shape with 24 layers, on 24 devices: the first stage's buffer is the one above, in
    the order of Transformer Engine's modules; both from 0.16.1's own buffer."""
    model = read_model("gpt2-xl")
    runs = (model.layers[0].model_copy(update={"count": 24}),)
    job = JobSpec(sequence_length=1024, global_batch=24, memory_margin=0.0)
    request = Request(
        model.model_copy(update={"layers": runs}), load_cluster("dgx-h100:3"), job,
        load_stack("megatron-core"),
    )  # fmt: skip
    stages = [{"chunks": [{"layers": [12 * n, 12 * n + 12]}]} for n in range(2)]
    layout = complete_layout({"pp": 2, "zero_stage": 1, "stages": stages}, request)
    priced = price(layout, request)
    for rank, size in enumerate((451_016_064, 449_379_456)):
        exact = exact_state(priced, rank)
        assert exact == {"weights": 2 * size, "gradients": 4 * size, "optimizer": size}
        terms = {t.name: t.bytes or 0 for t in predict(priced, request).stages[rank].memory}
        assert terms["alignment"] >= 0


def test_experts_have_the_dense_buffers_bucket_size() -> None:
    """96 dense replicas make buckets of 96 M elements, for experts of 24 replicas too (0.16.1's
    buffer: 158,830,464 and 55,944,960 elements; of 40 M it would have 55,945,344)."""
    attention = AttentionSpec(heads=16, kv_heads=4, head_dim=128)
    experts = MoeSpec(experts=16, top_k=2, intermediate=777)
    model = ModelSpec(
        name="case", family="test", source="test", hidden=2000, vocab=32_000,
        tied_embeddings=False, norm="rms", norm_bias=False,
        blocks={"layer": BlockSpec(mixer=attention, feed_forward=experts)},
        layers=(LayerRun(block="layer", count=3),),
    )  # fmt: skip
    job = JobSpec(sequence_length=128, global_batch=96, memory_margin=0.0)
    request = Request(model, load_cluster("dgx-h100:12"), job, load_stack("megatron-core"))
    exact = exact_state(price(complete_layout({"ep": 4, "zero_stage": 1}, request), request), 0)
    assert exact is not None
    assert exact["weights"] == 2 * (158_830_464 + 55_944_960)
    assert exact["optimizer"] == 12 * (158_830_464 // 96 + 55_944_960 // 24)


def test_megatron_without_sharding_has_no_padding() -> None:
    weights = [Weight("norm", 100, 1), Weight("mlp.up", 30, 10, "column")]
    assert numbers(held(weights, "megatron-core", ways=4, zero=0)) == (800, 1600, 4800, 0)


def test_fsdp2_splits_the_first_dimension_and_rounds_it_up() -> None:
    # 10 rows of 8 over 4 ranks: 3 rows on the first; 4 + 4 + 8 bytes each.
    weights = [Weight("mlp.up", 10, 8, "column")]
    assert numbers(held(weights, "torchtitan", ways=4, zero=3)) == (96, 96, 192, 0)
    # Column-parallel over tp 2: 5 rows, 2 of them on the first of 4 ranks.
    assert numbers(held(weights, "torchtitan", ways=4, zero=3, tp=2)) == (64, 64, 128, 0)
    # Eight experts as one tensor: one expert on each of 8 ranks; rows are split from there on.
    experts = [Weight("moe.experts.up", 6, 4, "expert_column", 8)]
    assert numbers(held(experts, "torchtitan", ways=8, zero=3))[0] == 4 * 24
    assert numbers(held(experts, "torchtitan", ways=16, zero=3))[0] == 4 * 8 * 1 * 4


def test_deepspeed_stages() -> None:
    weights = [Weight("mlp.up", 10, 10, "column"), Weight("norm", 7, 1)]
    # Stage 3 splits each parameter by itself: ceil(100 / 4) + ceil(7 / 4) = 27 elements; 16-bit
    # weights and gradients, 12 bytes of optimizer state, 4 of fp32 gradients in the step.
    assert numbers(held(weights, "deepspeed-hf", ways=4, zero=3)) == (54, 54, 324, 108)
    # Stage 1 with fp16: whole 16-bit weights and gradients, ceil(107 / 4) = 27 of the rest, and a
    # step that flattens 16-bit gradients and copies them to fp32.
    found = held(weights, "megatron-deepspeed", ways=4, zero=1, precision="fp16")
    assert numbers(found) == (214, 214, 324, 162)
    # bf16 accumulates in fp32, whole, beside the 16-bit gradients: 4 + 2 bytes.
    found = held(weights, "megatron-deepspeed", ways=4, zero=1)
    assert numbers(found) == (214, 642, 324, 0)


def test_low_precision_copies_are_of_linear_layers() -> None:
    # 64 x 64 by row and by column, one byte each, beside 2 bytes; the router has none.
    weights = [Weight("mlp.up", 64, 64, "column"), Weight("moe.router", 8, 64)]
    found = held(weights, "megatron-core", ways=1, zero=0, precision="fp8")
    assert numbers(found)[0] == 2 * (4096 + 512) + 2 * 4096


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    # 4 KV heads of 32 on tp 8: each rank holds one, as on tp 4.
    weight = Weight("attention.k", 128, 64, "column", kv_heads=4)
    four, eight = (state.local_tensor(weight, shard(tp=tp), 1) for tp in (4, 8))
    assert int(four.elements[0]) == int(eight.elements[0]) == 32 * 64


def test_sgd_holds_one_moment() -> None:
    weights = [Weight("mlp.up", 64, 64, "column")]
    assert numbers(held(weights, "megatron-core", ways=1, zero=0, optimizer="sgd"))[2] == 8 * 4096


def test_a_tied_head_is_held_again_on_the_last_stage() -> None:
    case = {**CASES[0]}
    model = model_of(case).model_copy(update={"tied_embeddings": True})
    job = JobSpec(sequence_length=128, global_batch=16, memory_margin=0.0)
    request = Request(model, load_cluster("dgx-h100:1"), job, load_stack("megatron-core"))
    parameters = {}
    for pp in (1, 2):
        layout = complete_layout({"tp": 2, "pp": pp, "zero_stage": 1}, request)
        stages = predict(price(layout, request), request).stages
        parameters[pp] = sum(stage.parameters for stage in stages)
    # 32,000 rows padded to a multiple of 128 x 2 = 32,000, half of them on each tp rank.
    assert parameters[2] - parameters[1] == 32_000 // 2 * 1024
