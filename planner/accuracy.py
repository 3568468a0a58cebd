"""The error band printed beside a prediction: earned on runs that the constants did not see.

``accuracy_bands.yaml``, made by ``benchmarks/accuracy``, holds factors on the predicted step time
between which 80 % of left-out runs lay, for ever narrower classes of runs: of the device family, of
the precision too, and so on. The band is that of the narrowest class that has runs; a device or a
stack without any has the wide band of first encounters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from hardware_profiles.documents import read_document

SHORT_LAYER_S = 0.012
"""Four times what an eager stack's host needs for the ops of a layer, forward and backward."""
HOST_BOUND = {0.3: "host-bound", 0.1: "partly host-bound", 0.01: "at the host's pace"}
"""What a run is called from which share of the step on that is spent waiting for the host."""
FEW = 12
"""Runs below which a class's band is not its own: the wider class's is mixed in."""
FILE = Path(__file__).parent / "accuracy_bands.yaml"


@dataclass(frozen=True, slots=True)
class RunClass:
    """What decides how well a run is predicted."""

    device: str
    precision: str
    stack: str
    moe: bool
    context_parallel: bool
    devices: int
    launch_share: float
    """Share of the predicted step for which the device waits for the host."""
    layer_s: float
    """Work of the busiest rank per layer and microbatch: short layers are near the host's pace."""
    tensor_parallel: int
    """Ranks that wait for each other several times a layer: for the slowest host, if hosts bind."""


@dataclass(frozen=True, slots=True)
class Band:
    """Factors on the predicted step time, and what they were earned on."""

    low: float
    high: float
    source: str


@lru_cache(maxsize=1)
def table() -> Mapping[str, Any]:
    """The shipped bands: ``families`` of devices and stacks, ``classes`` by path."""
    document = read_document(FILE)
    assert isinstance(document, dict)
    return document


def path_of(run: RunClass, families: Mapping[str, Mapping[str, list[str]]]) -> tuple[str, ...]:
    """The run's class from the widest part to the narrowest."""
    bits = {"fp8": "8-bit", "int8": "8-bit", "fp4": "4-bit", "nvfp4": "4-bit"}.get(
        run.precision, "16-bit"
    )
    kind = "MoE" if run.moe else "dense"
    if run.context_parallel:
        kind += " with context parallelism"
    size = next(
        (f"up to {limit} devices" for limit in (8, 128, 1024) if run.devices <= limit),
        "over 1024 devices",
    )
    short = "short layers" if run.layer_s < SHORT_LAYER_S else None
    pace = next((name for share, name in HOST_BOUND.items() if run.launch_share > share), short)
    if pace is not None:
        size += f", {pace}, tp {run.tensor_parallel}"
    device, stack = _family(run.device, families["devices"]), _family(run.stack, families["stacks"])
    return device, bits, kind, stack, size


def band_of(run: RunClass) -> Band:
    """The band of a run's narrowest class that has left-out runs."""
    known = table()
    classes = known["classes"]
    path = path_of(run, known["families"])
    for length in range(len(path), 0, -1):
        found = classes.get(" / ".join(path[:length]))
        if found is not None:
            return Band(found["low"], found["high"], _source(found, path[:length]))
    found = classes["first encounters"]
    return Band(found["low"], found["high"], _source(found, (f"no run on {run.device} was seen",)))


def band(step_s: float, run: RunClass) -> tuple[float, float, str]:
    """Low and high step time in seconds, and what the width was earned on."""
    found = band_of(run)
    return step_s * found.low, step_s * found.high, found.source


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two bands have a step time in common: then the model cannot tell which is faster."""
    return one[0] <= other[1] and other[0] <= one[1]


def _family(name: str, families: Mapping[str, list[str]]) -> str:
    """The family that lists ``name`` (shell patterns), else the name itself."""
    for family, patterns in families.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return family
    return name


def _source(found: Mapping[str, Any], path: tuple[str, ...]) -> str:
    sources = f"{found['sources']} source{'s' if found['sources'] > 1 else ''}"
    few = ", and of their wider class" if found["runs"] < FEW else ""
    kind = ", ".join(path)
    return f"80 % of left-out runs like it ({found['runs']} from {sources}{few}): {kind}"
