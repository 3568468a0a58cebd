"""Full recomputation of layers whose inputs tensor parallelism splits, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.interconnect import collective_time_s
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication
from planner.studies.verify import verify
from tests.oracle.brute_prices import Prices
from tests.oracle.brute_sums import sum_chunk

LAYERS, WIDTH, LENGTH = 96, 12_288, 2048
INPUT = LENGTH * WIDTH * 2
"""16-bit input of a layer of one sample."""


def request(stack: str = "megatron-lm-2021", **overrides: object) -> Request:
    asked = {"stack": stack, "sequence_length": LENGTH, "global_batch": 8, "precision": "fp16"}
    return read_request("gpt3-175b", "dgx-a100:8", None, asked | overrides)


def layout(mode: str, **more: object) -> dict[str, object]:
    return {"tp": 8, "pp": 8, "zero_stage": 0, "recompute": mode, **more}


def kept(mode: str, stack: str = "megatron-lm-2021") -> int:
    found = evaluate(request(stack), layout(mode))
    terms = {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}
    return terms["activations"]


def test_a_rank_keeps_an_eighth_of_each_input() -> None:
    """Twelve layers of eight microbatches in flight: 7/8 of each input leave; the working bytes of
    the layer that runs again have the whole one."""
    whole = kept("full", "megatron-deepspeed")
    parts = kept("partitioned", "megatron-deepspeed")
    in_flight = LAYERS // 8 * 8
    assert whole - parts >= in_flight * INPUT * 7 // 8
    assert parts >= in_flight * INPUT // 8


@pytest.mark.parametrize("stack", ["megatron-core", "megatron-core-0.8", "megatron-core-local"])
def test_megatron_core_keeps_inputs_in_parts_too(stack: str) -> None:
    asked = request(stack, precision="bf16")
    whole, parts = (
        {
            t.name: t.bytes or 0
            for t in evaluate(asked, layout(mode, sequence_parallel=False))
            .prediction.stages[0]
            .memory
        }
        for mode in ("full", "partitioned")
    )
    in_flight = LAYERS // 8 * 8
    assert whole["activations"] - parts["activations"] >= in_flight * INPUT * 7 // 8


def test_each_layer_is_gathered_once_per_microbatch() -> None:
    asked = request()
    found, plain = (evaluate(asked, layout(mode)) for mode in ("partitioned", "full"))
    calls = {
        (call.kind, call.count, call.bytes)
        for call in communication(asked, found).stages[3]
        if (call.group, call.phase, call.kind) == ("tp", "recompute", "all_gather")
    }
    count = LAYERS // 8 * 8
    assert calls == {("all_gather", count, count * INPUT)}
    eight, one = np.array([8]), np.array([1])
    gather = collective_time_s(
        asked.machine.fabric, "all_gather", np.array([float(INPUT)]), size=eight, stride=one
    )
    # Eight microbatches and seven of filling, twelve layers each.
    added = found.prediction.step_time_s - plain.prediction.step_time_s
    assert added == pytest.approx(15 * 12 * float(gather[0]), rel=0.02)


@pytest.mark.parametrize(
    ("stack", "more"),
    [("megatron-lm-2021", {"tp": 1, "pp": 64}), ("megatron-lm-2022", {"sequence_parallel": True})],
)
def test_what_no_rank_holds_twice_has_no_parts(stack: str, more: dict[str, object]) -> None:
    with pytest.raises(InputError, match="splits what tensor-parallel ranks hold alike"):
        evaluate(request(stack), layout("partitioned", **more))


def test_the_search_takes_parts_where_whole_inputs_do_not_fit() -> None:
    """Eight samples of four microbatches each in flight: 12 x 8 x 0.2 GB of whole inputs beside
    49 GB of state."""
    fix = {"tp": 8, "pp": 8, "microbatch_size": 8}
    found = plan(request(global_batch=128, constraints={"fix": fix}))
    modes = {part.mode for stage in found.layout.stages for part in stage.recompute}
    assert modes == {"partitioned"}
    assert verify(found) == []


def test_a_job_that_asks_for_parts_gets_tensor_parallelism() -> None:
    found = plan(request(constraints={"recompute": "partitioned"}))
    assert found.layout.tp > 1
    assert verify(found) == []


def test_layers_that_run_again_together_share_parts_and_a_gather() -> None:
    """Twelve layers in groups of four keep three parts, and gather three times per microbatch."""
    asked = request("megatron-deepspeed")
    found, alone = (evaluate(asked, layout(m)) for m in ("partitioned:4", "partitioned"))
    calls = {
        (call.count, call.bytes)
        for call in communication(asked, found).stages[3]
        if (call.group, call.phase, call.kind) == ("tp", "recompute", "all_gather")
    }
    count = LAYERS // 8 // 4 * 8
    assert calls == {(count, count * INPUT)}
    left = kept("partitioned", "megatron-deepspeed") - kept("partitioned:4", "megatron-deepspeed")
    assert left == 9 * 8 * INPUT // 8
    assert found.prediction.step_time_s < alone.prediction.step_time_s
    with pytest.raises(InputError, match="partitioned:N runs N layers again together"):
        evaluate(asked, layout("partitioned:1"))


def test_a_job_that_asks_for_groups_of_parts_verifies() -> None:
    found = plan(request("megatron-deepspeed", constraints={"recompute": "partitioned:3"}))
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {
        "partitioned:3"
    }
    assert verify(found) == []


@pytest.mark.parametrize(
    ("stack", "extra"),
    [("megatron-lm-2021", {}), ("megatron-core", {"sequence_parallel": False}),
     ("megatron-lm-2022", {"sequence_parallel": False})],
)  # fmt: skip
def test_some_layers_of_a_stage_keep_parts(stack: str, extra: dict[str, object]) -> None:
    """Of twelve layers the first five run again from a part of their inputs, the rest keep all:
    what lies between none and all twelve, layer by layer, in bytes, time and gathers."""
    asked = request(stack, precision="bf16") if stack == "megatron-core" else request(stack)
    shapes = [
        layout("none", **extra),
        layout("partitioned", recompute_layers=5, **extra),
        layout("partitioned", **extra),
    ]
    found = [evaluate(asked, shape) for shape in shapes]
    kept, time, gathers = [], [], []
    for each in found:
        terms = {t.name: t.bytes or 0 for t in each.prediction.stages[3].memory}
        kept.append(terms["activations"] + terms.get("split_blocks", 0))
        time.append(each.priced.ranks[3].chunks[0].backward_ns)
        calls = communication(asked, each).stages[3]
        again = [c for c in calls if (c.phase, c.kind) == ("recompute", "all_gather")]
        gathers.append(sum(call.count for call in again))
    assert kept[0] - kept[1] == pytest.approx((kept[0] - kept[2]) * 5 / 12, rel=1e-9)
    assert time[1] - time[0] == pytest.approx((time[2] - time[0]) * 5 / 12, rel=1e-9)
    assert gathers == [0, 5 * 8, 12 * 8]
    stages = found[1].layout.stages
    assert {(p.mode, p.layers) for s in stages for p in s.recompute} == {("partitioned", 5)}
    again = evaluate(asked, found[1].layout.model_dump(exclude_none=True))
    assert again.prediction == found[1].prediction


def test_brute_force_sums_parts_of_some_layers_alike() -> None:
    """Whole stages of five layers in parts and seven that run nothing again, summed by hand."""
    priced = evaluate(request(), layout("partitioned", recompute_layers=5)).priced
    tables, leaf = priced.tables, priced.leaf
    prices = Prices(
        layers=tuple(leaf.kinds[kind] for kind in leaf.sequence), embedding=leaf.embedding,
        head=leaf.head, hop=leaf.hop_ns, bucket=leaf.bucket_ns, tied_sync=leaf.tied_sync_ns,
        sync=leaf.sync_ns, fixed=leaf.fixed_bytes, receive=0, output=0,
        capacity=leaf.capacity_bytes, policies=tables.policies, late=(), waiting=(),
        put_off=(0, 0, 0), blocks_stay=leaf.idle_forward, ends=None,
    )  # fmt: skip
    for rank in range(1, 7):
        chunk = priced.ranks[rank].chunks[0]
        own = sum_chunk(
            prices, False, False, True, 12 * rank, 12, ("partitioned/none", 5), halves=False
        )
        assert own.activation == chunk.activation_bytes
        assert own.working == chunk.working_bytes
        assert own.draining == chunk.draining_bytes
        sent = priced.leaf.sends
        on, back = (sent[12][0], sent[12][1]) if sent else (0, 0)
        assert (own.forward + on, own.backward + back) == (chunk.forward_ns, chunk.backward_ns)
