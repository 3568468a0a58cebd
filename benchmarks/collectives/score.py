"""Score ``cost_models.interconnect`` against published measurements.

    python benchmarks/collectives/score.py [--by-system]

Errors are |predicted / measured - 1|. ``fitted`` rows set constants, ``held out`` rows did not:
other sizes of the same tables, and every other source and system (shown again on their own).
Exit code 5 when a target is missed on the held-out rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from measured import Row, load

from cost_models.fabric import Fabric, link_numbers
from cost_models.interconnect import collective_time_s, send_recv_time_s
from hardware_profiles.loader import load_link

PORTS = {
    "infiniband-ndr": (8, 8),
    "ndr-sharp": (8, 8),
    "infiniband-hdr": (8, 8),
    "efa-v3": (8, 16),
    "efa-v4": (8, 8),
    "slingshot-11": (4, 2),
}
"""Devices and ports per node of the systems measured across nodes."""
UP = {"a100_sxm": "nvlink3", "h100_sxm": "nvlink4", "h200_sxm": "nvlink4", "b200_sxm": "nvlink5"}
MIB = 2**20


@lru_cache
def fabric(device: str, network: str, nodes: int) -> Fabric:
    """The measured system as the cost model sees it."""
    devices, ports = PORTS.get(network, (8, 1))
    up = "pcie4-x16" if device == "l40s" else UP[device]
    plain = network if nodes > 1 else "infiniband-ndr"
    out = {"ndr-sharp": "infiniband-ndr-sharp"}.get(network, plain)
    return Fabric(
        nodes=nodes,
        devices_per_node=devices,
        ports_per_node=ports,
        nics=ports,
        scale_up=link_numbers(load_link(up)),
        scale_out=link_numbers(load_link(out)),
        tiers=(),
    )


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
    return row.network == "slingshot-11" and row.nodes > 2


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
        lambda r: _fabric_class(r) and r.payload_bytes >= 64 * MIB,
        None,
    ),
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
        return f"{name:58s} {'-':>5}"
    median, p90 = np.median(np.abs(errors)), np.percentile(np.abs(errors), 90)
    goal = (
        "" if target is None else f"  target {target:.0%} {'met' if median <= target else 'MISSED'}"
    )
    return f"{name:58s} {errors.size:5d} {median:7.1%} {p90:7.1%} {np.median(errors):+7.1%}{goal}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by-system", action="store_true", help="one line per system as well")
    options = parser.parse_args()
    rows = load()
    reasons = [reason for row in rows if (reason := excluded(row))]
    for reason in sorted(set(reasons)):
        sys.stdout.write(f"excluded: {reasons.count(reason)} rows: {reason}\n")
    scored = [row for row in rows if excluded(row) is None]
    errors = np.array([predict(row) / row.time_s - 1 for row in scored])
    sys.stdout.write(f"{'group':58s} {'rows':>5} {'median':>7} {'p90':>7} {'bias':>7}\n")
    seen = {_system(row) for row in scored if row.fitted}
    missed = False
    for name, (belongs, target) in GROUPS.items():
        inside = np.array([belongs(row) for row in scored])
        held_out = inside & np.array([not row.fitted for row in scored])
        sys.stdout.write(_line(f"{name} | fitted", errors[inside & ~held_out], None) + "\n")
        sys.stdout.write(_line(f"{name} | held out", errors[held_out], target) + "\n")
        unseen = held_out & np.array([_system(row) not in seen for row in scored])
        sys.stdout.write(
            _line("    of these, systems and sources never fitted", errors[unseen], None)
        )
        sys.stdout.write("\n")
        if target is not None and held_out.any():
            missed |= bool(np.median(np.abs(errors[held_out])) > target)
        if options.by_system:
            keys = [
                (r.device, r.network, r.nodes, r.devices, r.collective, r.source) for r in scored
            ]
            for key in sorted({k for k, ok in zip(keys, held_out, strict=True) if ok}):
                mine = held_out & np.array([k == key for k in keys])
                sys.stdout.write(_line("    " + " ".join(map(str, key)), errors[mine], None) + "\n")
    sys.exit(5 if missed else 0)


if __name__ == "__main__":
    main()
