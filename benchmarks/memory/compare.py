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
    "stream_blocks", "gather_buffers", "reduction_block", "first_gather", "idle_forward",
    "idle_logits", "left_blocks", "split_blocks", "routing_fragmentation",
})  # fmt: skip
"""Terms of a prediction that a trace without a device cannot have."""

STATE = ("weights", "optimizer", "buffers")
"""Terms of a prediction that live between steps."""


@dataclass(frozen=True)
class Comparison:
    """Bytes of one rank, predicted and traced."""

    id: str
    rank: int
    peak: tuple[int, int]
    state: tuple[int, int]
    """Weights, optimizer and buffers between steps."""
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
    """One rank's prediction against its trace, of the step without PyTorch's tracker. Where the
    tracker could not run, the state is taken to be what was predicted."""
    terms = {term.name: term.bytes or 0 for term in stage.memory if term.name not in NOT_TRACED}
    predicted = sum(terms.values())
    state = sum(terms.get(name, 0) for name in STATE) - _lasting(trace, stage)
    traced_state, total = state, trace["untracked_peak_bytes"]
    if "peak_bytes" in trace:
        between = trace["between_steps_bytes"]
        traced_state = sum(between[name] for name in ("Sharded Param", "OptState", "Buffer"))
        total -= trace["peak_bytes"]["Inputs"]
    return Comparison(
        id_, trace["case"]["stage"], (predicted, total), (state, traced_state),
        (predicted - state, total - traced_state),
    )  # fmt: skip


def _lasting(trace: Mapping[str, Any], stage: StagePrediction) -> int:
    """16-bit weights that stay gathered through the step: predicted as weights, but not there
    between steps: all, or the unit of tied ends, whose table tp has twice."""
    case = trace["case"]
    layout, model = case["layout"], case["model"]
    unit = again = 0
    if model["tied"] and layout["pp"] == 1 and case["loss"] == "plain":
        table = model["vocab"] // layout["tp"] * model["dim"]
        again = table if layout["tp"] > 1 else 0
        unit = table + model["dim"]
    stays = case["reshard"] == "never" or (layout["pp"] > 1 and case["reshard"] != "always")
    return 2 * ((stage.parameters if stays else unit) + again)


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


def results_page(rows: list[Comparison]) -> str:
    """The page of ``benchmarks/results``."""
    figures = summary(rows)
    return f"""# Memory: predictions beside traces of torchtitan

{len(rows)} traces of one rank of torchtitan 0.3.0 on PyTorch 2.13.0, made without a GPU by
`benchmarks/memory`; its README says what a trace can and cannot show. Traces of whole dense models
are of depths and degrees that the memory model was not developed on. What a pipeline adds (receive
buffers, logits held beside their loss, one reduction per step), reductions in flight beside the
next backward, the weighing of experts' outputs in fp32 and outputs that recomputation makes again
were found with the traces below, and nothing was fitted. The traces named `-deeper` and
`qwen3-30b-a3b-ep8-full` were made after that: nothing was changed for them. Peaks are those of the
step as it is, without PyTorch's tracker. Written by

    python benchmarks/memory/run.py page > benchmarks/results/memory.md

Error of the peak: median {100 * figures["median_error"]:.1f} %, worst \
{100 * figures["worst_error"]:.1f} %. Persistent state (weights, optimizer, buffers) is equal to the
byte, and so are calls and bytes of every collective (`tests/validation/test_torchtitan_traces.py`).
"Rest" is what is not persistent state, as a share of the peak.

{table(rows)}"""
