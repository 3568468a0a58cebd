"""Recomputation policies: what they free and repeat follows from the modules, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.layout import FULL, RecomputePolicy
from cost_models.memory import activation_bytes
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, SavedTensor
from cost_models.repeat import Work
from cost_models.step import LayerTimes, price_layer
from hardware_profiles.loader import load_stack
from planner.errors import InputError
from planner.pipeline import read_request
from planner.recompute import named_policy

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


def times() -> LayerTimes:
    request = read_request("llama-3.1-8b", "dgx-h100:1")
    return price_layer(TOY, shard(), request.machine)


def test_time_is_the_forward_of_what_runs_again() -> None:
    """With a host that takes no time: all of the forward, or what the modules or the list leave."""
    again = times().repeats
    forward = again.whole.device
    free = replace(
        again, forward_ahead=-forward, backward_ahead=-forward,
        whole=Work(forward, 0 * forward),
        modules={k: Work(w.device, 0 * w.host) for k, w in again.modules.items()},
        outputs={k: Work(w.device, 0 * w.host) for k, w in again.outputs.items()},
    )  # fmt: skip
    act, mlp = (float(free.seconds(modules(name))[0]) for name in ("act", "mlp"))
    assert float(free.seconds(FULL)[0]) == pytest.approx(float(forward[0]))
    assert 0 < act < mlp < float(forward[0])
    left = float(free.seconds(keeping("attention"))[0])
    assert left == pytest.approx(float(forward[0] - again.outputs["attention"].device[0]))


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

    assert searched("llama-3.1-8b") == ["selective", "mlp", "full"]
    assert searched("mixtral-8x7b") == ["selective", "moe_act", "layernorm+moe_act", "moe", "full"]
    assert "layernorm+mla_up_proj+moe_act" in searched("deepseek-v3")


@pytest.mark.parametrize("stack", ["megatron-core", "torchtitan", "megatron-lm-2022"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt3-175b"])
def test_recomputing_more_modules_keeps_less(model: str, stack: str) -> None:
    if stack == "megatron-lm-2022" and model in ("mixtral-8x7b", "deepseek-v3"):
        pytest.skip("no experts on this stack")
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
