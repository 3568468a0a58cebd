"""Error bands from left-out residuals, for classes of runs from wide to narrow.

A class is a prefix of ``planner.accuracy.path_of``: device family, precision, kind of model, stack,
size. Its band is the narrowest that holds a share of the residuals, so large that all bands
together hold 80 % of all runs; few runs are mixed with the wider class's band. Families weigh the
same in all but the narrowest class. The band of first encounters, for devices and stacks without
runs, is that of families judged on a device or a stack that no other family has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planner.accuracy import FEW, RunClass, path_of

SHARE = 0.78
"""Of a class's residuals: least widths, mixing and the prediction itself, which is always inside,
widen bands until they hold 80 % and a little more (``results/accuracy.md`` has the figure)."""
LIGHTER = 0.03
"""Least share of the residuals beyond either end of a band."""
MIXED = 4
"""Runs whose weight the wider class has."""
LEAST = 0.02
"""Narrowest half of a band: repeats of one configuration differ by that."""

FAMILIES = {
    "devices": {
        "A100": ["a100-*", "a800-*"],
        "Hopper": ["h100-*", "h200-*", "h800-*", "h20-*", "gh200"],
        "Blackwell": ["b200-*", "gb200", "gb300", "b300-*"],
        "V100": ["v100-*"],
        "TPU": ["tpu-*"],
        "Ascend": ["ascend-*"],
    },
    "stacks": {
        "Megatron before Transformer Engine": [
            "megatron-lm-202*", "megatron-deepspeed*", "deepspeed-zero3-2021",
        ],
        "Megatron-Core": [
            "megatron-core*", "nemo", "nemo-fp8", "nemo-flash2", "nemo-fp8-flash2",
            "nemo-*bf16-gradients", "megatron-bridge*",
        ],
        "FSDP": ["torchtitan*", "llm-foundry*", "fms-fsdp", "nemo-automodel*", "meta-llama3"],
        "DeepSpeed": ["deepspeed-hf"],
        "MaxText": ["maxtext-*"],
    },
}  # fmt: skip


def make(
    classes: Sequence[RunClass], residuals: np.ndarray, families: Sequence[str],
    sources: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """``planner/accuracy_bands.yaml`` as a document; ``residuals`` are log(predicted/measured)."""
    paths = [path_of(each, FAMILIES) for each in classes]
    names, labels = np.array(families), np.array(sources)
    made: dict[str, dict[str, Any]] = {}
    limits: dict[tuple[str, ...], tuple[float, float]] = {}
    first = first_encounters(paths, families)
    limits[()] = quantiles(residuals, even(names))
    prefixes = {path[:n] for path in paths for n in range(1, len(path) + 1)}
    for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix)):
        inside = np.array([path[: len(prefix)] == prefix for path in paths])
        found = residuals[inside]
        narrow = len(prefix) == len(paths[0])
        weights = np.ones(len(found)) if narrow else even(names[inside])
        own, wider = quantiles(found, weights), limits[prefix[:-1]]
        share = len(found) / (len(found) + MIXED)
        low, high = (share * a + (1 - share) * b for a, b in zip(own, wider, strict=True))
        if len(found) < FEW and len(set(names[inside])) == 1:
            # Few runs of one team share what the team had: they can warn, not reassure.
            low, high = min(low, wider[0]), max(high, wider[1])
        limits[prefix] = low, high
        made[" / ".join(prefix)] = entry(limits[prefix], found, labels[inside])
    made["first encounters"] = entry(
        quantiles(residuals[first], even(names[first])), residuals[first], labels[first]
    )
    return {"families": FAMILIES, "classes": made}


def entry(limits: tuple[float, float], residuals: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Factors on the prediction; the prediction itself is always inside."""
    low, high = min(limits[0], -LEAST), max(limits[1], LEAST)
    return {
        "low": float(np.exp(-high)),
        "high": float(np.exp(-low)),
        "runs": len(residuals),
        "sources": len(set(labels)),
    }


def even(names: np.ndarray) -> np.ndarray:
    """Weights under which each family counts the same."""
    return np.array([1 / np.sum(names == name) for name in names])


def quantiles(residuals: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The narrowest interval that holds ``SHARE`` of the weighted residuals, with at least
    ``LIGHTER`` of them beyond either end: they are skewed, and equal tails would widen it."""
    order = np.argsort(residuals)
    at = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    below = np.linspace(LIGHTER, 1 - SHARE - LIGHTER, 15)
    low, high = (np.interp(tail, at, residuals[order]) for tail in (below, below + SHARE))
    least = int(np.argmin(high - low))
    return float(low[least]), float(high[least])


def first_encounters(paths: Sequence[tuple[str, ...]], names: Sequence[str]) -> np.ndarray:
    """Runs for which no other family ran on their device family, or none on their stack family."""
    seen: dict[str, set[str]] = {}
    for path, name in zip(paths, names, strict=True):
        seen.setdefault(path[0], set()).add(name)
        seen.setdefault(path[3], set()).add(name)
    return np.array([len(seen[path[0]]) == 1 or len(seen[path[3]]) == 1 for path in paths])
