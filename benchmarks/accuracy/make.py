"""Make the fitted constants and the error bands that ship, and judge them on left-out families.

    python benchmarks/accuracy/make.py            # fit, judge, write results/ and the bands
    python benchmarks/accuracy/make.py --write    # put the constants of results/ into the profiles
    python benchmarks/accuracy/make.py --bands    # and then the runs into their final classes

The fit is that of ``planner calibrate``, with the constants of ``parameters.yaml`` and the runs of
``data/runs.csv``. ``results/left_out.csv`` has every run's prediction by constants fitted without
its family.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import bands
import grounds
import in_place
import numpy as np
import yaml

from planner import accuracy
from planner.accuracy import RunClass
from planner.predict import price, run_class
from planner.studies.calibrate.cases import Case, RunPricer, cases_of
from planner.studies.calibrate.fit import values_at
from planner.studies.calibrate.parameters import Parameter, read_parameters
from planner.studies.calibrate.study import described, judged
from planner.studies.runs import read_runs

HERE = Path(__file__).parent
RUNS = HERE / "data" / "runs.csv"
RESULTS = HERE / "results"
SWEEP = "vtrain-single"
THIN = 6
SOURCE = "benchmarks/accuracy, fitted to published training runs"


def main() -> None:
    """Fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="only put results/fit.yaml into the profiles"
    )
    parser.add_argument(
        "--bands", action="store_true", help="only make the bands of results/left_out.csv again"
    )
    parser.add_argument(
        "--refine", type=int, default=0, help="steps by true evaluation of each fold's own runs"
    )
    arguments = parser.parse_args()
    parameters = read_parameters(HERE / "parameters.yaml")
    if arguments.write:
        write(parameters)
        return
    cases = cases_of(read_runs(RUNS))
    if arguments.bands:
        judge_again(cases)
        return
    pricer = RunPricer(thinned(cases), parameters)
    outcome = judged(pricer, refine=arguments.refine, progress=_say)
    values = values_at(parameters, outcome.fitted.x)
    RESULTS.mkdir(exist_ok=True)
    fitted, left_out = predictions(RunPricer(cases, parameters), values, outcome.left_out.values)
    _judge(cases, fitted, left_out)
    fit = described("published runs", pricer, outcome)
    _dump(RESULTS / "fit.yaml", "Made by make.py.", fit)
    blind = outcome.left_out.values["simumax-b200"]
    peers = {
        "own_constants": grounds.own_constants(cases, parameters),
        "b200_without_own_kernels": grounds.without_own_kernels(cases, parameters, blind),
    }
    _dump(RESULTS / "grounds.yaml", "Made by make.py.", peers)


def write(parameters: Sequence[Parameter]) -> None:
    """Put the constants of ``results/fit.yaml`` into the profiles that ship."""
    document = yaml.safe_load((RESULTS / "fit.yaml").read_text(encoding="utf-8"))
    values = {row["name"]: row["after"] for row in document["constants"]}
    for parameter in parameters:
        for path in in_place.write(parameter, values[parameter.name], SOURCE):
            _say(f"wrote {parameter.name} into {path.name}")


def thinned(cases: Sequence[Case]) -> list[Case]:
    """The cases that are fitted: a sixth of the largest sweep, by model, and all others. A family
    weighs the same with fewer of its runs; all are judged."""
    models = sorted({case.request.model.model_dump_json() for case in cases if _is_sweep(case)})
    kept = set(models[::THIN])
    return [
        case
        for case in cases
        if not _is_sweep(case) or case.request.model.model_dump_json() in kept
    ]


def _is_sweep(case: Case) -> bool:
    return case.source == SWEEP


def predictions(
    pricer: RunPricer, values: Mapping[str, float], left_out: Mapping[str, Mapping[str, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of every run under the fit to all, and under the fit without its family."""
    families = np.array(pricer.families)
    apart = np.full(len(families), np.nan)
    for family, own in left_out.items():
        mine = families == family
        apart[mine] = pricer.residuals(own, mine)[mine]
    return pricer.residuals(values), apart


def _judge(cases: Sequence[Case], fitted: np.ndarray, left_out: np.ndarray) -> None:
    """Write every run's predictions, and the bands of the classes that predictions will ask for:
    those that the shipped constants put a run in."""
    classes = [run_class(price(case.layout, case.request), case.request) for case in cases]
    _write_rows(cases, classes, fitted, left_out)
    made = bands.make(
        classes, left_out, [case.family for case in cases], [case.source for case in cases]
    )
    _dump(accuracy.FILE, "Made by benchmarks/accuracy/make.py from left-out runs.", made)


def judge_again(cases: Sequence[Case]) -> None:
    """The bands again from ``results/left_out.csv``, after the constants were shipped."""
    with (RESULTS / "left_out.csv").open(newline="", encoding="utf-8") as file:
        known = {line["id"]: line for line in csv.DictReader(file)}
    kept = [case for case in cases if case.id in known]
    columns = [
        np.log([float(known[case.id][name]) / case.measured_s for case in kept])
        for name in ("fitted_s", "left_out_s")
    ]
    _judge(kept, *columns)


def zero_shot(cases: Sequence[Case]) -> list[bool]:
    """Whether no other family runs on the case's stack: it was priced as documented."""
    families: dict[str, set[str]] = {}
    for case in cases:
        families.setdefault(case.request.stack.name, set()).add(case.family)
    return [len(families[case.request.stack.name]) == 1 for case in cases]


def _write_rows(
    cases: Sequence[Case], classes: Sequence[RunClass], fitted: np.ndarray, left_out: np.ndarray
) -> None:
    with (RESULTS / "left_out.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ("id", "source", "family", "stack", "device", "precision", "moe", "cp", "devices",
             "launch_share", "layer_s", "tp", "zero_shot", "measured_s", "fitted_s", "left_out_s")
        )  # fmt: skip
        columns = zip(cases, classes, zero_shot(cases), fitted, left_out, strict=True)
        for case, run, alone, own, other in columns:
            times = (case.measured_s * float(np.exp(r)) for r in (0.0, own, other))
            writer.writerow(
                (case.id, case.source, case.family, run.stack, run.device, run.precision,
                 int(run.moe), int(run.context_parallel), run.devices,
                 f"{run.launch_share:.3f}", f"{run.layer_s:.3g}", run.tensor_parallel,
                 int(alone),
                 *(f"{time:.6g}" for time in times))
            )  # fmt: skip


def _dump(path: Path, head: str, document: object) -> None:
    text = yaml.safe_dump(_short(document), sort_keys=False, width=100, allow_unicode=True)
    path.write_text(f"# {head}\n{text}", encoding="utf-8")


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
