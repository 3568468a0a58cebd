"""Real requests, their plans and exports side by side: any change of an answer shows in a diff."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.errors import InfeasibleError
from planner.exports.registry import exporter
from planner.pipeline import evaluate, plan, read_request
from planner.plan import round_floats, to_json

FOLDER = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "cases.yaml").read_text())


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, update_golden: bool) -> None:
    case = CASES[name]
    request = read_request(case["model"], case["cluster"], None, case["job"])
    files: dict[str, str] = {}
    if case.get("infeasible"):
        with pytest.raises(InfeasibleError) as caught:
            plan(request)
        assert caught.value.diagnosis is not None
        files["infeasible.json"] = to_json(caught.value.diagnosis)
    else:
        result = plan(request)
        assert result.certificate.status == "optimal"
        assert result.prediction.fits
        files["plan.json"] = to_json(result)
        files["megatron-core.txt"] = exporter("megatron-core")(result).lines()
        if "published" in case:
            files["published.json"] = _published(case["published"], request, result)
    for file, text in files.items():
        _compare(FOLDER / name / file, text, update=update_golden)
    if update_golden:
        return
    kept = {path.name for path in (FOLDER / name).iterdir()}
    assert kept == set(files), "files that no case writes"


def _published(published: dict[str, Any], request: Any, result: Any) -> str:
    """The authors' layout, priced by the same model, beside the planner's."""
    priced = evaluate(request, published["layout"])
    ours, theirs = result.prediction, priced.prediction
    document = {
        "source": published["source"],
        "layout": published["layout"],
        "step_time_s": theirs.step_time_s,
        "mfu": theirs.mfu,
        "max_peak_gib": theirs.max_peak_bytes / 2**30,
        "fits": theirs.fits,
        "planner_step_time_s": ours.step_time_s,
        "planner_is_faster_by": theirs.step_time_s / ours.step_time_s - 1,
        "why": published["why"],
    }
    # A layout of the space cannot beat the proved bound.
    assert not theirs.fits or theirs.step_time_s >= result.certificate.lower_bound_s * (1 - 1e-8)
    return json.dumps(round_floats(document), indent=2) + "\n"


def _compare(path: Path, text: str, *, update: bool) -> None:
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    expected = path.read_text()
    if expected != text:
        lines = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=1
        )
        pytest.fail("\n".join(list(lines)[:60]) + "\n(pytest tests/golden --update-golden)")
