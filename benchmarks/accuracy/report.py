"""The accuracy page: predictions beside published runs, and the error under other policies.

    python benchmarks/accuracy/report.py RUNS.csv > benchmarks/results/accuracy.md

``RUNS.csv`` has the columns that ``planner validate`` reads. The page has the errors by family,
source and stack, the worst rows, what was skipped and why, and, for each column that a policy had
to fill, the error of the rows that are silent on it under every other value.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.studies.policy import Cell
from planner.studies.summary import error_of, statistics
from planner.studies.validate import validate

ALTERNATIVES: dict[str, tuple[Cell, ...]] = {
    "recompute": ("none", "selective", "full"),
    "sp": (0, 1),
    "zero_stage": (0, 1, "fsdp"),
    "vocab": (32000, 50257, 51200, 128256),
    "mbs": (1, 2, 4),
    "vpp": (1, 2, 4),
    "tied_embeddings": (0, 1),
    "etp": (1, "tp"),
    "cp_kind": ("p2p", "all_gather", "a2a"),
}
"""Values that a column may have had where a row does not say."""

_STATS = ("n", "median", "mean", "p90", "bias", "worst")


def main() -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description="Write the accuracy page.")
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    path = parser.parse_args().runs
    document = validate(path)
    print("\n".join(page(document, alternatives(path, document))))
    return 0


def page(document: Mapping[str, Any], others: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of the page."""
    summary = document["summary"]
    step = summary["step_time"]
    lines = [
        "# Accuracy",
        "",
        "Predicted over measured step time, minus one. Median, mean and P90 are of absolute",
        "errors, bias is the median of the signed ones.",
        "",
        f"{summary['priced']} of {summary['rows']} runs priced: "
        f"{_percent(summary['share_priced'])} of those that state devices, sequence, layers, "
        "hidden size, a batch and a figure.",
        f"Median over families of the family's median error "
        f"{_percent(step['median_of_family_medians'])}, of its mean error "
        f"{_percent(step['median_of_family_means'])}; "
        f"{_percent(step['in_band'])} of the runs lie in the printed band.",
    ]
    for name in ("family", "source", "stack"):
        lines += ["", f"## By {name}", "", *_errors(name, step[name])]
    lines += ["", "## Peak memory, by source", "", *_errors("source", summary["peak_memory"])]
    lines += ["", "## Worst runs", "", *_table(("run", "error"), _worst(step["worst"]))]
    lines += ["", "## What the policies filled", ""]
    lines += _table(("column", "runs"), _counts(summary["policy_filled"]))
    lines += ["", "## The same runs under other policies", ""]
    lines += ["Only runs that are silent on the column; all else as above.", ""]
    lines += _table(("source", "column", "value", "n", "median", "bias"), others)
    lines += ["", "## Skipped", "", *_table(("reason", "runs"), _counts(summary["skipped"]))]
    return lines


def alternatives(path: Path, document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows (source, column, value, n, median, bias) for the runs silent on each column."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *lines = list(csv.reader(file))
    result: list[tuple[str, ...]] = []
    for column, values in ALTERNATIVES.items():
        silent = [
            index
            for index, row in enumerate(document["rows"])
            if column in row["policy_filled"] and row["scored"]
        ]
        if not silent:
            continue
        text = io.StringIO()
        csv.writer(text).writerows([header, *(lines[index] for index in silent)])
        for value in values:
            rows = validate(text.getvalue(), changes={column: value})["rows"]
            result += _by_source(rows, column, value)
    return sorted(result, key=lambda row: row[:2])


def _by_source(
    rows: Sequence[Mapping[str, Any]], column: str, value: Cell
) -> list[tuple[str, ...]]:
    groups: dict[str, list[float | None]] = {}
    for row in rows:
        groups.setdefault(str(row["source"]), []).append(error_of(dict(row)))
    result = []
    for source, errors in groups.items():
        found = statistics(errors)
        if found is not None:
            shown = (_percent(found["median"]), _percent(found["bias"], sign=True))
            result.append((source, column, str(value), str(found["n"]), *shown))
    return result


def _errors(name: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            key,
            *(
                str(each[stat]) if stat == "n" else _percent(each[stat], sign=stat == "bias")
                for stat in _STATS
            ),
        )
        for key, each in groups.items()
    ]
    return _table((name, *_STATS), rows)


def _worst(worst: Mapping[str, float]) -> list[tuple[str, ...]]:
    return [(name, _percent(error, sign=True)) for name, error in worst.items()]


def _counts(counts: Mapping[str, int]) -> list[tuple[str, ...]]:
    return [(name, str(count)) for name, count in counts.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:+.1f} %" if sign else f"{100 * value:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
