"""``planner plan``: the best layout, with its certificate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli import options, output
from planner.cli.documents import read_stdin
from planner.errors import InfeasibleError, LimitReachedError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
@options.takes(options.job_flags, "flags")
@options.takes(options.search_flags, "limits")
def plan(
    model: options.Model,
    cluster: options.Cluster,
    job: options.Job = None,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", metavar="SECONDS", help="Stop the search after this long."),
    ] = None,
    require_optimal: Annotated[
        bool, typer.Option("--require-optimal", help="Exit code 4 unless proven optimal.")
    ] = False,
    format_: options.OutputFormat = None,
    output_file: options.Output = None,
    quiet: options.Quiet = False,
    *,
    flags: dict[str, Any],
    limits: dict[str, Any],
) -> None:
    """Find the best layout of MODEL on CLUSTER, proven under the cost model.

    Exit codes: 0 a plan; 2 bad input; 3 proven infeasible, with the reason; 4 a limit was reached
    without a plan (with --require-optimal: without a proof).
    """
    options.check_time_limit(time_limit)

    from planner import pipeline
    from planner.plan import to_json

    chosen = output.chosen(format_, output_file)
    progress = output.Progress(quiet=quiet)
    request = pipeline.read_request(model, cluster, job, flags | limits, stdin=read_stdin)
    if not quiet:
        output.remark(request.remark)
    try:
        result = pipeline.plan(request, time_limit_s=time_limit, progress=progress)
    except InfeasibleError as error:
        if chosen is output.Format.JSON and error.diagnosis is not None:
            output.write(to_json(error.diagnosis), output_file)
        raise
    finally:
        progress.close()
    if chosen is output.Format.JSON:
        output.write(to_json(result), output_file)
    else:
        from planner.report.plan import plan_table

        output.render(lambda: plan_table(result), output_file)
    certificate = result.certificate
    if require_optimal and certificate.status != "optimal":
        raise LimitReachedError(
            f"the plan is {certificate.status}, not proven optimal: a gap of "
            f"{100 * (certificate.relative_gap or 0):.2g} %, and the tolerance is "
            f"{100 * certificate.tolerance:.2g} %",
            hint=(
                "raise --tolerance, or leave --virtual-stages free out: even ones are proved"
                if request.free_stages
                else "raise --time-limit or --tolerance"
            ),
        )
