"""``planner export``: a plan as the flags of its target."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from planner.cli import options, output
from planner.cli.documents import read_plan

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Form(StrEnum):
    """How flags are printed."""

    LINE = "line"
    LINES = "lines"
    JSON = "json"


@app.command()
def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Software to launch: megatron-core.")
    ],
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan as JSON.")] = "-",
    form: Annotated[
        Form,
        typer.Option(
            "--format", help="line for $(...) in a script, lines to read, json with environment."
        ),
    ] = Form.LINE,
    output_file: options.Output = None,
) -> None:
    """Print the flags that run PLAN (default: standard input) on TARGET.

    The flags describe model, layout and batch; data, tokenizer, learning rate and checkpoints are
    the launch script's. Environment variables that the layout needs go to standard error, and
    into the document with --format json.
    """
    from planner.exports.registry import exporter

    write = exporter(target)
    launch = write(read_plan(plan))
    if form is Form.JSON:
        output.write(json.dumps(launch.as_dict(), indent=2) + "\n", output_file)
        return
    output.write(launch.line() if form is Form.LINE else launch.lines(), output_file)
    for name, value in launch.environment.items():
        typer.echo(f"note: set {name}={value}", err=True)
    for note in launch.notes:
        typer.echo(f"note: {note}", err=True)
