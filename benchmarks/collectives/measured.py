"""The measured rows and how they are split: some rows are fitted, others only judged."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data" / "measured.csv"
FITTED_IN_NODE = "aic"
"""In a node, every second size of this source is fitted; the rest, and other sources, are not."""
FITTED_ACROSS = (
    ("h100_sxm", "infiniband-ndr", 10),
    ("a100_sxm", "slingshot-11", 2),
    ("b200_sxm", "efa-v4", 4),
    ("h100_sxm", "ndr-sharp", 8),
    ("a100_sxm", "slingshot-11", 8),
    ("a100_sxm", "slingshot-11", 256),
)
"""Across nodes, every second size of these systems (device, network, nodes) is fitted."""
FITTED_WHOLE = ("gb200", "nvl72", 1)
"""System whose few rows all set constants."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; ``payload_bytes`` is the size as nccl-tests defines it."""

    device: str
    network: str
    nodes: int
    devices: int
    collective: str
    algorithm: str
    payload_bytes: int
    time_s: float
    source: str
    fitted: bool


def load() -> list[Row]:
    """All rows, with the split that ``fit.py`` and ``score.py`` share."""
    with DATA.open(newline="") as file:
        raw = list(csv.DictReader(file))
    sizes: dict[tuple[str, ...], set[int]] = {}
    for line in raw:
        sizes.setdefault(_series(line), set()).add(int(line["bytes"]))
    rows = []
    for line in raw:
        nodes, size = int(line["nodes"]), int(line["bytes"])
        even = sorted(sizes[_series(line)]).index(size) % 2 == 0
        system = (line["device"], line["network"], nodes)
        candidate = line["source"] == FITTED_IN_NODE if nodes == 1 else system in FITTED_ACROSS
        rows.append(
            Row(
                device=line["device"],
                network=line["network"],
                nodes=nodes,
                devices=int(line["gpus"]),
                collective=line["collective"],
                algorithm=line["algorithm"],
                payload_bytes=size,
                time_s=float(line["time_us"]) * 1e-6,
                source=line["source"],
                fitted=(candidate and even and line["collective"] != "send_recv")
                or system == FITTED_WHOLE,
            )
        )
    return rows


def _series(line: dict[str, str]) -> tuple[str, ...]:
    keys = ("device", "network", "nodes", "gpus", "collective", "algorithm", "source")
    return tuple(line[key] for key in keys)
