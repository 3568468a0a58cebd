"""Copies around products and collectives, against figures derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.gradient_copies import copy_seconds
from cost_models.layer_times import LayerTimes
from cost_models.step import CATEGORIES, PHASES, Machine
from hardware_profiles.loader import load_cluster, load_stack

PARAMETERS = np.full(3, 10**9)
SHARDED = np.array([False, True, True])
AGAIN = np.array([False, False, True])
ONE_BYTE_S = 1e9 / (2039e9 * 0.752)
"""One byte of a billion parameters on an A100."""


def copies(
    stack: str,
    precision: str = "bf16",
    wait_s: float = 0.0,
    frozen: int = 0,
    narrower: int = 0,
) -> dict[str, list[float]]:
    machine = Machine(
        cluster=load_cluster("dgx-a100"), stack=load_stack(stack), precision=precision,  # type: ignore[arg-type]
        optimizer="adamw",
    )  # fmt: skip
    terms = {c: {p: np.zeros(3) for p in PHASES} for c in CATEGORIES}
    terms["launch"]["backward"] += wait_s
    times = LayerTimes(terms, {}, None, np.zeros(1))  # type: ignore[arg-type]
    found = copy_seconds(
        PARAMETERS, times, machine, frozen=frozen * PARAMETERS, narrower=narrower * PARAMETERS,
        sharded=SHARDED, again=AGAIN,
    )  # fmt: skip
    return {
        phase: (np.broadcast_to(each, 3) / ONE_BYTE_S).tolist() for phase, each in found.items()
    }


@pytest.mark.parametrize(
    ("stack", "precision", "forward", "backward"),
    [
        # The product adds its gradient itself.
        ("megatron-core", "bf16", [0, 0, 0], [0, 0, 0]),
        # Read 16 bits, read and write 32; in fp16 all three in 16 bits.
        ("megatron-deepspeed", "bf16", [0, 0, 0], [10, 10, 10]),
        ("megatron-deepspeed", "fp16", [0, 0, 0], [6, 6, 6]),
        # 16 bits from buffer to tensor, 16 to 32 bits into the reduction's buffer.
        ("torchtitan", "bf16", [0, 4, 4], [0, 6, 10]),
        ("llm-foundry", "bf16", [0, 0, 0], [0, 8, 8]),
    ],
)
def test_bytes_per_parameter(
    stack: str, precision: str, forward: list[float], backward: list[float]
) -> None:
    found = copies(stack, precision)
    assert found["forward"] == pytest.approx(forward)
    assert found["backward"] == pytest.approx(backward)


def test_a_device_that_waits_for_the_host_copies_meanwhile() -> None:
    assert copies("torchtitan", wait_s=7 * ONE_BYTE_S)["backward"] == pytest.approx([0, 0, 3])


def test_frozen_weights_are_gathered_and_have_no_gradient() -> None:
    found = copies("torchtitan", frozen=2)
    assert found == {
        "forward": pytest.approx([0, 12, 12]),
        "backward": pytest.approx([0, 6, 18]),
    }


def test_weights_gathered_in_fewer_bytes_are_copied_in_fewer() -> None:
    # One byte less of each parameter, read and written.
    found = copies("torchtitan", narrower=1)
    assert found == {"forward": pytest.approx([0, 2, 2]), "backward": pytest.approx([0, 6, 8])}
