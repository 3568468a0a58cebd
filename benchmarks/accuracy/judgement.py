"""What the left-out predictions say: errors by group, targets, bands, ranking."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import bands as band_maker
import numpy as np

from planner.accuracy import RunClass, path_of
from planner.studies.ranking import layout_of, ranking, release_of, sweep_of
from planner.studies.statistics import statistics

TIERS = ("simumax-b200", "nvidia-dgxc", "llm-foundry", "torchtitan")
"""The most trusted sources (data/README.md, tiers 1 and 2)."""
NAMED: dict[str, tuple[str, ...]] = {
    "simumax-b200": ("simumax-b200",),
    "nvidia-dgxc": ("nvidia-dgxc",),
    "llm-foundry": ("llm-foundry",),
    "torchtitan": ("torchtitan",),
    "korthikanti": ("korthikanti-2205.05198",),
    "megatron-readme-h100": ("megatron-readme-h100",),
    "megatron-ptdp": ("megatron-ptdp",),
    "vtrain": ("vtrain-single", "vtrain-multi"),
    "ml-engineering": ("ml-engineering",),
}
WORST = 15
Shown = Callable[[Mapping[str, Any], str], str]


@dataclass(frozen=True)
class Row:
    """One run with its left-out and its fitted prediction."""

    id: str
    source: str
    family: str
    zero_shot: bool
    run: RunClass
    measured_s: float
    fitted_s: float
    left_out_s: float
    sweep: tuple[str, ...]
    layout: tuple[str, ...]
    release: str
    """The versions that the source's place names: another one ran other software."""

    @property
    def error(self) -> float:
        """Left-out error."""
        return self.left_out_s / self.measured_s - 1

    @property
    def fitted_error(self) -> float:
        """Error of constants that saw the run."""
        return self.fitted_s / self.measured_s - 1


def read(path: Path, runs: Path) -> list[Row]:
    """The rows of ``results/left_out.csv``, with the columns of the runs."""
    with runs.open(newline="", encoding="utf-8-sig") as file:
        cells = {line["id"]: line for line in csv.DictReader(file)}
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(line, cells[line["id"]]) for line in csv.DictReader(file)]


def _row(line: Mapping[str, str], cells: Mapping[str, str]) -> Row:
    def cell(column: str) -> str:
        return cells.get(column, "")

    run = RunClass(
        line["device"], line["precision"], line["stack"], line["moe"] == "1", line["cp"] == "1",
        int(line["devices"]), float(line["launch_share"]), float(line["layer_s"]),
        int(line["tp"]),
    )  # fmt: skip
    times = (float(line[name]) for name in ("measured_s", "fitted_s", "left_out_s"))
    return Row(
        line["id"], line["source"], line["family"], line["zero_shot"] == "1", run, *times,
        sweep_of(cell), layout_of(cell), release_of(cell),
    )  # fmt: skip


def targets(rows: Sequence[Row], share_priced: float) -> list[tuple[str, ...]]:
    """The figures that were asked for, with least and aim."""
    families = _grouped(rows, lambda row: row.family)
    medians = [_errors(each)["median"] for each in families.values()]
    means = [_errors(each)["mean"] for each in families.values()]
    trusted = [row for row in rows if row.source in TIERS]
    table = [
        _target(
            "headline: median over families of the family's median error", 9, 5, median(medians)
        ),
        _target("same, mean inside a family", 12, 7, median(means)),
        _target("P90 over trust tiers 1 and 2", 25, 15, _errors(trusted)["p90"]),
    ]
    for name, sources in NAMED.items():
        own = [row for row in rows if row.source in sources]
        if not own:
            table.append((f"{name}: median", "12 %", "6 %", "not priced", "no"))
            continue
        alone = sum(row.zero_shot for row in own) > len(own) / 2
        found = _errors(own)
        title = f"{name}{' (zero-shot)' if alone else ''}"
        table.append(_target(f"{title}: median", 15 if alone else 12, 6, found["median"]))
        table.append(_target(f"{title}: bias", 8, 3, found["bias"], signed=True))
    table.append(
        ("share of the denominator priced", "92 %", "98 %", f"{100 * share_priced:.1f} %",
         "aim" if share_priced >= 0.98 else "least" if share_priced >= 0.92 else "no")
    )  # fmt: skip
    return table


def _target(
    title: str, least: float, aim: float, value: float, *, signed: bool = False
) -> tuple[str, ...]:
    percent = 100 * value
    size = abs(percent)
    met = "aim" if size <= aim else "least" if size <= least else "no"
    mark = "±" if signed else ""
    shown = f"{percent:+.1f} %" if signed else f"{percent:.1f} %"
    return title, f"{mark}{least} %", f"{mark}{aim} %", shown, met


def by_source(rows: Sequence[Row], stats: Sequence[str], shown: Shown) -> list[tuple[str, ...]]:
    """A table row per source, with how many runs are zero-shot and the fitted error beside."""
    table = []
    for source, each in _grouped(rows, lambda row: row.source).items():
        found, fitted = _errors(each), statistics(row.fitted_error for row in each)
        assert fitted is not None
        alone = sum(row.zero_shot for row in each)
        table.append(
            (source, *(shown(found, stat) for stat in stats), str(alone) if alone else "",
             shown(fitted, "median"), shown(fitted, "bias"))
        )  # fmt: skip
    return table


def by_family(rows: Sequence[Row], stats: Sequence[str], shown: Shown) -> list[tuple[str, ...]]:
    """A table row per family."""
    groups = _grouped(rows, lambda row: row.family)
    return [(name, *(shown(_errors(each), s) for s in stats)) for name, each in groups.items()]


def zero_shot(rows: Sequence[Row], stats: Sequence[str], shown: Shown) -> list[tuple[str, ...]]:
    """A table row per stack that only one family runs on."""
    groups = _grouped([row for row in rows if row.zero_shot], lambda row: row.run.stack)
    return [(name, *(shown(_errors(each), s) for s in stats)) for name, each in groups.items()]


def worst(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The runs with the largest left-out errors."""
    ordered = sorted(rows, key=lambda row: (-abs(row.error), row.id))[:WORST]
    return [(row.id, row.run.stack, f"{100 * row.error:+.1f} %") for row in ordered]


def ranked(rows: Sequence[Row], *, mixed: bool = False) -> dict[str, dict[str, Any]]:
    """The ranking of left-out predictions, by source; ``mixed``: across releases of a source."""
    return ranking(
        [
            ((*row.sweep, "" if mixed else row.release), row.layout, row.left_out_s, row.measured_s)
            for row in rows
        ]
    )


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of the runs of one layout in a sweep over releases, those of its newest release."""
    kept = []
    for each in _layouts(rows).values():
        last = max(_age(row) for row in each)
        kept += [row for row in each if _age(row) == last]
    return kept


def drift(rows: Sequence[Row]) -> dict[str, list[float]]:
    """By source: time of a layout in a sweep over its time one release before, minus one."""
    found: dict[str, list[float]] = {}
    for (source, *_), each in _layouts(rows).items():
        releases = _grouped(each, lambda row: row.release)
        times = [
            median(row.measured_s for row in runs)
            for runs in sorted(releases.values(), key=lambda runs: _age(runs[0]))
        ]
        found.setdefault(source, []).extend(b / a - 1 for a, b in pairwise(times))
    return found


def _layouts(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.sweep, *row.layout), []).append(row)
    return groups


def _age(row: Row) -> tuple[tuple[int, ...], ...]:
    """Orders releases by the versions in their names."""
    return tuple(tuple(int(part) for part in word.split(".")) for word in row.release.split())


def bands(rows: Sequence[Row]) -> dict[str, float]:
    """Coverage and width of the bands; ``nested``: each family by bands made without it."""
    made = _made(rows)
    inside, widths = _judged(rows, made)
    nested, by_family_ = [], []
    for family, each in _grouped(rows, lambda row: row.family).items():
        found, _ = _judged(each, _made([row for row in rows if row.family != family]))
        nested += found
        by_family_.append(fmean(found))
    error = median(abs(row.error) for row in rows)
    return {
        "coverage": fmean(inside),
        "nested": fmean(nested),
        "nested_by_family": fmean(by_family_),
        "half_width": median(widths),
        "median_error": error,
        "ratio": median(widths) / error,
    }


def _made(rows: Sequence[Row]) -> dict[str, Any]:
    residuals = np.log([row.left_out_s / row.measured_s for row in rows])
    return band_maker.make(
        [row.run for row in rows], residuals, [row.family for row in rows],
        [row.source for row in rows],
    )  # fmt: skip


def _judged(rows: Sequence[Row], made: Mapping[str, Any]) -> tuple[list[bool], list[float]]:
    inside, widths = [], []
    for row in rows:
        path = path_of(row.run, made["families"])
        found = made["classes"]["first encounters"]
        for length in range(len(path), 0, -1):
            if " / ".join(path[:length]) in made["classes"]:
                found = made["classes"][" / ".join(path[:length])]
                break
        low, high = row.left_out_s * found["low"], row.left_out_s * found["high"]
        inside.append(low <= row.measured_s <= high)
        widths.append((found["high"] - found["low"]) / 2)
    return inside, widths


def _errors(rows: Sequence[Row]) -> dict[str, Any]:
    found = statistics(row.error for row in rows)
    assert found is not None
    return found


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (key(row), row.id)):
        groups.setdefault(key(row), []).append(row)
    return groups
