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
    return int(times.recompute_ns((policy,))[0, 0])


def microseconds(value: float) -> Sourced:
    return Sourced(value=value, unit="us", kind=Kind.ASSUMED, source="test")


def priced(
    launch_us: float, *ops: Op, expert_us: float = 0.0, sync_us: float = 0.0,
    blocking: bool = False, shard: Shard = SHARD,
) -> LayerTimes:  # fmt: skip
    stack = load_stack("megatron-core").model_copy(
        update={
            "launch_overhead": microseconds(launch_us),
            "expert_launch": microseconds(expert_us),
            "expert_sync": microseconds(sync_us),
            "blocking_launches": blocking,
        }
    )
    machine = Machine(
        cluster=load_cluster("dgx-a100"), stack=stack, precision="bf16", optimizer="adamw"
    )
    kind = LayerKind("made-up", (), lambda _: ops, lambda _: (), lambda _: ONE, lambda _: ONE)
    return price_layer(kind, shard, machine)


def streaming(
    forward_us: float, backward_us: float, *, modules: tuple[str, ...] = ()
) -> Elementwise:
    """One kernel each way that takes the device these times."""
    size = (np.array([forward_us, backward_us]) * 1e-6 - LATENCY_S) * BANDWIDTH
    return Elementwise("op", size[:1], size[1:], modules=modules)


def longer(device_us: float, host_us: float) -> float:
    """The smooth maximum, from its definition."""
    return float((device_us**4 + host_us**4) ** 0.25)


# Device 20 + 40 us: a host that is ahead of both passes, as long, behind, far behind.
@pytest.mark.parametrize("launch_us", [5, 30, 35, 50, 200])
def test_passes_share_the_floor(launch_us: float) -> None:
    """Both passes together take the longer of 60 us on the device and two launches on the host; the
    forward again makes that 80 us and three launches."""
    times = priced(launch_us, streaming(20, 40, modules=("core_attn",)))
    both = longer(60, 2 * launch_us)
    found = {phase: int(times.nanoseconds(phase)[0]) for phase in times.terms["launch"]}
    assert sum(found.values()) == pytest.approx(1000 * both, abs=4)
    waits = {p: longer(d, launch_us) - d for p, d in (("forward", 20), ("backward", 40))}
    share = waits["forward"] / sum(waits.values())
    assert found["forward"] == pytest.approx(1000 * (20 + (both - 60) * share), abs=4)
    more = 1000 * (longer(80, 3 * launch_us) - both)
    assert again(times, SELECTIVE) == again(times, FULL) == pytest.approx(more, abs=4)


def test_a_device_that_catches_up_shortens_the_wait_of_a_recomputation() -> None:
    # Host 2 x 35 us beside 60 us on the device; the forward again adds 35 us there and 50 us here.
    times = priced(35, streaming(50, 10))
    assert again(times, FULL) == pytest.approx(1000 * (longer(110, 105) - longer(60, 70)), abs=2)


def test_a_host_that_waits_for_every_kernel_adds_its_time() -> None:
    times = priced(35, streaming(20, 40), blocking=True)
    assert [int(times.nanoseconds(p)[0]) for p in ("forward", "backward")] == [
        pytest.approx(55_000, abs=2), pytest.approx(75_000, abs=2)
    ]  # fmt: skip
    assert again(times, FULL) == pytest.approx(55_000, abs=2)


def test_launches_by_configuration() -> None:
    """An op that only some configurations have costs the others nothing."""
    two = np.array([0, 3])
    op = Elementwise("op", np.array([0.0, 3e6]), np.array([0.0, 3e6]), two, two)
    both = Shard(
        sequence=1, sequence_parallel=two > 3, cp_kind=0 * two,
        **dict.fromkeys(("microbatch", "tp", "cp", "ep", "etp"), 1 + 0 * two),
    )  # fmt: skip
    times = priced(0, op, shard=both).terms["memory_bound"]["forward"]
    assert times[0] == 0.0
    assert times[1] == pytest.approx(3e6 / BANDWIDTH + 3 * LATENCY_S)


def test_experts_drain_the_queue_and_cost_the_host_a_call_each() -> None:
    products = GroupedMatMul("experts", ONE * 4, ONE * 8.0, ONE * 64, ONE * 64)
    idle = priced(0, products)
    busy = {p: 1e6 * float(idle.terms["matmul"][p][0]) for p in ("forward", "backward")}
    times = priced(100, products, expert_us=50, sync_us=30)
    # Forward: 100 us and 4 calls of 50 us, then the wait of 30 us; backward twice the calls.
    waits = {p: 1e6 * float(times.terms["launch"][p][0]) for p in ("forward", "backward")}
    assert waits["forward"] == pytest.approx(30 + longer(busy["forward"], 300) - busy["forward"])
    assert waits["backward"] == pytest.approx(longer(busy["backward"], 600) - busy["backward"])
    assert again(times, FULL) == pytest.approx(1000 * (30 + longer(busy["forward"], 300)), abs=2)
