"""Does the model put measured layouts in the right order?

A sweep is the runs of one release of a source that differ in nothing but their layout: the choice
that a planner makes. Kendall's tau says how well the predicted order agrees with the measured one;
the regret is what taking the best predicted of the measured layouts costs over taking the best
measured one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

SAME = (
    "framework", "layers", "hidden", "heads", "ffn_hidden", "vocab", "experts", "experts_active",
    "seq", "precision", "accelerator", "mem_gb", "gpus", "gpus_per_node", "inter_link", "gbs",
)  # fmt: skip
"""Columns that all runs of a sweep share; what is left is the layout."""
LAYOUT = (
    "tp", "sp", "pp", "vpp", "cp", "cp_kind", "dp", "ep", "etp", "zero_stage", "shard_group", "mbs",
    "schedule", "recompute", "offload", "overlap_notes",
)  # fmt: skip

VERSION = re.compile(r"\d+\.\d+(?:\.\d+)*")


def sweep_of(cell: Callable[[str], str]) -> tuple[str, ...]:
    """What a run shares with the rest of its sweep beside the release; ``cell`` reads a column."""
    return tuple(cell(column) for column in ("source", *SAME))


def release_of(cell: Callable[[str], str]) -> str:
    """The versions that the place of a run names (``source_where``), in order. Between releases of
    a source its software differs too: a layout that came with the next one is not the only cause
    of what it gained."""
    return " ".join(VERSION.findall(cell("source_where")))


def layout_of(cell: Callable[[str], str]) -> tuple[str, ...]:
    """A run's layout columns: repeats of one layout are one entry of a sweep."""
    return tuple(cell(column) for column in LAYOUT)


def ranking(
    runs: Sequence[tuple[tuple[str, ...], tuple[str, ...], float, float]],
) -> dict[str, dict[str, Any]]:
    """By source: ``sweeps``, ``runs``, mean ``tau``, mean and worst ``regret``.

    Each run is (sweep, layout, predicted seconds, measured seconds). Sweeps of fewer than two
    layouts say nothing; tau needs two that differ.
    """
    sweeps: dict[tuple[str, ...], dict[tuple[str, ...], list[tuple[float, float]]]] = {}
    for sweep, layout, predicted, measured in runs:
        sweeps.setdefault(sweep, {}).setdefault(layout, []).append((predicted, measured))
    found: dict[str, list[tuple[int, float | None, float]]] = {}
    for sweep, layouts in sorted(sweeps.items()):
        if len(layouts) < 2:
            continue
        pairs = [
            (median(p for p, _ in times), median(m for _, m in times)) for times in layouts.values()
        ]
        found.setdefault(sweep[0], []).append((len(pairs), kendall_tau(pairs), regret(pairs)))
    return {source: _summary(each) for source, each in found.items()}


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b of (predicted, measured) pairs: ties on either side count for neither; None where one
    side does not vary."""
    agree = one = other = 0
    for (p, m), (q, n) in combinations(pairs, 2):
        a, b = (p > q) - (p < q), (m > n) - (m < n)
        agree += a * b
        one += a != 0
        other += b != 0
    return None if not one or not other else float(agree / (one * other) ** 0.5)


def regret(pairs: Sequence[tuple[float, float]]) -> float:
    """Measured time of the layout predicted best, over the best measured one, minus one."""
    chosen = min(pairs)[1]
    return chosen / min(measured for _, measured in pairs) - 1


def _summary(sweeps: Sequence[tuple[int, float | None, float]]) -> dict[str, Any]:
    taus = [tau for _, tau, _ in sweeps if tau is not None]
    regrets = [each for _, _, each in sweeps]
    return {
        "sweeps": len(sweeps),
        "layouts": sum(count for count, _, _ in sweeps),
        "tau": fmean(taus) if taus else None,
        "mean_regret": fmean(regrets),
        "worst_regret": max(regrets),
    }


def ranking_rows(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Callable[[str], str]]
) -> list[tuple[tuple[str, ...], tuple[str, ...], float, float]]:
    """The scored rows of a validation as input of :func:`ranking`; ``cells`` read their columns."""
    return [
        (
            (*sweep_of(cell), release_of(cell)), layout_of(cell),
            row["predicted_step_time_s"], row["measured_step_time_s"],
        )
        for row, cell in zip(rows, cells, strict=True)
        if row["scored"] and row["measured_step_time_s"]
    ]  # fmt: skip
