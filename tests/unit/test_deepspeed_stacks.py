"""Ways of running DeepSpeed that are stacks of their own: AutoTP's overlap, AutoEP, pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.lanes import exchange_stride, replica_stride
from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import EvaluatedLayout, evaluate, plan
from planner.request import Request
from planner.specs import ConstraintSpec, JobSpec
from planner.studies.communication import communication


def price(model: str, stack: str, *, nodes: int = 2, **layout: Any) -> EvaluatedLayout:
    job = JobSpec(sequence_length=4096, global_batch=64, stack=stack)
    request = Request(read_model(model), load_cluster(f"dgx-h100:{nodes}"), job, load_stack(stack))
    return evaluate(request, {"microbatch_size": 1, **layout})


def seconds(found: EvaluatedLayout, name: str) -> float:
    return sum(term.seconds or 0.0 for term in found.prediction.time if term.name == name)


def test_overlap_hides_reductions_of_input_gradients_only() -> None:
    """Of a layer's seven reductions the backward's five hide (q, k, v, gate and up); the forward's
    two, of the outputs, stay, and what three weight gradients of narrow heads do not cover."""
    plain, hidden = (
        price("llama-3.1-8b", stack, nodes=1, tp=4, zero_stage=1)
        for stack in ("deepspeed-autotp", "deepspeed-autotp-overlap")
    )
    assert 2 / 7 < seconds(hidden, "tp_comm") / seconds(plain, "tp_comm") < 0.75
    assert seconds(hidden, "matmul") == seconds(plain, "matmul")


def test_experts_are_dealt_out_and_zero_splits_what_several_ranks_hold() -> None:
    """Mixtral's 8 experts on 8 of 16 ranks each: a rank holds one expert of every layer."""
    dealt = price("mixtral-8x7b", "deepspeed-autoep", ep=8, zero_stage=2)
    whole = price("mixtral-8x7b", "deepspeed-hf", zero_stage=2)
    expert = 3 * 4096 * 14336 * 32
    parameters = dealt.prediction.stages[0].parameters, whole.prediction.stages[0].parameters
    assert parameters[1] - parameters[0] == 7 * expert
    assert seconds(dealt, "ep_comm") > 0 == seconds(whole, "ep_comm")


def test_stage_3_splits_experts_over_the_ranks_that_hold_the_same_ones() -> None:
    """Of 32 layers, one expert of three matrices on each of 8 ranks, twice: half of it in bf16."""
    held = {}
    for stage in (2, 3):
        found = price("mixtral-8x7b", "deepspeed-autoep", ep=8, zero_stage=stage)
        terms = {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}
        held[stage] = terms["weights"]
    experts = 32 * 3 * 4096 * 14336
    dense = 46_702_792_704 - 8 * experts
    assert held[2] == 2 * (experts + dense)
    assert held[3] == pytest.approx(2 * (experts / 2 + dense / 16), rel=1e-5)


@pytest.mark.parametrize(
    ("stack", "layout", "said"),
    [
        ("deepspeed-autoep", {"ep": 8, "cp": 2, "zero_stage": 3}, "without context parallelism"),
        ("deepspeed-autoep", {"pp": 2, "zero_stage": 1}, "no pipeline"),
        ("deepspeed-pipe", {"pp": 2, "zero_stage": 2}, "no ZeRO stage 2"),
        ("deepspeed-pipe", {"pp": 2, "zero_stage": 1, "ep": 2}, "no expert parallelism"),
        ("deepspeed-pipe", {"pp": 2, "zero_stage": 1, "cp": 2}, "no context parallelism"),
        ("deepspeed-autotp", {"tp": 2, "cp": 2, "zero_stage": 1}, "no context parallelism"),
    ],
)
def test_what_deepspeed_refuses_is_refused(stack: str, layout: dict[str, Any], said: str) -> None:
    model = "mixtral-8x7b" if "ep" in layout else "llama-3.1-8b"
    with pytest.raises(InputError, match=said):
        price(model, stack, **layout)


def test_a_pipeline_waits_for_its_transfers_and_reduces_once() -> None:
    """Gradients are summed after the last backward, in the open."""
    found = price("llama-3.1-8b", "deepspeed-pipe", pp=4, zero_stage=1)
    assert found.layout.schedule == "1f1b"
    assert [stage.chunks[0].layers for stage in found.layout.stages] == [
        (0, 8), (8, 16), (16, 24), (24, 32),
    ]  # fmt: skip
    overlapped = load_stack("deepspeed-pipe").model_copy(update={"overlap_dp_gradients": True})
    job = JobSpec(sequence_length=4096, global_batch=64, stack="deepspeed-pipe")
    request = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:2"), job, overlapped)
    hidden = evaluate(request, {"microbatch_size": 1, "pp": 4, "zero_stage": 1})
    assert seconds(found, "gradient_reduction") > 2 * seconds(hidden, "gradient_reduction") > 0


def terms(found: EvaluatedLayout) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}


@pytest.mark.parametrize(("group", "groups"), [(2, 4), (3, 3), (5, 2), (8, 1)])
def test_one_checkpoint_of_several_layers_keeps_one_input(group: int, groups: int) -> None:
    """8 layers of 4096 x 4096 inputs in 16 bits on the first of 4 stages, 4 microbatches in flight:
    so many inputs as groups, whole or not, and all tensors of a group's layers when it runs again.
    """
    layout = {"pp": 4, "zero_stage": 1}
    plain, one, several = (
        price("llama-3.1-8b", "deepspeed-pipe", recompute=mode, **layout)
        for mode in ("none", "full", f"full:{group}")
    )
    boundary = 4096 * 4096 * 2
    tokens = terms(one)["activations"] - 4 * 8 * boundary
    # Each layer's share is rounded up to whole bytes.
    kept = terms(several)["activations"] - tokens - 4 * groups * boundary
    assert 0 <= kept < 4 * 8 * group
    layer = (terms(plain)["activations"] - tokens) // (4 * 8)
    assert terms(several)["working"] - terms(one)["working"] == (group - 1) * layer
    assert several.prediction.step_time_s == one.prediction.step_time_s


def test_the_search_puts_several_layers_into_a_checkpoint_where_nothing_else_fits() -> None:
    """Even stages of 8 layers on devices with room for the thriftiest group, but not for one input
    per layer."""
    stack = load_stack("deepspeed-pipe").model_copy(update={"uneven_stages": False})
    fixed = ConstraintSpec(fix={"pp": 4, "tp": 1, "microbatch_size": 1, "zero_stage": 1})
    job = JobSpec(
        sequence_length=4096, global_batch=64, stack=stack.name, memory_margin=0, constraints=fixed
    )
    asked = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:2"), job, stack)
    layout = {"pp": 4, "microbatch_size": 1, "zero_stage": 1}
    peaks = {
        mode: evaluate(asked, {**layout, "recompute": mode}).prediction.max_peak_bytes
        for mode in ("none", "full", "full:2", "full:3", "full:4", "full:8")
    }
    least = min(peaks, key=lambda mode: peaks[mode])
    assert least.startswith("full:")
    found = plan(replace(asked, capacity_bytes=peaks[least]))
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {least}
    roomy = plan(replace(asked, capacity_bytes=peaks["full"]))
    assert {part.mode for stage in roomy.layout.stages for part in stage.recompute} == {"full"}


@pytest.mark.parametrize("mode", ["full:1", "full:x", "full:", "full:99999"])
def test_a_group_is_a_number_of_layers(mode: str) -> None:
    with pytest.raises(InputError, match="runs N layers again together"):
        price("llama-3.1-8b", "deepspeed-pipe", pp=4, zero_stage=1, recompute=mode)
    with pytest.raises(InputError, match="recompute is"):
        price("llama-3.1-8b", "deepspeed-hf", zero_stage=1, recompute="full:2")


def test_layers_that_split_themselves_reduce_what_autotp_reduces() -> None:
    """Two reductions forward, five backward of each of a stage's 8 layers (16 microbatches), whole
    ends; a boundary crosses in two parts, one from each rank."""
    job = JobSpec(sequence_length=4096, global_batch=32, stack="deepspeed-pipe")
    stack = load_stack("deepspeed-pipe")
    asked = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:2"), job, stack)
    layout = {"microbatch_size": 1, "pp": 4, "tp": 2, "zero_stage": 1}
    stage = communication(asked, evaluate(asked, layout)).stages[1]
    reduced = [c for c in stage if c.group == "tp" and c.kind == "all_reduce"]
    assert {phase: sum(c.count for c in reduced if c.phase == phase) for phase in PASSES} == {
        "forward": 2 * 8 * 16, "backward": 5 * 8 * 16,
    }  # fmt: skip
    sent = [c for c in stage if c.group == "pp"]
    assert {c.bytes // c.count for c in sent} == {4096 * 4096 * 2 // 2}


PASSES = ("forward", "backward")


def test_sliced_experts_send_nothing_and_sum_each_expert() -> None:
    """Mixtral over tp 4, 4,096 tokens of 4,096 elements to 2 of 8 experts: each expert's output is
    summed forward, the gradient of its input twice backward (gate and up)."""
    job = JobSpec(sequence_length=4096, global_batch=64, stack="deepspeed-autotp")
    stack, cluster = load_stack("deepspeed-autotp"), load_cluster("dgx-h100:2")
    request = Request(read_model("mixtral-8x7b"), cluster, job, stack)
    found = evaluate(request, {"microbatch_size": 1, "tp": 4, "zero_stage": 1})
    assert (found.layout.etp, found.layout.ep) == (4, 1)
    calls = communication(request, found).layers["decoder"]
    copies = 4096 * 2 * 4096 * 2
    summed = [(call.name, call.phase, call.kind, call.count, call.bytes) for call in calls]
    assert [call for call in summed if "expert" in call[0]] == [
        ("expert_input", "backward", "all_reduce", 16, 2 * copies),
        ("expert_output", "forward", "all_reduce", 8, copies),
    ]
    assert not {call.group for call in calls} & {"ep", "etp"}


def test_sliced_experts_are_a_part_of_each_expert() -> None:
    """A quarter of every expert is as many weights as all of a quarter of them."""
    sliced = price("mixtral-8x7b", "deepspeed-autotp", tp=4, zero_stage=1)
    whole = price("mixtral-8x7b", "deepspeed-hf", zero_stage=1)
    expert = 3 * 4096 * 14336 * 32
    gone = whole.prediction.stages[0].parameters - sliced.prediction.stages[0].parameters
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert gone == 3 * (8 * expert + attention) // 4
    with pytest.raises(InputError, match="experts are split as tp splits all else"):
        price("mixtral-8x7b", "deepspeed-autotp", tp=4, etp=2, zero_stage=1)


FOLDED = "deepspeed-autoep-autotp"


def folded(**layout: int) -> tuple[Request, EvaluatedLayout]:
    job = JobSpec(sequence_length=4096, global_batch=64, stack=FOLDED)
    cluster = load_cluster("dgx-h100:2")
    request = Request(read_model("mixtral-8x7b"), cluster, job, load_stack(FOLDED))
    return request, evaluate(request, {"microbatch_size": 1, **layout})


def test_ranks_with_the_same_tokens_deal_their_copies_out_and_gather_every_output() -> None:
    """Mixtral over tp 4 and ep 4: of 4,096 tokens to 2 experts each a rank sends a quarter of the
    8,192 rows of 4,096 bf16 numbers, and gets all back; the gather's backward sums each quarter."""
    request, found = folded(tp=4, ep=4, zero_stage=2)
    copies = 4096 * 2 * 4096 * 2
    made = communication(request, found).layers["decoder"]
    calls = {(c.name, str(c.phase)): (c.group, c.kind, c.count, c.bytes) for c in made}
    for name in ("dispatch", "combine"):
        for phase in PASSES:
            assert calls[name, phase] == ("ep", "all_to_all", 1, copies // 4)
    assert calls["restore.outputs", "forward"] == ("tp", "all_gather", 1, copies)
    assert calls["restore.outputs", "backward"] == ("tp", "all_reduce", 4, copies)
    assert calls["restore.weights", "forward"] == ("tp", "all_gather", 1, 8192 * 2)
    assert calls["restore.indices", "forward"] == ("tp", "all_gather", 3, 3 * 8192 * 8)
    assert calls["experts.average", "backward"] == ("tp", "all_reduce", 1, 4096 * 4096 * 2)


def test_experts_that_are_folded_keep_their_own_rows_and_every_output() -> None:
    """A rank of tp 2 runs 4,096 of the 8,192 copies, and keeps all outputs in 16 bits for their
    weights' gradients; alone it keeps 8,192 of both, the outputs in 32 bits."""
    kept = {}
    for tp in (1, 2):
        request, _ = folded(tp=tp, ep=8, zero_stage=2)
        one = np.ones(1, dtype=np.int64)
        shard = Shard(4096, one, tp * one, one, 8 * one, one, one < 1, 0 * one)
        saved = request.workload.kinds["decoder"].saved(shard)
        kept[tp] = {t.name: int(np.ravel(t.bytes)[0]) for t in saved}
    row = 4096
    assert kept[1]["dispatched"] == 8192 * row * 2
    assert kept[2]["dispatched"] == 4096 * row * 2
    assert kept[1]["combined"] == 8192 * row * 4
    assert kept[2]["combined"] == 8192 * row * 2


def test_what_tensor_parallelism_repeats_is_averaged_when_it_is_reduced() -> None:
    """Router, norms, embedding and head in fp32, one by one: per step in stage 1, in every backward
    in stage 2; 32,000 x 4,096 numbers at each end."""
    for stage, phase in ((1, "step"), (2, "backward")):
        request, found = folded(tp=4, ep=4, zero_stage=stage)
        layers = communication(request, found).layers
        summed = {
            name: sorted((c.count, c.bytes) for c in calls if c.name == f"{name}.sum")
            for name, calls in layers.items()
        }
        assert {c.phase for calls in layers.values() for c in calls if ".sum" in c.name} == {phase}
        assert summed["decoder"] == [(1, 8 * 4096 * 4), (2, 2 * 4096 * 4)]
        assert summed["embedding"] == [(1, 32000 * 4096 * 4)]
        assert summed["head"] == [(1, 4096 * 4), (1, 32000 * 4096 * 4)]


@pytest.mark.parametrize(("tp", "ep", "dp", "ranks", "replicas"), [
    # 16 ranks, tp 4: lanes 0 4 8 12, 1 5 9 13, ...; groups of 4 are lanes, those of 8 two of them.
    (4, 4, 4, 4, 2),
    (4, 8, 4, 2, 2),
    (2, 2, 8, 2, 2),
    # The expert groups of all ranks: no other holds the same experts.
    (4, 16, 4, 1, 4),
])  # fmt: skip
def test_expert_groups_take_one_lane_after_the_other(
    tp: int, ep: int, dp: int, ranks: int, replicas: int
) -> None:
    one = np.ones(1, dtype=np.int64)
    assert exchange_stride(tp * one, ep * one, tp * dp).tolist() == [ranks]
    assert replica_stride(tp * one, ep * one, dp * one, 8).tolist() == [replicas]


@pytest.mark.parametrize(("layout", "reason"), [
    ({"tp": 2}, "tensor parallelism needs expert parallelism"),
    ({"tp": 2, "ep": 2, "zero_stage": 3}, "has no ZeRO stage 3"),
    ({"tp": 2, "ep": 2, "cp": 2}, "no context parallelism"),
])  # fmt: skip
def test_what_does_not_fold_is_refused(layout: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        folded(**layout)


@pytest.mark.parametrize(("stage", "kind"), [(1, "all_reduce"), (3, "reduce_scatter")])
def test_stages_1_and_2_sum_every_bucket_whole(stage: int, kind: str) -> None:
    """``use_multi_rank_bucket_allreduce``, on by default: each rank copies its part out."""
    job = JobSpec(sequence_length=4096, global_batch=64, stack="deepspeed-hf")
    asked = Request(
        read_model("llama-3.1-8b"), load_cluster("dgx-h100:2"), job, load_stack("deepspeed-hf")
    )
    layout = {"microbatch_size": 1, "zero_stage": stage}
    calls = communication(asked, evaluate(asked, layout)).layers["decoder"]
    assert {call.kind for call in calls if call.name == "decoder.gradient"} == {kind}
