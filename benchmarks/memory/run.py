"""Trace training steps of torchtitan without a GPU and compare their memory with predictions.

    python benchmarks/memory/run.py setup
    python benchmarks/memory/run.py trace --studies benchmarks/memory/studies.json --out FILE
    python benchmarks/memory/run.py trace --plan PLAN.json [--depth 4]
    python benchmarks/memory/run.py score FILE [--median 0.02 --worst 0.06]

Exit code 5 when the errors are above the thresholds, a trace differs from the one in --against, or
its collectives from those predicted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment
from cases import Study, cases_of, read_studies, study_of, study_of_plan
from compare import Comparison, collectives, compare, results_page, summary, table

from planner.errors import PlannerError
from planner.studies.communication import communication

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "tests" / "validation" / "data" / "torchtitan_traces.json"
TRACER = HERE / "tracer" / "trace.py"


def main() -> int:
    """Run one command."""
    arguments = _arguments()
    try:
        return int(arguments.run(arguments))
    except PlannerError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=environment.DEFAULT)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("setup", help="make the virtual environment").set_defaults(
        run=lambda a: print(environment.python_of(a.venv)) or 0
    )
    trace = commands.add_parser("trace", help="trace, and compare")
    source = trace.add_mutually_exclusive_group(required=True)
    source.add_argument("--studies", type=Path, help="JSON file of studies")
    source.add_argument("--plan", help="plan document for torchtitan, or '-'")
    trace.add_argument("--only", nargs="*", help="ids of studies")
    trace.add_argument("--depth", type=int, nargs="*", help="layers of each run of equal layers")
    trace.add_argument("--out", type=Path, help="JSON file of traces to add to")
    trace.add_argument("--against", type=Path, help="traces that these must equal")
    _thresholds(trace)
    trace.set_defaults(run=_trace)
    score = commands.add_parser("score", help="compare traces made before")
    score.add_argument("traces", type=Path)
    _thresholds(score)
    score.set_defaults(run=_score)
    page = commands.add_parser("page", help="the results page, of the traces that ship")
    page.add_argument("traces", type=Path, nargs="?", default=SHIPPED)
    page.set_defaults(run=_page)
    return parser.parse_args()


def _page(arguments: argparse.Namespace) -> int:
    print(results_page(score(json.loads(arguments.traces.read_text())["traces"])), end="")
    return 0


def _thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--median", type=float, default=1.0, help="most median error of the peak")
    parser.add_argument("--worst", type=float, default=1.0, help="most error of any peak")


def _trace(arguments: argparse.Namespace) -> int:
    if arguments.plan is None:
        studies = read_studies(arguments.studies)
        entries = {entry["id"]: entry for entry in json.loads(arguments.studies.read_text())}
        studies = [s for s in studies if not arguments.only or s.id in arguments.only]
    else:
        from planner.cli.documents import read_plan

        studies, entries = [study_of_plan(read_plan(arguments.plan), arguments.depth)], {}
    python = environment.python_of(arguments.venv)
    before = _by_key(arguments.against) if arguments.against else {}
    rows: list[Comparison] = []
    same = True
    for study in studies:
        result = study.evaluated()
        predicted = communication(study.request, result)
        for case in cases_of(study, result.layout):
            trace = run_case(python, case)
            expected, counted = collectives(trace, result, predicted)
            same &= _equal(f"{study.id} {case['stage']}: collectives", counted, expected)
            if (study.id, case["stage"]) in before:
                old = before[study.id, case["stage"]]
                for name in ("peak_bytes", "between_steps_bytes", "collectives"):
                    same &= _equal(f"{study.id} {case['stage']}: {name}", trace[name], old[name])
            rows.append(compare(study.id, trace, result.prediction.stages[case["stage"]]))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
            if arguments.out:
                _add(arguments.out, {"study": entries.get(study.id), **trace})
    return _report(rows, arguments) if same else 5


def _equal(what: str, new: Any, old: Any) -> bool:
    if new != old:
        print(f"{what} differ:\n  now {new}\n  expected {old}", file=sys.stderr)
    return bool(new == old)


def _by_key(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    traces = json.loads(path.read_text())["traces"]
    return {(t["study"]["id"], t["case"]["stage"]): t for t in traces}


def run_case(python: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One trace in a process of its own."""
    done = subprocess.run(
        [python, TRACER], input=json.dumps(case), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PlannerError(f"the trace failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _add(path: Path, trace: dict[str, Any]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {"traces": []}
    key = (trace["study"] or {}).get("id"), trace["case"]["stage"]
    kept = [
        t for t in document["traces"]
        if ((t["study"] or {}).get("id"), t["case"]["stage"]) != key
    ]  # fmt: skip
    document["traces"] = sorted(
        [*kept, trace], key=lambda t: ((t["study"] or {}).get("id") or "", t["case"]["stage"])
    )
    path.write_text(json.dumps(document, indent=1) + "\n")


def _score(arguments: argparse.Namespace) -> int:
    return _report(score(json.loads(arguments.traces.read_text())["traces"]), arguments)


def score(traces: list[dict[str, Any]]) -> list[Comparison]:
    """Predictions of today for traces made before."""
    rows = []
    for trace in traces:
        study: Study = study_of(trace["study"])
        stage = study.evaluated().prediction.stages[trace["case"]["stage"]]
        rows.append(compare(study.id, trace, stage))
    return rows


def _report(rows: list[Comparison], arguments: argparse.Namespace) -> int:
    figures = summary(rows)
    print(table(rows))
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {100 * value:.2f} %")
    good = figures["median_error"] <= arguments.median and figures["worst_error"] <= arguments.worst
    return 0 if good else 5


if __name__ == "__main__":
    sys.exit(main())
