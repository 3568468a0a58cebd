"""Predicted memory beside traces of real software, category by category.

Nothing was fitted to them: what op-by-op PyTorch keeps is in the blocks, what torchtitan and FSDP2
do in the stack's YAML. Persistent state is compared to the byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.request import Request
from planner.specs import JobSpec

TRACES = json.loads((Path(__file__).parent / "data" / "memory_traces.json").read_text())["traces"]
MODELS = {
    "405B": "llama-3.1-405b", "70B": "llama-3.1-70b", "8B": "llama-3.1-8b", "3B": "llama-3.2-3b",
    "1B": "llama-3.2-1b", "14B": "qwen3-14b",
}  # fmt: skip
MEDIAN, WORST = 0.02, 0.06
STATE = ("weights", "optimizer", "buffers")
HELD = (*STATE, "gradients", "activations", "working", "optimizer_update")


@dataclass(frozen=True)
class Compared:
    """A trace beside its prediction, in bytes."""

    trace: dict[str, Any]
    terms: dict[str, int]

    @property
    def total_error(self) -> float:
        """Of all tensors; the tracker's inputs are the batch, which is no activation."""
        peak = self.trace["peak_breakdown_bytes"]
        return sum(self.terms.get(n, 0) for n in HELD) / (peak["Total"] - peak["Inputs"]) - 1

    @property
    def activation_error(self) -> float:
        """Difference of the activations, as a share of the traced total.

        What a loss in pieces leaves until the next step counts as an activation in the trace and
        as a buffer in the prediction.
        """
        peak, end = self.trace["peak_breakdown_bytes"], self.trace["end_breakdown_bytes"]
        traced = peak["Activation"] - end["Activation"]
        return (self.terms["activations"] - traced) / peak["Total"]


def predicted(config: dict[str, Any]) -> dict[str, int]:
    model = read_model(MODELS[config["flavor"]])
    if config["layers"]:
        runs = (model.layers[0].model_copy(update={"count": config["layers"]}),)
        model = model.model_copy(update={"layers": runs})
    tp, replicate = config["tp"], config["dp_replicate"]
    dp = config["world"] // tp
    stack = load_stack("torchtitan-decomposed")
    job = JobSpec(
        sequence_length=config["seq"], global_batch=dp * config["mbs"], stack=stack.name,
        loss="chunked" if config["loss"] == "chunked" else "whole",
    )  # fmt: skip
    request = Request(model, load_cluster(f"dgx-h100:{config['world'] // 8}"), job, stack)
    sharded = 2 if config["reshard"] == "never" else 3
    found = evaluate(
        request,
        {
            "tp": tp, "dp_replicate": replicate, "dp_shard": dp // replicate,
            "zero_stage": sharded, "microbatch_size": config["mbs"],
            "recompute": config["ac"], "sequence_parallel": tp > 1,
        },
    )  # fmt: skip
    return {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}


def name(trace: dict[str, Any]) -> str:
    c = trace["config"]
    return "-".join(
        str(c[k]) for k in ("flavor", "layers", "tp", "ac", "seq", "mbs", "loss", "world")
    )


@pytest.fixture(scope="module")
def compared() -> dict[str, Compared]:
    return {name(t): Compared(t, predicted(t["config"])) for t in TRACES}


@pytest.mark.parametrize("trace", TRACES, ids=name)
def test_each_trace_is_within_the_limit(
    trace: dict[str, Any], compared: dict[str, Compared]
) -> None:
    found = compared[name(trace)]
    assert abs(found.total_error) <= WORST
    assert abs(found.activation_error) <= WORST


def test_the_medians_are_within_the_limit(compared: dict[str, Compared]) -> None:
    assert len(compared) == len(TRACES) == 19
    assert median(abs(c.total_error) for c in compared.values()) <= MEDIAN
    assert median(abs(c.activation_error) for c in compared.values()) <= MEDIAN


@pytest.mark.parametrize("trace", TRACES, ids=name)
def test_persistent_state_is_exact(trace: dict[str, Any], compared: dict[str, Compared]) -> None:
    """Parameters, optimizer state and buffers between steps, to the byte."""
    terms, end = compared[name(trace)].terms, trace["end_breakdown_bytes"]
    found = sum(terms.get(each, 0) for each in STATE)
    if trace["config"]["reshard"] == "never":
        # Predicted as held all step long, resharded when it ends.
        found -= trace["peak_breakdown_bytes"]["Unsharded Param"]
    elif (model := read_model(MODELS[trace["config"]["flavor"]])).tied_embeddings:
        # So is the unit of both ends, in 16 bits.
        assert trace["config"]["tp"] == 1
        found -= 2 * (model.vocab + 1) * model.hidden
    assert found == end["Total"] - end["Inputs"]


@pytest.mark.parametrize("trace", TRACES, ids=name)
def test_the_moment_of_the_peak(trace: dict[str, Any], compared: dict[str, Compared]) -> None:
    terms = compared[name(trace)].terms
    assert (terms.get("optimizer_update", 0) > 0) == trace["peak_in_optimizer_step"]
