"""Recomputation policies: what they free and repeat follows from the modules, by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import LayerKind, Shard
from cost_models.layer_times import LayerTimes
from cost_models.layout import FULL, RecomputePolicy
from cost_models.memory import activation_bytes
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, SavedTensor
from cost_models.recompute import group_of
from cost_models.repeat import Work
from cost_models.step import price_layer
from hardware_profiles.loader import load_stack
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.recompute import named_policy
from planner.studies.verify import verify

OPS: tuple[Op, ...] = (
    MatMul("qkv", 8, 24, 16, parts=(2, 1, 1), modules=("attn",)),
    Attention("attention", 1, 8, 8, 2, 1, 4, 4),
    MatMul("proj", 8, 16, 8),
    Collective("proj.scatter", "tp", "reduce_scatter", 256, "all_gather", 256),
    Elementwise("act", 1e9, 1e9, modules=("act", "mlp")),
    MatMul("fc", 8, 16, 32, modules=("mlp",)),
)
SAVED = (
    SavedTensor("input", 100),
    SavedTensor("qkv", 40, modules=("attn",)),
    SavedTensor("fc", 60, modules=("mlp",)),
    SavedTensor("act", 30, modules=("act", "mlp")),
)
TOY = LayerKind("toy", (), lambda _: OPS, lambda _: SAVED, lambda s: 10 * s.tp, lambda s: 5 * s.tp)


def shard(tp: int = 2) -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(8, one, tp * one, one, one, one, one.astype(bool), 0 * one)


def modules(*names: str) -> RecomputePolicy:
    return RecomputePolicy("+".join(names), frozenset(names))


def keeping(*names: Any) -> RecomputePolicy:
    return RecomputePolicy("selective", keeps=frozenset(names))


def sizes(policy: RecomputePolicy | None, tp: int = 1) -> tuple[int, int]:
    kept, working = activation_bytes(TOY, shard(tp), policy)
    return int(kept[0]), int(working[0])


def test_modules_free_their_tensors_and_bring_back_the_largest() -> None:
    """All: 230. Without mlp: 140, and its 90 come back; attn and act are run one by one."""
    assert sizes(None) == (230, 5)
    assert sizes(modules("mlp")) == (140, 5 + 90)
    assert sizes(modules("act", "attn")) == (230 - 40 - 30, 5 + 40)


def test_the_whole_layer_keeps_its_input() -> None:
    assert sizes(FULL, tp=1) == (10, 5 + 220)
    assert sizes(FULL, tp=2) == (20, 10 + 210)


def test_a_layer_run_to_its_end_has_its_output_beside_its_gradient() -> None:
    """Gathered over two ranks 40 each: gradient, product, its copy; 20 scattered. More than 10."""
    assert sizes(replace(FULL, to_the_end=True), tp=2) == (20, 3 * 40 + 20 + 210)
    assert sizes(replace(FULL, to_the_end=True), tp=1) == (10, 3 * 10 + 10 + 220)


def test_a_save_list_keeps_outputs() -> None:
    """The reduce-scatter's output is 256 / 2 on two ranks and nothing happens on one; attention
    keeps 8 rows of 2 heads with 4 values of 2 bytes and one statistic of 4."""
    assert sizes(keeping("reduce_scatter"), tp=2) == (20 + 128, 10 + 230 - 148)
    assert sizes(keeping("reduce_scatter"), tp=1) == (10, 225)
    assert sizes(keeping("attention"), tp=1) == (10 + 8 * 2 * (4 * 2 + 4), 5 + 230 - 202)


def test_every_second_product_counts_q_k_and_v_one_by_one() -> None:
    """Kept: q (half of 8 x 24 x 2 = 384) and v (a quarter), not k; not proj, the 4th; fc, the 5th.
    288 + 256 is more than the layer keeps without recomputation, which is the limit."""
    kept = activation_bytes(
        LayerKind("big", (), TOY.ops, lambda _: (SavedTensor("all", 10_000),),
                  TOY.boundary_bytes, TOY.working_bytes),
        shard(1), keeping("odd_matmul"),
    )[0]  # fmt: skip
    assert int(kept[0]) == 10 + 192 + 96 + 256
    assert sizes(keeping("odd_matmul"), tp=1)[0] == 230


def saved_of(precision: str, cp_kind: str = "p2p", cp: int = 1) -> tuple[dict[str, int], int]:
    """Tensors of a Llama layer with 64 tokens per rank by name, and its working bytes."""
    request = read_request("llama-3.1-8b", "dgx-h100:1", overrides={"precision": precision})
    (kind,) = request.workload.kinds.values()
    one = np.ones(1, dtype=np.int64)
    place = Shard(
        64 * cp, one, one, cp * one, one, one, one.astype(bool), cp_kind_code(cp_kind) * one
    )
    tensors = {tensor.name: int(np.asarray(tensor.bytes)[0]) for tensor in kind.saved(place)}
    return tensors, int(np.asarray(kind.working_bytes(place))[0])


def test_eight_bit_products_keep_eight_bit_inputs() -> None:
    """64 tokens of 4096: the norm's output, and the activation of 14336, are half as large; the
    attention's output stays in 16 bits for its own backward, with a copy for the projection."""
    (wide, _), (narrow, _) = saved_of("bf16"), saved_of("fp8")
    assert (wide["sub0.input"], narrow["sub0.input"]) == (64 * 4096 * 2, 64 * 4096)
    assert (wide["activation"], narrow["activation"]) == (64 * 14336 * 2, 64 * 14336)
    assert wide["attention_output"] == narrow["attention_output"] == 64 * 4096 * 2
    assert narrow["projection_input"] == 64 * 4096
    assert "projection_input" not in wide
    assert wide["fc1_output"] == narrow["fc1_output"] == 2 * 64 * 14336 * 2


def test_context_parallelism_holds_blocks_of_keys_and_values() -> None:
    """K and V of 64 tokens and 8 heads of 128: 256 KiB. The ring holds the next ones and the
    gradients of both; gathered over 4 ranks, all of them and their gradients."""
    kv = 2 * 8 * 128 * 64 * 2
    alone = saved_of("bf16")[1]
    assert saved_of("bf16", "p2p", 4)[1] - alone == max(0, attention_working(4 * kv) - alone)
    assert saved_of("bf16", "all_gather", 4)[1] - alone == max(0, attention_working(8 * kv) - alone)


def attention_working(buffers: int) -> int:
    """Gradients of 32 + 32 + 8 + 8 heads, the gathered input, and buffers."""
    return 80 * 128 * 64 * 2 + 64 * 4096 * 2 + buffers


def times() -> LayerTimes:
    request = read_request("llama-3.1-8b", "dgx-h100:1")
    return price_layer(TOY, shard(), request.machine)


def test_time_is_the_forward_of_what_runs_again() -> None:
    """With a host that takes no time: all of the forward, or what the modules or the list leave."""
    again = times().repeats
    forward = again.whole.device
    free = replace(
        again, whole=Work(forward, 0 * forward), back=Work(forward, 0 * forward),
        modules={k: Work(w.device, 0 * w.host) for k, w in again.modules.items()},
        outputs={k: Work(w.device, 0 * w.host) for k, w in again.outputs.items()},
    )  # fmt: skip
    act, mlp = (float(free.seconds((modules(name),))[0, 0]) for name in ("act", "mlp"))
    assert float(free.seconds((FULL,))[0, 0]) == pytest.approx(float(forward[0]))
    assert 0 < act < mlp < float(forward[0])
    left = float(free.seconds((keeping("attention"),))[0, 0])
    assert left == pytest.approx(
        float(forward[0] - again.outputs[frozenset({"attention"})].device[0])
    )


def test_names_mean_what_the_stack_means() -> None:
    core, titan = load_stack("megatron-core"), load_stack("torchtitan")
    assert named_policy("selective", core).modules == {"core_attn"}
    assert named_policy("core_attn", core).name == "selective"
    assert named_policy("moe_act+layernorm", core).name == "layernorm+moe_act"
    assert named_policy("selective", titan).keeps is not None
    with pytest.raises(InputError) as error:
        named_policy("moe_act", titan)
    assert "torchtitan knows none, selective, full" in error.value.message
    with pytest.raises(InputError) as error:
        named_policy("layernrom", core)
    assert error.value.hint is not None
    assert "layernorm" in error.value.hint


def test_a_model_is_offered_what_it_can_tell_apart() -> None:
    def searched(model: str) -> list[str]:
        request = read_request(model, "dgx-h100:1")
        return [policy.name for policy in request.workload.policies]

    assert searched("llama-3.1-8b") == ["selective", "mlp", "full", "partitioned"]
    # Experts under tp need sequence parallelism, which leaves no rank what another holds.
    modules = ["selective", "moe_act", "layernorm+moe_act", "moe"]
    assert searched("mixtral-8x7b") == [*modules, "full"]
    assert "layernorm+mla_up_proj+moe_act" in searched("deepseek-v3")


@pytest.mark.parametrize(
    ("stack", "precision", "offered"),
    [
        ("megatron-core", "bf16", "layernorm+mla_up_proj+moe_act"),
        ("megatron-core", "fp8", "mla_up_proj"),
        ("nemo-fp8", "fp8", "mla_up_proj"),
        ("megatron-bridge-fp8", "fp8", "layernorm+mla_up_proj+moe_act"),
    ],
)
def test_modules_that_cannot_run_again_in_a_precision_are_not_searched(
    stack: str, precision: str, offered: str
) -> None:
    request = read_request(
        "deepseek-v3", "dgx-h100:1", overrides={"stack": stack, "precision": precision}
    )
    names = [policy.name for policy in request.workload.policies]
    assert offered in names
    assert any("layernorm" in name for name in names) is ("layernorm" in offered)
    assert any("moe_act" in name for name in names) is ("moe_act" in offered)
    assert {"selective", "full"} <= {*names}


def test_a_layout_cannot_run_again_what_its_precision_refuses() -> None:
    layout = {"recompute": "layernorm+moe_act", "ep": 8, "dp_replicate": 1}
    asked: dict[str, Any] = {"stack": "megatron-core", "precision": "fp8", "sequence_length": 1024}
    with pytest.raises(InputError) as error:
        evaluate(read_request("mixtral-8x7b", "dgx-h100:1", overrides=asked), layout)
    assert "cannot run layernorm and moe_act again in fp8" in error.value.message
    assert "mla_up_proj, mlp, moe" in (error.value.hint or "")
    evaluate(
        read_request("mixtral-8x7b", "dgx-h100:1", overrides=asked | {"precision": "bf16"}), layout
    )
    asked["constraints"] = {"recompute": "moe_act"}
    with pytest.raises(InputError) as error:
        read_request("mixtral-8x7b", "dgx-h100:1", overrides=asked)
    assert "cannot run moe_act again in fp8" in error.value.message


@pytest.mark.parametrize(
    ("stack", "model"),
    [
        *product(
            ["megatron-core", "torchtitan"],
            ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt3-175b"],
        ),
        *product(["megatron-lm-2022"], ["megatron-22b", "gpt3-175b"]),
    ],
)
def test_recomputing_more_modules_keeps_less(stack: str, model: str) -> None:
    request = read_request(model, "dgx-h100:4", overrides={"stack": stack, "sequence_length": 2048})
    one = np.ones(3, dtype=np.int64)
    tp = np.array([1, 2, 4])
    place = Shard(2048, one, tp, one, one, one, tp > 1, 0 * one)
    for kind in request.workload.kinds.values():
        everything = activation_bytes(kind, place, None)[0]
        full = activation_bytes(kind, place, FULL)[0]
        for policy in request.workload.policies:
            kept = activation_bytes(kind, place, policy)[0]
            assert np.all(full <= kept)
            assert np.all(kept <= everything)


def test_a_custom_list_without_its_outputs_says_how_one_is_written() -> None:
    with pytest.raises(InputError) as refusal:
        named_policy("custom", load_stack("maxtext-gpu"))
    assert "custom:qkv+attention" in refusal.value.message
    assert "did you mean 'custom'" not in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("mode", "layers"), [("full", 1), ("full:3", 3), ("full:2/mlp", 2), ("mlp/none", 1)]
)
def test_layers_that_run_again_together_are_those_at_the_front(mode: str, layers: int) -> None:
    assert group_of(mode) == layers


def test_layers_run_again_together_where_a_job_names_it_and_no_search_does() -> None:
    job = {"sequence_length": 4096, "global_batch": 8}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    assert "full:4" not in {policy.name for policy in request.workload.policies}
    asked = read_request(
        "llama-3.1-8b", "dgx-h100:1", None, job | {"constraints": {"recompute": "full:4"}}
    )
    found = plan(asked)
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {"full:4"}
    assert verify(found) == []
