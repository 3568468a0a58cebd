"""DeepEP dispatch and combine: ``cost_models.expert_exchange`` against measured kernels.

Of ``data/exchange.csv``, combines of 16 bits in one node with top-6 and more set the links' shares
(every second size); everything else is held out: the other sizes, dispatch in 8 bits, small top-k,
and all runs across nodes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from systems import fabric

from cost_models.expert_exchange import exchange_time_s
from cost_models.ops import Routing

DATA = Path(__file__).parent / "data" / "exchange.csv"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One measured kernel; each rank holds ``tokens`` tokens of ``hidden`` elements."""

    device: str
    nodes: int
    hidden: int
    experts: int
    top_k: int
    tokens: int
    back: bool
    time_s: float
    fitted: bool

    @property
    def group(self) -> int:
        """Ranks: whole nodes of eight, or one tray of four GB200."""
        return 4 if self.device == "gb200" else 8 * self.nodes


def load() -> list[Exchange]:
    """All rows, dispatch and combine apart."""
    with DATA.open(newline="") as file:
        lines = list(csv.DictReader(file))
    sizes = sorted({int(line["tokens"]) for line in lines})
    rows = []
    for line in lines:
        names = ("nodes", "hidden", "experts", "top_k", "tokens")
        nodes, hidden, experts, top_k, tokens = (int(line[name]) for name in names)
        for back, column in ((False, "dispatch_fp8_us"), (True, "combine_us")):
            even = sizes.index(tokens) % 2 == 0 and tokens >= 8192
            fitted = back and nodes == 1 and top_k >= 6 and even and line["device"] != "gb200"
            time = float(line[column]) * 1e-6
            rows.append(
                Exchange(line["device"], nodes, hidden, experts, top_k, tokens, back, time, fitted)
            )
    return rows


def predict(row: Exchange) -> float:
    """Seconds for ``row``: 16 bits back, 8 bits and a scale for every 128 elements out."""
    element = 2.0 if row.back else 1 + 4 / 128
    routing = Routing(
        tokens=row.tokens, row_bytes=round(row.hidden * element), experts=row.experts,
        top_k=row.top_k,
    )  # fmt: skip
    network = "infiniband-ndr" if row.nodes > 1 else "none"
    time = exchange_time_s(
        fabric(row.device, network, row.nodes), "deepep", routing,
        size=np.array([row.group]), stride=np.array([1]), back=row.back,
    )  # fmt: skip
    return float(time[0])


GROUPS: dict[str, Callable[[Exchange], bool]] = {
    "combine in a node, 8 devices, top-6 and more, >= 8,192 tokens": (
        lambda r: r.nodes == 1 and r.group == 8 and r.back and r.top_k >= 6 and r.tokens >= 8192
    ),
    "combine in a node, 8 devices, top-1 and top-2, >= 8,192 tokens": (
        lambda r: r.nodes == 1 and r.group == 8 and r.back and r.top_k <= 2 and r.tokens >= 8192
    ),
    "dispatch in 8 bits in a node, 8 devices, >= 8,192 tokens": (
        lambda r: r.nodes == 1 and r.group == 8 and not r.back and r.tokens >= 8192
    ),
    "in a node, 64 to 1,024 tokens": lambda r: r.nodes == 1 and r.tokens <= 1024,
    "in a tray of 4 GB200, >= 8,192 tokens": lambda r: r.group == 4 and r.tokens >= 8192,
    "across 2 nodes, >= 1,024 tokens": lambda r: r.nodes == 2 and r.tokens >= 1024,
    "across 4 nodes, >= 1,024 tokens": lambda r: r.nodes == 4 and r.tokens >= 1024,
    "across 8 nodes, >= 1,024 tokens": lambda r: r.nodes == 8 and r.tokens >= 1024,
}


def table() -> list[tuple[str, np.ndarray]]:
    """Errors by group, fitted and held out apart."""
    rows = load()
    errors = np.array([predict(row) / row.time_s - 1 for row in rows])
    fitted = np.array([row.fitted for row in rows])
    result = []
    for name, belongs in GROUPS.items():
        inside = np.array([belongs(row) for row in rows])
        for label, chosen in (("fitted", inside & fitted), ("held out", inside & ~fitted)):
            if chosen.any():
                result.append((f"{name} | {label}", errors[chosen]))
    return result
