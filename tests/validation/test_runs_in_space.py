"""Published runs are layouts of the stacks that they are read as: nothing that ran is left out."""

from __future__ import annotations

from pathlib import Path

from planner.errors import InputError
from planner.layout_check import check_layout
from planner.studies.runs import SkippedError, read_runs
from planner.studies.validate import prepare

RUNS = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "data" / "runs.csv"
SUMS = "vtrain-single"
"""Step times that a predictor made (``benchmarks/accuracy/replays.py``)."""
SAME_BY_ANOTHER_NAME = "sharding over one rank is ZeRO stage 0"

GONE = {"torchtitan-8491dd60-1": "recomputes all of them or none"}
"""Every second layer again, a mode of 2024 that version 0.3.0 has no more."""


def test_the_space_has_every_published_layout() -> None:
    seen, missing, checked, gone = set(), [], 0, 0
    for run in read_runs(RUNS):
        if run.text("source") == SUMS:
            continue
        try:
            found = prepare(run)
        except SkippedError:
            continue
        layout = found.layout.model_dump_json()
        key = found.request.stack.name, found.request.model.name, layout
        if key in seen:
            continue
        seen.add(key)
        checked += 1
        try:
            check_layout(found.request, found.layout)
        except InputError as error:
            if GONE.get(run.text("id"), "-") in str(error):
                gone += 1
            elif SAME_BY_ANOTHER_NAME not in str(error):
                missing.append(f"{run.text('id')}: {error}")
    assert checked > 300
    assert missing == []
    assert gone == len(GONE)
