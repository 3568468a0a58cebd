"""Stacks on PyTorch's FSDP: switches that their users choose, and what a version refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hardware_profiles.loader import load_stack
from planner.certify import verify
from planner.errors import InputError
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request
from planner.rules import layout_rules, mesh_rules
from planner.space import build_space, expand
from planner.studies.communication import communication

PARAMETERS = 8_030_261_248
LAYER = 218_112_000


def request_of(
    stack: str, model: str = "llama-3.1-8b", cluster: str = "dgx-h100:2", **job: Any
) -> Request:
    fields = {"stack": stack, "sequence_length": 4096, "global_batch": 16}
    return read_request(model, cluster, None, fields | job)


def priced(request: Request, **layout: Any) -> EvaluatedLayout:
    return evaluate(request, {"microbatch_size": 1, "recompute": "none", **layout})


def terms(result: EvaluatedLayout) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in result.prediction.stages[0].memory}


def shards_of(request: Request) -> set[tuple[int, int, int]]:
    """Replicas, shards and stages of the layouts that no rule removes."""
    meshes = build_space(request).meshes
    layouts = expand(request, meshes)
    gathered = meshes.take(layouts.mesh)
    keep = layouts.vpp > 0
    for _, broken in layout_rules(request):
        keep &= ~broken(gathered, layouts)
    columns = (layouts.dp_replicate, layouts.dp_shard, layouts.zero_stage)
    return set(zip(*(column[keep].tolist() for column in columns), strict=True))


def test_composer_shards_over_all_or_not_at_all() -> None:
    """SHARDING_MAP of Composer 0.17 has no hybrid."""
    assert shards_of(request_of("llm-foundry")) == {(16, 1, 0), (1, 16, 2), (1, 16, 3)}


def test_no_shard_has_a_cast_copy_and_reduces_with_every_microbatch() -> None:
    """fp32 weights, gradients and moments whole, 16 bytes; a 16-bit copy of the unit that runs, of
    norm and head at the peak; each of two microbatches sums all gradients in 16 bits."""
    request = request_of("llm-foundry", global_batch=32, sequence_length=16384)
    none, full = (priced(request, zero_stage=stage) for stage in (0, 3))
    held = terms(none)
    assert held["weights"] + held["gradients"] + held["optimizer"] == pytest.approx(
        16 * PARAMETERS, rel=1e-4
    )
    kept = load_stack("llm-foundry")
    state = kept.state.model_copy(update={"casts_whole_weights": False})
    bare = replace(request, stack=kept.model_copy(update={"state": state}))
    once = priced(bare, zero_stage=0)
    assert held["working"] - terms(once)["working"] == 2 * (128_256 * 4096 + 4096)
    calls = communication(request, none).layers["decoder"]
    sums = [call for call in calls if call.kind == "all_reduce"]
    assert [call.bytes for call in sums] == [2 * LAYER]
    assert not [call for call in calls if call.kind == "all_gather"]
    assert none.prediction.step_time_s > once.prediction.step_time_s
    assert full.prediction.max_peak_bytes < none.prediction.max_peak_bytes


def test_composers_default_reduces_in_fp32() -> None:
    sizes = []
    for stack in ("llm-foundry", "llm-foundry-default"):
        request = request_of(stack)
        calls = communication(request, priced(request, zero_stage=3)).layers["decoder"]
        sizes.append([call.bytes for call in calls if call.kind == "reduce_scatter"])
    assert sizes == [[2 * LAYER], [4 * LAYER]]


def test_fms_takes_one_microbatch_and_replicates_over_nodes() -> None:
    request = request_of("fms-fsdp", global_batch=32)
    assert shards_of(request) == {(16, 1, 0), (1, 16, 3), (2, 8, 3)}
    meshes = build_space(request).meshes
    assert set((meshes.microbatch * meshes.dp).tolist()) == {32}
    assert set(meshes.tp.tolist()) == {1}
    with pytest.raises(InputError, match="a step is one microbatch"):
        priced(request, zero_stage=3)
    reasons = [reason for reason, _ in mesh_rules(request)]
    assert any("no tensor parallelism" in reason for reason in reasons)


@pytest.mark.parametrize("stack", ["llm-foundry", "fms-fsdp", "torchtitan-bf16"])
def test_their_plans_are_certified(stack: str) -> None:
    optimizer = "adamw_bf16" if stack == "torchtitan-bf16" else "adamw"
    request = request_of(stack, "llama-3.2-1b", "dgx-h100:1", optimizer=optimizer)
    assert verify(plan(request)) == []


def test_bf16_throughout_is_eight_bytes_a_parameter() -> None:
    """Weights, gradients and two moments of 2 bytes; a pipeline sums gradients in fp32."""
    request = request_of("torchtitan-bf16", optimizer="adamw_bf16", global_batch=32)
    held = terms(priced(request, dp_shard=16, zero_stage=3))
    sizes = [held[name] for name in ("weights", "gradients", "optimizer")]
    assert sizes == pytest.approx([PARAMETERS * each // 16 for each in (2, 2, 4)], rel=1e-3)
    piped = request_of("torchtitan-bf16", optimizer="adamw_bf16", global_batch=32)
    whole = terms(priced(piped, pp=2, dp_shard=8, zero_stage=2))["gradients"]
    assert whole > 4 * 16 * LAYER
    with pytest.raises(InputError, match="adamw"):
        priced(request_of("torchtitan-bf16", optimizer="adamw"), zero_stage=3)


def test_mxfp8_needs_scaled_blocks_and_reads_operands_twice() -> None:
    with pytest.raises(InputError, match="torchtitan-mxfp8"):
        request_of("torchtitan-mxfp8", precision="fp8")
    times = [
        priced(request_of(stack, cluster="dgx-b200:2", precision="fp8"), zero_stage=3)
        for stack in ("torchtitan-compile", "torchtitan-mxfp8")
    ]
    plain, blocks = (found.prediction for found in times)
    assert plain.step_time_s < blocks.step_time_s
    assert plain.max_peak_bytes == blocks.max_peak_bytes


def test_exchange_libraries_send_a_token_once_to_each_node() -> None:
    found = {
        name: priced(
            request_of(name, "deepseek-v3", "dgx-h100:16", global_batch=128),
            zero_stage=3, ep=32, recompute="full",
        ).prediction
        for name in ("torchtitan-compile", "torchtitan-deepep", "torchtitan-hybridep")
    }  # fmt: skip
    plain = found.pop("torchtitan-compile").step_time_s
    assert all(each.step_time_s < plain for each in found.values())


def test_adapters_beside_products_in_8_bits_save_time_and_no_memory() -> None:
    """LoRAConverter over Float8Linear: frozen weights stay in 16 bits."""
    job: dict[str, Any] = {"finetune": {"lora_rank": 16}, "global_batch": 32}
    found = [
        priced(request_of("torchtitan-compile", precision=each, **job), zero_stage=3).prediction
        for each in ("bf16", "fp8")
    ]
    assert found[0].step_time_s > found[1].step_time_s
    assert found[0].max_peak_bytes == found[1].max_peak_bytes


def test_owners_gather_whole_matrices_in_fp32_and_send_the_update_back() -> None:
    """DistMuon: two all-to-alls around the owners of whole matrices; tp and pp are refused."""
    request = request_of("torchtitan", optimizer="muon")
    adam = priced(request_of("torchtitan"), zero_stage=3).prediction
    muon = priced(request, zero_stage=3).prediction
    assert muon.step_time_s > adam.step_time_s
    assert muon.max_peak_bytes < adam.max_peak_bytes
    stack = load_stack("torchtitan")
    narrow = stack.model_copy(update={"muon": stack.muon.model_copy(update={"exchange_bytes": 2})})
    half = priced(replace(request, stack=narrow), zero_stage=3).prediction
    sent = muon.step_time_s - half.step_time_s
    # 2 bytes more of 6.98e9 elements in blocks, a 16th on each rank, there and back, at 40 GB/s
    # (one port) to 450 GB/s.
    each = 2 * 2 * 32 * LAYER / 16
    assert each / 450e9 < sent < each / 40e9
    for layout in ({"tp": 2}, {"pp": 2}):
        with pytest.raises(InputError, match="runs muon"):
            priced(request, **layout)


def test_whole_experts_need_no_exchange() -> None:
    """128 experts over 8 ranks of expert parallelism and 2 that share them: 16 each, 8 a rank."""
    times = []
    for size in (2, 4):
        stack = load_stack("torchtitan")
        stack = stack.model_copy(
            update={"muon": stack.muon.model_copy(update={"exchange_bytes": size})}
        )
        request = request_of("torchtitan", "qwen3-30b-a3b", optimizer="muon")
        found = priced(replace(request, stack=stack), zero_stage=3, ep=8)
        times.append(found.prediction.step_time_s)
    attention = 2 * 2 * 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048) / 16
    assert attention / 450e9 < times[1] - times[0] < attention / 20e9


def test_replayed_steps_do_not_wait_for_the_host() -> None:
    """The kernels are the same; nothing is launched one by one. Not under a pipeline."""
    waits = []
    for stack in ("torchtitan-compile", "torchtitan-cuda-graphs"):
        request = request_of(stack, "llama-3.2-1b", sequence_length=256)
        parts = {p.name: p.seconds or 0.0 for p in priced(request, zero_stage=3).prediction.time}
        waits.append((parts["matmul"], parts.get("launch", 0.0)))
    (products, eager), (same, replayed) = waits
    assert products == same
    assert eager > replayed == 0
    with pytest.raises(InputError, match="no pipeline parallelism"):
        priced(request_of("torchtitan-cuda-graphs"), pp=2)


def test_full_recomputation_stops_before_the_last_product() -> None:
    """Of a layer of Llama 3.1 8B, 4096 x 14336 of 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336) weights
    multiply for nothing that a gradient needs: 0.27 of the products of its forward."""
    request = request_of("llm-foundry", sequence_length=1024)
    stack = request.stack.model_copy(update={"recompute_needed_only": False})
    again = [
        next(
            term.seconds or 0.0
            for term in priced(one, recompute="full", zero_stage=3).prediction.time
            if term.name == "recompute"
        )
        for one in (request, replace(request, stack=stack))
    ]
    assert 0.72 < again[0] / again[1] < 0.8
