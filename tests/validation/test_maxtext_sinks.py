"""Pipelines of MaxText's gpt-oss, of mixtures split over tensor and of softcapped scores, without a
remat policy (``benchmarks/memory/maxtext_pipeline.py sinks``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.graph import LayerKind
from planner.pipeline import read_request
from tests.validation.test_maxtext_pipelines import (
    FIGURES,
    FOUND,
    NARROW,
    QUANTISED,
    kept_without_a_policy,
    narrow_layer,
    scores,
    split_over,
)

SINKS = {
    "model_type": "gpt_oss", "hidden_size": 1024, "intermediate_size": 1536,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_local_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 8, "vocab_size": 1024,
    "max_position_embeddings": 4096,
}  # fmt: skip
OTHER = {
    **SINKS, "hidden_size": 768, "intermediate_size": 1280, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip
CONFIGS = {1024: SINKS, 768: OTHER}
GEMMA: dict[str, Any] = {"model_type": "gemma2", **NARROW, "head_dim": 256}
ROWS: list[dict[str, Any]] = FOUND["stacked_sinks"]


def layers_of_a_block(row: dict[str, Any], folder: Path) -> list[LayerKind]:
    """One with a window and one without, on which MaxText repeats itself."""
    path = folder / "config.json"
    config = GEMMA if row["model"] == "gemma2-9b" else CONFIGS[row["hidden"]]
    path.write_text(json.dumps(config), encoding="utf-8")
    precision = "fp32" if "dtype" in row else row.get("quantization", "bf16")
    stack, cluster = "maxtext-gpu", QUANTISED.get(precision, ("", "dgx-h100:1"))[1]
    # Where the stack for GPUs would run a kernel, the loop was compiled without one.
    if row["devices"].startswith("v5e") or (row["model"], precision) == ("gemma2-9b", "bf16"):
        stack, cluster = "maxtext-tpu-dot-product", "tpu-v5e-8"
    asked = {
        "stack": stack, "sequence_length": FOUND["stacked_tokens"], "global_batch": 8,
        "precision": precision,
    }  # fmt: skip
    return [*read_request(str(path), cluster, None, asked).workload.kinds.values()]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(str(row[key]) for key in row if key not in FIGURES)
)
def test_everything_is_what_the_compiled_loop_stacks(row: dict[str, Any], tmp_path: Path) -> None:
    """But for segment ids and some numbers of a token's routing. The law was made from the first
    row; the others were compared with it afterwards, those over tensor corrected it."""
    shard = split_over(row)
    if row["model"] == "mixtral-8x7b":
        kept = kept_without_a_policy(narrow_layer(row, tmp_path), shard)
        assert abs(row["stacked"] - scores(row) - kept) <= 16 * FOUND["stacked_tokens"]
        return
    kinds = layers_of_a_block(row, tmp_path)
    assert len(kinds) == 2
    kept = sum(kept_without_a_policy(kind, shard) for kind in kinds)
    if row["model"] == "gemma2-9b":
        # The layers of a pair share sines and cosines.
        size = 4 if "dtype" in row else 2
        kept -= 2 * size * GEMMA["head_dim"] * FOUND["stacked_tokens"]
    assert 0 <= row["stacked"] - kept <= 1.5e-4 * row["stacked"]
