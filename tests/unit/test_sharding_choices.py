"""Who keeps, gathers and reduces weights: hpZ, MiCS, and ends that tp does not split."""

from __future__ import annotations

from typing import Any

import pytest

from cost_models.traffic import Calls
from hardware_profiles.loader import load_cluster, load_stack
from planner.certify import verify
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request
from planner.specs import JobSpec
from planner.studies.communication import communication

MODEL = read_model("llama-3.1-8b")
PARAMETERS = 8_030_261_248
LAYER = 218_112_000
VOCABULARY = 128_256 * 4096


def price(
    stack: str, *, nodes: int = 2, precision: Any = "bf16", **layout: Any
) -> tuple[Request, EvaluatedLayout]:
    batch = 16 * nodes
    job = JobSpec(sequence_length=4096, global_batch=batch, stack=stack, precision=precision)
    request = Request(MODEL, load_cluster(f"dgx-h100:{nodes}"), job, load_stack(stack))
    return request, evaluate(request, {"microbatch_size": 1, **layout})


def calls(stack: str, kind: str = "decoder", **layout: Any) -> list[Calls]:
    found = communication(*price(stack, **layout))
    return list(found.layers[kind])


def memory(stack: str, **layout: Any) -> dict[str, int]:
    _, result = price(stack, **layout)
    return {term.name: term.bytes or 0 for term in result.prediction.stages[0].memory}


def test_hpz_gathers_for_the_backward_inside_a_node() -> None:
    """From all 16 ranks forward, from the 8 of a node backward: the same 16-bit weights."""
    gathers = [call for call in calls("deepspeed-hpz") if call.kind == "all_gather"]
    assert [(call.phase, call.ranks, call.bytes) for call in gathers] == [
        ("forward", 16, 2 * LAYER), ("backward", 8, 2 * LAYER),
    ]  # fmt: skip


def test_hpz_holds_a_second_copy_of_the_weights() -> None:
    """2 bytes per parameter over the 8 ranks of a node, for faster backwards."""
    plain, kept = memory("deepspeed-hf", zero_stage=3), memory("deepspeed-hpz")
    assert kept["weights"] - plain["weights"] == pytest.approx(2 * PARAMETERS / 8, rel=1e-6)
    slow, fast = (price(stack, nodes=8, zero_stage=3)[1] for stack in STAGE_3)
    assert fast.prediction.step_time_s < slow.prediction.step_time_s
    assert fast.layout.reshard_after_forward == 8
    assert slow.layout.reshard_after_forward is True


STAGE_3 = ("deepspeed-hf", "deepspeed-hpz")


def test_a_layout_cannot_ask_for_a_resharding_that_the_stack_does_not_do() -> None:
    with pytest.raises(InputError, match="reshard_after_forward = 3"):
        price("deepspeed-hpz", reshard_after_forward=3)
    request, _ = price("deepspeed-hpz", nodes=3)
    stack = request.stack.model_copy(update={"reshard_group": 16})
    with pytest.raises(InputError, match="no multiple of the 16 ranks"):
        evaluate(Request(MODEL, request.cluster, request.job, stack), {"microbatch_size": 1})


def test_deepspeed_gathers_whole_weights_once_per_step() -> None:
    """ZeRO 2 keeps 16-bit weights whole and gathers 2 bytes of each after the update; FSDP2 keeps
    fp32 shards and gathers them with every microbatch."""
    for stack, phase in (("deepspeed-hf", "step"), ("pytorch-fsdp2", "forward")):
        gathers = [call for call in calls(stack, zero_stage=2) if call.kind == "all_gather"]
        assert [(call.phase, call.bytes) for call in gathers] == [(phase, 2 * LAYER)]
    assert memory("deepspeed-hf", zero_stage=2)["weights"] == pytest.approx(2 * PARAMETERS)


def test_mics_sums_over_replicas_once_per_step() -> None:
    """Shards of 8 ranks: 16-bit gradients of a layer, 1/8 of them, between the two nodes."""
    found = calls("deepspeed-mics", dp_replicate=2, dp_shard=8)
    sums = [call for call in found if call.kind == "all_reduce"]
    assert [(call.group, call.ranks, call.phase, call.bytes) for call in sums] == [
        ("dp_replicate", 2, "step", 2 * LAYER // 8)
    ]
    scatters = [call for call in found if call.kind == "reduce_scatter"]
    assert [(call.group, call.ranks, call.phase) for call in scatters] == [
        ("dp_shard", 8, "backward")
    ]


def test_mics_pays_for_replicas_once() -> None:
    """Two microbatches: MiCS sums over the nodes in one of them, hybrid FSDP in both."""
    request, once = price("deepspeed-mics", dp_replicate=2, dp_shard=8)
    stack = request.stack.model_copy(update={"replica_reduction": "microbatch"})
    job = request.job.model_copy(update={"global_batch": 16 * 16})
    slow = Request(MODEL, request.cluster, job, stack)
    fast = Request(MODEL, request.cluster, job, request.stack)
    layout = {"microbatch_size": 1, "dp_replicate": 2, "dp_shard": 8}
    times = [evaluate(each, layout).prediction.step_time_s for each in (slow, fast)]
    assert times[1] < times[0]
    assert once.layout.num_microbatches == 2


def test_autotp_leaves_the_ends_whole() -> None:
    """A rank has the whole of embedding and head, a quarter of the layers, and all norms."""
    _, result = price("deepspeed-autotp", nodes=1, tp=4, zero_stage=0)
    norms = 32 * 2 * 4096 + 4096
    layers = PARAMETERS - 2 * VOCABULARY - norms
    assert result.prediction.stages[0].parameters == 2 * VOCABULARY + norms + layers // 4
    ends = [*calls("deepspeed-autotp", "head", nodes=1, tp=4, zero_stage=0),
            *calls("deepspeed-autotp", "embedding", nodes=1, tp=4, zero_stage=0)]  # fmt: skip
    assert {call.group for call in ends} == {"dp"}


def test_autotp_reduces_the_input_gradient_of_each_projection() -> None:
    """q, k, v, gate and up in the backward; attention's and the MLP's output in the forward."""
    found = [c for c in calls("deepspeed-autotp", nodes=1, tp=4, zero_stage=0) if c.group == "tp"]
    assert {call.kind for call in found} == {"all_reduce"}
    assert sum(call.count for call in found if call.phase == "forward") == 2
    assert sum(call.count for call in found if call.phase == "backward") == 5
    assert {call.bytes // call.count for call in found} == {4096 * 4096 * 2}


def test_quantised_traffic_goes_inside_nodes_and_across() -> None:
    """Two nodes of 8: weights in 65 bytes of 64 elements, from all ranks forward and from the node
    backward; gradients in 33, all of them inside the node, an eighth of them across."""
    found = calls("deepspeed-zeropp", precision="fp16")
    weights, gradients = LAYER * 65 // 64, LAYER * 33 / 64
    assert [(call.phase, call.kind, call.ranks, call.bytes) for call in found] == [
        ("backward", "all_to_all", 8, gradients), ("backward", "all_to_all", 2, gradients / 8),
        ("forward", "all_gather", 16, weights), ("backward", "all_gather", 8, weights),
    ]  # fmt: skip


def test_quantised_traffic_pays_on_slow_networks_only() -> None:
    """Its kernels cost what 8 ports of 400 Gb/s hide anyway, less than an Ethernet's waits."""

    def step_s(stack: str, cluster: str) -> float:
        spec = JobSpec(sequence_length=2048, global_batch=64, stack=stack, precision="fp16")
        request = Request(MODEL, load_cluster(cluster), spec, load_stack(stack))
        layout = {"microbatch_size": 1, "recompute": "full"}
        return evaluate(request, layout).prediction.step_time_s

    stacks = ("deepspeed-zeropp", "deepspeed-hpz")
    quantised, plain = (step_s(stack, "dgx-h100:8") for stack in stacks)
    assert quantised > plain
    quantised, plain = (step_s(stack, "aws-p3-16xlarge:8") for stack in stacks)
    assert quantised < 0.7 * plain


def test_one_node_reduces_as_ever() -> None:
    """The gradients' exchange is for several nodes (stage3.py: num_nodes == 1 reduces)."""
    kinds = {call.kind for call in calls("deepspeed-zeropp", nodes=1, precision="fp16")}
    assert kinds == {"all_gather", "reduce_scatter"}


def test_hierarchical_gathers_cross_nodes_first() -> None:
    """Sixteen ranks of two nodes: pairs across gather an eighth, then the eight of a node all."""
    gathers = [
        (call.phase, call.ranks, call.bytes)
        for call in calls("deepspeed-mics-hierarchical", nodes=4, dp_replicate=2, dp_shard=16)
        if call.kind == "all_gather"
    ]
    once = [(2, 2 * LAYER // 8), (8, 2 * LAYER)]
    assert sorted(gathers) == sorted(
        (phase, *each) for phase in ("forward", "backward") for each in once
    )


def test_hierarchical_gathers_need_several_nodes() -> None:
    with pytest.raises(InputError, match="does not fill several nodes"):
        price("deepspeed-mics-hierarchical", dp_replicate=2, dp_shard=8)


def test_any_number_of_ranks_that_divides_them_may_keep_weights() -> None:
    """Of 16 ranks 2, 4 or 8, or none: more ranks hold less each and gather from farther."""
    held, waits = [], []
    for group in (2, 4, 8, True):
        layout = {"reshard_after_forward": group, "recompute": "full"}
        found = price("deepspeed-hpz", **layout)[1]
        assert found.layout.reshard_after_forward == group
        held.append(memory("deepspeed-hpz", **layout)["weights"])
        waits.append(calls("deepspeed-hpz", **layout)[-1].ranks)
    assert waits == [2, 4, 8, 16]
    for share, each in zip((2, 4, 8), held, strict=False):
        assert each - held[-1] == pytest.approx(2 * PARAMETERS / share, rel=1e-6)


def test_the_search_chooses_how_many_keep_weights() -> None:
    """Of the numbers that fit the fastest, and the recheck agrees."""
    spec = {"stack": "deepspeed-hpz", "precision": "fp16", "global_batch": 64}
    found = plan(read_request("llama-3.1-8b", "aws-p3dn:8", None, spec))
    assert found.layout.reshard_after_forward in (2, 4, 8, 16, 32, True)
    assert verify(found) == []
    times = []
    request = read_request("llama-3.1-8b", "aws-p3dn:8", None, spec)
    base = found.layout.model_dump(exclude={"reshard_after_forward", "stages"})
    for group in (2, 4, 8, 16, 32, True):
        other = evaluate(request, {**base, "reshard_after_forward": group, "recompute": "full"})
        if other.prediction.fits:
            times.append(other.prediction.step_time_s)
    assert found.prediction.step_time_s <= min(times)
