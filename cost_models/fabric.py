"""A cluster's links as the plain numbers that :mod:`cost_models.interconnect` works with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.torus import Torus, torus_of
from hardware_profiles.schema import (
    EXCHANGE_LIBRARIES,
    ClusterSpec,
    CollectiveConstants,
    LinkSpec,
    NodeSpec,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Table:
    """Two-protocol constants of one collective by group size, rising in ``devices``."""

    devices: Floats
    latency_s: Floats
    ll_s_per_byte: Floats
    simple_latency_s: Floats
    simple_s_per_byte: Floats

    def at(self, devices: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """``(latency_s, ll_s_per_byte, simple_latency_s, simple_s_per_byte)`` for ``devices``.

        Interpolated in log(devices) between measured sizes, each constant in its logarithm. Above
        the largest measured size latencies grow with the steps of a ring and bandwidths stay.
        """
        place, known = np.log(np.maximum(devices, 1.0)), np.log(self.devices)
        beyond = np.maximum(1.0, (devices - 1) / (self.devices[-1] - 1))

        def read(column: Floats) -> Floats:
            values = np.log(np.maximum(column, 1e-300))
            return np.exp(np.interp(place, known, values))

        return (
            read(self.latency_s) * beyond,
            read(self.ll_s_per_byte),
            read(self.simple_latency_s) * beyond,
            read(self.simple_s_per_byte),
        )


@dataclass(frozen=True, slots=True)
class Scale:
    """Factor on bandwidth by the nodes that a group spans."""

    nodes: Floats
    factor: Floats

    def at(self, nodes: Floats) -> Floats:
        """The factor, interpolated in log(nodes); 1 where the fabric was not measured at size."""
        if self.nodes.size == 0:
            return np.ones_like(nodes)
        return np.interp(np.log(np.maximum(nodes, 1.0)), np.log(self.nodes), self.factor)


@dataclass(frozen=True, slots=True)
class Link:
    """One link, in SI units, per device (scale-up) or per port (scale-out)."""

    s_per_byte: float
    """1 / (bandwidth x efficiency) of ring collectives."""
    all_to_all_s_per_byte: float
    send_recv_s_per_byte: float
    exchange_s_per_byte: dict[str, float]
    """Of expert exchange by library (``deepep``, ``hybridep``)."""
    latency_s: float
    simple_latency_s: float
    tables: dict[str, Table]
    in_network_s_per_byte: float | None
    """Of an all-reduce's payload in the switches; ``None`` where they do not reduce."""
    scaling: Scale
    all_to_all_scaling: Scale


@dataclass(frozen=True, slots=True)
class Tier:
    """A level of the network above the node."""

    nodes: float
    """Nodes below one switch group; infinite for the outermost."""
    oversubscription: float
    """Product of the oversubscriptions up to and including this tier."""
    latency_s: float


@dataclass(frozen=True, slots=True)
class Fabric:
    """The links of a homogeneous cluster; build with :func:`fabric_of`."""

    nodes: int
    devices_per_node: int
    ports_per_node: float
    """Ports that set a node's bandwidth; fractional where a measured link matrix is slower."""
    nics: int
    scale_up: Link
    scale_out: Link
    tiers: tuple[Tier, ...]
    torus: Torus | None = None
    """Set where the devices of a node (then a whole slice) are joined as a torus."""


def fabric_of(cluster: ClusterSpec) -> Fabric:
    """The numbers of ``cluster``; raises ``ValueError`` for groups of unlike nodes.

    A link matrix caps a node's bandwidth at its slowest entry: conservative, since which nodes
    talk is not decided here.
    """
    if not cluster.is_homogeneous:
        raise ValueError(f"cluster {cluster.name!r} has groups of unlike nodes")
    node = cluster.groups[0].node
    ports = float(node.nics)
    if cluster.link_matrix is not None and cluster.nodes > 1:
        matrix = np.asarray(cluster.link_matrix, dtype=np.float64)
        slowest = float(matrix[~np.eye(len(matrix), dtype=bool)].min())
        rate = node.scale_out.bandwidth.si * node.scale_out.efficiency.si
        ports = min(ports, slowest / rate)
    tiers, oversubscription = [], 1.0
    joined = _joined_nodes(node, cluster.nodes)
    for tier in cluster.tiers:
        oversubscription *= tier.oversubscription
        nodes = math.inf if tier.nodes is None else max(1.0, tier.nodes / joined)
        tiers.append(Tier(nodes, oversubscription, tier.latency_s))
    devices = node.devices_per_node * joined
    return Fabric(
        nodes=cluster.nodes // joined,
        devices_per_node=devices,
        ports_per_node=ports * joined,
        nics=node.nics * joined,
        torus=None if node.torus is None else torus_of(node.torus, devices, node.scale_up),
        scale_up=link_numbers(node.scale_up),
        scale_out=link_numbers(node.scale_out),
        tiers=tuple(tiers),
    )


def _joined_nodes(node: NodeSpec, nodes: int) -> int:
    """Nodes that make up one slice of a torus: the most that fit and divide the cluster."""
    if node.torus is None or not node.torus.joins_nodes:
        return 1
    most = max(1, math.prod(node.torus.axes) // node.devices_per_node)
    return max(n for n in range(1, min(most, nodes) + 1) if nodes % n == 0)


def link_numbers(link: LinkSpec) -> Link:
    """The numbers of ``link`` in SI units."""
    bandwidth, efficiency = link.bandwidth.si, link.efficiency.si
    all_to_all = link.efficiencies.get("all_to_all", link.efficiency).si
    send_recv = link.efficiencies.get("send_recv", link.efficiency).si
    shares = {str(name): share.si for name, share in link.efficiencies.items()}
    simple = link.simple_latency or link.latency
    by_collective: dict[str, list[CollectiveConstants]] = {}
    for constants in sorted(link.collectives, key=lambda each: each.devices):
        by_collective.setdefault(constants.collective, []).append(constants)
    return Link(
        s_per_byte=1 / (bandwidth * efficiency),
        all_to_all_s_per_byte=1 / (bandwidth * all_to_all),
        send_recv_s_per_byte=1 / (bandwidth * send_recv),
        exchange_s_per_byte={
            library: 1 / (bandwidth * shares.get(library, all_to_all))
            for library in EXCHANGE_LIBRARIES
        },
        latency_s=link.latency.si,
        simple_latency_s=max(simple.si, link.latency.si),
        tables={name: _table(rows) for name, rows in by_collective.items()},
        in_network_s_per_byte=1 / (bandwidth * shares["in_network"])
        if "in_network" in shares
        else None,
        scaling=_scale(link.scale),
        all_to_all_scaling=_scale(link.all_to_all_scale or link.scale),
    )


def _scale(pairs: tuple[tuple[int, float], ...]) -> Scale:
    return Scale(
        nodes=np.array([nodes for nodes, _ in pairs], dtype=np.float64),
        factor=np.array([factor for _, factor in pairs], dtype=np.float64),
    )


def _table(rows: list[CollectiveConstants]) -> Table:
    return Table(
        devices=np.array([row.devices for row in rows], dtype=np.float64),
        latency_s=np.array([row.latency_s for row in rows]),
        ll_s_per_byte=np.array([1 / row.ll_bandwidth for row in rows]),
        simple_latency_s=np.array([row.simple_latency_s for row in rows]),
        simple_s_per_byte=np.array([1 / row.bandwidth for row in rows]),
    )
