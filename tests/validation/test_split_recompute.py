"""Full recomputation under a split backward beside what PyTorch ran and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.recompute import mode_rows
from cost_models.step import Field
from hardware_profiles.loader import load_cluster, load_stack
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, MlpSpec, ModelSpec
from planner.pipeline import evaluate
from planner.predict import price
from planner.request import Request
from planner.specs import JobSpec

DATA = Path(__file__).parent / "data" / "split_recompute.json"
CASES = json.loads(DATA.read_text(encoding="utf-8"))["cases"]
PAIRS = list(zip(CASES[::2], CASES[1::2], strict=True))
STATISTICS = 0.02
"""Of a layer's bytes: norms' and attention's statistics, and their weights."""


def row_of(case: dict[str, Any]) -> tuple[dict[str, int], int]:
    """A layer's fields in 32 bits, and what it keeps where it runs again as a whole. Prices are in
    16 bits, traces were made in 32."""
    mixer = AttentionSpec(
        heads=case["heads"], kv_heads=case["kv_heads"], head_dim=case["hidden"] // case["heads"]
    )
    block = BlockSpec(
        mixer=mixer, feed_forward=MlpSpec(intermediate=case["intermediate"], gated=True)
    )
    model = ModelSpec(
        name="small", family="llama", source="a test", hidden=case["hidden"], vocab=512,
        tied_embeddings=False, norm="rms", norm_bias=False, blocks={"decoder": block},
        layers=(LayerRun(block="decoder", count=8),),
    )  # fmt: skip
    job = JobSpec(sequence_length=case["tokens"], global_batch=8, stack="torchtitan")
    stack = load_stack("torchtitan")
    apart = stack.layers.model_copy(update={"separate_projections": ("qkv", "gate_up")})
    stack = stack.model_copy(update={"layers": apart})
    request = Request(model, load_cluster("dgx-h100:1"), job, stack)
    layout = {"pp": 2, "vpp": 2, "schedule": "zbv", "microbatch_size": 1, "recompute": "full"}
    leaf = price(evaluate(request, layout).layout, request).leaf
    (kind,) = leaf.kinds
    fields = {field.name: kind[field] * 2 for field in Field}
    fields["WEIGHT_PASSES"] //= 2
    return fields, kind[mode_rows(leaf.policies)["full"].kept] * 2


@pytest.mark.parametrize(("plain", "full"), PAIRS)
def test_a_layer_runs_again_once_and_then_for_every_weight(
    plain: dict[str, Any], full: dict[str, Any]
) -> None:
    fields, _ = row_of(full)
    assert full["input_runs"] - full["forward_runs"] == 1
    assert full["weight_runs"] - full["input_runs"] == fields["WEIGHT_PASSES"]
    assert plain["weight_runs"] == plain["forward_runs"] == 1


@pytest.mark.parametrize(("plain", "full"), PAIRS)
def test_its_input_and_the_gradients_of_its_outputs_wait(
    plain: dict[str, Any], full: dict[str, Any]
) -> None:
    fields, kept = row_of(full)
    near = STATISTICS * fields["ACT_NONE"]
    assert full["forward_bytes"] == pytest.approx(kept, abs=near)
    assert full["input_bytes"] == pytest.approx(kept + fields["DEFERRED_AGAIN"], abs=near)
    assert plain["input_bytes"] > full["input_bytes"]


@pytest.mark.parametrize(("plain", "full"), PAIRS)
def test_what_the_passes_leave_adds_up(plain: dict[str, Any], full: dict[str, Any]) -> None:
    """Per pass, all that ops without weights keep. Attention on a CPU keeps two copies that fused
    kernels on a device do not: what a layer keeps without recomputation has them too."""
    fields, kept = row_of(full)
    passes = full["weight_runs"] - full["input_runs"]
    copies = plain["forward_bytes"] - fields["ACT_NONE"]
    assert copies == pytest.approx(2 * 4 * full["tokens"] * full["hidden"], rel=0.1)
    measured = full["weight_peak_bytes"] - passes * copies
    assert kept + fields["LEFT_AGAIN"] == pytest.approx(measured, rel=0.02)
