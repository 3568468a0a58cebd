"""Bytes that each dispatcher sends, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cost_models.expert_exchange import LAUNCH_ACROSS_S, LAUNCH_S, exchange_time_s, touched
from cost_models.fabric import fabric_of
from cost_models.interconnect import collective_time_s
from cost_models.ops import Routing
from hardware_profiles.loader import load_node
from hardware_profiles.schema import ClusterSpec, NodeGroup


def cluster(nodes: int, node: str = "dgx-h100") -> ClusterSpec:
    return ClusterSpec(name="test", groups=(NodeGroup(node=load_node(node), count=nodes),))


def routing(**changes: int) -> Routing:
    values = {"tokens": 8192, "row_bytes": 14336, "experts": 256, "top_k": 8} | changes
    return Routing(**values)


def seconds(
    dispatcher: str, ep: int, spec: Routing, *, nodes: int = 8, back: bool = False
) -> float:
    return float(
        exchange_time_s(
            fabric_of(cluster(nodes)), dispatcher, spec,  # type: ignore[arg-type]
            size=np.array([ep]), stride=np.array([1]), back=back,
        )[0]
    )  # fmt: skip


def cells(spec: Routing, count: int) -> float:
    return float(touched(spec, np.array([float(count)]))[0])


def test_touched_without_groups() -> None:
    # 4 ranks hold 2 of 8 experts each; 2 are drawn: a rank is missed by C(6,2)/C(8,2) = 15/28.
    assert cells(routing(experts=8, top_k=2), 4) == pytest.approx(4 * 13 / 28)
    assert cells(routing(experts=8, top_k=1), 4) == pytest.approx(1)
    assert cells(routing(experts=8, top_k=8), 4) == pytest.approx(4)
    assert cells(routing(), 1) == pytest.approx(1)


def test_touched_is_limited_by_groups() -> None:
    # DeepSeek-V3: 4 of 8 groups. On 8 nodes a node is a group of 32: chosen with 1/2, then missed
    # by 8 draws from 128 with prod (96 - i) / (128 - i).
    limited = routing(groups=8, group_limit=4)
    missed = math.prod((96 - i) / (128 - i) for i in range(8))
    assert cells(limited, 8) == pytest.approx(8 * 0.5 * (1 - missed))
    assert cells(limited, 8) < 4 < cells(routing(), 8)
    # On 2 nodes, a node holds 4 groups of which 0 to 4 are open: 1 way of 70 leaves none.
    assert 1.9 < cells(limited, 2) < 2
    # A group spread over 2 nodes (16 nodes): chosen with 1/2 as before, 16 experts held.
    missed = math.prod((112 - i) / (128 - i) for i in range(8))
    assert cells(limited, 16) == pytest.approx(16 * 0.5 * (1 - missed))


def test_touched_agrees_with_sampling() -> None:
    rng = np.random.default_rng(0)
    spec = routing(experts=64, top_k=6, groups=8, group_limit=3)
    hits = []
    for _ in range(4000):
        groups = rng.permutation(8)[:3]
        experts = rng.permutation(np.concatenate([np.arange(8) + 8 * g for g in groups]))[:6]
        hits.append([len(set(experts // (64 // n))) for n in (2, 4, 8, 16)])
    for count, mean in zip((2, 4, 8, 16), np.mean(hits, axis=0), strict=True):
        assert cells(spec, count) == pytest.approx(mean, rel=0.02)


def test_plain_dispatchers_are_collectives() -> None:
    spec, fabric = routing(), fabric_of(cluster(8))
    size, stride = np.array([64]), np.array([1])
    rows = 8192 * 14336
    for dispatcher, kind, back, payload in (
        ("alltoall", "all_to_all", False, rows * 8),
        ("alltoall", "all_to_all", True, rows * 8),
        ("allgather", "all_gather", False, rows * 64),
        ("allgather", "reduce_scatter", True, rows * 64),
    ):
        expected = collective_time_s(fabric, kind, payload, size=size, stride=stride)  # type: ignore[arg-type]
        assert seconds(dispatcher, 64, spec, back=back) == pytest.approx(float(expected[0]))


def test_one_copy_per_node_crosses_the_network() -> None:
    spec = routing(groups=8, group_limit=4)
    # One 400 Gb/s port per device at 0.88; 7/8 of the nodes touched are remote.
    wire = 8192 * 14336 * cells(spec, 8) * 7 / 8 / (50e9 * 0.88)
    assert seconds("deepep", 64, spec) == pytest.approx(LAUNCH_ACROSS_S + wire)
    assert seconds("deepep", 64, spec) < 0.6 * seconds("alltoall", 64, spec)
    assert seconds("deepep", 64, spec) < seconds("deepep", 64, routing())


def test_one_copy_per_rank_in_a_node() -> None:
    wire = 8192 * 14336 * cells(routing(), 8) * 7 / 8 / (450e9 * 0.68)
    assert seconds("deepep", 8, routing(), nodes=1) == pytest.approx(LAUNCH_S + wire)


def test_top_one_takes_the_time_of_two_copies() -> None:
    # 7/8 of a copy leaves the rank, and two are paid.
    wire = 8192 * 14336 * 2 / (450e9 * 0.68)
    assert seconds("deepep", 8, routing(top_k=1), nodes=1) == pytest.approx(LAUNCH_S + wire)


def test_alone_takes_no_time() -> None:
    for dispatcher in ("alltoall", "allgather", "deepep", "hybridep"):
        assert seconds(dispatcher, 1, routing()) == 0
