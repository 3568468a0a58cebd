"""``planner export``: a plan as the flags of its target."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import options, output
from planner.cli.documents import read_plan
from planner.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Form(StrEnum):
    """How flags are printed."""

    LINE = "line"
    LINES = "lines"
    JSON = "json"


@app.command()
def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Software to launch: megatron-core, torchtitan.")
    ],
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan as JSON.")] = "-",
    form: Annotated[
        Form,
        typer.Option(
            "--format", help="line for $(...) in a script, lines to read, json with environment."
        ),
    ] = Form.LINE,
    output_file: options.Output = None,
    files: Annotated[
        Path | None,
        typer.Option(
            "--files",
            metavar="FOLDER",
            help="Where to write files that flags name, such as schedule.csv.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the flags that run PLAN (default: standard input) on TARGET.

    The flags describe layout and batch, for megatron-core the model too; data, tokenizer, learning
    rate and checkpoints are the launch script's. Environment variables that the layout needs go to
    standard error, and into the document with --format json. An order of work of one's own is a
    file that the flags name: --files says where to write it; --format json holds its text too.
    """
    from planner.exports.registry import exporter

    write = exporter(target)
    launch = write(read_plan(plan))
    if files is not None:
        launch = launch.placed_in(files)
        for path, text in placed(launch.files, files):
            output.write(text, path)
            typer.echo(f"note: wrote {path}", err=True)
    elif launch.files and form is not Form.JSON:
        names = ", ".join(launch.files)
        raise InputError(
            f"the flags name a file that is not there yet: {names}",
            hint="--files FOLDER writes it there (--files . here); --format json holds its text",
        )
    if form is Form.JSON:
        output.write(json.dumps(launch.as_dict(), indent=2) + "\n", output_file)
        return
    output.write(launch.line() if form is Form.LINE else launch.lines(), output_file)
    for name, value in launch.environment.items():
        typer.echo(f"note: set {name}={value}", err=True)
    for note in launch.notes:
        typer.echo(f"note: {note}", err=True)
    if form is Form.LINE and launch.patterns():
        typer.echo(
            f"note: a shell may expand {', '.join(launch.patterns())}: set -f before $(...), or "
            "planner export --format lines ... | xargs torchrun ...",
            err=True,
        )


def placed(texts: dict[str, str], folder: Path) -> list[tuple[Path, str]]:
    """Where each file goes, without those that are there; raises :class:`InputError` where another
    one is."""
    found = []
    for name, text in texts.items():
        path = folder / name
        if not path.exists():
            found.append((path, text))
        elif path.read_text(encoding="utf-8", errors="replace") != text:
            raise InputError(
                f"{path} is there, with something else in it",
                hint="--files FOLDER: another place for it, or move it away",
            )
    return found
