"""Models with experts on every second layer, Mamba-2 and hybrids beside published steps.

No constant is fitted on these runs. The pages do not say what is recomputed, so a prediction
without recomputation is expected to be somewhat fast, by a third at most (one more forward).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.blocks.flops import model_flops_per_token
from planner.models.reader import read_model
from planner.models.spec import ModelSpec
from planner.pipeline import evaluate, read_request

RUNS = yaml.safe_load((Path(__file__).parent / "data" / "new_kinds.yaml").read_text())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['model']}-{run['cluster']}")
def test_a_published_step_is_within_a_forward_pass(run: dict[str, Any]) -> None:
    request = read_request(run["model"], run["cluster"], None, run["job"])
    predicted = evaluate(request, run["layout"]).prediction.step_time_s
    ratio = predicted / run["step_time_s"]
    print(f"{run['source']}: {predicted:.2f} s, measured {run['step_time_s']} s: {ratio - 1:+.1%}")
    assert 2 / 3 < ratio < 1.2


def test_no_part_of_a_step_is_less_than_nothing() -> None:
    # Routed experts in the head (MTP) merge the passes of two microbatches, as those of layers do.
    job = {"sequence_length": 4096, "global_batch": 1024, "stack": "megatron-bridge"}
    request = read_request("deepseek-v3", "dgx-h100:64", None, job)
    layout = {"pp": 8, "dp_shard": 64, "ep": 64, "microbatch_size": 1, "zero_stage": 1}
    parts = evaluate(request, layout).prediction.time
    assert all(part.seconds is not None and part.seconds >= 0 for part in parts)
    assert "dp_comm" not in [part.name for part in parts]


@pytest.mark.parametrize(
    ("tokens_per_s", "tflops", "sequence"),
    [(14719, 328, 8192), (14507, 323, 8192), (14890, 331, 8192)],
)
def test_flops_per_token_of_a_hybrid_are_those_that_megatron_counts(
    tokens_per_s: int, tflops: int, sequence: int
) -> None:
    # Megatron-Bridge's pages print both rates for Nemotron 3 Nano on 16 H100; its formula counts
    # full attention, which for 6 layers of 32 heads of 128 is 2 * 32 * 256 * S/2 more per token.
    model = read_model("nemotron-3-nano-30b-a3b")
    assert isinstance(model, ModelSpec)
    full = model_flops_per_token(model, sequence) + 3 * 6 * 2.0 * 32 * 256 * sequence / 2
    assert full == pytest.approx(tflops * 1e12 / tokens_per_s, rel=0.02)
