"""Products whose fp32 operands a compiler casts on their way (neuronx-cc's --auto-cast)."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.compute import matmul_time_s
from hardware_profiles.loader import load_device
from planner.errors import InputError
from planner.pipeline import EvaluatedLayout, evaluate, read_request

LAYOUT = {"tp": 8, "zero_stage": 1, "microbatch_size": 1}


def priced(stack: str, precision: str) -> EvaluatedLayout:
    request = read_request(
        "llama-3.1-8b", "aws-trn2", None,
        {"stack": stack, "precision": precision, "sequence_length": 2048, "global_batch": 8},
    )  # fmt: skip
    return evaluate(request, LAYOUT)


def seconds(found: EvaluatedLayout) -> dict[str, float | None]:
    return {term.name: term.seconds for term in found.prediction.time}


def test_a_cast_product_has_the_rate_of_its_arithmetic_and_the_traffic_of_its_operands() -> None:
    """A large product is bound by arithmetic, as in bf16; a thin one by 4 bytes of each
    weight."""
    device = load_device("trainium2")

    def time(dtype: str, rows: int) -> float:
        return float(np.ravel(matmul_time_s(device, dtype, rows, 16384, 16384))[0])

    assert time("fp32_in_bf16", 65536) == pytest.approx(time("bf16", 65536), rel=0.02)
    weight_s = 4 * 16384**2 / device.memory_bandwidth.si
    assert weight_s < time("fp32_in_bf16", 8) < 1.1 * weight_s
    assert time("bf16", 8) < 0.65 * weight_s


def test_auto_cast_changes_products_alone() -> None:
    cast, whole, half = (
        priced(stack, precision)
        for stack, precision in (
            ("neuron-auto-cast", "fp32"), ("neuron", "fp32"), ("neuron", "bf16"),
        )
    )  # fmt: skip
    assert cast.prediction.stages[0].memory == whole.prediction.stages[0].memory
    own, others = seconds(cast), seconds(whole)
    # Beside them, what hides behind them.
    different = {name for name in own if own[name] != pytest.approx(others[name], rel=1e-6)}
    assert different == {"matmul", "tp_comm", "gradient_reduction"}
    # 181 TFLOP/s at 0.8 of the peak, against 667 at 0.805, less what traffic takes.
    assert 2.5 < (others["matmul"] or 0) / (own["matmul"] or 1) < 3.8
    assert half.prediction.step_time_s < cast.prediction.step_time_s < whole.prediction.step_time_s


def test_utilisation_is_of_the_arithmetic_that_runs() -> None:
    cast, whole = priced("neuron-auto-cast", "fp32"), priced("neuron", "fp32")
    faster = whole.prediction.step_time_s / cast.prediction.step_time_s
    assert cast.prediction.mfu == pytest.approx(whole.prediction.mfu * faster * 181 / 667, rel=1e-6)


def test_auto_cast_is_of_fp32_tensors() -> None:
    with pytest.raises(InputError, match="does not train in bf16"):
        priced("neuron-auto-cast", "bf16")
