"""Embedding tables that two pipeline stages hold, against Megatron-Core's own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.step import Field
from hardware_profiles.loader import load_cluster, load_stack
from planner.buffer_sizes import exact_state
from planner.layouts import complete_layout
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, MlpSpec, ModelSpec
from planner.pipeline import evaluate
from planner.predict import predict, price
from planner.request import Request
from planner.specs import FineTuneSpec, JobSpec
from planner.studies.communication import communication

CASES = json.loads((Path(__file__).parent / "data" / "megatron_tables.json").read_text())
"""Made by benchmarks/memory/megatron_tables.py with Megatron-Core 0.16.1."""


def request_of(case: dict[str, Any], **job: Any) -> Request:
    block = BlockSpec(
        mixer=AttentionSpec(
            heads=case["heads"], kv_heads=case["kv"], head_dim=case["hidden"] // case["heads"]
        ),
        feed_forward=MlpSpec(intermediate=case["ffn"], gated=True),
    )
    model = ModelSpec(
        name="case", family="test", source="test", hidden=case["hidden"], vocab=case["vocab"],
        tied_embeddings=case["tied"], norm="rms", norm_bias=False, blocks={"layer": block},
        layers=(LayerRun(block="layer", count=case["layers"]),),
        mtp=(LayerRun(block="layer", count=case["mtp"]),) if case["mtp"] else (),
    )  # fmt: skip
    world = case["world"]
    spec = JobSpec(**{"sequence_length": 128, "global_batch": world, "memory_margin": 0.0, **job})
    stack = load_stack("megatron-core").model_copy(update={"vocab_divisor": 1})
    return Request(model, load_cluster(f"dgx-h100:{world // 8}"), spec, stack)


def raw_layout(case: dict[str, Any]) -> dict[str, Any]:
    return {"tp": case["tp"], "pp": case["pp"], "zero_stage": 1, "sequence_parallel": False}


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda c: "-".join(f"{key}{c[key]}" for key in ("tp", "pp", "rank", "mtp", "tied")),
)
def test_buffers_and_sums_are_megatrons(case: dict[str, Any]) -> None:
    request = request_of(case)
    rank = case["rank"] * case["pp"] // case["world"]
    stages = [
        {"chunks": [{"layers": [n * case["layers"] // case["pp"],
                                (n + 1) * case["layers"] // case["pp"]]}]}
        for n in range(case["pp"])
    ]  # fmt: skip
    layout = raw_layout(case) | ({"stages": stages} if case["pp"] > 1 else {})
    priced = price(complete_layout(layout, request), request)
    assert predict(priced, request).stages[rank].parameters == case["parameters"]
    size = case["buffer"]
    expected = {"weights": 2 * size, "gradients": 4 * size, "optimizer": 12 * size // case["dp"]}
    assert exact_state(priced, rank) == expected
    stage = communication(request, evaluate(request, layout)).stages[rank]
    summed = [call for call in stage if (call.group, call.kind) == ("pp", "all_reduce")]
    assert [(call.bytes, call.ranks) for call in summed] == [
        (4 * elements, ranks) for elements, ranks in case["shared"]
    ]


def costs_at(pp: int, mtp: bool, **changes: Any) -> Any:
    case = {**CASES[0], **changes}
    request = request_of(case, mtp=mtp)
    return price(complete_layout({"pp": pp, "zero_stage": 1}, request), request).leaf


def test_the_copy_is_there_with_the_modules_and_a_pipeline_only() -> None:
    table = 50_048 * 1000
    modules = {
        pp: costs_at(pp, True).head[Field.PARAMETERS] - costs_at(pp, False).head[Field.PARAMETERS]
        for pp in (1, 2)
    }
    assert modules[2] - modules[1] == table
    assert costs_at(2, False).tied_ns == costs_at(1, True).tied_ns == 0
    assert costs_at(2, True).tied_ns == costs_at(2, False, tied=True).tied_ns > 0


def test_gradients_of_two_lookups_of_one_table_meet() -> None:
    """The modules' lookup ends its backward first: its gradient waits for the embedding's."""
    table = 50_048 * 1000
    assert costs_at(1, True).head[Field.IN_FLIGHT] == 2 * table
    assert costs_at(2, True).head[Field.IN_FLIGHT] == costs_at(1, False).head[Field.IN_FLIGHT] == 0


def test_a_block_for_the_gradient_stays_on_both_stages() -> None:
    """128 tokens make logits and activations smaller than the table."""
    leaf = costs_at(2, True)
    assert leaf.head[Field.LOOKUP_BLOCK] == leaf.embedding[Field.LOOKUP_BLOCK] == 2 * 50_048 * 1000
    assert costs_at(2, False).head[Field.LOOKUP_BLOCK] == 0


def test_a_frozen_embedding_is_not_summed() -> None:
    case = {**CASES[0]}
    request = request_of(case, finetune=FineTuneSpec(freeze_layers=1), stack="megatron-core")
    workload = request.workload
    assert not workload.shares_table
    assert {weight.name: weight.frozen for weight in workload.head.weights if weight.copy} == {
        "embedding.mtp": True
    }
    assert not next(w for w in workload.head.weights if w.name == "head").frozen
