"""A trace beside the prediction for the same rank, group of categories by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.pipeline import EvaluatedLayout
from planner.plan import StagePrediction
from planner.studies.communication import Communication

NOT_TRACED = frozenset({
    "context", "communicators", "workspace", "fragmentation", "reserve", "margin", "graphs",
})  # fmt: skip
"""Terms of a prediction that a trace without a device cannot have."""

STATE = {"weights": ("Sharded Param",), "optimizer": ("OptState",)}
"""Terms that live between steps, and the tracker's categories for them."""


@dataclass(frozen=True)
class Comparison:
    """Bytes of one rank, predicted and traced."""

    id: str
    rank: int
    peak: tuple[int, int]
    state: tuple[int, int]
    """Weights and optimizer between steps."""
    live: tuple[int, int]
    """Everything else at the peak: activations, gradients, gathered weights, buffers."""

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.peak[0] / self.peak[1] - 1

    @property
    def live_error(self) -> float:
        """Error of what is not state, over the traced peak."""
        return (self.live[0] - self.live[1]) / self.peak[1]


def compare(id_: str, trace: Mapping[str, Any], stage: StagePrediction) -> Comparison:
    """One rank's prediction against its trace."""
    terms = {term.name: term.bytes or 0 for term in stage.memory if term.name not in NOT_TRACED}
    predicted = sum(terms.values())
    state = sum(terms.get(name, 0) for name in STATE)
    peak = trace["peak_bytes"]
    between = trace["between_steps_bytes"]
    traced_state = sum(between[name] for names in STATE.values() for name in names)
    return Comparison(
        id_, trace["case"]["stage"], (predicted, peak["Total"]), (state, traced_state),
        (predicted - state, peak["Total"] - traced_state),
    )  # fmt: skip


Totals = Counter[tuple[str, str, int, str]]
"""Calls and bytes by pass, kind and ranks."""


def collectives(
    trace: Mapping[str, Any], result: EvaluatedLayout, predicted: Communication
) -> tuple[Totals, Totals]:
    """Predicted and traced collectives of a step of the trace's rank.

    Under a pipeline passes are not told apart. The norm of all gradients is the trainer's, which a
    trace does not run.
    """
    pipelined = result.layout.pp > 1
    expected: Totals = Counter()
    for call in predicted.stages[trace["case"]["stage"]]:
        if call.group == "world":
            continue
        share = 1
        if call.phase != "step" and not pipelined:
            share = result.layout.num_microbatches // trace["case"]["microbatches"]
        when = "forward" if call.phase == "forward" else "backward"
        key = ("pipeline" if pipelined else when, call.kind, call.ranks)
        expected[*key, "calls"] += call.count // share
        expected[*key, "bytes"] += call.bytes // share
    counted: Totals = Counter()
    for row in trace["collectives"]:
        key = (row["phase"], row["kind"], row["group_size"])
        counted[*key, "calls"] += row["count"]
        counted[*key, "bytes"] += row["bytes"]
    return expected, counted


def summary(rows: list[Comparison]) -> dict[str, float]:
    """Median and worst absolute errors, of the peak and of what is not state."""
    import statistics

    result = {}
    for name in ("error", "live_error"):
        values = [abs(getattr(row, name)) for row in rows]
        result[f"median_{name}"] = statistics.median(values)
        result[f"worst_{name}"] = max(values)
    return result


def table(rows: list[Comparison]) -> str:
    """A Markdown table, GiB and percent."""
    gib = 2**30
    lines = [
        "| trace | rank | peak GiB, traced | predicted | error | state, traced | predicted | "
        "rest over peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.id} | {row.rank} | {row.peak[1] / gib:.2f} | {row.peak[0] / gib:.2f} | "
        f"{100 * row.error:+.1f} % | {row.state[1] / gib:.3f} | {row.state[0] / gib:.3f} | "
        f"{100 * row.live_error:+.1f} % |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
