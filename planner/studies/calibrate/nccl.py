"""Collective constants of a link from logs of nccl-tests (also rccl-tests).

A log inside one node gives the two-protocol constants of :class:`CollectiveConstants`; a log over
several nodes gives the share of the ports' bandwidth that large transfers reach, and the latency.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cost_models.fabric import fabric_of
from cost_models.interconnect import collective_time_s
from hardware_profiles.schema import ClusterSpec, CollectiveConstants, Kind
from planner.errors import InputError
from planner.studies.calibrate.parameters import Constant, Overlay, Parameter, Target

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
_NAMES: dict[str, Collective] = {
    "all_reduce": "all_reduce", "allreduce": "all_reduce", "all_gather": "all_gather",
    "allgather": "all_gather", "reduce_scatter": "reduce_scatter",
    "reducescatter": "reduce_scatter", "alltoall": "all_to_all", "all_to_all": "all_to_all",
}  # fmt: skip
_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s.*\bon\s+(\S+)\s+device", re.IGNORECASE)
LARGE_BYTES = 2**24
FOLDS = 4


@dataclass(frozen=True, slots=True)
class Log:
    """One log: payload bytes (as the test counts them) and seconds, out of place."""

    collective: Collective
    devices: int
    nodes: int
    sizes: tuple[float, ...]
    times: tuple[float, ...]


def read_log(path: Path, text: str) -> Log:
    """A log of nccl-tests. Raises :class:`InputError` for what is not one."""
    collective = _collective(path, text)
    hosts: dict[int, str] = {}
    sizes, times = [], []
    for line in text.splitlines():
        rank = _RANK.match(line)
        if rank:
            hosts[int(rank[1])] = rank[2]
        cells = line.split()
        if len(cells) >= 8 and cells[0].isdigit() and not line.startswith("#"):
            # size, count, type, redop, root, then the out-of-place time in microseconds
            size, time_us = float(cells[0]), float(cells[5])
            if size > 0 and time_us > 0:
                sizes.append(size)
                times.append(time_us * 1e-6)
    if not hosts or len(sizes) < 4:
        raise InputError(
            f"{path}: not a log of nccl-tests: {len(hosts)} '# Rank' lines and {len(sizes)} sizes",
            hint="keep the '#' lines of the log; at least 4 sizes are needed",
        )
    return Log(collective, len(hosts), len(set(hosts.values())), tuple(sizes), tuple(times))


def _collective(path: Path, text: str) -> Collective:
    stated = re.search(r"(?:test starting:\s*|/)(\w+?)_perf", text)
    for name in (stated[1] if stated else "", path.stem.lower()):
        for known, collective in _NAMES.items():
            if known in name:
                return collective
    raise InputError(
        f"{path}: which collective is it?",
        hint="name the file after it: all_reduce.log, all_gather.log, reduce_scatter.log, "
        "alltoall.log",
    )


class NodePricer:
    """A log inside one node against the two-protocol law."""

    def __init__(self, log: Log) -> None:
        n = log.devices
        bus = (n - 1) / n * (2 if log.collective == "all_reduce" else 1)
        self._wire = np.array(log.sizes) * bus
        self._log_time = np.log(log.times)
        self._large = np.array(log.sizes) >= LARGE_BYTES
        fastest = min(log.times)
        peak = float(np.max(self._wire / np.array(log.times)))
        self.parameters = (
            _free("latency_s", fastest, 10), _free("ll_bandwidth", peak / 4, 100),
            _free("simple_latency_s", 2 * fastest, 20), _free("bandwidth", peak, 2),
        )  # fmt: skip
        self.families = tuple(f"sizes {i % FOLDS + 1}" for i in range(len(log.sizes)))

    def moved_by(self, index: int) -> np.ndarray:
        """Every constant may reach every size."""
        return np.full(len(self._log_time), index >= 0)

    def residuals(self, values: Mapping[str, float], only: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of each size; NaN where ``only`` is False."""
        at = {p.name: values.get(p.name, p.prior) for p in self.parameters}
        law = np.minimum(
            at["latency_s"] + self._wire / at["ll_bandwidth"],
            at["simple_latency_s"] + self._wire / at["bandwidth"],
        )
        result = np.log(law) - self._log_time
        return result if only is None else np.where(only, result, np.nan)


class NetworkPricer:
    """Logs over several nodes against ``cost_models.interconnect`` on a cluster."""

    def __init__(self, logs: Sequence[Log], cluster: ClusterSpec) -> None:
        self._logs, self._cluster = tuple(logs), cluster
        link = cluster.groups[0].node.scale_out
        self.parameters = tuple(
            Parameter(
                name=name, low=low, high=high, prior=min(max(prior, low), high), spread=0.7,
                source="the link's profile",
                targets=(Target(kind="link", names=(link.name,), path=name),),
            )
            for name, low, high, prior in (
                ("efficiency", 0.05, 1.0, link.efficiency.si),
                ("latency", 2e-7, 1e-3, link.latency.si),
            )
        )  # fmt: skip
        self.families = tuple(
            f"{log.collective} over {log.nodes} nodes" for log in logs for _ in log.sizes
        )

    def moved_by(self, index: int) -> np.ndarray:
        """Both constants reach every size."""
        return np.full(len(self.families), index >= 0)

    def residuals(self, values: Mapping[str, float], only: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of each size; NaN where ``only`` is False."""
        overlay = Overlay(self.parameters, values)
        parts = []
        for log in self._logs:
            group = self._cluster.groups[0]
            node = group.node.model_copy(update={"devices_per_node": log.devices // log.nodes})
            group = group.model_copy(update={"node": node, "count": log.nodes})
            cluster = self._cluster.model_copy(update={"groups": (group,)})
            fabric = fabric_of(overlay.cluster(cluster))
            payload = np.array(log.sizes)
            size = np.full(len(payload), log.devices)
            time = collective_time_s(
                fabric, log.collective, payload, size=size, stride=np.ones_like(size)
            )
            parts.append(np.log(time) - np.log(log.times))
        result = np.concatenate(parts)
        return result if only is None else np.where(only, result, np.nan)


def constants_of(log: Log, values: Mapping[str, float], source: str) -> CollectiveConstants:
    """The constants of a fit; the small-message protocol is the one with the lower latency."""
    at = {name: float(f"{value:.4g}") for name, value in values.items()}
    if at["latency_s"] > at["simple_latency_s"]:
        at = {
            "latency_s": at["simple_latency_s"], "ll_bandwidth": at["bandwidth"],
            "simple_latency_s": at["latency_s"], "bandwidth": at["ll_bandwidth"],
        }  # fmt: skip
    return CollectiveConstants(
        collective=log.collective, devices=log.devices, kind=Kind.FITTED, source=source, **at
    )


def _free(name: str, start: float, factor: float) -> Constant:
    return Constant(
        name=name, low=start / factor, high=start * factor, prior=start, spread=2.0,
        source="the log's own smallest and largest sizes",
    )  # fmt: skip
