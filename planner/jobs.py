"""Read a job: a file, standard input, or nothing, with what the user set beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError, did_you_mean
from planner.schedule_csv import check_actions, with_actions
from planner.specs import DEGREES, JobSpec


def read_job(
    reference: str | None,
    overrides: Mapping[str, Any],
    *,
    stdin: Callable[[], str] | None = None,
) -> JobSpec:
    """The job at ``reference`` (a path, ``-``, or None for defaults) with ``overrides`` on top.

    ``overrides`` hold only fields that were set; ``constraints`` merge key by key. Raises
    :class:`InputError` or ``DocumentError`` with the user's own numbers.
    """
    from hardware_profiles.documents import parse_document, read_document, validate

    where = "job"
    data: object = None
    if reference == "-":
        if stdin is None:
            raise InputError("no standard input to read the job from")
        data, where = parse_document(stdin(), where="standard input"), "standard input"
    elif reference is not None:
        path = Path(reference)
        if not path.exists():
            raise InputError(f"job file {reference} does not exist")
        data, where = read_document(path), reference
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(f"{where} holds a {type(data).__name__}, not a mapping of job fields")
    merged: dict[str, Any] = dict(data)
    for key, value in overrides.items():
        if key == "constraints" and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    if "global_batch" in overrides and "global_batch_tokens" not in overrides:
        merged.pop("global_batch_tokens", None)
    if "global_batch_tokens" in overrides and "global_batch" not in overrides:
        merged.pop("global_batch", None)
    if merged.get("schedule_csv") is not None:
        merged = with_actions(merged)
    job = validate(JobSpec, merged, where=where)
    _check(job)
    return job


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = {**result[key], **value}
        elif key == "forbid":
            result[key] = (*result.get(key, ()), *value)
        else:
            result[key] = value
    return result


def _check(job: JobSpec) -> None:
    limits = job.constraints
    for name in (*limits.fix, *limits.max, *limits.forbid):
        if name not in DEGREES:
            raise InputError(
                f"no degree is called {name!r}",
                hint=did_you_mean(name, list(DEGREES)) or "degrees: " + ", ".join(DEGREES),
            )
    for kind, values in (("fix", limits.fix), ("max", limits.max)):
        for name, value in values.items():
            least = 0 if name == "zero_stage" else 1
            if value < least:
                raise InputError(f"--{kind} {name}={value}: the least is {least}")
            if name == "zero_stage" and value > 3:
                raise InputError(f"--{kind} {name}={value}: the most is 3")
    for name, value in limits.fix.items():
        if name in limits.max and value > limits.max[name]:
            raise InputError(f"--fix {name}={value} contradicts --max {name}={limits.max[name]}")
        if name in limits.forbid and value > 1:
            raise InputError(f"--fix {name}={value} contradicts --forbid {name}")
    check_actions(job)
    if job.global_batch is not None and job.global_batch_tokens is not None:
        sequence = job.sequence_length
        if sequence is None or job.global_batch * sequence != job.global_batch_tokens:
            raise InputError(
                f"global_batch = {job.global_batch} samples and global_batch_tokens = "
                f"{job.global_batch_tokens} are both given",
                hint="give one of them",
            )
