"""Bytes that an optimizer step moves per parameter, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.data_parallel import price_kind
from cost_models.data_traffic import DataParallel
from cost_models.graph import LayerKind, Shard, Weight
from cost_models.ops import Elementwise
from cost_models.step import Field, Machine, price_layer
from hardware_profiles.loader import load_cluster, load_stack

ONE = np.ones(1, dtype=np.int64)
SHARD = Shard(
    sequence=2048, microbatch=ONE, tp=ONE, cp=ONE, ep=ONE, etp=ONE,
    sequence_parallel=np.zeros(1, dtype=bool), cp_kind=ONE * 0,
)  # fmt: skip
DATA = DataParallel(replicate=ONE, shard=ONE, pp=ONE, zero_stage=ONE * 0, reshard=ONE * 0)


def moved(stack: str, precision: str) -> float:
    """Bytes per parameter of a billion."""
    machine = Machine(load_cluster("dgx-a100"), load_stack(stack), precision, "adamw")  # type: ignore[arg-type]
    weight, op = Weight("w", 10**5, 10**4), Elementwise("op", 1e9 * ONE, 1e9 * ONE)
    kind = LayerKind(
        "made-up", (weight,), lambda _: (op,), lambda _: (), lambda _: ONE, lambda _: ONE
    )
    times = price_layer(kind, SHARD, machine)
    rows, _ = price_kind(kind, times, SHARD, DATA, machine, vocab_divisor=1)
    return float(rows[Field.OPTIMIZER][0]) * 1e-9 * 2039e9 * 0.752 / 1e9


@pytest.mark.parametrize(
    ("stack", "precision", "passes"),
    [
        ("megatron-lm-2022", "fp16", 8 + 8 + 4),  # unscaled, clipped, zeroed
        ("megatron-lm-2022", "bf16", 8 + 4),
        ("megatron-lm-2022-fp16", "fp16", 6 + 8 + 8 + 2),  # copied, unscaled, clipped, zeroed
        ("megatron-lm-2021-fp16", "fp16", 6 + 8 + 8),  # copied, unscaled, clipped
        ("megatron-deepspeed", "fp16", 0),
        ("megatron-core", "bf16", 8 + 4 + 4),  # clipped, zeroed, checked; one rank averages nothing
        ("nemo", "bf16", 8 + 4),  # clipped, zeroed
        ("nemo-fp8", "fp8", 6 + 8 + 2),  # copied, clipped, zeroed
    ],
)
def test_bytes_per_parameter(stack: str, precision: str, passes: int) -> None:
    # The norm and Adam read the gradient; master and moments are read and written, the weight out.
    assert moved(stack, precision) == pytest.approx(4 + 4 + 3 * 8 + 2 + passes, rel=1e-3)
