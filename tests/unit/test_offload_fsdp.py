"""State of FSDP that is on the hosts as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from planner.certify import verify
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from tests.unit.offloading import BOTH, PARAMETERS, predicted, term

FSDP = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}


def fsdp(stack: str, model: str = "llama-3.1-8b", **job: Any) -> Request:
    fields = {
        "sequence_length": 2048,
        "global_batch": 16,
        "optimizer_offload": True,
        "stack": stack,
    }
    return read_request(model, "dgx-h100:1", None, fields | {"parameter_offload": True} | job)


@pytest.mark.parametrize(
    "stack", ["torchtitan", "pytorch-fsdp1", "pytorch-fsdp2", "nemo-automodel"]
)
def test_fsdp_keeps_all_state_on_the_host(stack: str) -> None:
    """CPUOffloadPolicy: weights in fp32, their gradients and two moments, 16 bytes; 4 bytes come
    for each of two gathers and leave with each reduction, twice for two microbatches; AutoModel
    reduces behind the second one only."""
    found = evaluate(fsdp(stack), FSDP).prediction
    assert found.host is not None
    assert found.host.bytes_per_node == 16 * PARAMETERS
    crossings, waiting = (5, 2 * PARAMETERS) if stack == "nemo-automodel" else (6, 0)
    assert found.host.link_bytes_per_step == PARAMETERS // 8 * 4 * crossings
    held = [term(found, name) for name in ("optimizer", "gradients", "weights")]
    assert held == [0, waiting, 0]
    kept = evaluate(fsdp(stack, optimizer_offload=False, parameter_offload=False), FSDP).prediction
    assert found.step_time_s > kept.step_time_s


@pytest.mark.parametrize(
    ("stack", "asked", "said"),
    [
        ("torchtitan", "optimizer_offload", "optimizer_offload: true without parameter_offload"),
        ("torchtitan", "parameter_offload", "parameter_offload: true without optimizer_offload"),
    ],
)
def test_a_search_refuses_half_of_what_leaves_together(stack: str, asked: str, said: str) -> None:
    job = {"stack": stack, "sequence_length": 4096, "global_batch": 16, asked: True}
    with pytest.raises(InputError, match=said) as caught:
        read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    assert "optimizer_offload and parameter_offload together" in (caught.value.hint or "")


def test_fsdp_offloads_all_or_nothing_and_what_its_host_can_update() -> None:
    with pytest.raises(InputError, match="with the weights only"):
        fsdp("torchtitan", parameter_offload=False)
    with pytest.raises(InputError, match="no adamw_bf16 on the host"):
        evaluate(fsdp("torchtitan", optimizer="adamw_bf16"), FSDP)
    # AutoModel hands the policy on where ep is 1 only.
    with pytest.raises(InputError, match="keeps mixtures under ep on the device"):
        evaluate(fsdp("nemo-automodel", "mixtral-8x7b"), {**FSDP, "ep": 2})
    assert evaluate(fsdp("nemo-automodel", "mixtral-8x7b"), FSDP).prediction.host is not None


def test_weights_that_stay_gathered_come_from_the_host_once() -> None:
    """ZeRO 2: for each forward, under a pipeline for the step's first one; whole gradients of a
    pipeline wait on the device, in fp32, and their shards leave after its last backward."""
    twice = evaluate(fsdp("torchtitan"), {**FSDP, "zero_stage": 2}).prediction
    assert twice.host is not None
    assert twice.host.link_bytes_per_step == PARAMETERS // 8 * 4 * 2 * 2
    assert term(twice, "gradients") == 0
    resharded = evaluate(fsdp("torchtitan"), FSDP).prediction
    kept = evaluate(fsdp("torchtitan", optimizer_offload=False, parameter_offload=False), FSDP)
    exposed = [p.step_time_s - kept.prediction.step_time_s for p in (twice, resharded)]
    assert 0 < exposed[0] < exposed[1]
    layout = {"pp": 2, "dp_shard": 4, "zero_stage": 2, "recompute": "none"}
    piped = evaluate(fsdp("torchtitan"), layout).prediction
    own = evaluate(fsdp("torchtitan", optimizer_offload=False, parameter_offload=False), layout)
    assert piped.host is not None
    assert piped.host.link_bytes_per_step <= (PARAMETERS // 2 + 525_400_000) // 4 * 4 * 2
    sums = [term(p, "gradients") for p in (piped, own.prediction)]
    assert sums[0] == sums[1] > 4 * PARAMETERS // 2 * 0.9
    with pytest.raises(InputError, match="from ZeRO stage 3 on"):
        predicted(layout={"zero_stage": 2}, global_batch=16, **BOTH)


def test_plans_with_fsdp_on_the_host_are_certified() -> None:
    request = fsdp("torchtitan", "llama-3.2-1b")
    assert verify(plan(request)) == []
