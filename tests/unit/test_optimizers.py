"""Optimizers: state by hand, steps by hand, and what a stack does not run."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models import state
from cost_models.graph import Shard, Weight
from cost_models.optimizers import OPTIMIZERS, newton_schulz_flops
from cost_models.state_rules import state_rules
from hardware_profiles.loader import load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request

ONE = np.ones(1, dtype=np.int64)
SHARD = Shard(1, ONE, ONE, ONE, ONE, ONE, ONE.astype(bool), ONE * 0)
MATRIX = Weight("mlp.up", 1000, 600)
VECTOR = Weight("norm", 512, 1)


def optimizer_bytes(name: str, *weights: Weight, zero: int = 0, ways: int = 1) -> int:
    rules = state_rules(
        spec=load_stack("torchgpipe").state, precision="fp32", optimizer=name,
        master_weights=False, gradient_dtype="fp32",
    )  # fmt: skip
    sharding = state.Sharding(ONE * ways, ONE * zero, ONE.astype(bool) & False)
    held = state.state_bytes(weights, SHARD, sharding, rules, vocab_divisor=1)
    return int(held.optimizer[0])


@pytest.mark.parametrize(
    ("name", "matrix", "vector"),
    [
        ("adamw", 8 * 600_000, 8 * 512),
        ("adamw_bf16", 4 * 600_000, 4 * 512),
        ("sgd", 4 * 600_000, 4 * 512),
        ("lion", 4 * 600_000, 4 * 512),
        ("adagrad", 4 * 600_000, 4 * 512),
        ("rmsprop", 4 * 600_000, 4 * 512),
        ("novograd", 4 * 600_000, 4 * 512),
        ("adamax", 8 * 600_000, 8 * 512),
        ("adadelta", 8 * 600_000, 8 * 512),
        ("rprop", 8 * 600_000, 8 * 512),
        # Two bytes, and two fp32 scales per 256: 2344 blocks, and 2.
        ("adam8bit", 2 * 600_000 + 8 * 2344, 2 * 512 + 16),
        # A row and a column of second moments; a vector's in full.
        ("adafactor", 4 * 1600, 4 * 512),
        # One moment of a matrix; vectors are AdamW's.
        ("muon", 4 * 600_000, 8 * 512),
    ],
)
def test_state_by_hand(name: str, matrix: int, vector: int) -> None:
    assert optimizer_bytes(name, MATRIX) == matrix
    assert optimizer_bytes(name, VECTOR) == vector
    assert optimizer_bytes(name, MATRIX, VECTOR) == matrix + vector


def test_the_ends_are_not_muon_s() -> None:
    assert optimizer_bytes("muon", Weight("embedding", 1000, 600)) == 8 * 600_000
    assert optimizer_bytes("muon", Weight("head", 1000, 600)) == 8 * 600_000


def test_sharded_state_is_a_share() -> None:
    for name in OPTIMIZERS:
        whole = optimizer_bytes(name, MATRIX)
        share = optimizer_bytes(name, MATRIX, zero=1, ways=8)
        assert whole / 8 <= share <= whole / 8 + 16


def test_newton_schulz_by_hand() -> None:
    """Five steps of 4 a^2 b + 2 a^3 with a = 600, b = 1000; the vector has none."""
    found = newton_schulz_flops(
        [(w, state.local_tensor(w, SHARD, 1)) for w in (MATRIX, VECTOR, Weight("head", 9, 9))]
    )
    assert found[0] == 5 * (4 * 600**2 * 1000 + 2 * 600**3)


def test_order_of_memory_and_time() -> None:
    """Less state, less memory; Muon's step is longer than AdamW's by its iterations."""
    peak: dict[str, int] = {}
    update: dict[str, float] = {}
    for name in load_stack("torch-pipelining").optimizers:
        overrides = {"stack": "torch-pipelining", "optimizer": name, "global_batch": 8}
        request = read_request("unet-2015", "dgx-a100", None, overrides)
        found = evaluate(request, {"dp_replicate": 8, "dp_shard": 1, "zero_stage": 0})
        peak[name] = found.prediction.max_peak_bytes
        terms = {term.name: term.seconds for term in found.prediction.time}
        update[name] = terms["optimizer_and_gather"] or 0.0
    assert peak["adafactor"] < peak["adam8bit"] < peak["lion"] < peak["adamw"]
    # Convolutions are flattened to matrices.
    assert peak["muon"] < peak["adamw"]
    assert update["adam8bit"] < update["sgd"] == update["lion"] < update["adamw"] < update["muon"]


def test_muon_on_a_decoder() -> None:
    def run(optimizer: str) -> tuple[int, float]:
        overrides = {"stack": "maxtext-gpu", "optimizer": optimizer}
        found = evaluate(read_request("llama-3.1-8b", "dgx-h100:2", None, overrides), {"tp": 1})
        terms = {term.name: term.seconds or 0.0 for term in found.prediction.time}
        return found.prediction.max_peak_bytes, terms["optimizer_and_gather"]

    (adam_peak, adam_s), (muon_peak, muon_s) = run("adamw"), run("muon")
    assert muon_peak < adam_peak
    # 32 layers of matrices: 5 x (4 a^2 b + 2 a^3) is 1.65e14 FLOPs a layer, over 16 ranks.
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
    flops = 32 * sum(5 * (4 * a * a * b + 2 * a**3) for a, b in layer)
    assert muon_s - adam_s > flops / 16 / 989e12


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_planned_and_proved(name: str) -> None:
    decoder = "llama-3.2-3b"
    model, cluster, stack = {
        "adamw_bf16": (decoder, "dgx-a100", "megatron-core-precision-aware"),
        "rprop": (decoder, "dgx-a100", "pytorch-fsdp1"),
        "novograd": (decoder, "aws-trn1", "neuron"),
    }.get(name, ("t5-3b", "dgx-a100", "torch-pipelining"))
    found = plan(read_request(model, cluster, None, {"stack": stack, "optimizer": name}))
    assert found.prediction.fits
    assert found.certificate.status == "optimal"


def test_a_stack_without_it_says_so() -> None:
    with pytest.raises(InputError, match=r"megatron-core .* has no optimizer lion") as caught:
        read_request("gpt2", "dgx-a100", None, {"optimizer": "lion", "stack": "megatron-core"})
    assert "--stack deepspeed-hf" in str(caught.value.hint)
    assert read_model("gpt2").name == "gpt2"
