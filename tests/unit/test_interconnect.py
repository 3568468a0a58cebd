"""Hand-computed collective times on a cluster of round numbers."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from cost_models.fabric import Fabric, fabric_of, link_numbers
from cost_models.interconnect import (
    LAUNCH_LL_S,
    LAUNCH_SIMPLE_S,
    PEER_SHARE,
    RING_NORM,
    collective_time_s,
    place,
    send_recv_time_s,
)
from hardware_profiles.loader import catalog_names, load_cluster, load_link, load_node
from hardware_profiles.schema import (
    ClusterSpec,
    CollectiveConstants,
    DeviceSpec,
    Kind,
    LinkSpec,
    NetworkTier,
    NodeGroup,
    NodeSpec,
    Sourced,
)

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
GB = 1e9


def _number(value: float, unit: str = "") -> Sourced:
    return Sourced(value=value, unit=unit, kind=Kind.ASSUMED, source="test")


def _device() -> DeviceSpec:
    one = _number(1)
    return DeviceSpec.model_validate(
        {
            "name": "d",
            "title": "d",
            "vendor": "v",
            "peak_flops": {},
            "memory_capacity": one,
            "memory_bandwidth": one,
            "compute_units": one,
            "kernels": {
                "matmul": {},
                "attention": {},
                "memory_bound_efficiency": one,
                "memory_bound_latency": one,
            },
        }
    )


def _table(devices: int, latency_s: float, simple_s: float, bandwidth: float) -> list[object]:
    return [
        CollectiveConstants(
            collective=name,
            devices=devices,
            latency_s=latency_s,
            ll_bandwidth=bandwidth / 10,
            simple_latency_s=simple_s,
            bandwidth=bandwidth,
            kind=Kind.FITTED,
            source="test",
        )
        for name in COLLECTIVES
    ]


def _cluster(
    nodes: int = 16,
    *,
    up_bandwidth: float = 200.0,
    tables: bool = True,
    nics: int = 8,
    tiers: tuple[NetworkTier, ...] = (),
    matrix: tuple[tuple[float, ...], ...] | None = None,
    scale: tuple[tuple[int, float], ...] = (),
) -> ClusterSpec:
    """8 devices a node; 200 GB/s inside, 8 ports of 50 GB/s of which 50 % are reached."""
    collectives = (
        [
            *_table(2, 10e-6, 20e-6, up_bandwidth * GB / 2),
            *_table(8, 40e-6, 80e-6, up_bandwidth * GB / 2),
        ]
        if tables
        else []
    )
    up = LinkSpec.model_validate(
        {
            "name": "up",
            "title": "up",
            "bandwidth": _number(up_bandwidth, "GB/s"),
            "latency": _number(1, "us"),
            "simple_latency": _number(2, "us"),
            "efficiency": _number(0.5),
            "collectives": tuple(collectives),
        }
    )
    out = LinkSpec.model_validate(
        {
            "name": "out",
            "title": "out",
            "bandwidth": _number(50, "GB/s"),
            "latency": _number(5, "us"),
            "simple_latency": _number(10, "us"),
            "efficiency": _number(0.5),
            "scale": scale,
        }
    )
    node = NodeSpec(
        name="n",
        title="n",
        device=_device(),
        devices_per_node=8,
        scale_up=up,
        scale_out=out,
        nics=nics,
        host_link=_number(1),
    )
    return ClusterSpec(
        name="c", groups=(NodeGroup(node=node, count=nodes),), tiers=tiers, link_matrix=matrix
    )


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_group_of_one_takes_no_time(collective: str) -> None:
    assert collective_time_s(_cluster(), collective, 1e9, size=1, stride=4) == 0
    assert send_recv_time_s(_cluster(), 1e9, size=1, stride=4) == 0


def test_in_node_large_message_follows_the_simple_protocol() -> None:
    # wire = 1 GB * 2 * 7/8 = 1.75 GB; 80 us + 1.75e9 / 100e9 = 17.58 ms (LL would take 175 ms).
    assert collective_time_s(_cluster(), "all_reduce", 1e9, size=8, stride=1) == pytest.approx(
        80e-6 + 0.0175
    )
    # all_gather counts the total output: 1 GB * 7/8 over 100 GB/s.
    assert collective_time_s(_cluster(), "all_gather", 1e9, size=8, stride=1) == pytest.approx(
        80e-6 + 0.00875
    )


def test_in_node_small_message_follows_the_low_latency_protocol() -> None:
    # 8 KB all_to_all in 2: wire 4 KB; 10 us + 4e3 / 10e9 = 10.4 us, below 20 us + 0.04 us.
    assert collective_time_s(_cluster(), "all_to_all", 8e3, size=2, stride=1) == pytest.approx(
        10.4e-6
    )


def test_constants_between_measured_sizes_interpolate_in_logarithms() -> None:
    # n = 4 is half-way between 2 and 8 in log n: sqrt(20 * 80) = 40 us; wire = 3/4 GB.
    assert collective_time_s(_cluster(), "all_gather", 1e9, size=4, stride=2) == pytest.approx(
        40e-6 + 0.0075
    )


def test_link_without_measurements_is_a_ring() -> None:
    # 2 * 7 steps of 2 us after the launch; 1.75 GB over 200 GB/s * 0.5.
    assert collective_time_s(
        _cluster(tables=False), "all_reduce", 1e9, size=8, stride=1
    ) == pytest.approx(LAUNCH_SIMPLE_S + 28e-6 + 0.0175)


def test_ring_across_nodes_with_one_member_per_node() -> None:
    # tp = 8 inside, so stride 8: 8 groups share 8 ports of 25 GB/s: one each. 4 nodes, all-gather:
    # wire 0.75 GB -> 30 ms; n - 1 = 3 steps of 10 us, all across nodes.
    assert collective_time_s(_cluster(), "all_gather", 1e9, size=4, stride=8) == pytest.approx(
        LAUNCH_SIMPLE_S + 30e-6 + 0.030
    )


def test_ring_across_nodes_uses_all_ports_of_its_members() -> None:
    # 16 devices on 2 nodes: 8 ports of 25 GB/s = 200 GB/s outside, 100 GB/s inside:
    # 1/B = (1/200^p + 1/100^p)^(1/p); wire 15/16 GB. 15 steps: 2 across, 13 inside of 2 us.
    slope = ((1 / 200e9) ** RING_NORM + (1 / 100e9) ** RING_NORM) ** (1 / RING_NORM)
    assert collective_time_s(_cluster(), "all_gather", 1e9, size=16, stride=1) == pytest.approx(
        LAUNCH_SIMPLE_S + 2 * 10e-6 + 13 * 2e-6 + 15 / 16 * 1e9 * slope
    )


def test_small_all_reduce_across_many_nodes_is_a_tree() -> None:
    # 1 byte over 16 nodes: 2 * log2(16) = 8 steps of 5 us beat a ring's 30.
    assert collective_time_s(_cluster(), "all_reduce", 1.0, size=16, stride=8) == pytest.approx(
        LAUNCH_LL_S + 40e-6, rel=1e-3
    )


def test_all_to_all_across_nodes_pays_for_the_remote_share() -> None:
    # 16 devices on 2 nodes, 1 GB each: 8/16 remote over 25 GB/s a device = 20 ms; inside
    # 8/16 * 7/8 GB over 100 GB/s = 4.4 ms is hidden. Latency 40 us + 10 us + 8 peers of 0.6 * 5 us.
    assert collective_time_s(_cluster(), "all_to_all", 1e9, size=16, stride=1) == pytest.approx(
        40e-6 + 10e-6 + 8 * PEER_SHARE * 5e-6 + 0.020
    )


def test_send_recv_inside_and_across_nodes() -> None:
    # Inside: 1 GB over 200 * 0.5 GB/s.
    assert send_recv_time_s(_cluster(), 1e9, size=2, stride=4) == pytest.approx(
        LAUNCH_SIMPLE_S + 2e-6 + 0.010
    )
    # stride 8: 8 senders on 8 ports: 25 GB/s each. With 4 ports: 12.5 GB/s each.
    assert send_recv_time_s(_cluster(), 1e9, size=2, stride=8) == pytest.approx(
        LAUNCH_SIMPLE_S + 10e-6 + 0.040
    )
    assert send_recv_time_s(_cluster(nics=4), 1e9, size=2, stride=8) == pytest.approx(
        LAUNCH_SIMPLE_S + 10e-6 + 0.080
    )
    # stride 4, 4 stages on 2 nodes: 4 of 8 devices send across; a device drives one port only.
    assert send_recv_time_s(_cluster(), 1e9, size=4, stride=4) == pytest.approx(
        LAUNCH_SIMPLE_S + 10e-6 + 0.040
    )
    assert send_recv_time_s(_cluster(nics=4), 1e9, size=4, stride=4) == pytest.approx(
        LAUNCH_SIMPLE_S + 10e-6 + 0.040
    )


@pytest.mark.parametrize(
    ("size", "stride", "members", "nodes"),
    [
        (8, 1, 8, 1),
        (2, 4, 2, 1),
        (16, 1, 8, 2),
        (4, 4, 2, 2),
        (4, 8, 1, 4),
        (4, 16, 1, 4),
        # Ranks 0 3 6 9 | 12 15 18 21: blocks of 12 start at 0, 4 of a node; at most 2 nodes.
        (4, 3, 1, 2),
        # Blocks of 6: the second holds ranks 6..11, on 2 nodes, 2 members on the first.
        (6, 1, 1, 2),
        # Blocks of 24 are 3 whole nodes; stride 3 puts 2 or 3 members on each.
        (8, 3, 2, 3),
        (6, 4, 2, 3),
        (1, 8, 1, 1),
    ],
)
def test_placement(size: int, stride: int, members: int, nodes: int) -> None:
    placement = place(fabric_of(_cluster()), size, stride)
    assert (placement.members, placement.nodes) == (members, nodes)


def _members_by_hand(size: int, stride: int, world: int) -> tuple[int, int]:
    """Fewest members on a touched node, most nodes touched, over all groups of a world."""
    fewest, most = size, 1
    for block in range(0, world, size * stride):
        for first in range(block, block + stride):
            on = [(first + i * stride) // 8 for i in range(size)]
            fewest = min(fewest, min(on.count(node) for node in set(on)))
            most = max(most, len(set(on)))
    return fewest, most


def test_placement_is_never_better_than_enumeration() -> None:
    fabric = fabric_of(_cluster(4096))
    for size in range(1, 25):
        for stride in range(1, 25):
            fewest, most = _members_by_hand(size, stride, size * stride * 8)
            placement = place(fabric, size, stride)
            assert placement.members <= fewest, (size, stride)
            assert placement.nodes >= most, (size, stride)
            if (size * stride) % 8 == 0 and (stride % 8 == 0 or 8 % stride == 0):
                assert (placement.members, placement.nodes) == (fewest, most), (size, stride)


def test_one_node_has_no_network() -> None:
    assert place(fabric_of(_cluster(1)), 6, 1).nodes == 1


def test_oversubscription_slows_what_leaves_the_tier() -> None:
    tiers = (NetworkTier(name="leaf", nodes=4, oversubscription=4), NetworkTier(name="spine"))
    free, tight = _cluster(), _cluster(tiers=tiers)

    def slope(cluster: ClusterSpec, collective: str, size: int, stride: int) -> float:
        one, two = (
            float(collective_time_s(cluster, collective, payload, size=size, stride=stride))
            for payload in (1e9, 2e9)
        )
        return two - one

    # Within a leaf: 4 nodes.
    assert slope(tight, "all_gather", 4, 8) == pytest.approx(slope(free, "all_gather", 4, 8))
    # 8 nodes, next neighbour one node on: 1 of 4 nodes sends up, 4 * 1/4 = 1: no slowdown.
    assert slope(tight, "all_gather", 8, 8) == pytest.approx(slope(free, "all_gather", 8, 8))
    # 2 members 8 nodes apart: every node sends up: 4 times.
    assert slope(tight, "all_gather", 2, 64) == pytest.approx(4 * slope(free, "all_gather", 2, 64))
    # All-to-all over 8 nodes: 4 of 8 members are outside: 4 * 4/8 = 2 against 7/8.
    assert slope(tight, "all_to_all", 8, 8) == pytest.approx(
        2 / (7 / 8) * slope(free, "all_to_all", 8, 8)
    )


def test_tier_latency_adds_to_each_step_across_nodes() -> None:
    tiers = (
        NetworkTier(name="leaf", nodes=4, latency_s=1e-6),
        NetworkTier(name="spine", latency_s=3e-6),
    )

    def added(size: int) -> float:
        with_tiers = collective_time_s(
            _cluster(tiers=tiers), "all_gather", 1e9, size=size, stride=8
        )
        return float(
            with_tiers - collective_time_s(_cluster(), "all_gather", 1e9, size=size, stride=8)
        )

    assert added(4) == pytest.approx(3 * 1e-6)
    assert added(8) == pytest.approx(7 * 4e-6)


def test_link_matrix_and_scale_cap_the_network() -> None:
    free = collective_time_s(_cluster(2), "all_gather", 1e9, size=2, stride=8)
    # A node reaches 8 * 50 * 0.5 = 200 GB/s; a measured 100 GB/s halves it: 20 ms -> 40 ms.
    capped = _cluster(2, matrix=((0.0, 100e9), (150e9, 0.0)))
    slow = collective_time_s(capped, "all_gather", 1e9, size=2, stride=8)
    assert slow - free == pytest.approx(0.020)
    # Factor 0.5 at 4 nodes, 1 at 1 node: 2 nodes are half-way in log nodes: 0.75.
    scaled = collective_time_s(
        _cluster(2, scale=((1, 1.0), (4, 0.5))), "all_gather", 1e9, size=2, stride=8
    )
    assert scaled - free == pytest.approx(0.020 / 0.75 - 0.020)


def test_unlike_groups_and_bad_sizes_raise() -> None:
    cluster = _cluster()
    mixed = ClusterSpec(name="mixed", groups=cluster.groups * 2)
    with pytest.raises(ValueError, match="unlike nodes"):
        fabric_of(mixed)
    with pytest.raises(ValueError, match="at least 1"):
        collective_time_s(cluster, "all_reduce", 1.0, size=0, stride=1)


def _everything(cluster: ClusterSpec, payload: np.ndarray) -> np.ndarray:
    size, stride = np.meshgrid(np.arange(1, 20), [1, 2, 3, 4, 8, 16, 24])
    grid = {"size": size[..., None], "stride": stride[..., None]}
    times = [collective_time_s(cluster, name, payload, **grid) for name in COLLECTIVES]
    return np.stack([*times, send_recv_time_s(cluster, payload, **grid)])


def test_times_are_finite_and_rise_with_payload() -> None:
    payload = np.concatenate([[0.0], np.geomspace(1, 1e12, 40)])
    tiers = (NetworkTier(name="leaf", nodes=4, oversubscription=3), NetworkTier(name="spine"))
    times = _everything(_cluster(64, tiers=tiers), payload)
    assert np.isfinite(times).all()
    assert (times >= 0).all()
    assert (np.diff(times, axis=-1) >= 0).all()


def test_faster_link_never_takes_longer() -> None:
    payload = np.geomspace(1, 1e12, 20)
    base = _cluster(64, tables=False)
    times = _everything(base, payload)
    node = base.groups[0].node
    for which in ("scale_up", "scale_out"):
        for change in ("latency", "simple_latency", "bandwidth"):
            for factor in (0.9, 0.3, 0.01):
                link = getattr(node, which)
                number = getattr(link, change)
                value = number.value / factor if change == "bandwidth" else number.value * factor
                better = link.model_copy(
                    update={change: number.model_copy(update={"value": value})}
                )
                faster = node.model_copy(update={which: better})
                cluster = base.model_copy(update={"groups": (NodeGroup(node=faster, count=64),)})
                assert (_everything(cluster, payload) <= times * (1 + 1e-12)).all(), (which, change)


def test_arguments_broadcast_and_a_million_take_under_a_second() -> None:
    fabric: Fabric = fabric_of(_cluster(1024))
    rng = np.random.default_rng(0)
    payload = rng.uniform(1, 1e9, 10**6)
    size, stride = 2 ** rng.integers(0, 10, 10**6), 2 ** rng.integers(0, 6, 10**6)
    start = time.process_time()
    times = collective_time_s(fabric, "all_reduce", payload, size=size, stride=stride)
    assert time.process_time() - start < 1.0
    assert times.shape == (10**6,)
    each = collective_time_s(
        fabric, "all_reduce", payload[7], size=int(size[7]), stride=int(stride[7])
    )
    assert each == times[7]


def test_all_to_all_beyond_its_table_adds_peers_not_ring_steps() -> None:
    fabric = fabric_of(load_cluster("gb200-nvl72:1"))
    measured = float(collective_time_s(fabric, "all_to_all", 0.0, size=8, stride=1))
    wide = float(collective_time_s(fabric, "all_to_all", 0.0, size=64, stride=1))
    assert wide == pytest.approx(measured + PEER_SHARE * 56 * 1.34e-6)


@pytest.mark.parametrize("name", catalog_names("node"))
def test_no_node_type_beats_its_wires(name: str) -> None:
    node = load_node(name)
    fabric = fabric_of(load_cluster(f"{name}:4"))
    inside, payload = fabric.devices_per_node, 2.0**32
    up, ports = node.scale_up.bandwidth.si, fabric.ports_per_node * node.scale_out.bandwidth.si
    for kind in COLLECTIVES:
        for n in {2, inside, inside * fabric.nodes} - {1}:
            seconds = float(collective_time_s(fabric, kind, payload, size=n, stride=1))  # type: ignore[arg-type]
            moved = payload * (2 if kind == "all_reduce" else 1) * (n - 1) / n
            # NVLS reduces in the switch and beats the wire of a ring by 7 %.
            limit = 1.08 * up
            if n > inside:
                share = (n - inside) / (n - 1)
                across = ports / inside / share if kind == "all_to_all" else ports
                limit = across if inside == 1 else min(limit, across)
            assert moved / seconds <= limit * (1 + 1e-9), (kind, n)


def test_switches_that_reduce_carry_the_payload_once() -> None:
    plain = fabric_of(load_cluster("dgx-h100:8"))
    sharp = replace(plain, scale_out=link_numbers(load_link("infiniband-ndr-sharp")))
    payload = 2.0**33

    def seconds(fabric: Fabric, size: int, stride: int) -> float:
        return float(collective_time_s(fabric, "all_reduce", payload, size=size, stride=stride))

    # 8 ports of 50 GB/s at 0.486; measured: 44 ms.
    assert seconds(sharp, 64, 1) == pytest.approx(payload / (8 * 50e9 * 0.486), rel=0.01)
    assert seconds(sharp, 64, 1) < seconds(plain, 64, 1)
    # One member on each node: its own port, and rings as before.
    assert seconds(sharp, 8, 8) == pytest.approx(seconds(plain, 8, 8))


def test_all_to_all_has_its_own_scale() -> None:
    fabric = fabric_of(load_cluster("polaris:64"))
    assert fabric.scale_out.all_to_all_scaling.at(np.array([2.0, 8.0, 540.0])).tolist() == [
        1.0, 0.6, 0.6,
    ]  # fmt: skip
    assert fabric.scale_out.scaling.at(np.array([540.0])).tolist() == [0.9]
    roce = fabric_of(load_cluster("gaudi2-hls:4")).scale_out
    assert roce.all_to_all_scaling.at(np.array([128.0])).tolist() == [0.71]
