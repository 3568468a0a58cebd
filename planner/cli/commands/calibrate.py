"""``planner calibrate``: profiles from measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import options, output
from planner.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def calibrate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Runs (CSV), products (CSV) or nccl-tests logs; one kind."
        ),
    ],
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="Whose products these are.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="NAME", help="Where the logs are from: dgx-h100:4."),
    ] = None,
    parameters: Annotated[
        Path | None,
        typer.Option(
            "--parameters", metavar="FILE", help="Constants to fit to runs, with bounds and priors."
        ),
    ] = None,
    profiles: Annotated[
        Path | None,
        typer.Option("--profiles", metavar="FOLDER", help="Write the fitted profiles here."),
    ] = None,
    format_: options.OutputFormat = None,
    output_file: options.Output = None,
    quiet: options.Quiet = False,
) -> None:
    """Fit a device, stack or link to measurements, and say what the fit is worth.

    Runs have the columns of `planner validate`; the constants are bounded, and each family of runs
    is judged by constants fitted without it. Products are a CSV with m, n, k, time_us and, if you
    like, dtype, batch and stage. Logs are those of nccl-tests. The profiles extend what ships:
    give a node's file to --cluster or a stack's to --stack.
    """
    from planner.plan import round_floats
    from planner.studies.calibrate.parameters import read_parameters
    from planner.studies.calibrate.study import calibrate as study

    chosen = read_parameters(parameters) if parameters else None
    if profiles is not None:
        _make(profiles)
    document = study(
        files, device=device, cluster=cluster, parameters=chosen,
        progress=(lambda _: None) if quiet else _say,
    )  # fmt: skip
    if profiles is not None:
        for name, text in document["profiles"].items():
            output.write(text, profiles / name)
    if output.chosen(format_, output_file) is output.Format.JSON:
        output.write(json.dumps(round_floats(document), indent=2) + "\n", output_file)
    else:
        from planner.report.calibration import calibration_table

        output.render(lambda: calibration_table(document, profiles), output_file)


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def _make(folder: Path) -> None:
    """Before the fit, which takes its time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from None
