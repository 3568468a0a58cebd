"""Memory margins from published runs: how far measured peaks exceed predicted ones.

    python benchmarks/memory/margins.py RUNS.csv > planner/memory_margin.yaml

``RUNS.csv`` has the columns that ``planner validate`` reads. No constant of the memory model is
fitted to these runs, and runs whose source does not say what was read are left out. The margin of a
group of stacks is the least that covers 95 % of a family, on average; a group needs two families
and twenty runs, else its stacks take the pooled margin. Beside each stands the share of a family's
runs that the margin from the other families covers: what the claim is worth on runs not seen. A
group whose own margin is smaller than the pooled one and worth less on such runs takes the pooled
one: its runs can warn, not reassure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware_profiles.loader import catalog_names, load_stack
from planner.memory_margin import CONFIDENCE
from planner.studies.policy import convention
from planner.studies.validate import validate

LEAST_RUNS, LEAST_FAMILIES = 20, 2
Residuals = Mapping[str, Sequence[float]]
"""Measured over predicted peak, minus one, by family."""


def main() -> int:
    """Print the data file."""
    parser = argparse.ArgumentParser(description="Write the memory margins.")
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    rows = [row for row in validate(parser.parse_args().runs)["rows"] if _judged(row)]
    print("\n".join(document(rows)))
    return 0


def _judged(row: Mapping[str, Any]) -> bool:
    """Whether a row has both peaks, and its source says what it read."""
    stated = not convention("memory", row["source"]).get("assumed", False)
    return bool(stated and row["predicted_peak_gib"] and row["measured_peak_gib"])


def document(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the data file."""
    lines = ["# Made by benchmarks/memory/margins.py: do not edit.", _entry("pooled", rows)]
    lines.append("groups:")
    pooled = _by_family(rows)
    for layout, stacks in sorted(_groups().items()):
        own = [row for row in rows if row["stack"] in stacks]
        residuals = _by_family(own)
        if len(own) < LEAST_RUNS or len(residuals) < LEAST_FAMILIES:
            continue
        smaller = quantile(residuals) < quantile(pooled)
        if smaller and coverage(residuals) < coverage(pooled):
            continue
        lines += [f"  # state layout: {layout}", f"  - stacks: [{', '.join(sorted(stacks))}]"]
        lines += [f"    {line}" for line in _fields(residuals)]
    return lines if len(lines) > 3 else [*lines[:-1], "groups: []"]


def _groups() -> dict[str, list[str]]:
    """Shipped stacks by how they lay out their state."""
    groups: dict[str, list[str]] = {}
    for name in catalog_names("stack"):
        groups.setdefault(load_stack(name).state.layout, []).append(name)
    return groups


def _by_family(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for row in rows:
        residual = row["measured_peak_gib"] / row["predicted_peak_gib"] - 1
        result.setdefault(row["family"], []).append(residual)
    return result


def _entry(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join([f"{name}:", *(f"  {line}" for line in _fields(_by_family(rows)))])


def _fields(residuals: Residuals) -> list[str]:
    runs = sum(len(each) for each in residuals.values())
    margin = quantile(residuals)
    families = ", ".join(f"{name} {len(each)}" for name, each in sorted(residuals.items()))
    left_out = coverage(residuals)
    left = f"{left_out:.0%} of a family left out"
    covers = f"covers {CONFIDENCE:.0%} of a family's measured peaks ({left})"
    return [
        f"margin: {margin:.3f}",
        f"runs: {runs}",
        f"covered_left_out: {left_out:.2f}",
        f'source: "{covers}: {families}"',
    ]


def quantile(residuals: Residuals) -> float:
    """The least margin, at least 0, that covers ``CONFIDENCE`` of a family, on average: families
    count alike, since a run that is planned is of none of them."""
    weighed = sorted((value, 1 / len(each)) for each in residuals.values() for value in each)
    beyond, least = 0.0, weighed[-1][0]
    for value, weight in reversed(weighed):
        least = value
        beyond += weight / len(residuals)
        if beyond > 1 - CONFIDENCE + 1e-9:
            break
    return max(least, 0.0)


def coverage(residuals: Residuals) -> float:
    """Mean over families of the share of runs that the margin of the others covers."""
    if len(residuals) < LEAST_FAMILIES:
        return float("nan")
    shares = []
    for name, each in residuals.items():
        margin = quantile({other: r for other, r in residuals.items() if other != name})
        shares.append(sum(value <= margin for value in each) / len(each))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    sys.exit(main())
