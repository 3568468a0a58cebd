"""Traces of torchtitan's real step (``benchmarks/memory``) against predictions of the same rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.studies.communication import communication

ROOT = Path(__file__).parents[2]
TRACES = json.loads((ROOT / "tests/validation/data/torchtitan_traces.json").read_text())["traces"]

sys.path.insert(0, str(ROOT / "benchmarks" / "memory"))
from cases import cases_of, study_of  # noqa: E402
from compare import NOT_TRACED, collectives, compare, summary  # noqa: E402

sys.path.pop(0)

traced = pytest.mark.parametrize(
    "trace", TRACES, ids=lambda trace: f"{trace['study']['id']}-{trace['case']['stage']}"
)


@traced
def test_two_meters_agree(trace: dict[str, Any]) -> None:
    """PyTorch's tracker and the sum of live storages; the tracker may count the inputs twice."""
    extra = trace["peak_bytes"]["Total"] - trace["live_storages_peak_bytes"]
    assert 0 <= extra <= trace["peak_bytes"]["Inputs"]


@traced
def test_the_study_still_means_what_was_traced(trace: dict[str, Any]) -> None:
    """The planner's layout lowers to the case that the tracer built."""
    study = study_of(trace["study"])
    cases = {case["stage"]: case for case in cases_of(study, study.evaluated().layout)}
    assert cases[trace["case"]["stage"]] == trace["case"]


@traced
def test_collectives_are_the_counted_ones(trace: dict[str, Any]) -> None:
    """Calls and bytes by kind, group and pass, exactly: dense, MLA, experts, cp, pipelines, and
    what recomputation calls again."""
    study = study_of(trace["study"])
    result = study.evaluated()
    expected, counted = collectives(trace, result, communication(study.request, result))
    assert counted == expected


@traced
def test_persistent_state_to_the_byte(trace: dict[str, Any]) -> None:
    """fp32 weights and two moments of the rank's shard; AdamW adds a 4-byte step per tensor."""
    study = study_of(trace["study"])
    stage = study.evaluated().prediction.stages[trace["case"]["stage"]]
    terms = {term.name: term.bytes or 0 for term in stage.memory}
    between = trace["between_steps_bytes"]
    assert terms["optimizer"] == 2 * between["Sharded Param"]
    steps = between["OptState"] - terms["optimizer"]
    assert steps % 4 == 0
    assert 0 < steps // 4 < 30 * study.request.model.layer_count + 10


def test_every_term_is_traced_or_said_not_to_be() -> None:
    """A new term of a prediction must be put on one side."""
    known = {"weights", "gradients", "optimizer", "activations", "working"}
    names = {
        term.name
        for trace in TRACES
        for term in study_of(trace["study"]).evaluated().prediction.stages[0].memory
    }
    assert names <= known | NOT_TRACED


def test_peaks_are_near_the_traced_ones() -> None:
    """Loose: the activations of this stack are not exact yet."""
    rows = []
    for trace in TRACES:
        study = study_of(trace["study"])
        stage = study.evaluated().prediction.stages[trace["case"]["stage"]]
        rows.append(compare(study.id, trace, stage))
    figures = summary(rows)
    assert figures["median_error"] <= 0.15
    assert figures["worst_error"] <= 0.50
