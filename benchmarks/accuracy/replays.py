"""Whose step times the largest sweep has: vTrain's own predictor's.

At the release the runs were taken from (VIA-Research/vTrain@f8dda84), ``src/predictor.py`` adds up
one traced step for each hidden size, tensor parallelism and microbatch size (``profile``), an entry
of an all-reduce table for each reduction (``compute_comm_time``: the size in whole MiB) and
``2 x bytes / (bandwidth / 4)`` for each hop of the pipeline (``_compute_p2p_latency``). What the
sweep's steps differ by is compared with those rules, to the nanosecond.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray
from readings import SWEEP, Cell, Step, fused

from planner.studies.calibrate.cases import RunPricer, cases_of
from planner.studies.ranking import regret
from planner.studies.runs import read_runs

SEQUENCE = 1024
VOCABULARY = 50257
BYTES = 2
MIB = 2**20
NS = 1e9
HOP_BYTES_PER_S = 800 * 2**30 / 8 / 4
"""A quarter of ``inter_node_bandwidth`` (``config/validation/single``: 800 Gb/s)."""
WAITING = 0.1
"""A layer waits for the host where launches are at least this share of a predicted step."""
Table = Mapping[tuple[int, int], int]
"""Nanoseconds of an all-reduce by devices and MiB."""


def table_of(path: Path) -> dict[tuple[int, int], int]:
    """The entries of ``trace/a100/AR_GPU*_LUT`` that were copied into ``path``."""
    with path.open(newline="", encoding="utf-8") as file:
        return {(int(e["devices"]), int(e["mib"])): int(e["ns"]) for e in csv.DictReader(file)}


def reductions(found: Sequence[Step]) -> dict[tuple[int, int], list[int]]:
    """What data parallelism adds to a step, in nanoseconds, by devices and MiB of gradients: each
    run with several replicas less the run with one that is its like in all else."""
    alone = {_like(step): step.stated_s for step in found if step.dp == 1}
    added: dict[tuple[int, int], list[int]] = {}
    for step in found:
        if step.dp > 1 and _like(step) in alone:
            more = round(NS * (step.stated_s - alone[_like(step)]))
            added.setdefault((step.dp, _gradient_mib(step)), []).append(more)
    return added


def _like(step: Step) -> tuple[object, ...]:
    return step.cell, step.pp, step.layers, step.microbatches


def _gradient_mib(step: Step) -> int:
    """Gradients of a rank of the first stage, as the predictor lists them."""
    hidden, tp, _ = step.cell
    layer = 12 * hidden**2 // tp + 7 * hidden // tp + 6 * hidden
    embedding = VOCABULARY // tp * hidden
    head = embedding if step.pp == 1 else 0
    numbers = embedding + SEQUENCE * hidden + step.layers * layer + head
    return round(BYTES * numbers / MIB)


def shorter_for_more(
    added: Mapping[tuple[int, int], Sequence[int]],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The neighbouring sizes, as (devices, MiB), of which the larger saves most time."""
    places = [pair for pair in pairwise(sorted(added)) if pair[0][0] == pair[1][0]]
    return min(places, key=lambda pair: added[pair[1]][0] / added[pair[0]][0])


def lines(found: Sequence[Step]) -> dict[tuple[Cell, int], tuple[float, float]]:
    """By cell and stages, one replica: seconds of a step beside layers and microbatches, and of a
    layer and microbatch. Only where the runs are more than a line needs."""
    runs: dict[tuple[Cell, int], list[Step]] = {}
    for step in found:
        if step.dp == 1:
            runs.setdefault((step.cell, step.pp), []).append(step)
    return {place: _line(group) for place, group in runs.items() if _tells(group)}


def hops(fitted: Mapping[tuple[Cell, int], tuple[float, float]]) -> list[float]:
    """What two more stages add to a step beside layers, over the predictor's four hops, minus one:
    for each cell that was run at 2 and at 4 stages."""
    return [
        (fitted[cell, 4][0] - fitted[cell, 2][0]) / (4 * _hop_s(cell)) - 1
        for cell, pp in fitted
        if pp == 2 and (cell, 4) in fitted
    ]


def by_depth(fitted: Mapping[tuple[Cell, int], tuple[float, float]]) -> list[float]:
    """A layer and microbatch in a pipeline, over the same without one, minus one. The predictor
    runs forwards again in all stages but the last, if at all: never where there is one stage."""
    return [
        fitted[cell, pp][1] / fitted[cell, 1][1] - 1
        for cell, pp in fitted
        if pp > 1 and (cell, 1) in fitted
    ]


def _hop_s(cell: Cell) -> float:
    hidden, _, samples = cell
    return 2 * BYTES * samples * SEQUENCE * hidden / HOP_BYTES_PER_S


def _columns(group: Sequence[Step]) -> NDArray[np.float64]:
    return np.array([[1.0, s.layers, s.microbatches, s.microbatches * s.layers] for s in group])


def _tells(group: Sequence[Step]) -> bool:
    """Whether a straight line through the steps is more than the steps themselves."""
    columns = _columns(group)
    return len(group) > columns.shape[1] == int(np.linalg.matrix_rank(columns))


def _line(group: Sequence[Step]) -> tuple[float, float]:
    seconds = np.array([step.stated_s for step in group])
    solved = np.linalg.lstsq(_columns(group), seconds, rcond=None)[0]
    return float(solved[0]), float(solved[-1])


@dataclass(frozen=True)
class Launches:
    """Replays of layers that wait for the host. A traced layer has no collectives, so that all
    launch the same kernels, but for the softmax where it is not fused."""

    cells: tuple[Cell, ...]
    """With a fused softmax."""
    low_s: float
    high_s: float
    equal: dict[Cell, float]
    """Layer times as read, but one time for the same launches: their mean."""


def launches(found: Sequence[Step], read: Mapping[Cell, float], table: Table) -> Launches:
    """``read`` are the layer times of the steps."""
    steps: dict[Cell, list[Step]] = {}
    for step in found:
        steps.setdefault(step.cell, []).append(step)
    shares = {cell: median(s.row.run.launch_share for s in own) for cell, own in steps.items()}
    waiting = [cell for cell, share in shares.items() if share >= WAITING]
    traced = {cell: read[cell] - reduced_s(cell, table) for cell in waiting}
    merged = tuple(cell for cell in waiting if fused(steps[cell][0]))
    equal = dict(read)
    for kind in (merged, tuple(set(waiting) - set(merged))):
        equal.update({c: fmean(traced[a] for a in kind) + reduced_s(c, table) for c in kind})
    own = [traced[cell] for cell in merged]
    return Launches(merged, min(own), max(own), equal)


def regrets_at(
    found: Sequence[Step], read: Mapping[Cell, float], table: Table, kinds: Launches, time_s: float
) -> list[float]:
    """Of the sweeps all of whose layouts wait for the host in the same launches (with a fused
    softmax), what the best costs if those take ``time_s`` and everything else is as read."""
    sweeps: dict[tuple[str, ...], dict[tuple[str, ...], list[Step]]] = {}
    for step in found:
        sweeps.setdefault(step.row.sweep, {}).setdefault(step.row.layout, []).append(step)
    costs = []
    for layouts in sweeps.values():
        cells = {step.cell for own in layouts.values() for step in own}
        if len(layouts) < 2 or not cells <= {*kinds.cells}:
            continue
        moved = {cell: time_s + reduced_s(cell, table) - read[cell] for cell in cells}
        pairs = [
            (
                median(s.row.measured_s + moved[s.cell] * s.replayed for s in own),
                median(s.row.measured_s for s in own),
            )
            for own in layouts.values()
        ]
        costs.append(regret(pairs))
    return costs


def reduced_s(cell: Cell, table: Table) -> float:
    """Two all-reduces of the layer's forward and two of its backward."""
    hidden, tp, samples = cell
    mib = samples * SEQUENCE * hidden * BYTES // MIB
    return 4 * table[tp, mib] / NS if tp > 1 else 0.0


def without_recomputation(found: Sequence[Step], runs: Path) -> list[Step]:
    """The steps as the constants that ship price them if no forward runs again, in place of the
    left-out predictions."""
    stated = [run for run in read_runs(runs) if run.text("source") == SWEEP]
    changed = [replace(run, cells={**run.cells, "recompute": "none"}) for run in stated]
    cases = cases_of(changed)
    ratios = np.exp(RunPricer(cases, ()).residuals({}))
    priced = {c.id: c.measured_s * float(r) for c, r in zip(cases, ratios, strict=True)}
    return [replace(s, row=replace(s.row, left_out_s=priced[s.row.id])) for s in found]
