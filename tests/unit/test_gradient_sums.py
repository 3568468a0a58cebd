"""Kernels that autograd adds to a backward: sums of two gradients, and of one over its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.ops import Elementwise, Op
from cost_models.step import price_layer
from hardware_profiles.loader import load_stack
from planner.pipeline import read_request
from planner.recompute import named_policy

TOKENS, HIDDEN, INNER, VOCAB = 2048, 2048, 8192, 50304
STREAM = 2.0 * TOKENS * HIDDEN
"""Bytes of the residual stream of one sample in 16 bits."""


def ops_of(model: str, stack: str, precision: str = "bf16") -> dict[str, Op]:
    """Ops of one layer and of the head, on one device."""
    request = read_request(
        model, "dgx-a100:1",
        overrides={"stack": stack, "precision": precision, "sequence_length": TOKENS},
    )  # fmt: skip
    (name,) = {*request.workload.layers}
    one = np.ones(1, dtype=np.int64)
    shard = Shard(TOKENS, one, one, one, one, one, np.zeros(1, dtype=np.bool_), 0 * one)
    layer, head = request.workload.kinds[name], request.workload.head
    return {op.name: op for op in (*layer.ops(shard), *head.ops(shard))}


def moved(op: Op) -> tuple[float, float]:
    """Bytes forward and backward."""
    assert isinstance(op, Elementwise)
    forward, backward = (np.asarray(each) for each in (op.forward_bytes, op.backward_bytes))
    return float(forward.item()), float(backward.item())


def test_a_residual_is_read_twice_and_its_gradients_are_summed() -> None:
    ops = ops_of("gpt3-1.3b", "megatron-core")
    # Read the input and the gradient, write one; then read two gradients and write their sum.
    assert moved(ops["norm0"]) == moved(ops["norm1"]) == (2 * STREAM, 6 * STREAM)
    # Nobody but the norm reads what goes into the last one.
    assert moved(ops["final_norm"]) == (2 * STREAM, 3 * STREAM)


def test_a_compiler_sums_where_it_makes_a_gradient() -> None:
    ops = ops_of("llama-2-7b", "torchtitan-compile")
    stream = 2.0 * TOKENS * 4096
    assert moved(ops["norm0"]) == (2 * stream, 4 * stream)


@pytest.mark.parametrize(("stack", "dropped"), [("megatron-core", 0.0), ("megatron-lm-2022", 2.5)])
def test_gradients_of_biases_are_sums_over_rows(stack: str, dropped: float) -> None:
    """Without dropout the residual's gradient passes by as it is; with it it is masked: read in 16
    bits with a byte of mask for two, and written."""
    ops = ops_of("gpt3-1.3b", stack, "fp16")
    assert moved(ops["mlp_residual"])[1] == pytest.approx((dropped + 1) * STREAM)
    assert moved(ops["attention_residual"])[1] == pytest.approx((dropped + 1) * STREAM)
    # Two tensors read and one written by the activation's backward; what it wrote read once more.
    assert moved(ops["activation"]) == (2 * 2.0 * TOKENS * INNER, 4 * 2.0 * TOKENS * INNER)


def test_internevo_adds_and_norms_again() -> None:
    ops = ops_of("llama-2-7b", "internevo")
    stream = 2.0 * TOKENS * 4096
    # The norm reads and writes, the addition reads two and writes one, once more.
    assert moved(ops["norm0"]) == moved(ops["norm1"]) == (2 * stream, (6 + 2) * stream)
    assert moved(ops["mlp_residual"]) == (3 * stream, 3 * stream)


def test_a_model_without_biases_sums_none() -> None:
    ops = ops_of("llama-2-7b", "torchtitan")
    assert moved(ops["mlp_residual"])[1] == 0.0


@pytest.mark.parametrize("stack", ["megatron-core", "megatron-lm-2022"])
def test_megatron_passes_over_the_logits_six_times(stack: str) -> None:
    """To fp32 6, maximum 4, subtract 8, exponentiate 8, sum 4, divide 8; back: scale 8, cast 6."""
    ops = ops_of("gpt3-1.3b", stack, "fp16")
    assert moved(ops["cross_entropy"]) == (38.0 * TOKENS * VOCAB, 14.0 * TOKENS * VOCAB)


def test_a_compiler_joins_passes_over_the_logits() -> None:
    assert load_stack("neuron").loss_traffic == {"forward": 26, "backward": 14}


def test_a_layer_that_runs_again_norms_once_more_and_no_more() -> None:
    """InternEvo, internlm/model/modeling_internlm.py: dropout_selective_checkpoint is on where
    checkpoint is not, so a layer that is checkpointed whole has nothing checkpointed inside."""
    one = np.ones(1, dtype=np.int64)
    shard = Shard(TOKENS, one, one, one, one, one, np.zeros(1, dtype=np.bool_), 0 * one)
    backward, rerun = [], []
    for norms_again in (True, False):
        stack = load_stack("internevo").model_copy(update={"norms_again": norms_again})
        request = read_request(
            "llama-2-7b", "dgx-a100:1", overrides={"stack": "internevo", "sequence_length": TOKENS}
        )
        request = replace(request, stack=stack)
        (name,) = {*request.workload.layers}
        times = price_layer(request.workload.kinds[name], shard, request.machine)
        backward.append(int(times.nanoseconds("backward")[0]))
        rerun.append(backward[-1] + int(times.recompute_ns((named_policy("full", stack),))[0, 0]))
    # Two norms of 2 and two additions of 3 passes over 16 MiB, at the least.
    assert backward[0] - backward[1] > 10 * 2 * TOKENS * 4096 / 2.04e12 * 1e9
    assert rerun[0] == pytest.approx(rerun[1], abs=10)
