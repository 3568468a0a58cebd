"""Calls that XLA places around MaxText's layers on ``tensor`` x ``tensor_transpose`` ranks
(``benchmarks/collectives/maxtext_tensor_transpose.py``), and what waits for their backward."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.memory import activation_bytes
from cost_models.traffic import Calls, layer_calls, recomputed_calls
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.pipeline import read_request
from planner.recompute import named_policy
from planner.request import Request

FOUND = json.loads(
    (Path(__file__).parent / "data" / "maxtext_tensor_transpose.json").read_text(encoding="utf-8")
)
ALONE = [row for row in FOUND["counted"] if {*row["degrees"]} <= {"tensor", "tensor_transpose"}]
LISTED = [row for row in ALONE if row["policy"] == "minimal_with_context"]
PARTS = {"self_attention": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
GROUPS = {"tp_transposed": "tensor_transpose", "tp_straight": "tensor"}


def named(row: dict[str, Any]) -> str:
    degrees = "x".join(f"{name}{number}" for name, number in row["degrees"].items())
    return f"{degrees}-{row['hidden']}-{row['policy']}"


def ways(row: dict[str, Any]) -> tuple[int, int]:
    """tp and the factor that is transposed."""
    transposed = row["degrees"].get("tensor_transpose", 1)
    return row["degrees"].get("tensor", 1) * transposed, transposed


def mixer_of(row: dict[str, Any]) -> AttentionSpec | LatentAttentionSpec:
    """DeepSeek-V2-Lite's where the row says so; with latents of queries too."""
    if row.get("model") not in ("latent", "latents"):
        return AttentionSpec(heads=row["heads"], kv_heads=8, head_dim=128)
    return LatentAttentionSpec(
        heads=row["heads"], q_lora_rank=768 if row["model"] == "latents" else None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    )  # fmt: skip


def feed_forward_of(row: dict[str, Any]) -> MlpSpec | MoeSpec:
    """A mixture of four experts where the row says so."""
    if row.get("model") == "mixture":
        return MoeSpec(intermediate=row["width"], experts=4, top_k=2, gated=True)
    return MlpSpec(intermediate=row["width"], gated=True)


def request_of(row: dict[str, Any]) -> Request:
    asked = {
        "stack": "maxtext-tpu", "sequence_length": row["tokens"], "global_batch": 1,
        "tensor_transpose": ways(row)[1],
    }  # fmt: skip
    request = read_request("llama-3.1-8b", "tpu-v5e-8:1", None, asked)
    block = BlockSpec(
        mixer=mixer_of(row),
        feed_forward=feed_forward_of(row),
    )
    assert isinstance(request.model, ModelSpec)
    changes = {"hidden": row["hidden"], "vocab": 1024, "blocks": {"decoder": block}}
    return replace(request, model=request.model.model_copy(update=changes))


def place(row: dict[str, Any]) -> Shard:
    one = np.ones(1, dtype=np.int64)
    tp, transposed = ways(row)
    return Shard(
        row["tokens"], one, tp * one, one, one, one, one > 0, 0 * one, transposed=transposed
    )


def counted(row: dict[str, Any], *phases: str) -> Counter[tuple[str, ...]]:
    """Bytes by pass, part, kind and axes, of layers alone."""
    found = Counter[tuple[str, ...]]()
    for phase, part, kind, axes, size, number in row["calls"]:
        if part in PARTS and phase in phases:
            found[phase, part, kind.replace("-", "_"), axes] += size * number
    return found


def priced(calls: tuple[Calls, ...], row: dict[str, Any]) -> Counter[tuple[str, ...]]:
    whole = "tensor_transpose" if "tensor" not in row["degrees"] else "tensor"
    found = Counter[tuple[str, ...]]()
    for call in calls:
        part = next(part for part, names in PARTS.items() if call.name.split(".")[0] in names)
        found[call.phase, part, call.kind, GROUPS.get(call.group, whole)] += call.bytes
    return found


@pytest.mark.parametrize("row", LISTED, ids=named)
def test_layers_send_what_xla_sends(row: dict[str, Any]) -> None:
    request = request_of(row)
    (kind,) = request.workload.kinds.values()
    calls = layer_calls(kind, place(row), request.machine)
    assert priced(calls, row) == counted(row, "forward", "backward")


@pytest.mark.parametrize("row", LISTED, ids=named)
def test_ends_send_what_xla_sends_on_the_way_forward(row: dict[str, Any]) -> None:
    """And the head's gradients; looked-up rows' are another shape of table in so small a model."""
    request = request_of(row)
    work, shard = request.workload, place(row)
    every = {"tp": "tensor tensor_transpose" if "tensor" in row["degrees"] else "tensor_transpose"}
    if ways(row)[1] == 1:
        every = {"tp": "tensor"}
    for part, kind in (("embed", work.embedding), ("logits", work.head)):
        found = Counter[tuple[str, ...]]()
        for call in layer_calls(kind, shard, request.machine):
            if not call.name.startswith("cross_entropy"):
                found[call.phase, call.kind, {**GROUPS, **every}[call.group]] += call.bytes
        seen = {
            (phase, kind_.replace("-", "_"), axes): size
            for phase, place_, kind_, axes, size, _ in row["calls"]
            if place_ == part and (phase == "forward" or part == "logits")
        }
        # The head's input is gathered again for its backward, where XLA keeps it.
        assert {key: found[key] for key in seen} == seen
        assert all(kind_ == "all_gather" for _, kind_, _ in {*found} - {*seen})


@pytest.mark.parametrize("row", [row for row in ALONE if row["policy"] == "full"], ids=named)
def test_layers_that_run_again_send_again_what_xla_sends(row: dict[str, Any]) -> None:
    """XLA joins what the feed-forward sends again with its backward's sum, in one call."""
    request = request_of(row)
    (kind,) = request.workload.kinds.values()
    policy = named_policy("full", request.stack)
    again = priced(recomputed_calls(kind, place(row), request.machine, policy), row)
    found = counted(row, "again", "forward")
    attention = {key[2:]: size for key, size in again.items() if key[1] == "self_attention"}
    assert attention == {
        key[2:]: size for key, size in found.items() if key[:2] == ("again", "self_attention")
    }
    joined = sum(
        size * number
        for phase, part, kind_, axes, size, number in row["calls"]
        if (part, kind_, axes) == ("mlp", "all-reduce", "tensor_transpose") and phase != "forward"
    )
    backward = priced(layer_calls(kind, place(row), request.machine), row)
    key = ("mlp", "all_reduce", "tensor_transpose")
    assert joined == again["recompute", *key] + backward["backward", *key]
    assert sum(size for key, size in again.items() if key[1] == "mlp") == again["recompute", *key]


@pytest.mark.parametrize("row", ALONE, ids=named)
def test_layers_keep_what_xla_keeps(row: dict[str, Any]) -> None:
    request = request_of(row)
    kind: LayerKind
    (kind,) = request.workload.kinds.values()
    kept, _ = activation_bytes(kind, place(row), named_policy(row["policy"], request.stack))
    assert int(kept[0]) == row["kept"]
