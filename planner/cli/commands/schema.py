"""``planner schema``: the JSON Schema of what the planner reads and writes."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli import output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def schema(
    document: Annotated[
        str | None,
        typer.Argument(metavar="DOCUMENT", help="plan, layout, job, model, cluster, ..."),
    ] = None,
) -> None:
    """Print the JSON Schema of DOCUMENT; without one, the names of the documents."""
    from planner.cli.schemas import NAMES, schema_text

    if document is None:
        output.write("".join(f"{name}\n" for name in NAMES))
    else:
        output.write(schema_text(document))
