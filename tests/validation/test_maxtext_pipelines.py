"""Pipelines of MaxText's own decoders (``benchmarks/memory/maxtext_pipeline.py``): what its remat
policies keep of a layer, and what is kept without any, which no layout has."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.memory import activation_bytes
from hardware_profiles.loader import load_stack
from planner.pipeline import read_request
from planner.recompute import named_policy

FOUND = json.loads(
    (Path(__file__).parent / "data" / "maxtext_pipelines.json").read_text(encoding="utf-8")
)
COUNTED: dict[tuple[str, str, int], dict[str, Any]] = {
    (row["model"], row["policy"], row["repeats"]): row for row in FOUND["counted"]
}
TOKENS = FOUND["tokens"]
SAME = {
    "llama3.1-8b": "llama-3.1-8b", "qwen3-8b": "qwen3-8b", "gpt3-175b": "gpt-3-175b",
    "mixtral-8x7b": "mixtral-8x7b", "qwen3-30b-a3b": "qwen3-30b-a3b",
}  # fmt: skip
"""Models whose layers MaxText 0.1.0 has one by one, with the names that the stack's version has."""


@cache
def layer(model: str) -> LayerKind:
    asked = {"stack": "maxtext-gpu", "sequence_length": TOKENS, "global_batch": 8}
    (kind,) = read_request(SAME[model], "dgx-h100:1", None, asked).workload.kinds.values()
    return kind


@pytest.mark.parametrize("model", SAME)
def test_policies_keep_what_maxtext_keeps(model: str) -> None:
    one, stack = np.ones(1, dtype=np.int64), load_stack("maxtext-gpu")
    shard = Shard(TOKENS, one, one, one, one, one, np.zeros(1, dtype=bool), one)
    for mode in ("full", "minimal"):
        kept, _ = activation_bytes(layer(model), shard, named_policy(mode, stack))
        assert int(kept[0]) == COUNTED[model, mode, 1]["bytes_per_token"] * TOKENS


@pytest.mark.parametrize("model", SAME)
def test_without_a_policy_repeats_keep_casts_of_the_weights(model: str) -> None:
    beyond = COUNTED[model, "none", 2]["other_bytes"] - COUNTED[model, "none", 1]["other_bytes"]
    weights = sum(2 * weight.elements for weight in layer(model).weights)
    assert beyond == pytest.approx(weights, rel=1e-3)


def test_without_a_policy_layers_keep_several_times_what_a_list_does() -> None:
    models = {model for model, _, _ in COUNTED}
    times = {
        model: COUNTED[model, "none", 1]["bytes_per_token"]
        / COUNTED[model, "minimal", 1]["bytes_per_token"]
        for model in models
    }
    assert 2.7 < min(times.values()) < 2.8
    assert 5.0 < max(times.values()) < 5.1


def test_the_compiler_keeps_it_and_spares_no_products() -> None:
    """Temporaries grow by what the loop hands on, seven iterations of it."""
    none, listed = FOUND["compiled"]["none"], FOUND["compiled"]["minimal_with_context"]
    tokens, iterations = FOUND["compiled_tokens"], FOUND["iterations"]
    handed = (none["bytes_per_token"] - listed["bytes_per_token"]) * tokens * iterations
    assert none["temporaries"] - listed["temporaries"] == pytest.approx(handed, rel=0.06)
    assert none["flops"] == pytest.approx(listed["flops"], rel=1e-3)
    assert none["bytes_accessed"] > 1.05 * listed["bytes_accessed"]
