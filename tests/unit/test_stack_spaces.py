"""What ``evaluate`` refuses is what the space of the stack leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hardware_profiles.loader import load_stack
from planner.errors import InputError
from planner.pipeline import evaluate, read_request
from planner.request import Request
from planner.space import build_space


def request_of(stack: str, model: str = "llama-3.1-8b") -> Request:
    job = {"stack": stack, "sequence_length": 4096, "global_batch": 16}
    return read_request(model, "dgx-h100:1", None, job)


@pytest.mark.parametrize(
    ("stack", "model", "layout", "reason"),
    [
        ("torchtitan", "mixtral-8x7b", {"tp": 2, "ep": 2, "etp": 2}, "split over ep, or over tp"),
        ("pytorch-tp", "mixtral-8x7b", {"tp": 2, "etp": 4}, "among ranks that tp joins"),
        ("megatron-core-0.8", "mixtral-8x7b", {"tp": 2, "etp": 1}, "as tp splits all else"),
        ("torchtitan", "llama-3.1-8b", {"cp": 2, "cp_kind": "p2p"}, "no p2p context"),
        ("nemo-automodel", "mixtral-8x7b", {"tp": 2, "ep": 2}, "no mixture of experts under tp"),
        ("nemo-automodel", "llama-3.1-8b", {"cp": 2, "cp_kind": "p2p"}, "is all_gather"),
        ("nemo-automodel", "mixtral-8x7b", {"cp": 2, "cp_kind": "all_gather"}, "is p2p"),
        ("meta-llama3", "llama-3.1-8b", {"tp": 2, "sequence_parallel": False}, "with sequence"),
        ("deepspeed-autotp", "llama-3.1-8b", {"tp": 2, "sequence_parallel": True}, "no sequence"),
    ],
)
def test_evaluate_refuses_what_no_plan_has(
    stack: str, model: str, layout: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        evaluate(request_of(stack, model), layout)


@pytest.mark.parametrize("stack", ["torchtitan", "nemo-automodel", "pytorch-fsdp2"])
def test_tp_without_sequence_parallelism_is_searched(stack: str) -> None:
    meshes = build_space(request_of(stack)).meshes
    assert set(meshes.sp[meshes.tp > 1].tolist()) == {0, 1}
    assert evaluate(request_of(stack), {"tp": 2, "sequence_parallel": False}).prediction.step_time_s


def test_torchtitan_experts_are_over_ep_or_over_tp() -> None:
    meshes = build_space(request_of("torchtitan", "mixtral-8x7b")).meshes
    degrees = zip(meshes.tp, meshes.ep, meshes.etp, strict=True)
    found = {(tp, ep > 1, etp) for tp, ep, etp in degrees}
    assert {(2, True, 1), (2, False, 2), (1, True, 1)} <= found
    assert all(etp == (1 if over_ep else tp) for tp, over_ep, etp in found)


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 8), ("muon", 4)])
def test_muon_needs_whole_query_groups(optimizer: str, most: int) -> None:
    """Qwen3-30B-A3B has 4 KV heads."""
    job = {"stack": "megatron-core-muon", "sequence_length": 4096, "global_batch": 16}
    request = read_request("qwen3-30b-a3b", "dgx-h100:1", None, job | {"optimizer": optimizer})
    assert max(build_space(request).meshes.tp) == most


def test_mxfp8_recipes_of_nemo_gather_parameters_alone(tmp_path: Path) -> None:
    """16-bit weights of 8.03e9 parameters come from seven of eight devices at 900 GB/s at most; the
    other 8-bit recipes hide that behind the forward."""
    beside = tmp_path / "beside.yaml"
    beside.write_text("extends: nemo-mxfp8\nname: beside\noverlap_dp_parameters: true\n")

    def step_s(stack: str) -> float:
        job = {"stack": stack, "sequence_length": 4096, "global_batch": 64, "precision": "fp8"}
        request = read_request("llama-3.1-8b", "dgx-b200:1", None, job)
        return evaluate(request, {"tp": 1, "zero_stage": 1}).prediction.step_time_s

    least = 2 * 8.03e9 * 7 / 8 / 900e9
    assert least < step_s("nemo-mxfp8") - step_s(str(beside)) < 2 * least


def test_experts_have_a_mesh_of_their_own_in_megatron_core() -> None:
    request = request_of("megatron-core", "mixtral-8x7b")
    meshes = build_space(request).meshes
    found = set(zip(meshes.tp.tolist(), meshes.ep.tolist(), meshes.etp.tolist(), strict=True))
    assert {(1, 1, 8), (1, 2, 4), (2, 1, 8), (8, 4, 2), (4, 8, 1)} <= found
    assert all(8 % (ep * etp) == 0 for _, ep, etp in found)
    # Quarters of 4 experts are as many weights as one expert of 8, and 4 ranks' tokens meet.
    shared, dealt = (
        evaluate(request, {"tp": 1, "pp": 1, "ep": ep, "etp": etp, "zero_stage": 1}).prediction
        for ep, etp in ((2, 4), (8, 1))
    )
    held = [{t.name: t.bytes for t in p.stages[0].memory}["weights"] for p in (shared, dealt)]
    assert held[0] == held[1]
    assert shared.step_time_s > dealt.step_time_s


def test_torchtitan_has_the_optimizers_of_its_container() -> None:
    assert load_stack("torchtitan").optimizers == ("adamw", "adamw_bf16", "muon")
    with pytest.raises(InputError, match="no optimizer sgd"):
        read_request("llama-3.1-8b", "dgx-h100:1", None, {
            "stack": "torchtitan", "sequence_length": 4096, "global_batch": 16, "optimizer": "sgd",
        })  # fmt: skip


def test_weights_reshard_to_any_number_of_ranks_under_plain_fsdp2() -> None:
    request = request_of("pytorch-fsdp2")
    base = {"zero_stage": 3}
    whole, some = (evaluate(request, base | more) for more in ({}, {"reshard_after_forward": 2}))
    assert whole.layout.reshard_after_forward is True
    assert some.prediction.step_time_s < whole.prediction.step_time_s
    peaks = [each.prediction.stages[0].peak_bytes for each in (whole, some)]
    assert peaks[0] < peaks[1]
    with pytest.raises(InputError, match="reshard_after_forward = 3"):
        evaluate(request, base | {"reshard_after_forward": 3})
