"""Predictions beside published measurements: price every run of a file that can be priced.

Each row goes through the same pipeline as ``evaluate``. Which stack ran it, and what the row leaves
out, is decided by the tables in ``planner/studies/policies`` from the row's own columns; the name
of the model, the source and the notes change no prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.layouts import complete_layout
from planner.plan import Layout
from planner.predict import predict, price
from planner.priced import Priced
from planner.request import Request
from planner.studies.machines import cluster_of, machine_columns
from planner.studies.measured import GIB, flops_per_token, has_metric, measured
from planner.studies.policy import Cell, Reading, convention, family_of, reading_of
from planner.studies.published import layout_of, request_of, stages_of
from planner.studies.ranking import ranking, ranking_rows
from planner.studies.runs import Run, SkippedError, read_runs
from planner.studies.summary import summarise

DENOMINATOR = ("gpus", "seq", "layers", "hidden", "gbs")
"""With a metric, what a row must state to count in the share priced."""


def validate(
    source: Path | str,
    *,
    fail_above: float | None = None,
    changes: Mapping[str, Cell] | None = None,
) -> dict[str, Any]:
    """Every run of a CSV file (or CSV text) with its prediction, in order, and a summary.

    ``fail_above`` is a limit on the median absolute step-time error in percent; the summary's
    ``gate`` then says whether it held. ``changes`` replace what the policy fills where a row leaves
    it out: the error under another policy. Raises :class:`InputError` for a file that cannot be
    read.
    """
    runs = read_runs(source)
    rows = [row_of(run, changes) for run in runs]
    summary = summarise(rows, denominator=[_counts(run) for run in runs])
    summary["ranking"] = ranking(ranking_rows(rows, [run.text for run in runs]))
    if fail_above is not None:
        overall = summary["step_time"]["overall"]
        found = overall["median"] * 100 if overall else None
        summary["gate"] = {
            "limit_percent": fail_above,
            "median_percent": found,
            "passed": found is not None and found <= fail_above,
        }
    return {"rows": rows, "summary": summary}


def _counts(run: Run) -> bool:
    return all(run.size(column) for column in DENOMINATOR) and has_metric(run)


def row_of(run: Run, changes: Mapping[str, Cell] | None = None) -> dict[str, Any]:
    """One row of the document."""
    source = run.text("source")
    row: dict[str, Any] = {
        "id": run.text("id") or str(run.row + 1),
        "source": source,
        "family": family_of(source),
        "stack": None,
        "status": "skipped",
        "reason": None,
        "measured_basis": None,
        "policy_filled": [],
        "predicted_step_time_s": None,
        "measured_step_time_s": None,
        "band_s": None,
        "predicted_peak_gib": None,
        "measured_peak_gib": None,
        "formula_peak_gib": None,
        "fits": None,
        "scored": False,
        "warnings": [],
    }
    request = None
    try:
        cluster_of(machine_columns(run))
        reading = reading_of(run, changes)
        row["stack"] = reading.stack
        request = request_of(reading)
        prepared = prepared_of(reading, request)
        priced = price(prepared.layout, request)
    except SkippedError as skipped:
        row["reason"] = str(skipped)
    else:
        row |= _prediction(priced, request, convention("memory", source)["of"])
        row |= {
            "status": "priced",
            "policy_filled": sorted(reading.filled),
            "warnings": prepared.warnings,
        }
    found = measured(run, request)
    utilisation = _utilisation(found.step_time_s, request)
    possible = utilisation is None or utilisation <= 1
    if not possible:
        row["warnings"] = [
            *row["warnings"],
            f"the stated figures imply {utilisation:.0%} of the device's peak: not scored",
        ]
    row |= {
        "measured_basis": found.basis,
        "measured_step_time_s": found.step_time_s,
        "measured_peak_gib": found.peak_gib,
        "formula_peak_gib": found.formula_gib,
        "scored": row["status"] == "priced" and found.scored and possible,
    }
    return row


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can be priced."""

    request: Request
    layout: Layout
    family: str
    warnings: list[str]


def prepare(run: Run, changes: Mapping[str, Cell] | None = None) -> Prepared:
    """The run's request and complete layout. Raises :class:`SkippedError` with the reason."""
    reading = reading_of(run, changes)
    return prepared_of(reading, request_of(reading))


def prepared_of(reading: Reading, request: Request) -> Prepared:
    """As :func:`prepare`, for a run whose request is known."""
    partial, warnings = layout_of(reading, request)
    try:
        layout = complete_layout(partial, request)
    except (InputError, ValueError) as error:
        raise SkippedError(f"layout not defined: {error}") from None
    layout = stages_of(reading, layout, request)
    return Prepared(request, layout, family_of(reading.run.text("source")), warnings)


def counted(run: Run, request: Request) -> float | None:
    """The measured step time in seconds if errors against it count, else None."""
    found = measured(run, request)
    utilisation = _utilisation(found.step_time_s, request)
    return found.step_time_s if found.scored and (utilisation or 0) <= 1 else None


def _utilisation(step_s: float | None, request: Request | None) -> float | None:
    """Causal model FLOPs over the dense peak of the run's precision; above 1 is impossible."""
    if not step_s or request is None:
        return None
    flops = flops_per_token(request, full_attention=False) * request.global_batch * request.sequence
    peak = request.machine.device.peak_flops[request.job.precision].si
    return flops / request.devices / step_s / peak


def _prediction(priced: Priced, request: Request, peak: str) -> dict[str, Any]:
    """What a plan would say of this layout; ``peak`` is which of its peaks the row states."""
    prediction = predict(priced, request)
    peaks = {
        "allocated": prediction.allocated_bytes,
        "reserved": prediction.reserved_bytes,
        "device": prediction.device_bytes,
    }
    return {
        "predicted_step_time_s": prediction.step_time_s,
        "band_s": list(prediction.step_time_band_s),
        "predicted_peak_gib": peaks[peak] / GIB,
        "fits": prediction.fits,
    }
