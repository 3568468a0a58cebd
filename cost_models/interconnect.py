"""Time of collectives and point-to-point transfers on a cluster.

Every law here is the minimum of a few straight lines in the payload, one per protocol or algorithm
that the library may pick: ``t = min_i (latency_i + payload * slope_i)``. So time never falls when
the payload grows, and never rises when a latency or an inverse bandwidth falls.

**In a node** the lines are the measured two-protocol constants of the link
(``CollectiveConstants``), interpolated in log(group size). A collective without measurements takes
a ring over the link's bandwidth x efficiency.

Devices joined as a torus have laws of their own, by axes (``cost_models.torus``).

**Across nodes**, a group with G members on each of k nodes (n = G k):

- The G members get G / devices_per_node of the node's ports, for all groups of a dimension run the
  same collective at once. With oversubscribed tiers the share falls by the traffic that leaves the
  tier.
- Ring (all collectives but all-to-all): wire bytes over a bandwidth where network and node-internal
  link both take part, ``1/B = (1/B_nic^p + 1/B_intra^p)^(1/p)`` with p = ``RING_NORM``: within 1 %
  of the slower one where they differ by two, 9 % below it where they are equal. Latency: n - 1
  steps, k of them across nodes; twice for all-reduce.
- Tree (all-reduce): ``TREE_SHARE`` of the ring's bandwidth, latency in log2(k).
- Switches that reduce (all-reduce of whole nodes): the slower of the node's own all-reduce and the
  payload once through the ports.
- All-to-all: each device sends (n - G) / n of its buffer through its share of the ports, the rest
  inside; the slower of the two sets the time. Latency per remote peer.

``payload`` is the size of nccl-tests: all_reduce the buffer, all_gather the total output,
reduce_scatter the total input, all_to_all the send buffer of one rank. All sizes in bytes, times in
seconds; arguments broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models import torus
from cost_models.fabric import Fabric, Floats, fabric_of
from cost_models.unique import distinct_values
from hardware_profiles.schema import ClusterSpec

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

LAUNCH_LL_S = 6.6e-6
LAUNCH_SIMPLE_S = 8.4e-6
"""Fixed time of a collective by protocol. Source: NCCL 2.2x, default tuner constants
(``src/graph/tuning.cc``, base latencies of Ring)."""
LAUNCH_TORUS_S = 1e-6
"""Fixed time of a collective of a compiled program on a torus. Assumed: the first hop's latency;
there is no host in it."""
TREE_SHARE = 0.92
"""Tree bandwidth over ring bandwidth. Source: as above."""
LL_SHARE = 0.1
"""Bandwidth of the small-message protocol across nodes over that of large messages. Assumed from
NCCL's caps of 19-45 GB/s (as above) on links of 200-400 GB/s a node."""
PEER_SHARE = 0.6
"""Latency that each further peer adds to an all-to-all, over that of a step: messages to several
peers are in flight together. Fitted on 2 nodes of 4 A100 (``benchmarks/collectives``)."""
RING_NORM = 7.0
"""Exponent p above; fitted on 10 nodes of 8 H100 (``benchmarks/collectives``)."""

_RING_OF = {
    "all_reduce": "reduce_scatter",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the members of a group are; all arrays broadcast over groups."""

    size: Floats
    members: Floats
    """Members on the node that has fewest: it sets the group's share of the ports."""
    nodes: Floats
    node_stride: Floats
    """Nodes from one node of the group to the next."""
    stride: Floats
    """Ranks from one member to the next."""


@dataclass(frozen=True, slots=True)
class Law:
    """``t = min over lines (latency_s + payload * s_per_byte)``; lines along the first axis."""

    latency_s: Floats
    s_per_byte: Floats

    def time_s(self, payload_bytes: Floats, group: NDArray[np.intp]) -> Floats:
        """Seconds for ``payload_bytes`` in the groups that ``group`` indexes; both broadcast."""
        times = np.full(np.broadcast_shapes(payload_bytes.shape, group.shape), np.inf)
        for latency, slope in zip(self.latency_s, self.s_per_byte, strict=True):
            np.minimum(times, latency[group] + payload_bytes * slope[group], out=times)
        return times


def place(fabric: Fabric, size: ArrayLike, stride: ArrayLike) -> Placement:
    """Members per node and nodes of groups whose members are ``stride`` ranks apart.

    Ranks fill nodes in order; groups start wherever a block of ``size * stride`` ranks does. Where
    blocks do not line up with nodes, the worst group counts: one member alone on a node, and the
    most nodes that a block can touch. Raises ``ValueError`` for a size or stride below 1.
    """
    n, step = np.broadcast_arrays(np.asarray(size, np.int64), np.asarray(stride, np.int64))
    if n.size and (n.min() < 1 or step.min() < 1):
        raise ValueError("group size and stride must be at least 1")
    per_node = fabric.devices_per_node
    block = n * step
    inside = ~spans_nodes(fabric, n, step)
    aligned = block % per_node == 0
    members = np.where(aligned, np.minimum(n, np.maximum(1, per_node // step)), 1)
    touched = -(-(block + per_node - np.gcd(block, per_node)) // per_node)
    nodes = np.where(aligned, np.minimum(n, block // per_node), np.minimum(n, touched))
    return Placement(
        size=n.astype(np.float64),
        members=np.where(inside, n, members).astype(np.float64),
        nodes=np.where(inside, 1, np.maximum(nodes, 2)).astype(np.float64),
        node_stride=np.maximum(1, -(-step // per_node)).astype(np.float64),
        stride=step.astype(np.float64),
    )


def spans_nodes(
    fabric: Fabric, size: NDArray[np.int64], stride: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether some group of a dimension has members on more than one node."""
    block, per_node = size * stride, fabric.devices_per_node
    apart: NDArray[np.bool_] = (block > per_node) | (per_node % block != 0)
    return apart & (size > 1) & (fabric.nodes > 1)


def collective_time_s(
    cluster: ClusterSpec | Fabric,
    collective: CollectiveKind,
    payload_bytes: ArrayLike,
    *,
    size: ArrayLike,
    stride: ArrayLike,
) -> NDArray[np.float64]:
    """Seconds of one collective in groups of ``size`` members, ``stride`` ranks apart.

    All groups of the dimension run at once. ``payload_bytes`` as nccl-tests defines it; a group of
    one takes no time. Arguments broadcast; pass a :func:`fabric_of` to convert the cluster once.
    """
    return _times(cluster, collective, payload_bytes, size, stride)


def send_recv_time_s(
    cluster: ClusterSpec | Fabric, payload_bytes: ArrayLike, *, stride: ArrayLike, size: ArrayLike
) -> NDArray[np.float64]:
    """Seconds of the slowest transfer when each member sends ``payload_bytes`` to the next.

    Pipeline neighbours are ``stride`` ranks apart in a pipeline of ``size``. Every device sends at
    once, so those whose neighbour is on another node share their node's ports. No pipeline, no
    time.
    """
    return _times(cluster, "send_recv", payload_bytes, size, stride)


def _times(
    cluster: ClusterSpec | Fabric,
    what: str,
    payload_bytes: ArrayLike,
    size: ArrayLike,
    stride: ArrayLike,
) -> NDArray[np.float64]:
    fabric = cluster if isinstance(cluster, Fabric) else fabric_of(cluster)
    payload = np.asarray(payload_bytes, dtype=np.float64)
    n, step = np.broadcast_arrays(np.asarray(size, np.int64), np.asarray(stride, np.int64))
    # Groups repeat in a search: the law is worked out once per distinct (size, stride).
    sizes, of_size = distinct_values(n)
    strides, of_stride = distinct_values(step)
    cells, where = distinct_values(of_size * len(strides) + of_stride)
    placement = place(fabric, sizes[cells // len(strides)], strides[cells % len(strides)])
    law = _send_recv(fabric, placement) if what == "send_recv" else _law(fabric, what, placement)
    alone = placement.size == 1
    latency = np.where(alone, 0.0, law.latency_s)
    slope = np.where(alone, 0.0, law.s_per_byte)
    return Law(latency, slope).time_s(payload, where.reshape(n.shape))


def _law(fabric: Fabric, collective: str, placement: Placement) -> Law:
    inside = _in_node(fabric, collective, placement.size, placement.stride)
    if fabric.nodes == 1 or not np.any(placement.nodes > 1):
        return inside
    across = (
        _all_to_all(fabric, placement)
        if collective == "all_to_all"
        else _ring_and_tree(fabric, collective, placement)
    )
    lines = max(len(inside.latency_s), len(across.latency_s))
    spans = placement.nodes > 1
    return Law(
        np.where(spans, _pad(across.latency_s, lines), _pad(inside.latency_s, lines)),
        np.where(spans, _pad(across.s_per_byte, lines), _pad(inside.s_per_byte, lines)),
    )


def _pad(lines: Floats, count: int) -> Floats:
    """``lines`` with the first repeated until there are ``count``: the minimum does not change."""
    return np.concatenate([lines, np.repeat(lines[:1], count - len(lines), axis=0)])


def _bus_factor(collective: str, size: Floats) -> Floats:
    """Wire bytes per payload byte, as nccl-tests defines bus bandwidth."""
    share = (size - 1) / size
    return 2 * share if collective == "all_reduce" else share


def _in_node(fabric: Fabric, collective: str, size: Floats, stride: Floats) -> Law:
    if fabric.torus is not None:
        return _in_torus(fabric.torus, collective, size, stride)
    link, bus = fabric.scale_up, _bus_factor(collective, size)
    table = link.tables.get(collective)
    if table is not None and collective == "all_to_all":
        # Messages to several peers are in flight together, where a ring's steps follow each other.
        latency, ll_slope, simple_latency, slope = table.at(np.minimum(size, table.devices[-1]))
        peers = PEER_SHARE * np.maximum(size - table.devices[-1], 0) * link.latency_s
        latencies = np.stack([latency + peers, simple_latency + peers])
        return Law(latencies, bus * np.stack([ll_slope, slope]))
    if table is not None:
        latency, ll_slope, simple_latency, slope = table.at(size)
        return Law(np.stack([latency, simple_latency]), bus * np.stack([ll_slope, slope]))
    if collective == "all_to_all":
        steps, slope = np.ones_like(size), bus * link.all_to_all_s_per_byte
    else:
        rounds = 2 if collective == "all_reduce" else 1
        steps, slope = rounds * (size - 1), bus * link.s_per_byte
    # The small-message protocol stores a flag beside each word: half the bandwidth.
    latency = LAUNCH_LL_S + steps * link.latency_s
    simple_latency = LAUNCH_SIMPLE_S + steps * link.simple_latency_s
    return Law(np.stack([latency, simple_latency]), np.stack([2 * slope, slope]))


def _in_torus(slice_: torus.Torus, collective: str, size: Floats, stride: Floats) -> Law:
    rounds = 2 if collective == "all_reduce" else 1
    latency = LAUNCH_TORUS_S + rounds * torus.ring_latency_s(slice_, size, stride)
    if collective == "all_to_all":
        slope = torus.all_to_all_s_per_byte(slice_, size, stride)
    else:
        slope = _bus_factor(collective, size) * torus.ring_s_per_byte(slice_, size, stride)
    return Law(latency[None], slope[None])


def _ring_slope(fabric: Fabric, collective: str, size: Floats, stride: Floats) -> Floats:
    """Seconds per byte on the wire of a ring inside a node; 0 for one member."""
    if fabric.torus is not None:
        return torus.ring_s_per_byte(fabric.torus, size, stride)
    table = fabric.scale_up.tables.get(_RING_OF[collective])
    slope = np.full_like(size, fabric.scale_up.s_per_byte) if table is None else table.at(size)[3]
    return np.where(size > 1, slope, 0.0)


def _network(fabric: Fabric, placement: Placement) -> tuple[Floats, Floats]:
    """Slowdown of a ring by oversubscribed tiers, and the tiers' latency per message.

    Of a tier's N nodes, min(N, d) have their neighbour, d nodes on, outside it: with one ring per
    group that share of the traffic meets the oversubscribed up-links.
    """
    slowdown, latency = np.ones_like(placement.nodes), np.zeros_like(placement.nodes)
    reached = placement.nodes > 1
    for tier in fabric.tiers:
        latency = latency + np.where(reached, tier.latency_s, 0.0)
        reached = reached & _leaves(tier.nodes, fabric, placement)
        crossing = tier.oversubscription * np.minimum(1.0, placement.node_stride / tier.nodes)
        slowdown = np.where(reached, np.maximum(slowdown, crossing), slowdown)
    return slowdown, latency


def _leaves(tier_nodes: float, fabric: Fabric, placement: Placement) -> NDArray[np.bool_]:
    """Whether some group reaches beyond a tier of ``tier_nodes`` nodes."""
    if tier_nodes >= fabric.nodes:
        return np.zeros(placement.nodes.shape, dtype=bool)
    span = placement.nodes * placement.node_stride
    outside: NDArray[np.bool_] = (span > tier_nodes) | (np.mod(tier_nodes, span) != 0)
    return outside


def port_slope(
    fabric: Fabric, placement: Placement, s_per_byte: float, *, to_all: bool = False
) -> Floats:
    """Seconds per byte through the ports that one device of the group can count on.

    ``to_all``: each node sends to every other, instead of to its neighbour.
    """
    per_device = fabric.ports_per_node / fabric.devices_per_node
    outer = fabric.scale_out
    scaling = outer.all_to_all_scaling if to_all else outer.scaling
    return s_per_byte / (per_device * scaling.at(placement.nodes))


def _ring_and_tree(fabric: Fabric, collective: str, placement: Placement) -> Law:
    inner, outer = fabric.scale_up, fabric.scale_out
    n, k, members = placement.size, placement.nodes, placement.members
    rounds = 2 if collective == "all_reduce" else 1
    slowdown, tier_latency = _network(fabric, placement)
    network = port_slope(fabric, placement, outer.s_per_byte) * slowdown / members
    in_node = _ring_slope(fabric, collective, members, placement.stride)
    # Divided by the larger one, powers neither overflow nor vanish.
    ratio = np.minimum(network, in_node) / np.maximum(network, in_node)
    ring = np.maximum(network, in_node) * (1 + ratio**RING_NORM) ** (1 / RING_NORM)
    slope = _bus_factor(collective, n) * ring

    hops = rounds * np.minimum(k, n - 1)
    steps = rounds * (n - 1) - hops
    far_ll, far = outer.latency_s + tier_latency, outer.simple_latency_s + tier_latency
    latencies = [
        LAUNCH_LL_S + hops * far_ll + steps * inner.latency_s,
        LAUNCH_SIMPLE_S + hops * far + steps * inner.simple_latency_s,
    ]
    slopes = [slope / LL_SHARE, slope]
    if collective == "all_reduce":
        depth, chain = 2 * np.ceil(np.log2(k)), 2 * (members - 1)
        latencies += [
            LAUNCH_LL_S + depth * far_ll + chain * inner.latency_s,
            LAUNCH_SIMPLE_S + depth * far + chain * inner.simple_latency_s,
        ]
        slopes += [slope / (TREE_SHARE * LL_SHARE), slope / TREE_SHARE]
        if outer.in_network_s_per_byte is not None:
            whole = members == fabric.devices_per_node
            wire = port_slope(fabric, placement, outer.in_network_s_per_byte) / members
            reduced_s = LAUNCH_SIMPLE_S + 2 * far + chain * inner.simple_latency_s
            latencies.append(np.where(whole, reduced_s, latencies[1]))
            reduced = np.maximum(wire, _in_node(fabric, collective, members, placement.stride)
                                 .s_per_byte[-1])  # fmt: skip
            slopes.append(np.where(whole, reduced, slope))
    return Law(np.stack(latencies), np.stack(slopes))


def _all_to_all(fabric: Fabric, placement: Placement) -> Law:
    n, members = placement.size, placement.members
    port = port_slope(fabric, placement, fabric.scale_out.all_to_all_s_per_byte, to_all=True)
    slope = port * oversubscribed(fabric, placement, (n - members) / n, np.ones_like(n))
    inside = _in_node(fabric, "all_to_all", members, placement.stride)
    alone = members == 1
    within = inside.s_per_byte[-1] * members / n
    slope = np.maximum(slope, np.where(alone, 0.0, within))
    launch = np.where(alone, LAUNCH_LL_S, inside.latency_s[0])
    _, tier_latency = _network(fabric, placement)
    first = fabric.scale_out.simple_latency_s + tier_latency
    latency = launch + first + PEER_SHARE * (n - members) * fabric.scale_out.latency_s
    return Law(latency[None], slope[None])


def oversubscribed(
    fabric: Fabric, placement: Placement, leaving_node: Floats, everywhere: Floats
) -> Floats:
    """Bytes that a device's ports carry, counted by what the scarcest level makes of them.

    Of ``everywhere`` bytes spread evenly over the group's nodes, ``leaving_node`` pass the ports;
    those that leave a tier count by its oversubscription if that is more.
    """
    scarce = leaving_node
    span = placement.nodes * placement.node_stride
    for tier in fabric.tiers:
        if not np.isfinite(tier.nodes):
            continue
        near = np.where(span > tier.nodes, np.maximum(1, tier.nodes // placement.node_stride), 1)
        leaving = everywhere * np.maximum(1 - near / placement.nodes, 0) * tier.oversubscription
        reached = _leaves(tier.nodes, fabric, placement)
        scarce = np.where(reached, np.maximum(scarce, leaving), scarce)
    return scarce


def _send_recv(fabric: Fabric, placement: Placement) -> Law:
    inner, outer = fabric.scale_up, fabric.scale_out
    latency = np.full_like(placement.size, LAUNCH_SIMPLE_S + inner.simple_latency_s)
    slope = np.full_like(placement.size, inner.send_recv_s_per_byte)
    if fabric.torus is not None:
        slope = torus.shift_s_per_byte(fabric.torus, placement.size, placement.stride)
    slowdown, tier_latency = _network(fabric, placement)
    # A device drives its own ports; devices whose neighbour is remote share the node's.
    senders = fabric.devices_per_node / np.maximum(placement.members, 1.0)
    own = max(1.0, fabric.nics / fabric.devices_per_node)
    ports = np.minimum(fabric.ports_per_node / senders, min(own, fabric.ports_per_node))
    far_slope = outer.send_recv_s_per_byte * slowdown / (ports * outer.scaling.at(placement.nodes))
    far_latency = LAUNCH_SIMPLE_S + outer.simple_latency_s + tier_latency
    spans, alone = placement.nodes > 1, placement.members == 1
    latency = np.where(
        spans, np.where(alone, far_latency, np.maximum(latency, far_latency)), latency
    )
    slope = np.where(spans, np.where(alone, far_slope, np.maximum(slope, far_slope)), slope)
    return Law(latency[None], slope[None])
