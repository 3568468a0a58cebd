"""Inputs of layers that wait on the hosts."""

from __future__ import annotations

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.units import format_bytes
from planner.certify import verify
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request
from planner.report.parts import host_words
from planner.request import Request
from planner.specs import JobSpec
from tests.unit.offloading import predicted, term

CHECKPOINTS = 32 * 2048 * 4096 * 2
"""Inputs of 32 layers: 2,048 tokens of 4,096 16-bit numbers."""


def test_checkpoints_on_the_host_leave_the_device() -> None:
    """What stays is twice one layer's input, on its way, beside what the layer works with."""
    here = predicted(global_batch=8)
    there = predicted(global_batch=8, activation_offload=True)
    assert here.host is None
    assert there.host is not None
    assert there.host.bytes_per_node == 8 * CHECKPOINTS
    assert there.host.link_bytes_per_step == 2 * CHECKPOINTS
    assert term(here, "activations") - term(there, "activations") == CHECKPOINTS
    assert there.max_peak_bytes < here.max_peak_bytes
    # 16 MiB cross the link in 0.3 ms, a layer's forward takes longer: nothing is waited for.
    assert there.step_time_s == here.step_time_s


def test_checkpoints_that_take_longer_than_a_layer_are_waited_for() -> None:
    """Over a thousandth of the link, 32 layers wait twice for what a pass does not hide."""
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    slow = node.model_copy(update={"host_link": node.host_link.model_copy(update={"value": 0.055})})
    group = cluster.groups[0].model_copy(update={"node": slow})
    cluster = cluster.model_copy(update={"groups": (group,)})
    stack, model = load_stack("deepspeed-hf"), read_model("llama-3.1-8b")
    steps = []
    for moved in (False, True):
        job = JobSpec(
            sequence_length=2048, stack="deepspeed-hf", global_batch=8, activation_offload=moved
        )
        request = Request(model, cluster, job, stack)
        layout = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}
        steps.append(evaluate(request, layout).prediction.step_time_s)
    assert 0 < steps[1] - steps[0] < 2 * CHECKPOINTS / 0.055e9
    assert steps[1] > 2 * CHECKPOINTS / 0.055e9


def test_a_plan_with_checkpoints_on_the_host_verifies() -> None:
    job = {"activation_offload": True, "stack": "deepspeed-hf", "sequence_length": 16384,
           "global_batch": 8}  # fmt: skip
    found = plan(read_request("llama-3.1-8b", "dgx-h100:1", None, job))
    full = {part.mode: part.layers for part in found.layout.stages[0].recompute}.get("full", 0)
    assert found.layout.stages[0].activation_offload_layers == full
    assert verify(found) == []


def test_a_pipeline_sends_the_inputs_of_its_layers_to_the_hosts() -> None:
    """GPT-3 over 8 stages and tp 8: the first has 12 layers of 8 microbatches of 2,048 x 12,288
    16-bit numbers, all on its node's host; each way is waited for."""
    size = 2048 * 12_288 * 2
    found = {}
    for mode, parts in (("full", 1), ("partitioned", 8)):
        for moved in (False, True):
            job = {"stack": "megatron-deepspeed", "sequence_length": 2048, "global_batch": 8,
                   "precision": "fp16", "activation_offload": moved,
                   "constraints": {"recompute": mode}}  # fmt: skip
            asked = read_request("gpt3-175b", "dgx-a100:8", None, job)
            layout = {"tp": 8, "pp": 8, "zero_stage": 0, "recompute": mode}
            found[moved] = evaluate(asked, layout).prediction
        here, there = found[False], found[True]
        assert there.host is not None
        assert there.host.bytes_per_node == 8 * 12 * 8 * size // parts
        assert there.host.link_bytes_per_step == 2 * 12 * 8 * size // parts
        assert term(here, "activations") - term(there, "activations") == 12 * 8 * size // parts
        # Eight microbatches and seven of filling, twelve layers each, there and back.
        way = 2 * size / parts / asked.cluster.groups[0].node.host_link.si
        waited = there.step_time_s - here.step_time_s
        assert waited == pytest.approx(15 * 12 * way, rel=0.01)


def test_a_pipeline_with_inputs_on_the_hosts_verifies() -> None:
    job = {"activation_offload": True, "stack": "megatron-deepspeed", "sequence_length": 2048,
           "global_batch": 32, "precision": "fp16", "constraints": {"fix": {"pp": 4}}}  # fmt: skip
    found = plan(read_request("gpt3-175b", "dgx-a100:8", None, job))
    assert verify(found) == []


def test_zero_3_of_2021_offloads_from_stage_2_on() -> None:
    """Ren et al., arXiv 2101.06840; stage 1 kept its state on the device."""
    job = {"stack": "deepspeed-zero3-2021", "sequence_length": 1024, "global_batch": 64,
           "precision": "fp16", "optimizer_offload": True}  # fmt: skip
    asked = read_request("gpt2-xl", "dgx-a100:1", None, job)
    with pytest.raises(InputError, match="ZeRO stage 2"):
        evaluate(asked, {"zero_stage": 1})
    assert evaluate(asked, {"zero_stage": 2}).prediction.host is not None
    more = read_request("gpt2-xl", "dgx-a100:1", None, job | {"parameter_offload": True})
    least = evaluate(more, {"zero_stage": 3}).prediction
    assert least.max_peak_bytes < evaluate(asked, {"zero_stage": 3}).prediction.max_peak_bytes


def test_megatron_keeps_checkpoints_on_the_device() -> None:
    job = {"activation_offload": True, "stack": "megatron-core", "global_batch": 8}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    with pytest.raises(InputError, match="keeps activations on the device"):
        evaluate(request, {"zero_stage": 1})


def test_checkpoints_that_overfill_the_host_do_not_fit() -> None:
    """126 layers of 16,384 x 131,072 16-bit numbers on 8 devices are 4.3 TB."""
    job = {"activation_offload": True, "stack": "deepspeed-hf", "sequence_length": 131072,
           "global_batch": 64}  # fmt: skip
    request = read_request("llama-3.1-405b", "dgx-h100:8", None, job)
    layout = {"zero_stage": 3, "recompute": "full", "microbatch_size": 1}
    found = evaluate(request, layout).prediction
    assert found.host is not None
    assert found.host.capacity_bytes_per_node is not None
    assert found.host.bytes_per_node > found.host.capacity_bytes_per_node
    assert not found.fits


def test_a_report_says_what_the_hosts_hold_and_lack() -> None:
    job = {"optimizer_offload": True, "stack": "deepspeed-hf", "sequence_length": 2048}
    said = []
    for nodes in (3, 8):
        cluster = f"dgx-h100:{nodes}"
        request = read_request("llama-3.1-405b", cluster, None, {**job, "global_batch": 8 * nodes})
        host = evaluate(request, {"zero_stage": 3}).prediction.host
        assert host is not None
        kept, words = host_words(host)
        assert kept.plain == format_bytes(host.bytes_per_node)
        assert f"{format_bytes(host.link_bytes_per_node_per_step)} a step" in words
        said.append(words)
    assert "of 1.8 TiB in the memory of the fullest node" in said[0]
    assert "too much" in said[0]
    assert "too much" not in said[1]
