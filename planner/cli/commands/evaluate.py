"""``planner evaluate``: the price of layouts that the user names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import options, output
from planner.cli.documents import lines_of, read_stdin
from planner.errors import InputError, PlannerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.pipeline import EvaluatedLayout
    from planner.request import Request
    from planner.studies.communication import Communication

app = typer.Typer(add_completion=False, rich_markup_mode=None)

BAD_LINES = 20
"""A stream that starts with this many lines that are not JSON is not read further."""


@app.command()
@options.takes(options.job_flags, "flags")
def evaluate(
    model: options.Model,
    cluster: options.Cluster,
    job: options.Job = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            metavar="FILE|-",
            help="JSON lines of layouts; prints one line each, in order.",
        ),
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor parallel degree.")] = None,
    sequence_parallel: Annotated[
        bool | None, typer.Option("--sequence-parallel/--no-sequence-parallel", help="Megatron SP.")
    ] = None,
    cp: Annotated[int | None, typer.Option("--cp", help="Context parallel degree.")] = None,
    cp_kind: Annotated[
        str | None,
        typer.Option("--cp-kind", help="p2p, all_gather, a2a, a2a_p2p or a2a_all_gather."),
    ] = None,
    cp_inner: Annotated[
        int | None, typer.Option("--cp-inner", help="Of two levels: ranks that exchange heads.")
    ] = None,
    pp: Annotated[int | None, typer.Option("--pp", help="Pipeline stages.")] = None,
    vpp: Annotated[int | None, typer.Option("--vpp", help="Virtual stages per rank.")] = None,
    ep: Annotated[int | None, typer.Option("--ep", help="Expert parallel degree.")] = None,
    etp: Annotated[int | None, typer.Option("--etp", help="Expert tensor parallel degree.")] = None,
    dp_replicate: Annotated[
        int | None, typer.Option("--dp-replicate", help="Replicas of the sharded group.")
    ] = None,
    dp_shard: Annotated[
        int | None, typer.Option("--dp-shard", help="Default: what the cluster leaves.")
    ] = None,
    microbatch_size: Annotated[
        int | None, typer.Option("--microbatch-size", help="Samples per microbatch.")
    ] = None,
    zero_stage: Annotated[int | None, typer.Option("--zero-stage", help="0 to 3.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help=options.SCHEDULE_HELP)] = None,
    round_size: Annotated[
        int | None,
        typer.Option("--round-size", help="Interleaved: microbatches in a row of a virtual stage."),
    ] = None,
    layers_outside: Annotated[
        int | None,
        typer.Option("--layers-outside", help="Layers outside the pipeline (MaxText)."),
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option("--recompute", help="none, selective, full, or modules joined by +."),
    ] = None,
    comm: Annotated[
        bool,
        typer.Option("--comm", help="Also the collectives: calls and bytes per layer and step."),
    ] = False,
    format_: options.OutputFormat = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Price layouts of MODEL on CLUSTER: one from flags, or many from --layouts.

    With --layouts each JSON object gets one JSON line, in order: status ok, infeasible (with its
    prediction, fits false) or error (with code, message and hint). Exit code 0 when the stream was
    read, 2 when it was not JSON lines.
    """
    named = {
        "tp": tp, "sequence_parallel": sequence_parallel, "cp": cp, "cp_kind": cp_kind,
        "cp_inner": cp_inner, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp,
        "dp_replicate": dp_replicate, "dp_shard": dp_shard,
        "microbatch_size": microbatch_size, "zero_stage": zero_stage, "schedule": schedule,
        "round_size": round_size, "layers_outside": layers_outside, "recompute": recompute,
    }  # fmt: skip
    layout = {key: value for key, value in named.items() if value is not None}
    if layouts is not None and layout:
        flag = "--" + next(iter(layout)).replace("_", "-")
        raise InputError(
            f"{flag} and --layouts both name layouts", hint="give the layout in one of them"
        )

    if layouts == "-" and "-" in (model, cluster, job):
        raise InputError(
            "standard input cannot hold both the layouts and another input",
            hint="put one of them in a file",
        )

    from planner import pipeline

    request = pipeline.read_request(model, cluster, job, flags, stdin=read_stdin)
    output.remark(request.remark)
    if layouts is None:
        _evaluate_one(request, layout, format_, comm=comm)
    else:
        _evaluate_stream(request, layouts, comm=comm)


def _evaluate_one(
    request: Request, layout: dict[str, Any], wanted: output.Format | None, *, comm: bool
) -> None:
    from planner import pipeline
    from planner.plan import Document, round_floats

    result = pipeline.evaluate(request, layout)
    if output.chosen(wanted) is output.Format.JSON:
        documents: dict[str, Document] = {"layout": result.layout, "prediction": result.prediction}
        body: dict[str, Any] = {k: v.model_dump(mode="json") for k, v in documents.items()}
        if comm:
            body["communication"] = _communication(request, result).document()
        output.write(json.dumps(round_floats(body), indent=2) + "\n")
        return
    from planner.report.evaluation import evaluation_table

    output.render(lambda: evaluation_table(result.layout, result.prediction, request.position))
    if comm:
        from planner.report.communication import communication_tables

        found = _communication(request, result)
        output.render(lambda: communication_tables(found.layers, found.stages))


def _communication(request: Request, result: EvaluatedLayout) -> Communication:
    from planner.studies.communication import communication

    return communication(request, result)


def _evaluate_stream(request: Request, reference: str, *, comm: bool) -> None:
    bad = total = 0
    for record, is_json in _records(request, reference, comm=comm):
        output.write(json.dumps(record, separators=(",", ":")) + "\n")
        total += 1
        bad += not is_json
        if bad == total == BAD_LINES:
            break
    if bad:
        where = "standard input" if reference == "-" else reference
        raise InputError(
            f"{where}: {bad} of {total} lines read are not JSON objects",
            hint='give one layout per line, such as {"tp": 8, "pp": 4}',
        )


def _records(
    request: Request, reference: str, *, comm: bool
) -> Iterator[tuple[dict[str, Any], bool]]:
    """One result per line that is not blank, and whether the line was a JSON object."""
    index = 0
    for line in lines_of(reference):
        if not line.strip():
            continue
        yield _record(request, index, line, comm=comm)
        index += 1


def _record(request: Request, index: int, line: str, *, comm: bool) -> tuple[dict[str, Any], bool]:
    record: dict[str, Any] = {"index": index}
    try:
        layout = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _failed(record, "not_json", f"line is not JSON: {error}", None), False
    if not isinstance(layout, dict):
        kind = type(layout).__name__
        return _failed(record, "not_json", f"expected a JSON object, got {kind}", None), False
    if "id" in layout:
        record["id"] = layout.pop("id")

    from hardware_profiles.documents import DocumentError
    from planner import pipeline
    from planner.plan import round_floats

    try:
        result = pipeline.evaluate(request, layout)
    except DocumentError as error:
        return _failed(record, "bad_input", error.message, error.hint), True
    except PlannerError as error:
        return _failed(record, error.code, error.message, error.hint), True
    record["status"] = "ok" if result.prediction.fits else "infeasible"
    record["prediction"] = round_floats(result.prediction.model_dump(mode="json"))
    if comm:
        record["communication"] = _communication(request, result).document()
    return record, True


def _failed(record: dict[str, Any], code: str, message: str, hint: str | None) -> dict[str, Any]:
    return {
        **record,
        "status": "error",
        "error": {"code": code, "message": message, "hint": hint},
    }
