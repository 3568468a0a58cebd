"""Muon, Adafactor and offload as DeepSpeed runs them, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.interconnect import collective_time_s
from cost_models.optimizers import LocalTensor, newton_schulz_flops
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
    for stack, layout in (("deepspeed-hf", sharded(2)), ("deepspeed-autotp", sharded(2))):
        with pytest.raises(InputError, match="no muon on the host: DeepSpeed"):
            evaluate(request(stack, optimizer="muon", optimizer_offload=True), layout)
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
