"""Flags shared by the commands, and how their text becomes the keys of a job."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from planner.cli.output import Format
from planner.errors import InputError, did_you_mean

Command: TypeAlias = Callable[..., None]

SCHEDULE_HELP = (
    "gpipe, 1f1b, interleaved, looped_bfs, interleaved_zero_bubble, zbv, dualpipev, 1f1b_vocab_1, "
    "1f1b_vocab_2, 1f1b_interlaced, gpipe_delayed or looped_bfs_delayed."
)
DEGREES = (
    "tp", "cp", "pp", "vpp", "dp_replicate", "dp_shard", "ep", "etp", "microbatch_size",
    "zero_stage", "round_size", "layers_outside",
)  # fmt: skip
"""What ``--fix``, ``--max`` and ``--forbid`` may name (``planner.specs.Degree``)."""

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Catalogue name, config.json, YAML, folder or '-'.")
]
Cluster = Annotated[
    str,
    typer.Argument(
        metavar="CLUSTER", help="Catalogue name, YAML file, NODE_TYPE:NODES such as dgx-h100:128."
    ),
]
Job = Annotated[
    str | None,
    typer.Argument(metavar="JOB", help="YAML file of the job, or '-'.", show_default=False),
]
OutputFormat = Annotated[
    Format | None,
    typer.Option("--format", help="Default: table on a terminal, JSON in a pipe or a file."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write here instead of standard output."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
SeqLen = Annotated[
    str | None, typer.Option("--seq-len", metavar="TOKENS", help="Tokens per sample: 4096, 8Ki.")
]
GlobalBatch = Annotated[
    str | None, typer.Option("--global-batch", metavar="SAMPLES", help="Samples per step.")
]
GlobalBatchTokens = Annotated[
    str | None,
    typer.Option("--global-batch-tokens", metavar="TOKENS", help="Tokens per step: 4M, 4Mi."),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="DTYPE", help="bf16, fp16, fp32, fp8, int8 or nvfp4."),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="NAME",
        help=(
            "adamw, adamw_bf16, sgd, lion, adagrad, rmsprop, novograd, adamax, adadelta, rprop, "
            "adam8bit, adafactor or muon."
        ),
    ),
]
Stack = Annotated[
    str | None, typer.Option("--stack", metavar="NAME", help="Software that runs the plan.")
]
ScheduleCsv = Annotated[
    str | None,
    typer.Option(
        "--schedule-csv",
        metavar="FILE",
        help="Order of work: a row of actions for each pipeline rank, such as 0F0,0F1,0B0,0B1.",
    ),
]
VirtualStages = Annotated[
    str | None,
    typer.Option(
        "--virtual-stages",
        metavar="even|free",
        help="free: any numbers of layers; the best is bounded, not proved. See --time-limit.",
    ),
]
NoRecompute = Annotated[bool, typer.Option("--no-recompute", help="Never recompute activations.")]
Reserve = Annotated[
    str | None,
    typer.Option("--reserve", metavar="BYTES", help="Leave this free on each device: 2GiB."),
]
MemoryMargin = Annotated[
    float | None,
    typer.Option(
        "--memory-margin",
        metavar="SHARE",
        help="Memory to have beyond the predicted peak: 0.1; default: what published runs earn.",
    ),
]
Fix = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="DEGREE=N", help="Fix a degree: tp=8. Repeatable."),
]
Max = Annotated[
    list[str] | None,
    typer.Option("--max", metavar="DEGREE=N", help="Bound a degree: pp=16. Repeatable."),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option("--forbid", metavar="DEGREE", help="Keep a degree at 1. Repeatable."),
]
ScheduleOnly = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help=SCHEDULE_HELP)]
RecomputeOnly = Annotated[
    str | None,
    typer.Option(
        "--recompute",
        metavar="MODE",
        help="Allow only none, selective, full, modules joined by +, or a mode of the stack.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", metavar="GAP", help="Relative gap called optimal; default 0.01."),
]


def takes(group: Callable[..., dict[str, Any]], keyword: str) -> Callable[[Command], Command]:
    """Give a command the flags that ``group`` takes, and what they mean as argument ``keyword``.

    A group is a function from flags, annotated as Typer wants them, to keys of a job. So a flag is
    declared once, whichever commands have it. The flags stand after the argument ``job``.
    """

    def decorate(command: Command) -> Command:
        shared = inspect.signature(group, eval_str=True).parameters
        own = inspect.signature(command, eval_str=True).parameters

        @functools.wraps(command)
        def run(**values: Any) -> None:
            flags = {name: values.pop(name) for name in shared}
            command(**values, **{keyword: group(**flags)})

        merged = [own[name] for name in own if name != keyword]
        after_job = 1 + [p.name for p in merged].index("job")
        merged[after_job:after_job] = shared.values()
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in merged]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def job_flags(
    seq_len: SeqLen = None,
    global_batch: GlobalBatch = None,
    global_batch_tokens: GlobalBatchTokens = None,
    precision: Precision = None,
    optimizer: Optimizer = None,
    stack: Stack = None,
    reserve: Reserve = None,
    memory_margin: MemoryMargin = None,
    schedule_csv: ScheduleCsv = None,
) -> dict[str, Any]:
    """The keys of ``planner.specs.JobSpec`` that the user set.

    Raises :class:`InputError` for text that is not a number.
    """
    if global_batch is not None and global_batch_tokens is not None:
        raise InputError(
            f"--global-batch {global_batch} and --global-batch-tokens {global_batch_tokens} "
            "both set the batch",
            hint="give one of them",
        )
    return given(
        sequence_length=None if seq_len is None else count("--seq-len", seq_len),
        global_batch=None if global_batch is None else count("--global-batch", global_batch),
        global_batch_tokens=(
            None
            if global_batch_tokens is None
            else count("--global-batch-tokens", global_batch_tokens)
        ),
        precision=precision,
        optimizer=optimizer,
        stack=stack,
        memory_margin=memory_margin,
        schedule_csv=schedule_csv,
        memory_reserve_bytes=None if reserve is None else size("--reserve", reserve),
    )


def search_flags(
    fix: Fix = None,
    maximum: Max = None,
    forbid: Forbid = None,
    schedule: ScheduleOnly = None,
    recompute: RecomputeOnly = None,
    no_recompute: NoRecompute = False,
    virtual_stages: VirtualStages = None,
    tolerance: Tolerance = None,
) -> dict[str, Any]:
    """The keys of a job that bound its search, ``constraints`` nested.

    Raises :class:`InputError` for text that is not a degree or ``name=value``.
    """
    if no_recompute and recompute not in (None, "none"):
        raise InputError(
            f"--no-recompute contradicts --recompute {recompute}", hint="give one of them"
        )
    constraints = given(
        fix=_assignments("--fix", fix or ()) or None,
        max=_assignments("--max", maximum or ()) or None,
        forbid=[_degree("--forbid", name) for name in _split(forbid or ())] or None,
        schedule=schedule,
        recompute=recompute,
        virtual_stages=virtual_stages,
    )
    return given(
        allow_recompute=False if no_recompute else None,
        tolerance=tolerance,
        constraints=constraints or None,
    )


def given(**values: Any) -> dict[str, Any]:
    """The values that are set."""
    return {key: value for key, value in values.items() if value is not None}


def check_time_limit(seconds: float | None) -> None:
    """Raise :class:`InputError` for a time limit that is not a positive number."""
    if seconds is not None and not seconds > 0:
        raise InputError(f"--time-limit {seconds:g}: must be more than 0 seconds")


def count(flag: str, text: str, *, least: int = 1, example: str | None = None) -> int:
    """A whole number of at least ``least``, with an optional SI or binary prefix."""
    hint = f"for example {example or flag + ' 4096'}"
    from hardware_profiles.units import UnitError, parse_count

    negative = text.strip().startswith("-")
    try:
        value = parse_count(text.strip().removeprefix("-"))
    except UnitError as error:
        raise InputError(f"{flag}: {error}", hint=hint) from None
    value = -value if negative else value
    if value < least:
        raise InputError(f"{flag} {text}: must be at least {least}", hint=hint)
    return value


def size(flag: str, text: str) -> int:
    """Bytes from text such as ``2GiB``; a bare number counts bytes."""
    from hardware_profiles.units import UnitError, parse_quantity

    if text.strip().startswith("-"):
        raise InputError(f"{flag} {text}: must not be negative", hint=f"for example {flag} 2GiB")
    try:
        return round(parse_quantity(text, base="B"))
    except UnitError as error:
        raise InputError(f"{flag}: {error}", hint=f"for example {flag} 2GiB") from None


def _assignments(flag: str, items: Iterable[str]) -> dict[str, int]:
    values: dict[str, int] = {}
    for item in _split(items):
        name, mark, text = item.partition("=")
        if not mark:
            raise InputError(
                f"{flag} {item}: expected DEGREE=VALUE", hint=f"for example {flag} tp=8"
            )
        name = _degree(flag, name)
        least = 0 if name in ("zero_stage", "layers_outside") else 1
        value = count(f"{flag} {name}", text, least=least, example=f"{flag} {name}=8")
        if values.setdefault(name, value) != value:
            raise InputError(f"{flag} sets {name} to both {values[name]} and {value}")
    return values


def _degree(flag: str, name: str) -> str:
    known = name.strip().replace("-", "_")
    if known not in DEGREES:
        raise InputError(f"{flag}: no degree {name!r}", hint=did_you_mean(known, list(DEGREES)))
    return known


def _split(items: Iterable[str]) -> list[str]:
    return [part for item in items for part in item.split(",") if part.strip()]
