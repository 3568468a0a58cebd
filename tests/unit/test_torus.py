"""Torus laws by hand, and against what no box of links can beat."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from cost_models.fabric import fabric_of
from cost_models.interconnect import LAUNCH_TORUS_S, collective_time_s, send_recv_time_s
from cost_models.torus import (
    Torus,
    all_to_all_s_per_byte,
    ring_latency_s,
    ring_s_per_byte,
    shift_s_per_byte,
    slice_shape,
)
from hardware_profiles.loader import load_node
from hardware_profiles.schema import ClusterSpec, NodeGroup

# Links of 100 bytes/s: 0.01 s a byte.
POD = Torus((16, 16), (True, True), (0.01, 0.01), 1.0)
CUBE = Torus((4, 4, 4), (True,) * 3, (0.01,) * 3, 1.0)
OPEN = Torus((8, 8), (False, False), (0.01, 0.01), 1.0)


def at(law, torus: Torus, size: int, stride: int = 1) -> float:  # type: ignore[no-untyped-def]
    return float(law(torus, np.array([float(size)]), np.array([float(stride)]))[0])


@pytest.mark.parametrize(
    ("axes", "closes_at", "devices", "shape"),
    [
        ((16, 16), 16, 8, (2, 4)),
        ((16, 16), 16, 32, (4, 8)),
        ((16, 16), 16, 64, (8, 8)),
        ((16, 16), 16, 128, (8, 16)),
        ((16, 16), 16, 256, (16, 16)),
        ((16, 16, 16), 4, 16, (2, 2, 4)),
        ((16, 16, 16), 4, 64, (4, 4, 4)),
        ((16, 16, 16), 4, 128, (4, 4, 8)),
        ((16, 16, 16), 4, 384, (4, 8, 12)),
        ((16, 16, 16), 4, 4096, (16, 16, 16)),
        ((4, 4), 4, 7, (1, 7)),
    ],
)
def test_slice_shapes(
    axes: tuple[int, ...], closes_at: int, devices: int, shape: tuple[int, ...]
) -> None:
    assert slice_shape(axes, devices, closes_at) == shape


def test_rings_use_both_ways_of_every_closed_axis() -> None:
    assert at(ring_s_per_byte, POD, 1) == 0
    assert at(ring_s_per_byte, POD, 16) == pytest.approx(1 / 200)
    assert at(ring_s_per_byte, POD, 16, 16) == pytest.approx(1 / 200)
    assert at(ring_s_per_byte, POD, 256) == pytest.approx(1 / 400)
    assert at(ring_s_per_byte, CUBE, 64) == pytest.approx(1 / 600)


def test_a_part_of_an_axis_is_a_line() -> None:
    assert at(ring_s_per_byte, POD, 8) == pytest.approx(1 / 100)
    assert at(ring_s_per_byte, POD, 2) == pytest.approx(1 / 100)
    # A whole axis of 4 and half of the next.
    assert at(ring_s_per_byte, CUBE, 8) == pytest.approx(1 / (200 + 100))
    assert at(ring_s_per_byte, OPEN, 64) == pytest.approx(1 / 200)


def test_interleaved_groups_share_links() -> None:
    # 8 members, every second device of an axis of 16: closed, over links that two groups share.
    assert at(ring_s_per_byte, POD, 8, 2) == pytest.approx(1 / 100)
    # Half of one axis (2 of 4, every second) and the whole of the next.
    assert at(ring_s_per_byte, CUBE, 8, 2) == pytest.approx(1 / (200 / 2 + 200))


def test_latency_counts_links() -> None:
    assert at(ring_latency_s, POD, 16) == 8
    assert at(ring_latency_s, POD, 8) == 7
    assert at(ring_latency_s, POD, 256) == 16
    assert at(ring_latency_s, POD, 8, 2) == 4 * 2


def test_all_to_all_is_bound_by_the_middle_of_an_axis() -> None:
    # 16 on a closed axis: half of what 8 send crosses to the other 8, over two cuts.
    assert at(all_to_all_s_per_byte, POD, 16) == pytest.approx(16 / 8 / 100)
    assert at(all_to_all_s_per_byte, POD, 256) == pytest.approx(16 / 8 / 100)
    assert at(all_to_all_s_per_byte, OPEN, 8) == pytest.approx(8 / 4 / 100)
    assert at(all_to_all_s_per_byte, POD, 1) == 0


@pytest.mark.parametrize("torus", [POD, CUBE, OPEN])
def test_no_law_beats_the_bisection_or_the_links_of_a_device(torus: Torus) -> None:
    n = torus.devices
    links = sum(2 if closed else 1 for closed in torus.closed)
    # Ring: (n - 1)/n of the buffer enters over the links of a corner device.
    assert at(ring_s_per_byte, torus, n) >= 1 / (100 * links) * (1 - 1e-12)
    # All-to-all: n/2 devices send half of their buffers over the narrowest cut, one way.
    for extent, closed in zip(torus.extents, torus.closed, strict=True):
        cut = n / extent * (2 if closed else 1) * 100
        assert at(all_to_all_s_per_byte, torus, n) >= n / 4 / cut * (1 - 1e-12)
    # Longest axis by brute force: shift traffic never exceeds what one link carries.
    assert at(shift_s_per_byte, torus, 2) == pytest.approx(1 / 100)


def test_bisection_bandwidth_of_published_pods() -> None:
    # Google Cloud documentation: 1.6 TB/s for v5e, 3.2 TB/s for v6e, all-reduce 51.2 and 102.4.
    for name, bisection, reduction in (("v5e", 1.6e12, 51.2e12), ("v6e", 3.2e12, 102.4e12)):
        fabric = fabric_of(cluster(f"tpu-{name}-pod", 1))
        torus = fabric.torus
        assert torus is not None
        assert torus.extents == (16, 16)
        link = 1 / (torus.s_per_byte[0] * 0.855)
        assert prod(torus.extents) / max(torus.extents) * 2 * link == pytest.approx(bisection)
        assert 256 * 4 * link == pytest.approx(reduction)


def cluster(node: str, count: int) -> ClusterSpec:
    return ClusterSpec(name="t", groups=(NodeGroup(node=load_node(node), count=count),))


def test_cubes_join_into_slices() -> None:
    one = fabric_of(cluster("tpu-v4-cube", 8))
    assert one.torus is not None
    assert one.torus.extents == (8, 8, 8)
    assert (one.nodes, one.devices_per_node, one.nics) == (1, 512, 256)
    two = fabric_of(cluster("tpu-v4-cube", 128))
    assert (two.nodes, two.devices_per_node) == (2, 4096)
    small = fabric_of(cluster("tpu-v4-32", 4))
    assert (small.nodes, small.devices_per_node) == (4, 16)
    assert small.torus is not None
    assert not any(small.torus.closed)


def test_collectives_on_a_slice_and_between_slices() -> None:
    fabric = fabric_of(cluster("tpu-v5e-pod", 2))
    link = 50e9 * 0.855
    payload = 2**30

    def time(kind: str, size: int, stride: int = 1) -> float:
        return float(collective_time_s(fabric, kind, payload, size=size, stride=stride))  # type: ignore[arg-type]

    gather = LAUNCH_TORUS_S + 8e-6 + payload * 15 / 16 / (2 * link)
    assert time("all_gather", 16) == pytest.approx(gather)
    assert time("all_reduce", 256) == pytest.approx(
        LAUNCH_TORUS_S + 2 * 16e-6 + 2 * payload * 255 / 256 / (4 * link)
    )
    # Between two slices all 256 groups share 64 ports.
    assert time("all_reduce", 2, 256) > 10 * time("all_reduce", 16)
    hop = float(send_recv_time_s(fabric, payload, size=2, stride=16))
    assert hop == pytest.approx(payload / link, rel=1e-3)


def test_ultraserver_has_a_slower_third_axis() -> None:
    torus = fabric_of(cluster("aws-trn2u", 1)).torus
    assert torus is not None
    assert torus.extents == (4, 4, 4)
    assert torus.s_per_byte[2] == pytest.approx(2 * torus.s_per_byte[0])
