"""Muon, Adafactor and offload as DeepSpeed runs them, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.compute import roofline_time_s
from cost_models.interconnect import collective_time_s
from cost_models.optimizers import LocalTensor, newton_schulz_flops
from hardware_profiles.stack_consistency import require_consistent
from planner.errors import InputError
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication
from planner.studies.verify import verify

ENDS = 2 * 128_256 * 4096
ATTENTION = 4096 * (4096 + 1024 + 1024 + 4096)
MATRICES = 32 * (ATTENTION + 3 * 4096 * 14_336)
VECTORS = 65 * 4096
RANKS = 16


def request(stack: str = "deepspeed-hf", model: str = "llama-3.1-8b", **more: object) -> Request:
    asked = {"stack": stack, "sequence_length": 4096, "global_batch": 64, "precision": "bf16"}
    return read_request(model, "dgx-h100:2", None, asked | more)


def sharded(zero_stage: int, **more: object) -> dict[str, object]:
    return {"dp_shard": RANKS, "zero_stage": zero_stage, "recompute": "full", **more}


def memory(found: EvaluatedLayout) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_momentum_of_matrices_takes_two_bytes(zero_stage: int) -> None:
    """Masters of all, 2 bytes of momentum of matrices, 8 of what Adam updates."""
    found = memory(evaluate(request(optimizer="muon"), sharded(zero_stage)))
    expected = (6 * MATRICES + 12 * (ENDS + VECTORS)) / RANKS
    assert found["optimizer"] == pytest.approx(expected, rel=1e-3)


def test_flattened_tensors_have_no_rows() -> None:
    """Adafactor keeps one fp32 second moment of each element of a flat shard."""
    found = memory(evaluate(request(optimizer="adafactor"), sharded(2)))
    assert found["optimizer"] == pytest.approx(8 * (MATRICES + ENDS + VECTORS) / RANKS, rel=1e-3)
    rows = memory(evaluate(request(optimizer="adafactor"), sharded(0)))
    masters = 4 * (MATRICES + ENDS + VECTORS)
    assert masters < rows["optimizer"] < 1.01 * masters


def test_gram_iterations_of_a_wide_matrix() -> None:
    """4 products with X (2 a^2 b each) and 14 of a x a (2 a^3 each); a square takes 5 steps."""
    model = request(optimizer="muon")
    (weight, *_) = [w for kind in model.workload.kinds.values() for w in kind.weights if w.cols > 1]
    one = np.array([1])

    def flops(rows: int, cols: int) -> float:
        local = LocalTensor(np.array([rows * cols]), np.array([rows]), one)
        return float(newton_schulz_flops([(weight, local)], gram=True)[0])

    assert flops(8, 32) == flops(32, 8) == 4 * 2 * 8 * 8 * 32 + 14 * 2 * 8**3
    assert flops(8, 8) == 5 * (4 * 8**3 + 2 * 8**3)


def test_stage_3_sums_whole_gradients_and_moves_matrices_with_every_microbatch() -> None:
    """Per layer an all-reduce of its gradients, a gather of the momentum, and two gathers in
    rounds: a bucket of 5e8 elements holds 7 x 5e8 / 218 M matrices, dealt to 16 ranks."""
    asked = request(optimizer="muon")
    layout = sharded(3, microbatch_size=1)
    found = communication(asked, evaluate(asked, layout))
    (name,) = (name for name in found.layers if name not in ("embedding", "head"))
    layer = [call for call in found.layers[name] if call.phase == "backward"]
    layer_elements = MATRICES // 32
    (summed,) = (call for call in layer if call.kind == "all_reduce")
    assert summed.bytes == 2 * (layer_elements + 2 * 4096)
    together = 7 * 5e8 / layer_elements
    rounds = 7 / together * np.ceil(together / RANKS)
    sizes = sorted(call.bytes for call in layer if call.kind == "all_gather")
    weights = 2 * (layer_elements + 2 * 4096)
    in_rounds = 2 * 2 * rounds * RANKS * layer_elements / 7
    assert sizes == pytest.approx(sorted([weights, 2 * layer_elements, in_rounds]), rel=1e-6)
    assert not [call for call in layer if call.kind == "reduce_scatter"]


def test_iterations_come_with_every_microbatch_in_stage_3_and_once_per_step_in_stage_2() -> None:
    def seconds(optimizer: str, zero_stage: int, batch: int) -> float:
        asked = request(optimizer=optimizer, global_batch=batch)
        found = evaluate(asked, sharded(zero_stage, microbatch_size=1))
        return found.prediction.step_time_s

    def added(zero_stage: int) -> float:
        """What Muon adds to four more microbatches."""
        return sum(
            sign * seconds(optimizer, zero_stage, batch)
            for optimizer, sign in (("muon", 1), ("adamw", -1))
            for batch, sign in ((8 * RANKS, sign), (4 * RANKS, -sign))
        )

    assert added(2) == pytest.approx(0, abs=1e-4)
    one = np.array([RANKS])
    gather = collective_time_s(
        request().machine.fabric, "all_gather", np.array([2.0 * MATRICES]), size=one,
        stride=np.array([1]),
    )  # fmt: skip
    assert added(3) > float(gather[0])


def test_muon_needs_zero_and_is_refused_where_gradients_are_quantised() -> None:
    with pytest.raises(InputError, match="runs muon under ZeRO only"):
        evaluate(request(optimizer="muon"), {"dp_shard": RANKS, "zero_stage": 0})
    with pytest.raises(InputError, match="muon"):
        evaluate(request("deepspeed-zeropp", optimizer="muon", precision="fp16"), sharded(3))
    best = plan(request(optimizer="muon"))
    assert best.layout.zero_stage in (1, 2)
    assert verify(best) == []


def test_a_pipeline_keeps_whole_gradients_until_the_host_has_the_state() -> None:
    """Stage 1 over 4 ranks of 4 stages: 2 bytes of weights and of gradients on the device."""
    layout = {"pp": 4, "dp_shard": 4, "zero_stage": 1, "recompute": "full"}
    for precision in ("fp16", "bf16"):
        asked = request("deepspeed-pipe", precision=precision, optimizer_offload=True)
        found = memory(evaluate(asked, layout))
        assert found["optimizer"] == 0
        assert found["gradients"] == found["weights"]
    with pytest.raises(InputError, match="on the host under ZeRO only"):
        evaluate(asked, layout | {"zero_stage": 0})


def test_tensor_parallel_ranks_offload_too() -> None:
    layout = {"tp": 4, "dp_shard": 4, "zero_stage": 2, "recompute": "full"}
    there, here = (
        evaluate(request("deepspeed-autotp", optimizer_offload=offload), layout)
        for offload in (True, False)
    )
    assert memory(there)["optimizer"] == memory(there)["gradients"] == 0
    assert memory(here)["optimizer"] > 0
    assert there.prediction.step_time_s > here.prediction.step_time_s
    best = plan(request("deepspeed-autotp", optimizer_offload=True))
    assert best.layout.zero_stage > 0
    assert verify(best) == []


def test_only_optimizers_of_the_host_run_there() -> None:
    with pytest.raises(InputError, match="no adam8bit on the host: bitsandbytes"):
        evaluate(request(optimizer="adam8bit", optimizer_offload=True), sharded(2))
    with pytest.raises(InputError, match="no muon on the host: DeepSpeed"):
        evaluate(request("deepspeed-autotp", optimizer="muon", optimizer_offload=True), sharded(2))
    with pytest.raises(InputError, match="runs muon on the host from ZeRO stage 3 on"):
        evaluate(request(optimizer="muon", optimizer_offload=True), sharded(2))
    assert memory(evaluate(request(optimizer="lion", optimizer_offload=True), sharded(2)))


def test_a_pipeline_orthogonalises_in_fp16_alone() -> None:
    """engine.py: in bf16 it has BF16_Optimizer, which adds gradients as they are."""
    job = {"stack": "deepspeed-pipe", "sequence_length": 4096, "global_batch": 64,
           "optimizer": "muon", "precision": "fp16"}  # fmt: skip
    asked = read_request("llama-3.1-8b", "dgx-h100:2", None, job)
    adamw = read_request("llama-3.1-8b", "dgx-h100:2", None, job | {"optimizer": "adamw"})
    layout = {"pp": 4, "zero_stage": 1}
    found, plain = (evaluate(each, layout).prediction for each in (asked, adamw))
    assert found.step_time_s > plain.step_time_s
    assert found.max_peak_bytes < plain.max_peak_bytes
    with pytest.raises(InputError, match="that tp does not split"):
        evaluate(asked, {"tp": 2, "pp": 4, "zero_stage": 1})
    with pytest.raises(InputError, match="under ZeRO only"):
        evaluate(asked, {"pp": 4, "zero_stage": 0})
    with pytest.raises(InputError, match="runs muon in fp16"):
        read_request("llama-3.1-8b", "dgx-h100:2", None, job | {"precision": "bf16"})
    assert verify(plan(asked)) == []


def test_hosts_keep_two_bytes_of_momentum_and_what_adam_needs() -> None:
    """Weight, gradient and momentum of matrices, 10 bytes; 16 of all else, and 16 of new tensors of
    a group of that in its update. Momentum crosses the link twice with each microbatch."""
    layout = sharded(3, microbatch_size=1)
    found, adamw = (
        evaluate(request(optimizer=name, optimizer_offload=True), layout)
        for name in ("muon", "adamw")
    )
    host, others = found.prediction.host, ENDS + VECTORS
    assert host is not None
    assert adamw.prediction.host is not None
    assert host.place == "memory"
    assert host.bytes_per_node == pytest.approx((10 * MATRICES + (16 + 16) * others) / 2, rel=1e-4)
    more = host.link_bytes_per_step - adamw.prediction.host.link_bytes_per_step
    assert more == pytest.approx(4 * 4 * MATRICES / RANKS, rel=1e-6)
    assert memory(found)["optimizer"] == memory(found)["gradients"] == 0
    assert memory(found) == memory(adamw)


def test_the_host_updates_matrices_in_two_passes_and_all_else_in_ten() -> None:
    """20 and 96 bytes of its memory, AdamW's one pass 28; and with each microbatch 8 bytes of it
    and 4 over the link for the momentum, and what the device does, none of it hidden."""
    node = request().cluster.groups[0].node
    spec = request().stack.offload
    assert spec is not None
    assert spec.adam_efficiency is not None
    assert node.host_memory_bandwidth is not None
    rate = node.host_memory_bandwidth.si * spec.adam_efficiency.si / 8

    def seconds(name: str, batch: int, there: bool) -> float:
        asked = request(optimizer=name, optimizer_offload=there, global_batch=batch * RANKS)
        return evaluate(asked, sharded(3, microbatch_size=1)).prediction.step_time_s

    one, two = (seconds("muon", n, there=True) - seconds("adamw", n, there=True) for n in (1, 2))
    update = (20 - 28) * MATRICES / RANKS / rate + (96 - 28) * (ENDS + VECTORS) / RANKS / rate
    assert one - (two - one) == pytest.approx(update, rel=1e-3)
    device = seconds("muon", 2, there=False) - seconds("muon", 1, there=False)
    device -= seconds("adamw", 2, there=False) - seconds("adamw", 1, there=False)
    momentum = MATRICES / RANKS * (8 / rate + 4 / node.host_link.si)
    assert two - one > device + momentum


def test_plans_with_muon_on_the_hosts_verify() -> None:
    for stack in ("deepspeed-hf", "deepspeed-nvme-parameters"):
        best = plan(request(stack, optimizer="muon", optimizer_offload=True))
        assert best.layout.zero_stage == 3
        assert verify(best) == []
    with pytest.raises(
        InputError, match=r"no muon on the host: DeepSpeed 0\.19\.3: stage3\.py calls"
    ):
        evaluate(
            request("deepspeed-nvme-pipelined", optimizer="muon", optimizer_offload=True),
            sharded(3),
        )
    both = request(
        "deepspeed-nvme-parameters", optimizer="muon", optimizer_offload=True,
        parameter_offload=True,
    )  # fmt: skip
    beside = evaluate(both, sharded(3)).prediction.host
    assert beside is not None
    assert beside.bytes_per_node == pytest.approx(2 * (MATRICES + ENDS + VECTORS) / 2, rel=1e-4)
    kept = (10 * MATRICES + (16 + 16) * (ENDS + VECTORS)) / 2 + 8 * 3e9
    assert beside.buffer_bytes_per_node == pytest.approx(kept, rel=1e-4)


def test_drives_swap_a_group_with_each_bucket() -> None:
    """17 buckets of 5e8 elements, one group of a rank's matrices: with each the drives of a node
    read and write its weights and momentum, 16 bytes of each element of its 8 devices; the link
    carries 2 bytes there and 4 back, the host copies 4 bytes twice and converts once. Gradients of
    half the group, on average, are read by all buckets but the first of the last microbatch."""
    asked = {
        name: request("deepspeed-nvme", optimizer=name, optimizer_offload=True)
        for name in ("muon", "adamw")
    }
    node, spec = asked["muon"].cluster.groups[0].node, asked["muon"].stack.offload
    assert spec is not None
    assert spec.adam_efficiency is not None
    assert node.host_memory_bandwidth is not None
    assert node.drives_read_bandwidth is not None
    assert node.drives_write_bandwidth is not None
    reads, writes = node.drives_read_bandwidth.si, node.drives_write_bandwidth.si
    rate = node.host_memory_bandwidth.si * spec.adam_efficiency.si / 8

    def seconds(name: str, batch: int, stack: str = "deepspeed-nvme", *, there: bool) -> float:
        own = request(stack, optimizer=name, optimizer_offload=there, global_batch=batch * RANKS)
        return evaluate(own, sharded(3, microbatch_size=1)).prediction.step_time_s

    one, two = (seconds("muon", n, there=True) - seconds("adamw", n, there=True) for n in (1, 2))
    held = MATRICES / RANKS
    device = seconds("muon", 2, "deepspeed-hf", there=True)
    device -= seconds("muon", 1, "deepspeed-hf", there=True)
    device -= seconds("adamw", 2, "deepspeed-hf", there=True)
    device += seconds("adamw", 1, "deepspeed-hf", there=True)
    on_host = held * (8 / rate + 4 / node.host_link.si)
    swaps = 17 * held * 8 * 8 * (1 / reads + 1 / writes)
    crossing = held * (22 / rate + 6 / node.host_link.si)
    assert two - one == pytest.approx(device - on_host + crossing + swaps, rel=1e-3)
    # Once: the update, of 8 bytes less of state, and gradients of half the group 16 times.
    update = (20 - 28) * held / rate + (96 - 28) * (ENDS + VECTORS) / RANKS / rate
    fewer = 4 * held * 8 * (1 / reads + 1 / writes)
    again = 16 / 2 * held * 4 * 8 / reads
    assert one - (two - one) == pytest.approx(update - fewer + again, rel=1e-2)


def test_drives_lose_gradients_of_small_parts() -> None:
    """A key of 4,096 x 1,024 elements: a part of 1 MiB on 16 ranks, of half on 32."""
    fits = request("deepspeed-nvme", optimizer="muon", optimizer_offload=True)
    assert verify(plan(fits)) == []
    asked = {"stack": "deepspeed-nvme", "sequence_length": 4096, "global_batch": 64,
             "precision": "bf16", "optimizer": "muon", "optimizer_offload": True}  # fmt: skip
    many = read_request("llama-3.1-8b", "dgx-h100:4", None, asked)
    with pytest.raises(InputError, match="loses gradients on the drives"):
        evaluate(many, {"dp_shard": 32, "zero_stage": 3, "recompute": "full"})


def test_one_rank_iterates_with_each_microbatch_too() -> None:
    """It runs as stage 3: all iterations, and the way of the momentum, with each microbatch."""
    asked = request(model="gpt2-medium", optimizer_offload=True, sequence_length=1024)
    (group,) = asked.cluster.groups
    node = group.node.model_copy(update={"devices_per_node": 1, "nics": 1})
    alone = group.model_copy(update={"node": node, "count": 1})
    asked = replace(asked, cluster=asked.cluster.model_copy(update={"groups": (alone,)}))

    def seconds(optimizer: str, batch: int) -> float:
        job = asked.job.model_copy(update={"optimizer": optimizer, "global_batch": batch})
        found = evaluate(replace(asked, job=job), {"microbatch_size": 1})
        return found.prediction.step_time_s

    each = [seconds("muon", n) - seconds("adamw", n) for n in (1, 2)]
    spec, one = asked.stack.offload, np.array([1])
    assert spec is not None
    assert spec.adam_efficiency is not None
    assert node.host_memory_bandwidth is not None
    rate = node.host_memory_bandwidth.si * spec.adam_efficiency.si
    weights = [
        (weight, LocalTensor(weight.elements // weight.count * one, weight.rows * one,
                             weight.count * one))
        for weight in asked.workload.kinds[asked.workload.layers[0]].weights
    ]  # fmt: skip
    layers = len(asked.workload.layers)
    matrices = layers * sum(int(t.total[0]) for w, t in weights if w.cols > 1)
    flops = newton_schulz_flops(weights, gram=True) * layers
    iterations = float(roofline_time_s(node.device, "bf16", flops, np.zeros(1))[0])
    momentum = matrices * (8 / rate + 4 / node.host_link.si)
    assert each[1] - each[0] == pytest.approx(iterations + momentum, rel=1e-2)


def test_groups_on_drives_need_buckets() -> None:
    stack = request("deepspeed-nvme").stack
    state = stack.state.model_copy(update={"reduction_elements": 0})
    with pytest.raises(ValueError, match=r"momentum_bytes needs state\.reduction_elements"):
        require_consistent(stack.model_copy(update={"state": state}))
