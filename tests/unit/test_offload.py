"""What the hosts hold, what crosses their links, and layouts that they or the margin refuse."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InfeasibleError, InputError
from planner.memory_margin import margin_of, usable_bytes
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.request import Request
from planner.specs import JobSpec

PARAMETERS = 8_030_261_248


def predicted(
    cluster: str = "dgx-h100:1", layout: dict[str, Any] | None = None, **job: Any
) -> Prediction:
    spec = JobSpec(sequence_length=2048, stack="deepspeed-hf", **job)
    request = Request(
        read_model("llama-3.1-8b"), load_cluster(cluster), spec, load_stack("deepspeed-hf")
    )
    chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"} | (layout or {})
    return evaluate(request, chosen).prediction


def term(found: Prediction, name: str) -> int:
    return sum(each.bytes or 0 for each in found.stages[0].memory if each.name == name)


def test_the_host_holds_what_leaves_the_device() -> None:
    """16 bytes of optimizer state and gradient per parameter on one node, half as many on each of
    two; a gradient and a weight of 2 bytes cross each device's link."""
    one = predicted(global_batch=8, optimizer_offload=True)
    two = predicted("dgx-h100:2", global_batch=16, optimizer_offload=True)
    none = predicted(global_batch=8)
    assert none.host is None
    assert one.host is not None
    assert two.host is not None
    assert one.host.bytes_per_node == 16 * PARAMETERS == 2 * two.host.bytes_per_node
    assert one.host.link_bytes_per_step == 4 * PARAMETERS // 8
    assert (term(one, "optimizer"), term(one, "gradients")) == (0, 0)
    assert term(none, "optimizer") == pytest.approx(12 * PARAMETERS / 8, rel=1e-5)


def test_weights_on_the_host_cross_its_link_for_each_pass() -> None:
    """2 more bytes there; they come for the forward and for the backward of each microbatch."""
    found = predicted(global_batch=16, optimizer_offload=True, parameter_offload=True)
    assert found.host is not None
    assert found.host.bytes_per_node == 18 * PARAMETERS
    share = PARAMETERS // 8
    assert found.host.link_bytes_per_step == share * (4 + 2 * 2 * 2)
    assert term(found, "weights") == 0


def test_a_plan_that_overfills_the_host_is_infeasible() -> None:
    """16 bytes of 405 billion parameters are 6.5 TB; a node has 2 TB, and 4 nodes have 8."""
    job = {"optimizer_offload": True, "stack": "deepspeed-hf", "sequence_length": 2048}
    three = read_request("llama-3.1-405b", "dgx-h100:3", None, {**job, "global_batch": 24})
    with pytest.raises(InfeasibleError):
        plan(three)
    reason = r"host memory of .* per node does not hold what is offloaded"
    with pytest.raises(InputError, match=reason):
        evaluate(three, {"zero_stage": 3})
    found = plan(read_request("llama-3.1-405b", "dgx-h100:8", None, {**job, "global_batch": 64}))
    host = found.prediction.host
    assert host is not None
    assert host.capacity_bytes_per_node is not None
    assert host.bytes_per_node <= host.capacity_bytes_per_node


def test_the_margin_is_given_or_earned() -> None:
    """A layout fits if its peak and the margin are within the device; it is priced either way."""
    layout = {"tp": 4, "zero_stage": 1, "recompute": "full", "microbatch_size": 1}
    overrides = {"stack": "megatron-core", "global_batch": 8, "sequence_length": 4096}
    peaks, fits = [], []
    for margin in (0.0, 1.0, None):
        job = overrides | ({} if margin is None else {"memory_margin": margin})
        found = evaluate(read_request("llama-3.1-8b", "dgx-h100:1", None, job), layout).prediction
        assert found.step_time_s > 0
        peaks.append(found.max_peak_bytes)
        fits.append(found.fits)
    assert len(set(peaks)) == 1
    assert fits == [True, True, True]
    margins = [margin / 100 for margin in range(101)]
    capacity = round(1.5 * peaks[0])
    assert [peaks[0] <= usable_bytes(capacity, m) for m in margins] == [m <= 0.5 for m in margins]
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, overrides)
    assert request.memory_margin == margin_of("megatron-core")
    assert request.memory_margin[0] > 0


def test_a_layout_that_does_not_fit_is_priced() -> None:
    job = {"stack": "megatron-core", "global_batch": 8, "sequence_length": 4096}
    found = evaluate(
        read_request("llama-3.1-70b", "dgx-h100:1", None, job), {"tp": 8, "zero_stage": 0}
    ).prediction
    assert not found.fits
    assert found.step_time_s > 0
    assert found.max_peak_bytes > 80e9
