"""What the step times of the largest sweep are made of.

A step of ``m`` microbatches on ``pp`` stages of ``L`` layers is about
``a + b L + m h + (m + pp - 1) L c``, where ``c`` is a layer and microbatch: one number for each
hidden size, tensor parallelism and microbatch size (a *cell*). How straight the lines are says
whether the runs were clocked one by one; the layer times say what a ranking rests on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judgement import Row
from numpy.typing import NDArray

from planner.studies.ranking import ranking

SWEEP = "vtrain-single"
FUSED_SOFTMAX = 4
"""Samples times heads of a rank that Megatron's fused softmax takes are multiples of this."""
Cell = tuple[int, int, int]
"""Hidden size, tensor parallelism, microbatch size."""
_PULL = 1.7
"""Relative error for each second that a layer takes once per step: draws it to none where all runs
of a cell have as many microbatches, so that nothing else tells it from what each of them pays."""
_ROUNDS = 3000


@dataclass(frozen=True)
class Step:
    """One run of the sweep."""

    row: Row
    cell: Cell
    heads: int
    layers: float
    """Of a stage."""
    pp: int
    dp: int
    microbatches: float
    stated_s: float
    """The step time with all digits that the source has."""

    @property
    def replayed(self) -> float:
        """How often a layer's time is in the step."""
        return (self.microbatches + self.pp - 1) * self.layers


def steps(rows: Sequence[Row], runs: Path) -> list[Step]:
    """The sweep's runs, with the columns of ``runs``."""
    with runs.open(newline="", encoding="utf-8-sig") as file:
        cells = {line["id"]: line for line in csv.DictReader(file)}
    return [_step(row, cells[row.id]) for row in rows if row.source == SWEEP]


def _step(row: Row, line: Mapping[str, str]) -> Step:
    tp, pp, dp, mbs = (int(float(line[name])) for name in ("tp", "pp", "dp", "mbs"))
    return Step(
        row, (int(float(line["hidden"])), tp, mbs), int(float(line["heads"])),
        float(line["layers"]) / pp, pp, dp, float(line["gbs"]) / (dp * mbs),
        float(line["step_time_s"]),
    )  # fmt: skip


def straightness(found: Sequence[Step]) -> dict[str, float]:
    """Relative distance of runs from the line of their cell and degrees (``a``, ``b``, ``h``, ``c``
    fitted to four runs or fewer than there are): ``runs``, ``median``, ``p90``."""
    off: list[float] = []
    for group in _grouped(found, degrees=True).values():
        if len(group) > 4:
            columns = [[1.0, s.layers, s.microbatches, s.microbatches * s.layers] for s in group]
            measured = np.array([s.row.measured_s for s in group])
            off += np.abs(_relative(np.array(columns), measured)[1]).tolist()
    return {
        "runs": len(off), "median": float(np.median(off)), "p90": float(np.quantile(off, 0.9))
    }  # fmt: skip


def layer_times(found: Sequence[Step], field: str) -> dict[Cell, float]:
    """Seconds of a layer and microbatch by cell, from ``measured_s`` or ``left_out_s``."""
    times = {}
    for (cell, *_), group in _grouped(found, degrees=False).items():
        columns = np.array([_columns(step) for step in group])
        seconds = np.array([getattr(step.row, field) for step in group])
        times[cell] = float(_relative(columns, seconds, pulled=(2, 3))[0][-1])
    return times


def _columns(step: Step) -> list[float]:
    shared, piped = float(step.dp > 1), float(step.pp > 1)
    return [
        1.0, shared, step.layers, shared * step.layers, step.microbatches,
        piped * step.microbatches, step.pp - 1.0, step.replayed,
    ]  # fmt: skip


def _relative(
    columns: NDArray[np.float64], seconds: NDArray[np.float64], pulled: tuple[int, ...] = ()
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least relative squares, and what is left; ``pulled`` are columns drawn to none."""
    scaled = columns / seconds[:, None]
    more = _PULL * np.eye(columns.shape[1])[list(pulled)]
    right = np.concatenate([np.ones(len(seconds)), np.zeros(len(pulled))])
    solved = np.linalg.lstsq(np.concatenate([scaled, more]), right, rcond=1e-10)[0]
    return solved, scaled @ solved - 1.0


def _grouped(found: Sequence[Step], *, degrees: bool) -> dict[tuple[Any, ...], list[Step]]:
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in found:
        key = (step.cell, step.pp, step.dp) if degrees else (step.cell,)
        groups.setdefault(key, []).append(step)
    return groups


def fused(step: Step) -> bool:
    """Whether Megatron's fused softmax takes the step's samples and heads."""
    return step.heads // step.cell[1] * step.cell[2] % FUSED_SOFTMAX == 0


def ordered(found: Sequence[Step]) -> list[tuple[Cell, Cell]]:
    """Pairs of cells of one tensor parallelism of which the second has as much of everything, or
    more, and no kernel that the first lacks."""
    one = {step.cell: fused(step) for step in found}
    return [
        (a, b)
        for a in sorted(one)
        for b in sorted(one)
        if a != b and a[1] == b[1] and a[0] <= b[0] and a[2] <= b[2] and (one[a] or not one[b])
    ]


def nearest_in_order(
    times: Mapping[Cell, float], pairs: Sequence[tuple[Cell, Cell]]
) -> dict[Cell, float]:
    """The layer times nearest to ``times`` (least squared ratios) of which none in ``pairs`` takes
    longer than the one with more work: Dykstra's projections."""
    value = {cell: float(np.log(seconds)) for cell, seconds in times.items()}
    memory = dict.fromkeys(pairs, (0.0, 0.0))
    for _ in range(_ROUNDS):
        for pair in pairs:
            less, more = (value[cell] + kept for cell, kept in zip(pair, memory[pair], strict=True))
            low, high = (less, more) if less <= more else ((less + more) / 2,) * 2
            memory[pair] = (less - low, more - high)
            value[pair[0]], value[pair[1]] = low, high
    return {cell: float(np.exp(each)) for cell, each in value.items()}


def ranked_with(found: Sequence[Step], times: Mapping[Cell, float]) -> dict[str, Any]:
    """The ranking of left-out predictions whose layer times are replaced by ``times``."""
    own = layer_times(found, "left_out_s")
    runs = []
    for step in found:
        moved = (times[step.cell] - own[step.cell]) * _columns(step)[-1]
        row = step.row
        runs.append((row.sweep, row.layout, row.left_out_s + moved, row.measured_s))
    return ranking(runs)[SWEEP]
