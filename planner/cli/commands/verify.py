"""``planner verify``: an independent recheck of a plan."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from planner.cli import options, output
from planner.cli.documents import read_plan
from planner.errors import RefutedError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def verify(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan as JSON, or '-'.")],
    format_: options.OutputFormat = None,
) -> None:
    """Recheck every claim of PLAN without the solver, then replay the search for its counts.

    Exit codes: 0 every claim holds; 2 not a plan; 4 all holds that could be checked, but the bound
    takes too long; 6 refuted, with the findings on standard error.
    """
    document = read_plan(plan)

    from planner.studies.verify import verify as recheck

    findings = recheck(document)
    if output.chosen(format_) is output.Format.JSON:
        output.write(json.dumps({"holds": not findings, "findings": findings}, indent=2) + "\n")
    elif not findings:
        output.write(f"verified: {document.certificate.statement}\n")
    if findings:
        raise RefutedError("\nrefuted: ".join(findings))
