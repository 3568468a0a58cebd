"""Fit the in-node two-protocol constants and write them into ``hardware_profiles/links``.

    python benchmarks/collectives/fit.py [--write] [--ring-norm]

The law is ``t = min(latency + w / ll_bandwidth, simple_latency + w / bandwidth)``, ``w`` the wire
bytes. Minimised: the mean of |log(predicted / measured)|^1.5 over the fitted rows, those of 16 MiB
and more counting twice. The search is a cross-entropy method with a fixed seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from measured import Row, load

ROOT = Path(__file__).parents[2]
LINKS = {
    "nvlink3": ("nvlink3", 1.0, None),
    "nvlink4": ("nvlink4", 1.0, None),
    "nvlink4-h800": ("nvlink4", 200 / 450, "nvlink4, bandwidths times 200/450"),
    "nvlink5": ("nvlink5", 1.0, None),
    "pcie4-x16": ("pcie4", 1.0, "L40S, PCIe 4 through the host"),
}
"""Link: (network of the measurements, factor on the bandwidths, what it is borrowed from)."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
STAND_IN = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "reduce_scatter",
}
"""Whose constants a collective takes at a size where it was not measured: the same wire bytes."""
SOURCE = "aiconfigurator-core 0.12.0 (Apache-2.0) NCCL tables, fitted by benchmarks/collectives"


def fit(rows: list[Row]) -> np.ndarray:
    """``(latency_s, ll_bandwidth, simple_latency_s, bandwidth)`` of rows of one table."""
    n = rows[0].devices
    bus = (n - 1) / n * (2 if rows[0].collective == "all_reduce" else 1)
    wire = np.array([row.payload_bytes * bus for row in rows])
    time = np.array([row.time_s for row in rows])
    weight = np.where([row.payload_bytes >= 2**24 for row in rows], 2.0, 1.0)
    rng = np.random.default_rng(0)
    peak = float(np.max(wire / time))
    mean = np.log([time.min(), peak / 4, 2 * time.min(), peak])
    spread = np.array([0.3, 1.0, 0.7, 0.2])
    best, best_loss = mean, np.inf
    for _ in range(150):
        sample = mean + spread * rng.standard_normal((600, 4))
        sample[0] = best
        a, b, c, d = np.exp(sample[:, :, None]).transpose(1, 0, 2)
        law = np.minimum(a + wire / b, c + wire / d)
        loss = (np.abs(np.log(law / time)) ** 1.5 * weight).sum(axis=1)
        elite = np.argsort(loss)[:40]
        if loss[elite[0]] < best_loss:
            best, best_loss = sample[elite[0]], loss[elite[0]]
        mean = sample[elite].mean(axis=0)
        spread = np.maximum(sample[elite].std(axis=0), 1e-4)
    result: np.ndarray = np.exp(best)
    # The small-message protocol is the one with the lower latency.
    return result if result[0] <= result[2] else result[[2, 3, 0, 1]]


def block(link: str, rows: list[Row]) -> str:
    """The ``collectives:`` part of a link file."""
    network, factor, borrowed = LINKS[link]
    tables: dict[tuple[str, int], tuple[np.ndarray, str | None]] = {}
    chosen = [row for row in rows if row.nodes == 1 and row.network == network and row.fitted]
    for key in sorted({(row.collective, row.devices) for row in chosen}):
        mine = [row for row in chosen if (row.collective, row.devices) == key]
        tables[key] = fit(mine), borrowed
    sizes = sorted({devices for _, devices in tables})
    for collective, other in STAND_IN.items():
        for devices in sizes:
            if (collective, devices) not in tables and (other, devices) in tables:
                note = f"{other}, not measured for {collective} at {devices}"
                constants, _ = tables[other, devices]
                tables[collective, devices] = constants, "; ".join(filter(None, (borrowed, note)))
    lines = ["collectives:"]
    for collective in COLLECTIVES:
        for devices in sizes:
            if (collective, devices) not in tables:
                continue
            (a, b, c, d), origin = tables[collective, devices]
            extra = f", borrowed_from: '{origin}'" if origin else ""
            lines.append(
                f"  - {{collective: {collective}, devices: {devices}, latency_s: {a:.3e}, "
                f"ll_bandwidth: {b * factor:.4e}, simple_latency_s: {c:.3e}, "
                f"bandwidth: {d * factor:.4e}, kind: fitted,\n     source: *source{extra}}}"
            )
    return "\n".join(lines) + "\n"


def scan_ring_norm(rows: list[Row]) -> None:
    """Print the error on the fitted multi-node rows for several values of ``RING_NORM``."""
    import score

    from cost_models import interconnect

    chosen = [
        row
        for row in rows
        if row.fitted and row.nodes > 1 and row.payload_bytes >= 500e6 and score.is_ring(row)
    ]
    for norm in (2, 3, 4, 5, 6, 7, 8, 10, 12):
        interconnect.RING_NORM = float(norm)
        errors = [abs(np.log(score.predict(row) / row.time_s)) for row in chosen]
        sys.stdout.write(f"ring norm {norm}: mean {np.mean(errors):.4f}\n")


def main() -> None:
    """Print the constants of every link, or write them below ``collectives:`` in its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the link files")
    parser.add_argument("--ring-norm", action="store_true", help="scan RING_NORM instead")
    options = parser.parse_args()
    rows = load()
    if options.ring_norm:
        scan_ring_norm(rows)
        return
    for link in LINKS:
        text = block(link, rows)
        if not options.write:
            sys.stdout.write(f"# {link}\n{text}")
            continue
        path = ROOT / "hardware_profiles" / "links" / f"{link}.yaml"
        head = path.read_text().split("collectives:\n")[0]
        path.write_text(head + text.replace("*source", f"&source {SOURCE!r}", 1))


if __name__ == "__main__":
    main()
