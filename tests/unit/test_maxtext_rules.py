"""What MaxText refuses of its own accord is outside the space, and said so."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.ops import Attention, MatMul
from planner.errors import InputError
from planner.pipeline import evaluate, read_request
from planner.recount import every_mesh
from planner.request import Request
from planner.shards import ONE


def request(model: str, cluster: str, stack: str, **job: object) -> Request:
    return read_request(model, cluster, None, {"stack": stack, "sequence_length": 2048, **job})


@pytest.mark.parametrize(
    ("stack", "cluster", "runs"),
    [("maxtext-gpu", "dgx-h100:1", False), ("maxtext-tpu", "tpu-v5p-8", True)],
)
def test_scales_from_earlier_steps_do_not_accumulate(stack: str, cluster: str, runs: bool) -> None:
    asked = request("llama-3.1-8b", cluster, stack, precision="fp8", global_batch=64)
    twice = {"microbatch_size": 64 // asked.devices // 2}
    if runs:
        assert evaluate(asked, twice).layout.num_microbatches == 2
        return
    with pytest.raises(InputError, match="no fp8 with gradient accumulation"):
        evaluate(asked, twice)
    once = evaluate(asked, {"microbatch_size": 8})
    assert once.layout.num_microbatches == 1
    piped = evaluate(asked, {"pp": 4, "microbatch_size": 4})
    assert piped.layout.num_microbatches == 8
    in_bf16 = request("llama-3.1-8b", cluster, stack, precision="bf16", global_batch=64)
    assert evaluate(in_bf16, twice).layout.num_microbatches == 2
    assert all(mesh.pp > 1 or mesh.dp * mesh.mbs == 64 for mesh in every_mesh(asked))


def test_experts_lie_in_samples_or_in_pieces_of_them() -> None:
    asked = request("mixtral-8x7b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    assert evaluate(asked, {"ep": 8}).layout.dp_shard == 8
    assert evaluate(asked, {"ep": 8, "cp": 8}).layout.dp_shard == 1
    with pytest.raises(InputError, match="a part of dp, or over a part of cp"):
        evaluate(asked, {"ep": 8, "cp": 2})


def test_experts_are_split_as_all_else_is() -> None:
    asked = request("mixtral-8x7b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    assert evaluate(asked, {"tp": 2, "ep": 4}).layout.etp == 2
    with pytest.raises(InputError, match="experts are split as tp splits all else"):
        evaluate(asked, {"tp": 2, "ep": 4, "etp": 1})


def test_int8_products_run_at_the_rate_of_int8() -> None:
    def step(precision: str, cluster: str) -> float:
        asked = request(
            "llama-3.2-1b", cluster, "maxtext-tpu", precision=precision, global_batch=128
        )
        return evaluate(asked, {"microbatch_size": 8}).prediction.step_time_s

    # 393 against 197 TFLOP/s; attention, head and what moves bytes stay in 16 bits.
    assert 0.5 < step("int8", "tpu-v5e-16") / step("bf16", "tpu-v5e-16") < 0.9
    # A v4 has one rate for both, and quantising comes on top.
    assert 1.0 < step("int8", "tpu-v4-32") / step("bf16", "tpu-v4-32") < 1.2
    with pytest.raises(InputError, match="does not train in int8"):
        request("llama-3.2-1b", "dgx-h100:1", "torchtitan", precision="int8")


def test_scales_of_the_operand_itself_take_one_more_pass() -> None:
    early, own = (
        evaluate(
            request("llama-3.1-8b", "dgx-h100:1", stack, precision="fp8", global_batch=16),
            {"microbatch_size": 2},
        )
        for stack in ("maxtext-gpu", "maxtext-gpu-fp8-full")
    )
    more = own.prediction.step_time_s / early.prediction.step_time_s
    assert 1.0 < more < 1.1
    assert own.prediction.max_peak_bytes == early.prediction.max_peak_bytes


def test_weights_gathered_once_for_a_pipeline_s_microbatches() -> None:
    """pipeline_fsdp_ag_once: one gather of 16 bits instead of one for every pass, for the room of
    a stage's weights and of their gradients."""
    asked = request("llama-3.1-8b", "dgx-h100:1", "maxtext-gpu", global_batch=32)
    layout = {"pp": 2, "dp_shard": 4, "microbatch_size": 1, "recompute": "full"}
    each, once = (evaluate(asked, {**layout, "zero_stage": stage}) for stage in (3, 2))
    assert once.prediction.step_time_s < each.prediction.step_time_s
    stage_weights = 16 * 218_112_000  # 16 layers of Llama-3.1-8B
    more = once.prediction.max_peak_bytes - each.prediction.max_peak_bytes
    # 2 bytes of weights and 4 of gradients, less their shards, what a layer gathers for itself, and
    # the embedding and head of that stage.
    assert 3 * stage_weights < more < 6 * 1.2 * stage_weights
    with pytest.raises(InputError, match="under a pipeline only"):
        evaluate(asked, {"zero_stage": 2, "microbatch_size": 1})


@pytest.mark.parametrize("stack", ["maxtext-gpu", "maxtext-tpu"])
def test_the_sequence_axis_exchanges_heads(stack: str) -> None:
    cluster = {"maxtext-gpu": "dgx-h100:1", "maxtext-tpu": "tpu-v5p-8"}[stack]
    asked = request("llama-3.1-8b", cluster, stack, global_batch=8)
    found = evaluate(asked, {"cp": 4, "cp_kind": "a2a"})
    assert found.layout.cp_kind == "a2a"
    gathered = evaluate(asked, {"cp": 4, "cp_kind": "all_gather"})
    assert found.prediction.step_time_s != gathered.prediction.step_time_s
    both = evaluate(asked, {"cp": 4, "cp_kind": "a2a_all_gather", "cp_inner": 2})
    assert both.layout.cp_inner == 2


@pytest.mark.parametrize(
    ("model", "cluster", "stack", "layout", "said"),
    [
        ("llama-3.1-8b", "tpu-v6e-8", "maxtext-tpu", {"pp": 2}, "pipeline are not quantised"),
        ("llama-3.1-8b", "dgx-h100:1", "maxtext-gpu-fp8-full", {"pp": 2}, "are not quantised"),
        ("mixtral-8x7b", "dgx-h100:1", "maxtext-gpu", {"ep": 8}, "no mixture of experts in fp8"),
    ],
)
def test_what_maxtext_does_not_run_in_fp8(
    model: str, cluster: str, stack: str, layout: dict[str, int], said: str
) -> None:
    """layers/pipeline.py and moe.py; in bf16 the same layouts run."""
    chosen = {"microbatch_size": 1, "zero_stage": 3, **layout}
    batch = {"global_batch": 16 if "pp" in layout else 8}
    assert evaluate(request(model, cluster, stack.removesuffix("-fp8-full"), **batch), chosen)
    asked = request(model, cluster, stack, precision="fp8", **batch)
    with pytest.raises(InputError, match=said):
        evaluate(asked, chosen)
    if layout == {"ep": 8}:
        asked = request(model, cluster, "maxtext-gpu-fp8-full", precision="fp8", **batch)
        assert evaluate(asked, chosen)


def test_no_kernel_of_gpus_takes_attention_sinks() -> None:
    """layers/attention_op.py, validate_gpu_flash_attention: products of all queries and keys and a
    softmax between, of windows too; the ring is a kernel's own."""
    asked = request("gpt-oss-20b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    one = np.ones(1, dtype=np.int64)
    shard = Shard(2048, one, one, one, one, one, np.zeros(1, dtype=np.bool_), 0 * one)
    for kind in asked.workload.kinds.values():
        ops = kind.ops(shard)
        assert not any(isinstance(op, Attention) for op in ops)
        (scores,) = (op for op in ops if op.name == "scores")
        assert isinstance(scores, MatMul)
        assert [int(np.ravel(n)[0]) for n in (scores.m, scores.n, scores.k, scores.batch)] == [
            2048, 2048, 64, 64,
        ]  # fmt: skip
        (kept,) = (tensor.bytes for tensor in kind.saved(shard) if tensor.name == "softmax")
        assert int(np.ravel(kept)[0]) == 2 * 64 * 2048**2
    assert not any("windows" in note for note in asked.workload.assumptions)
    assert any("full, not causal, score" in note for note in asked.workload.assumptions)
    chosen = {"cp": 2, "ep": 4, "microbatch_size": 1, "recompute": "full"}
    assert evaluate(asked, {**chosen, "cp_kind": "all_gather"})
    with pytest.raises(InputError, match="context parallelism of attention sinks is all_gather"):
        evaluate(asked, {**chosen, "cp_kind": "p2p"})
    without = request("qwen3-30b-a3b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    assert evaluate(without, {**chosen, "cp_kind": "p2p"})
    assert {mesh.cp_kind for mesh in every_mesh(asked) if mesh.cp > 1} == {
        "all_gather", "a2a", "a2a_all_gather",
    }  # fmt: skip


def test_lists_name_no_output_of_attention_without_a_kernel() -> None:
    """0.2.0, attention_op.py: kernels alone name their output ``context``."""
    asked = request("gpt-oss-20b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    chosen = {"ep": 8, "microbatch_size": 1}
    with_name, without = (
        evaluate(asked, {**chosen, "recompute": mode}).prediction
        for mode in ("minimal_with_context", "minimal")
    )
    assert with_name.step_time_s == without.step_time_s
    assert with_name.stages == without.stages


def test_splash_attention_has_no_derivative_for_sinks_in_a_loop() -> None:
    """jax 0.10.2, _splash_attention_bwd: the gradient of the sinks is in 16 bits, they are not."""
    asked = request("gpt-oss-20b", "tpu-v6e-8", "maxtext-tpu", global_batch=8)
    chosen = {"ep": 4, "microbatch_size": 1, "recompute": "full"}
    assert any(
        isinstance(op, Attention) for kind in asked.workload.kinds.values() for op in kind.ops(ONE)
    )
    assert evaluate(asked, {**chosen, "ep": 8})
    with pytest.raises(InputError, match="no derivative of a pipeline's loop over layers with att"):
        evaluate(asked, {**chosen, "pp": 2})
    assert all(mesh.pp == 1 for mesh in every_mesh(asked))
    on_gpus = request("gpt-oss-20b", "dgx-h100:1", "maxtext-gpu", global_batch=8)
    assert evaluate(on_gpus, {**chosen, "pp": 2})
    without = request("qwen3-30b-a3b", "tpu-v6e-8", "maxtext-tpu", global_batch=8)
    assert evaluate(without, {**chosen, "pp": 2})


@pytest.mark.parametrize(
    ("model", "pp", "outside"),
    [
        ("gpt-oss-20b", 4, 0), ("gpt-oss-20b", 8, 8), ("gpt-oss-120b", 4, 4), ("gemma-2-9b", 2, 2),
        ("qwen3-8b", 8, 4), ("deepseek-v2-lite", 2, 1),
    ],
)  # fmt: skip
def test_stages_hold_whole_patterns_of_layers(model: str, pp: int, outside: int) -> None:
    """gpt-oss's 24 layers come in pairs: eight stages hold one each, and four pairs are outside."""
    asked = request(model, "tpu-v5p-32:1", "maxtext-tpu-dot-product", global_batch=64, mtp=False)
    layout = {"pp": pp, "dp_shard": 16 // pp, "zero_stage": 3}
    assert evaluate(asked, layout).layout.layers_outside == outside
    if outside > 1:
        with pytest.raises(InputError, match=f"layers_outside = {outside - 1}"):
            evaluate(asked, {**layout, "layers_outside": outside - 1})


def test_patterns_without_a_block_have_no_pipeline() -> None:
    asked = request("gemma-3-1b", "tpu-v5p-32:1", "maxtext-tpu", global_batch=64)
    with pytest.raises(InputError, match="patterns of up to 4"):
        evaluate(asked, {"pp": 2, "dp_shard": 8, "zero_stage": 3})
