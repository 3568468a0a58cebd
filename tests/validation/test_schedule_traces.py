"""PyTorch's breadth-first and zero-bubble schedules, traced (``benchmarks/memory``), against
predictions of the same rank."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.studies.communication import communication

ROOT = Path(__file__).parents[2]
TRACES = json.loads((ROOT / "tests/validation/data/schedule_traces.json").read_text())["traces"]

sys.path.insert(0, str(ROOT / "benchmarks" / "memory"))
from cases import cases_of, study_of  # noqa: E402
from compare import Comparison, collectives, compare  # noqa: E402

sys.path.pop(0)

traced = pytest.mark.parametrize(
    "trace", TRACES, ids=lambda trace: f"{trace['study']['id']}-{trace['case']['stage']}"
)


def compared(trace: dict[str, Any]) -> Comparison:
    """The trace beside the prediction for its rank."""
    study = study_of(trace["study"])
    stage = study.evaluated().prediction.stages[trace["case"]["stage"]]
    return compare(study.id, trace, stage)


@traced
def test_the_study_still_means_what_was_traced(trace: dict[str, Any]) -> None:
    study = study_of(trace["study"])
    cases = {case["stage"]: case for case in cases_of(study, study.evaluated().layout)}
    assert cases[trace["case"]["stage"]] == trace["case"]


@traced
def test_collectives_are_the_counted_ones(trace: dict[str, Any]) -> None:
    """Also what passes between ranks: nothing at the turn of a V."""
    study = study_of(trace["study"])
    result = study.evaluated()
    expected, counted = collectives(trace, result, communication(study.request, result))
    assert counted == expected


@traced
def test_peaks_are_hardly_ever_under_predicted(trace: dict[str, Any]) -> None:
    """Too high where a rank's largest loss and its most activations come apart, and where PyTorch
    reduces a chunk's gradients before the next chunk has any (breadth-first)."""
    assert -0.04 < compared(trace).error < 0.11


def test_median_error() -> None:
    assert statistics.median(abs(compared(trace).error) for trace in TRACES) < 0.03
