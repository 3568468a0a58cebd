"""Score ``cost_models.interconnect`` against published measurements.

    python benchmarks/collectives/score.py [--by-system] [--write]

Errors are |predicted / measured - 1|. ``fitted`` rows set constants, ``held out`` rows did not:
other sizes of the same tables, and every other source and system (shown again on their own).
Exit code 5 when a target is missed on the held-out rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import exchange
import numpy as np
from measured import Row, load
from systems import fabric

from cost_models.interconnect import collective_time_s, send_recv_time_s

RESULTS = Path(__file__).parents[1] / "results" / "collectives.md"

MIB = 2**20


def predict(row: Row) -> float:
    """Seconds for ``row``; groups of fewer devices than a node has leave their share unused."""
    system = fabric(row.device, row.network, row.nodes)
    per_node = row.devices // row.nodes
    stride = system.devices_per_node // per_node if row.nodes > 1 else 1
    if row.collective == "send_recv":
        time = send_recv_time_s(system, row.payload_bytes, stride=stride, size=row.devices)
    else:
        time = collective_time_s(
            system,
            row.collective,  # type: ignore[arg-type]
            row.payload_bytes,
            size=row.devices,
            stride=stride,
        )
    return float(time)


def excluded(row: Row) -> str | None:
    """Why ``row`` is not scored, or ``None``."""
    if row.network == "unidentified":
        return "network not stated"
    if "NVLS off" in row.algorithm or row.algorithm == "nvlstree":
        return "algorithm forced, not the library's choice"
    if row.nodes == 128:
        return "run far below larger ones of the same system"
    return None


def _fabric_class(row: Row) -> bool:
    return (row.network == "slingshot-11" and row.nodes > 2) or row.network == "nvl72"


GROUPS: dict[str, tuple[Callable[[Row], bool], float | None]] = {
    "in a node, >= 16 MiB": (
        lambda r: (
            r.nodes == 1 and r.payload_bytes >= 16 * MIB and is_ring(r) and r.device != "l40s"
        ),
        0.08,
    ),
    "across nodes, >= 512 MB": (
        lambda r: r.nodes > 1 and r.payload_bytes >= 500e6 and is_ring(r) and not _fabric_class(r),
        0.08,
    ),
    "all-to-all in a node, >= 16 MiB": (
        lambda r: (
            r.nodes == 1 and r.payload_bytes >= 16 * MIB and is_all_to_all(r) and r.device != "l40s"
        ),
        0.05,
    ),
    "all-to-all across nodes, >= 512 MB": (
        lambda r: (
            r.nodes > 1 and r.payload_bytes >= 500e6 and is_all_to_all(r) and not _fabric_class(r)
        ),
        0.05,
    ),
    "in a node, < 16 MiB": (
        lambda r: r.nodes == 1 and r.payload_bytes < 16 * MIB and r.device != "l40s",
        None,
    ),
    "across nodes, 16-500 MB": (
        lambda r: (
            r.nodes > 1 and 16e6 <= r.payload_bytes < 500e6 and is_ring(r) and not _fabric_class(r)
        ),
        None,
    ),
    "across nodes, < 16 MB": (
        lambda r: r.nodes > 1 and r.payload_bytes < 16e6 and is_ring(r) and not _fabric_class(r),
        None,
    ),
    "all-to-all across nodes, < 500 MB": (
        lambda r: (
            r.nodes > 1 and r.payload_bytes < 500e6 and is_all_to_all(r) and not _fabric_class(r)
        ),
        None,
    ),
    "PCIe through the host (L40S), >= 16 MiB": (
        lambda r: r.device == "l40s" and r.payload_bytes >= 16 * MIB,
        None,
    ),
    "send-recv in a node": (lambda r: r.nodes == 1 and r.collective == "send_recv", None),
    "send-recv, 2 nodes": (lambda r: r.nodes == 2 and r.collective == "send_recv", None),
    "send-recv, 10 nodes": (lambda r: r.nodes == 10 and r.collective == "send_recv", None),
    "Slingshot, 8 nodes and more, >= 64 MiB": (
        lambda r: r.network == "slingshot-11" and _fabric_class(r) and r.payload_bytes >= 64 * MIB,
        None,
    ),
    "racks of 72 GB200, >= 512 MiB": (lambda r: r.network == "nvl72", None),
}


def is_ring(row: Row) -> bool:
    """Whether rings or trees carry it."""
    return row.collective in ("all_reduce", "all_gather", "reduce_scatter")


def is_all_to_all(row: Row) -> bool:
    """Whether every member sends to every other."""
    return row.collective == "all_to_all"


def _system(row: Row) -> tuple[str, str, int, str]:
    return row.device, row.network, row.nodes, row.source


def _line(name: str, errors: np.ndarray, target: float | None) -> str:
    if errors.size == 0:
        return f"{name:72s} {'-':>5}"
    median, p90 = np.median(np.abs(errors)), np.percentile(np.abs(errors), 90)
    goal = (
        "" if target is None else f"  target {target:.0%} {'met' if median <= target else 'MISSED'}"
    )
    return f"{name:72s} {errors.size:5d} {median:7.1%} {p90:7.1%} {np.median(errors):+7.1%}{goal}"


def table(*, by_system: bool) -> tuple[list[str], bool]:
    """The lines of the table, and whether a target is missed."""
    rows = load()
    reasons = [reason for row in rows if (reason := excluded(row))]
    lines = [f"excluded: {reasons.count(r)} rows: {r}" for r in sorted(set(reasons))]
    scored = [row for row in rows if excluded(row) is None]
    errors = np.array([predict(row) / row.time_s - 1 for row in scored])
    fitted = np.array([row.fitted for row in scored])
    seen = {_system(row) for row in scored if row.fitted}
    unseen = np.array([_system(row) not in seen for row in scored])
    lines.append(f"{'group':72s} {'rows':>5} {'median':>7} {'p90':>7} {'bias':>7}")
    missed = False
    for name, (belongs, target) in GROUPS.items():
        inside = np.array([belongs(row) for row in scored])
        held_out = inside & ~fitted
        lines.append(_line(f"{name} | fitted", errors[inside & fitted], None))
        lines.append(_line(f"{name} | held out", errors[held_out], target))
        lines.append(_line("    of these, systems never fitted", errors[held_out & unseen], None))
        if target is not None and held_out.any():
            missed |= bool(np.median(np.abs(errors[held_out])) > target)
        if by_system:
            lines += _by_system(scored, errors, held_out)
    lines.append("DeepEP kernels")
    lines += [_line(name, found, None) for name, found in exchange.table()]
    return lines, missed


def _by_system(scored: list[Row], errors: np.ndarray, held_out: np.ndarray) -> list[str]:
    keys = [(r.device, r.network, r.nodes, r.devices, r.collective, r.source) for r in scored]
    lines = []
    for key in sorted({k for k, ok in zip(keys, held_out, strict=True) if ok}):
        mine = held_out & np.array([k == key for k in keys])
        lines.append(_line("    " + " ".join(map(str, key)), errors[mine], None))
    return lines


def main() -> None:
    """Print the table; ``--write`` also rewrites ``benchmarks/results/collectives.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by-system", action="store_true", help="one line per system as well")
    parser.add_argument("--write", action="store_true", help="rewrite the results page")
    options = parser.parse_args()
    lines, missed = table(by_system=options.by_system)
    sys.stdout.write("\n".join(lines) + "\n")
    if options.write:
        RESULTS.write_text(
            "# Collectives: model against measurement\n\n"
            "Made by `python benchmarks/collectives/score.py --write`; what is fitted and what is\n"
            "held out is in `benchmarks/collectives/README.md`. Errors are |predicted / measured\n"
            "- 1|; the bias is signed.\n\n```\n" + "\n".join(lines) + "\n```\n"
        )
    sys.exit(5 if missed else 0)


if __name__ == "__main__":
    main()
