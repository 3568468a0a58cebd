"""What a run measured: its step time, by the source's own conventions, and its peak memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.lowering import lower
from planner.request import Request
from planner.studies.policy import convention, pattern, table
from planner.studies.runs import METRICS, Run

GIB = 1024**3
_UNITS = {"GiB": GIB, "GB": 1e9}


@dataclass(frozen=True, slots=True)
class Measured:
    """``basis`` names the column that gave the time, and the FLOP convention where one was used."""

    step_time_s: float | None = None
    basis: str | None = None
    peak_gib: float | None = None
    formula_gib: float | None = None
    """A peak that the source computed by a formula of its own."""
    scored: bool = True
    """False where the figure is not of a full training step, or of other dimensions than stated."""


def has_metric(run: Run) -> bool:
    """Whether the run states a time or something that gives one."""
    return any(run.number(column) for column in METRICS)


def measured(run: Run, request: Request | None = None) -> Measured:
    """The run's figures; a rate in FLOP/s needs ``request`` to become a time."""
    time, basis = _step_time(run, request)
    if any(_named(run, rule) for rule in table("conventions")["not_scored"]):
        return Measured(time, basis, scored=False)
    return Measured(time, basis, _peak_gib(run, "reading"), _peak_gib(run, "formula"))


def _named(run: Run, rule: dict[str, Any]) -> bool:
    """Whether one of the rule's columns holds what it looks for."""
    return any(
        pattern(rule["match"]).search(run.text(column).lower()) for column in rule["columns"]
    )


def _step_time(run: Run, request: Request | None) -> tuple[float | None, str | None]:
    stated = run.number("step_time_s")
    if stated:
        basis = run.text("step_time_basis")
        return stated, f"step_time_s:{basis}" if basis else "step_time_s"
    if run.number("iter_s"):
        return run.number("iter_s"), "iter_s"
    gpus, batch, sequence = run.number("gpus"), run.number("gbs"), run.number("seq")
    rate = run.number("tokens_per_s_per_gpu")
    if rate and gpus and batch and sequence:
        return batch * sequence / (rate * gpus), "tokens_per_s_per_gpu"
    if request is None:
        return None, None
    rule = convention("flops", run.text("source"))
    attention = rule["attention"]
    flops = flops_per_token(request, full_attention=attention == "full")
    flops *= request.global_batch * request.sequence / request.devices
    tflops, mfu = run.number("tflops_per_gpu_model"), run.number("mfu")
    if tflops:
        return flops / (tflops * 1e12), f"tflops_per_gpu_model:{attention}"
    if mfu:
        name = request.job.precision if rule["peak"] == "run" else rule["peak"]
        peak = request.machine.device.peak_flops[name].si
        return flops / (mfu / 100 * peak), f"mfu:{attention}:{name}"
    return None, None


def flops_per_token(request: Request, *, full_attention: bool) -> float:
    """Model FLOPs per token. Causal attention is linear in the sequence, so all pairs of a
    sequence are the causal pairs of one twice as long."""
    length = request.sequence * (2 if full_attention else 1)
    job = request.job.model_copy(update={"sequence_length": length})
    graph = lower(request.model, job, request.stack, request.machine.device)
    return graph.model_flops_per_token


def _peak_gib(run: Run, meaning: str) -> float | None:
    stated = run.number("mem_gib")
    rule = convention("memory", run.text("source"))
    if stated is None or rule["meaning"] != meaning:
        return None
    return stated * _UNITS[rule["unit"]] / GIB
