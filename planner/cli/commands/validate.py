"""``planner validate``: predictions beside measured runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import options, output
from planner.errors import GateError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Measured runs, one a row.")],
    fail_above: Annotated[
        float | None,
        typer.Option(
            "--fail-above",
            metavar="PCT",
            help="Exit code 5 when the median step-time error is above this, in percent.",
        ),
    ] = None,
    format_: options.OutputFormat = None,
    output_file: options.Output = None,
) -> None:
    """Predict every run of FILE.csv and compare with what was measured.

    Rows that cannot be priced stay in the output with the reason. Exit codes: 0 done; 2 bad input;
    5 the median absolute step-time error is above --fail-above, or no row was priced.
    """
    from planner.plan import round_floats
    from planner.studies import validate as study

    document = study.validate(file)
    if output.chosen(format_, output_file) is output.Format.JSON:
        output.write(json.dumps(round_floats(document), indent=2) + "\n", output_file)
    else:
        from planner.report.validation import validation_table

        output.render(lambda: validation_table(document), output_file)
    if fail_above is not None:
        _gate(document, fail_above)


def _gate(document: dict[str, object], limit_percent: float) -> None:
    from planner.report.validation import step_time_errors

    errors = sorted(abs(error) for _, error in step_time_errors(document))
    if not errors:
        raise GateError("no row has both a predicted and a measured step time")
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    if median * 100 > limit_percent:
        raise GateError(
            f"median step-time error {median * 100:.1f} % of {len(errors)} rows is above "
            f"{limit_percent:g} %"
        )
