"""The floor that the host sets under a layer's time, on layers of a few made-up ops."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.compute import memory_bound_bandwidth_bytes_per_s
from cost_models.graph import LayerKind, Shard
from cost_models.layer_times import LayerTimes
from cost_models.layout import FULL, RecomputePolicy
from cost_models.ops import Elementwise, GroupedMatMul, Op
from cost_models.step import Machine, price_layer
from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import Kind, Sourced

ONE = np.ones(1, dtype=np.int64)
SHARD = Shard(
    sequence=1, microbatch=ONE, tp=ONE, cp=ONE, ep=ONE, etp=ONE,
    sequence_parallel=np.zeros(1, dtype=bool), cp_kind=ONE * 0,
)  # fmt: skip
DEVICE = load_cluster("dgx-a100").groups[0].node.device
BANDWIDTH = memory_bound_bandwidth_bytes_per_s(DEVICE)
LATENCY_S = DEVICE.kernels.memory_bound_latency.si
SELECTIVE = RecomputePolicy("selective", frozenset({"core_attn"}))


def again(times: LayerTimes, policy: RecomputePolicy) -> int:
    """Extra backward time of a recomputation in ns."""
    return int(times.recompute_ns(policy)[0])


def microseconds(value: float) -> Sourced:
    return Sourced(value=value, unit="us", kind=Kind.ASSUMED, source="test")


def priced(launch_us: float, *ops: Op, expert_us: float = 0.0, sync_us: float = 0.0) -> LayerTimes:
    stack = load_stack("megatron-core").model_copy(
        update={
            "launch_overhead": microseconds(launch_us),
            "expert_launch": microseconds(expert_us),
            "expert_sync": microseconds(sync_us),
        }
    )
    machine = Machine(
        cluster=load_cluster("dgx-a100"), stack=stack, precision="bf16", optimizer="adamw"
    )
    kind = LayerKind("made-up", (), lambda _: ops, lambda _: (), lambda _: ONE, lambda _: ONE)
    return price_layer(kind, SHARD, machine)


def streaming(
    forward_us: float, backward_us: float, *, modules: tuple[str, ...] = ()
) -> Elementwise:
    """One kernel each way that takes the device these times."""
    size = (np.array([forward_us, backward_us]) * 1e-6 - LATENCY_S) * BANDWIDTH
    return Elementwise("op", size[:1], size[1:], modules=modules)


@pytest.mark.parametrize(
    ("launch_us", "forward", "backward", "selective", "full"),
    [
        # The device needs 60 us for both passes: a host of 2 x 25 us keeps ahead of it, although
        # the forward alone (20 us) is shorter than its launch.
        (25, 20, 40, 20, 20),
        # 2 x 35 us on the host: 10 us of waiting, all of it in the pass that falls short. With the
        # forward again (or its op, selectively) 105 us on the host.
        (35, 30, 40, 35, 35),
        # Both passes fall short, by 30 and 10 us.
        (50, 50, 50, 50, 50),
        # One pass of 31 us leaves the host 2 us behind after both, 13 us after three.
        (31, 22, 40, 31, 31),
    ],
)
def test_passes_share_the_floor(
    launch_us: float, forward: int, backward: int, selective: int, full: int
) -> None:
    times = priced(launch_us, streaming(20, 40, modules=("core_attn",)))
    found = {phase: int(times.nanoseconds(phase)[0]) for phase in times.terms["launch"]}
    found |= {policy.name: again(times, policy) for policy in (SELECTIVE, FULL)}
    wanted = {"forward": forward, "backward": backward, "selective": selective, "full": full}
    assert found == {phase: pytest.approx(1000 * us, abs=3) for phase, us in wanted.items()}


def test_a_device_that_catches_up_shortens_the_wait_of_a_recomputation() -> None:
    # Host 2 x 35 us, device 50 + 10 us: 10 us of waiting in the backward. Recomputing the forward
    # adds 35 us there and 50 us here: then the device is the longer, 110 us in all.
    times = priced(35, streaming(50, 10))
    assert int(times.nanoseconds("backward")[0]) == pytest.approx(20_000, abs=2)
    assert again(times, FULL) == pytest.approx(40_000, abs=2)


def test_experts_drain_the_queue_and_cost_the_host_a_call_each() -> None:
    products = GroupedMatMul("experts", ONE * 4, ONE * 8.0, ONE * 64, ONE * 64)
    idle = priced(0, products)
    busy = {phase: float(idle.terms["matmul"][phase][0]) for phase in ("forward", "backward")}
    times = priced(100, products, expert_us=50, sync_us=30)
    # Forward: 100 us and 4 calls of 50 us, then the wait of 30 us; backward twice the calls.
    assert float(times.terms["launch"]["forward"][0]) == pytest.approx(330e-6 - busy["forward"])
    assert float(times.terms["launch"]["backward"][0]) == pytest.approx(600e-6 - busy["backward"])
    assert again(times, FULL) == pytest.approx(330_000, abs=2)
