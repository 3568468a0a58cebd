"""Module inputs on the host: what leaves, what comes back, what is waited for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.certify import verify
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.request import Request
from planner.specs import JobSpec

TOKENS = 8192
# Llama-3.1-8B: 32 query heads and 8 of keys, 8 of values, of 128 each, in 16 bits.
QKV = (32 + 2 * 8) * 128 * TOKENS * 2
OUTPUT = 32 * 128 * TOKENS * 2
LAYOUT = {"pp": 4, "dp_shard": 2, "zero_stage": 1, "microbatch_size": 1}


def predicted(
    stack: str, *, model: str = "llama-3.1-8b", link_share: float = 1.0,
    layout: dict[str, Any] | None = None,
) -> Prediction:  # fmt: skip
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    link = node.host_link.model_copy(update={"value": node.host_link.value * link_share})
    group = cluster.groups[0].model_copy(
        update={"node": node.model_copy(update={"host_link": link})}
    )
    job = JobSpec(sequence_length=TOKENS, stack=stack, global_batch=16)
    request = Request(
        read_model(model), cluster.model_copy(update={"groups": (group,)}), job, load_stack(stack)
    )
    return evaluate(request, layout or LAYOUT).prediction


def term(found: Prediction, rank: int, name: str) -> int:
    return sum(each.bytes or 0 for each in found.stages[rank].memory if each.name == name)


@pytest.mark.parametrize("rank", range(4))
def test_inputs_leave_the_device_but_for_one_layer(rank: int) -> None:
    """8 layers' inputs of all microbatches in flight leave; those of one layer stay, and the
    largest comes back one ahead."""
    here, there = predicted("megatron-core"), predicted("megatron-core-offload")
    in_flight = 4 - rank
    gone = term(here, rank, "activations") - term(there, rank, "activations")
    assert gone == in_flight * 8 * (QKV + OUTPUT)
    assert term(there, rank, "inputs_on_device") == QKV + OUTPUT
    assert term(here, rank, "inputs_on_device") == 0
    if rank < 3:
        assert term(there, rank, "working") - term(here, rank, "working") == QKV


def test_hosts_hold_the_inputs_of_every_stage_on_them() -> None:
    found = predicted("megatron-core-offload").host
    assert found is not None
    # Two devices of each of four stages, with 4, 3, 2 and 1 microbatches of eight layers.
    assert found.bytes_per_node == 2 * (4 + 3 + 2 + 1) * 8 * (QKV + OUTPUT)
    assert found.link_bytes_per_step == 2 * 8 * (QKV + OUTPUT) * 8


def test_a_hidden_way_costs_nothing_and_a_slow_link_is_waited_for() -> None:
    """168 MB cross 64 GB/s in less than a layer's forward; a hundredth of that is waited for."""
    here, there = predicted("megatron-core"), predicted("megatron-core-offload")
    assert there.step_time_s == here.step_time_s
    slow = predicted("megatron-core-offload", link_share=0.01)
    share = load_cluster("dgx-h100:1").groups[0].node.host_link.si * 0.01
    waits = {part.name: part.seconds for part in slow.time}["host_link"]
    way = 2 * (QKV + OUTPUT) / share
    layers = 8 * 8
    assert waits is not None
    assert 0 < layers * way - waits < here.step_time_s
    assert slow.step_time_s > waits


def test_what_is_run_again_is_not_sent() -> None:
    """The experts' inputs of a layer whose mixture runs again are never kept."""
    evaluated = partial(predicted, "megatron-core-offload", model="qwen3-30b-a3b")
    layout = {"ep": 8, "zero_stage": 1, "microbatch_size": 1}
    plain = evaluated(layout=layout).host
    again = evaluated(layout={**layout, "recompute": "moe"}).host
    assert plain is not None
    assert again is not None
    # 8 of 128 experts per token, 2,048 wide, in each of 48 layers and both microbatches.
    assert plain.link_bytes_per_step - again.link_bytes_per_step == (
        2 * 2 * 48 * TOKENS * 8 * 2048 * 2
    )


def test_a_plan_verifies() -> None:
    job = {"stack": "megatron-core-offload", "sequence_length": TOKENS, "global_batch": 8}
    limits = {"fix": {"tp": 1, "pp": 1}}
    found = plan(read_request("llama-3.1-8b", "dgx-h100:1", None, {**job, "constraints": limits}))
    assert found.prediction.host is not None
    assert verify(found) == []


def test_hosts_that_are_too_small_are_refused() -> None:
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    assert node.host_memory is not None
    memory = node.host_memory.model_copy(update={"value": node.host_memory.value / 100})
    group = cluster.groups[0].model_copy(
        update={"node": node.model_copy(update={"host_memory": memory})}
    )
    stack = load_stack("megatron-core-offload")
    job = JobSpec(sequence_length=TOKENS, stack=stack.name, global_batch=16)
    request = Request(
        read_model("llama-3.1-8b"), cluster.model_copy(update={"groups": (group,)}), job, stack
    )
    found = evaluate(request, LAYOUT).prediction
    assert found.host is not None
    assert found.host.capacity_bytes_per_node is not None
    assert found.host.bytes_per_node > found.host.capacity_bytes_per_node
    assert not found.fits


def test_the_region_of_queries_keys_and_values_sends_all_that_it_saves() -> None:
    """Its products' input and that of the norm fused into them: the hidden size of 4,096 twice."""
    stack = load_stack("megatron-core-offload")
    assert stack.offload is not None
    inputs = (*stack.offload.inputs, "qkv_linear")
    more = stack.model_copy(update={"offload": stack.offload.model_copy(update={"inputs": inputs})})
    job = JobSpec(sequence_length=TOKENS, stack=stack.name, global_batch=16)
    model, cluster = read_model("llama-3.1-8b"), load_cluster("dgx-h100:1")
    few, many = (
        evaluate(Request(model, cluster, job, s), LAYOUT).prediction for s in (stack, more)
    )
    for rank in range(4):
        gone = term(few, rank, "activations") - term(many, rank, "activations")
        assert gone == (4 - rank) * 8 * 2 * 4096 * TOKENS * 2
