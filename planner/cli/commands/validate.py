"""``planner validate``: predictions beside measured runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    every_row: Annotated[
        bool, typer.Option("--rows", help="Show every priced row, not only the worst.")
    ] = False,
    format_: options.OutputFormat = None,
    output_file: options.Output = None,
) -> None:
    """Predict every run of FILE.csv and compare with what was measured.

    Rows that cannot be priced stay in the output with the reason. Exit codes: 0 done; 2 bad input;
    5 the median absolute step-time error is above --fail-above, or no row was priced.
    """
    from planner.plan import round_floats
    from planner.studies import validate as study

    document = study.validate(file, fail_above=fail_above)
    if output.chosen(format_, output_file) is output.Format.JSON:
        output.write(json.dumps(round_floats(document), indent=2) + "\n", output_file)
    else:
        from planner.report.validation import validation_table

        output.render(lambda: validation_table(document, every_row=every_row), output_file)
    if fail_above is not None:
        _gate(document["summary"]["gate"], fail_above)


def _gate(gate: dict[str, Any], limit_percent: float) -> None:
    found = gate["median_percent"]
    if found is None:
        raise GateError("no row has both a predicted and a measured step time")
    if not gate["passed"]:
        raise GateError(f"the median step-time error of {found:.1f} % is above {limit_percent:g} %")
