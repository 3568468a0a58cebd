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
    alone: int = 0,
    lookup: bool = False,
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
        sharded=SHARDED, again=AGAIN, alone=alone * PARAMETERS, lookup=lookup,
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
        ("megatron-lm-2022-fp16", "fp16", [0, 0, 0], [6, 6, 6]),
        ("megatron-lm-2021-fp16", "fp16", [0, 0, 0], [6, 6, 6]),
        ("megatron-lm-2021", "fp16", [0, 0, 0], [10, 10, 10]),
        # 16 bits from buffer to tensor, 16 to 32 bits into the reduction's buffer.
        ("torchtitan", "bf16", [0, 4, 4], [0, 6, 10]),
        ("llm-foundry", "bf16", [0, 0, 0], [0, 8, 8]),
        # Added to a whole main gradient, in 32 bits or 16, or copied to that of a split unit.
        ("megatron-fsdp", "bf16", [0, 0, 0], [10, 6, 6]),
        ("megatron-bridge-fsdp", "fp8", [0, 0, 0], [6, 4, 4]),
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


def test_one_rank_casts_its_weights_and_hands_gradients_on() -> None:
    # fp32 to 16 bits, then copied; 16 to 32 bits, then copied (FSDP2 over a group of one).
    found = copies("torchtitan", alone=1)
    assert found == {
        "forward": pytest.approx([0, 6 + 4, 10]),
        "backward": pytest.approx([0, 6 + 8, 14 + 10]),
    }
    assert copies("deepspeed-hf", alone=1) == copies("deepspeed-hf")


@pytest.mark.parametrize(
    ("stack", "precision", "backward"),
    [
        # Zeros in 16 bits; products add to fp32 themselves, another kernel adds the table: 2 + 8.
        ("megatron-core", "bf16", 12),
        # The same where gradients are kept in 16 bits.
        ("megatron-core-fp16", "fp16", 8),
        # What is added for every weight is added for a table.
        ("megatron-deepspeed", "fp16", 8),
        ("torchtitan", "bf16", 2),
    ],
)
def test_a_lookup_has_a_dense_gradient(stack: str, precision: str, backward: int) -> None:
    assert copies(stack, precision, lookup=True)["backward"][0] == pytest.approx(backward)


def test_dense_gradients_of_a_large_vocabulary_take_what_was_measured() -> None:
    """sail-sg/VocabularyParallelism, artifact/test_one_host.csv: 256,000 x 3,072 in fp16 on A100.
    The first stage's backward takes 25,185 us, that of the next, which has as many layers and no
    table, 21,108."""
    found = copies("megatron-core-fp16", "fp16", lookup=True)["backward"][0]
    assert found * ONE_BYTE_S * 256_000 * 3_072 / 1e9 == pytest.approx(4.077e-3, rel=0.03)


@pytest.mark.parametrize(
    ("stack", "precision", "expected"),
    [
        ("megatron-core", "bf16", 8),
        ("nemo-fp8", "fp8", 4),
        ("megatron-core-fp16", "fp16", 4),
        ("internevo", "bf16", 0),
    ],
)
def test_products_read_and_write_the_gradient_in_the_width_it_is_kept_in(
    stack: str, precision: str, expected: int
) -> None:
    machine = Machine(load_cluster("dgx-a100"), load_stack(stack), precision, "adamw")  # type: ignore[arg-type]
    assert machine.accumulated_bytes == expected
