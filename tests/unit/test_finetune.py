"""LoRA, QLoRA and frozen layers: parameters and state by hand, times in order, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cost_models.graph import Shard
from cost_models.ops import Elementwise, MatMul
from planner.errors import InputError
from planner.finetune import NF4_BYTES_PER_64
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request
from planner.specs import FineTuneSpec
from planner.studies.verify import verify

ONE = np.ones(1, dtype=np.int64)
SHARD = Shard(4096, ONE, ONE, ONE, ONE, ONE, ONE.astype(bool), ONE * 0)
WHOLE = {"tp": 1, "microbatch_size": 1, "dp_replicate": 1}


def request(finetune: dict[str, Any] | None, model: str = "llama-3.1-8b", **more: Any) -> Request:
    job = {"stack": "nemo-automodel", "global_batch": 16, "sequence_length": 4096, **more}
    return read_request(model, "dgx-h100", None, {**job, "finetune": finetune})


def priced(finetune: dict[str, Any] | None, **more: Any) -> EvaluatedLayout:
    return evaluate(request(finetune, **more), WHOLE)


def memory(found: EvaluatedLayout) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}


def test_adapters_by_hand() -> None:
    """Rank 16 on Llama 3.1 8B: qkv (4096 -> 6144), proj (4096 -> 4096), fc1 (4096 -> 28672) and
    fc2 (14336 -> 4096): 16 x (10240 + 8192 + 32768 + 18432) in each of 32 layers."""
    kind = request({"lora_rank": 16}, stack="nemo").workload.kinds["decoder"]
    trained = [weight for weight in kind.weights if not weight.frozen]
    assert sum(weight.elements for weight in trained) == 16 * (10240 + 8192 + 32768 + 18432)
    assert {weight.name for weight in trained} == {
        f"lora.{name}.{side}" for name in ("qkv", "proj", "fc1", "fc2") for side in "ab"
    }
    sharding = {weight.name: weight.sharding for weight in trained}
    assert sharding["lora.qkv.a"] == sharding["lora.proj.b"] == "replicated"
    assert (sharding["lora.qkv.b"], sharding["lora.proj.a"]) == ("column", "row")


APART = 16 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336))
"""Of a layer with an adapter for each of q, k, v, o, gate, up and down."""


@pytest.mark.parametrize("stack", ["nemo-automodel", "deepspeed-hf", "pytorch-fsdp1"])
def test_linear_layers_of_transformers_have_adapters_of_their_own(stack: str) -> None:
    kind = request({"lora_rank": 16}, stack=stack).workload.kinds["decoder"]
    trained = [weight for weight in kind.weights if not weight.frozen]
    assert sum(weight.elements for weight in trained) == APART
    products = {op.name: op for op in kind.ops(SHARD) if isinstance(op, MatMul)}
    down, up = products["qkv.lora_a"], products["qkv.lora_b"]
    assert (down.n, down.parts) == (48, (1, 1, 1))
    assert (up.n, up.k) == (6144, 16)
    assert [6 * part // sum(up.parts) for part in up.parts] == [4, 1, 1]


def test_adapters_of_a_small_model_are_as_many_as_peft_makes() -> None:
    """Llama 3.2 1B, all seven linear layers: 11,272,192 trained parameters by hand."""
    kind = request({"lora_rank": 16}, "llama-3.2-1b", stack="deepspeed-hf").workload
    layer = [w for name in kind.layers for w in kind.kinds[name].weights if not w.frozen]
    assert sum(weight.elements for weight in layer) == 11_272_192


def test_only_adapters_have_gradients_and_state() -> None:
    found = priced({"lora_rank": 16})
    terms = memory(found)
    adapters = 32 * APART
    # Sharded over 8; FSDP2 keeps fp32 weights, gradients and two moments of what is trained, and
    # the 8.03 billion frozen weights in 16 bits.
    assert terms["optimizer"] == pytest.approx(8 * adapters / 8, rel=0.01)
    assert terms["weights"] == pytest.approx((2 * 8.03e9 + 4 * adapters) / 8, rel=0.01)
    full = memory(priced(None))
    assert full["optimizer"] == pytest.approx(8 * 8.03e9 / 8, rel=0.01)


def test_four_bits() -> None:
    """Linear layers of 6.98 billion weights at 33 bytes per 64; embedding, head and norms in 16."""
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096
    terms = memory(priced({"lora_rank": 16, "base_bits": 4}))
    adapters = 32 * APART
    expected = linear * NF4_BYTES_PER_64 / 64 + 2 * rest + 4 * adapters
    assert terms["weights"] == pytest.approx(expected / 8, rel=0.01)


def test_ops_by_hand() -> None:
    kind = request({"lora_rank": 8, "base_bits": 4, "lora_targets": ["fc1"]}).workload.kinds[
        "decoder"
    ]
    ops = kind.ops(SHARD)
    products = {op.name: op for op in ops if isinstance(op, MatMul)}
    assert products["qkv"].frozen
    assert products["fc1"].frozen
    assert not products["fc1.lora_a"].frozen
    assert (products["fc1.lora_a"].n, products["fc1.lora_b"].k) == (16, 8)
    assert "qkv.lora_a" not in products
    read = next(op for op in ops if op.name == "fc2.dequantise")
    assert isinstance(read, Elementwise)
    assert np.all(np.asarray(read.forward_bytes) == 14336 * 4096 * (33 / 64 + 2))


def test_times_in_order() -> None:
    """No weight gradients: a third of the products' time goes; NF4 costs its dequantisation."""
    full, lora = priced(None), priced({"lora_rank": 16})
    four = priced({"lora_rank": 16, "base_bits": 4})
    half = priced({"freeze_layers": 16})
    steps = [found.prediction.step_time_s for found in (full, lora, four, half)]
    assert 0.6 * steps[0] < steps[1] < 0.85 * steps[0]
    assert steps[2] > steps[1]
    # Half of the layers without a backward: a third of the step less, at most.
    assert 0.6 * steps[0] < steps[3] < 0.8 * steps[0]
    # The convention counts the FLOPs that are done.
    assert lora.prediction.mfu == pytest.approx(full.prediction.mfu, rel=0.25)


def test_a_tied_head_is_frozen_with_its_embedding() -> None:
    """Llama 3.2 1B, 8 of 16 layers of 60,821,504 parameters and the last norm are trained."""
    graph = request({"freeze_layers": 8}, "llama-3.2-1b").workload
    assert {w.name: w.frozen for w in graph.head.weights} == {
        "final_norm": False,
        "head.tied": True,
    }
    product = next(op for op in graph.head.ops(SHARD) if isinstance(op, MatMul))
    assert product.frozen
    assert any("shares the embedding's table, which is frozen" in a for a in graph.assumptions)
    found = evaluate(request({"freeze_layers": 8}, "llama-3.2-1b"), WHOLE)
    assert memory(found)["optimizer"] == 8 * (8 * 60_821_504 + 2048) // 8
    untied = request({"freeze_layers": 8}).workload
    assert not any(weight.frozen for weight in untied.head.weights)
    assert not any("shares the embedding's table" in a for a in untied.assumptions)


def test_frozen_layers_keep_nothing() -> None:
    graph = request({"freeze_layers": 4}).workload
    assert graph.layers[:4] == ("decoder.frozen",) * 4
    frozen = graph.kinds["decoder.frozen"]
    assert frozen.saved(SHARD) == ()
    assert not frozen.backward
    assert all(weight.frozen for weight in (*frozen.weights, *graph.embedding.weights))
    kept = memory(priced({"freeze_layers": 16}))["activations"]
    assert kept < 0.6 * memory(priced(None))["activations"]


@pytest.mark.parametrize(
    "finetune", [{"lora_rank": 16}, {"lora_rank": 64, "base_bits": 4}, {"freeze_layers": 20}]
)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_planned_and_proved(finetune: dict[str, Any], model: str) -> None:
    found = plan(request(finetune, model=model))
    assert found.prediction.fits
    assert found.certificate.status == "optimal"
    assert verify(found) == []


def test_a_70b_model_fits_on_one_server_with_adapters() -> None:
    found = plan(request({"lora_rank": 16}, model="llama-3.1-70b"))
    assert found.prediction.fits


def test_networks_of_layers_can_be_frozen_too() -> None:
    job = {"stack": "torch-pipelining", "finetune": {"freeze_layers": 3}}
    found = plan(read_request("unet-2015", "dgx-a100", None, job))
    assert found.certificate.status == "optimal"


@pytest.mark.parametrize(
    ("finetune", "says"),
    [
        ({}, "give lora_rank, or freeze_layers"),
        ({"lora_rank": 8, "freeze_layers": 2}, "leave freeze_layers out"),
        ({"freeze_layers": 2, "base_bits": 4}, "belong to lora_rank"),
        ({"lora_rank": 8, "base_bits": 8}, "base_bits"),
    ],
)
def test_what_makes_no_sense(finetune: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FineTuneSpec.model_validate(finetune)


def test_errors_of_the_request() -> None:
    with pytest.raises(InputError, match="does not do qlora") as caught:
        request({"lora_rank": 8, "base_bits": 4}, stack="nemo")
    assert "--stack deepspeed-hf" in str(caught.value.hint)
    with pytest.raises(InputError, match="has no product 'fc9'"):
        _ = request({"lora_rank": 8, "lora_targets": ["fc9"]}).workload
    with pytest.raises(InputError, match="has 32 layers"):
        _ = request({"freeze_layers": 32}).workload
