"""What of a collective stays visible, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cost_models.communication import Visible, Windows, expose, merge_passes, visible
from cost_models.configs import Configs, price_configs
from cost_models.data_parallel import _window
from cost_models.data_traffic import GatheredBytes, Mesh, Pieces, Wire, calls
from cost_models.fabric import fabric_of
from cost_models.graph import Shard
from cost_models.interconnect import collective_time_s
from cost_models.layer_times import LayerTimes
from cost_models.ops import Collective
from cost_models.step import Field
from hardware_profiles.loader import load_node, load_stack
from hardware_profiles.schema import ClusterSpec, NodeGroup, StackSpec
from planner.pipeline import read_request

FABRIC = fabric_of(
    ClusterSpec(name="test", groups=(NodeGroup(node=load_node("dgx-h100"), count=2),))
)
BYTES = 64 * 2**20


def shard(tp: int) -> Shard:
    one = np.array([1])
    return Shard(sequence=4096, microbatch=one, tp=np.array([tp]), cp=one, ep=one, etp=one,
                 sequence_parallel=np.array([True]), cp_kind=np.array([0]))  # fmt: skip


def stack(overlap: str, contention: float = 0.0) -> StackSpec:
    base = load_stack("megatron-core")
    cost = base.overlap_contention.model_copy(update={"value": contention})
    return base.model_copy(update={"tensor_parallel_overlap": overlap, "overlap_contention": cost})


def windows(whole: float, chunk: Callable[[int], float]) -> Windows:
    def part(parts: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([chunk(int(parts[0]))])

    return Windows({"fc1:fprop": np.array([whole])}, {"fc1:fprop": part})


def seen(tp: int, overlap: str, kernels: Windows, contention: float = 0.0) -> float:
    op = Collective("fc1.gather", "tp", "all_gather", BYTES, None, 0, forward_product="fc1:fprop")
    result = visible(op, shard(tp), FABRIC, stack(overlap, contention), "h100", kernels)
    assert result is not None
    return float(result.forward[0])


def gather(tp: int) -> float:
    time = collective_time_s(FABRIC, "all_gather", BYTES, size=np.array([tp]), stride=np.array([1]))
    return float(time[0])


def test_expose() -> None:
    time, window = np.array([3.0, 1.0]), np.array([2.0, 2.0])
    assert expose(time, window, 0.1).tolist() == pytest.approx([1.2, 0.1])


def test_a_slow_product_hides_all_of_a_pipelined_gather() -> None:
    # Four chunks of 1 s each hide three messages of well below that.
    kernels = windows(4.0, lambda parts: 4.0 / parts)
    assert seen(4, "none", kernels) == pytest.approx(gather(4))
    assert seen(4, "pipelined", kernels) == pytest.approx(0.0)
    assert seen(4, "pipelined", kernels, contention=0.1) == pytest.approx(0.1 * gather(4))


def test_a_fast_product_hides_its_own_chunks_but_one() -> None:
    # chunk + 3 max(chunk, time / 3) - 4 chunk = time - 3 chunk.
    chunk = gather(4) / 30
    kernels = windows(4 * chunk, lambda parts: 4 * chunk / parts)
    assert seen(4, "pipelined", kernels) == pytest.approx(gather(4) - 3 * chunk)


def test_cutting_costs_what_the_chunks_lose() -> None:
    # Chunks at half the rate: 4 chunks take 2 x whole, and one whole more is paid.
    whole = 4 * gather(4)
    kernels = windows(whole, lambda parts: 2 * whole / parts)
    assert seen(4, "pipelined", kernels) == pytest.approx(gather(4)), "not cut: it does not pay"
    whole = gather(4) / 2
    kernels = windows(whole, lambda parts: 1.2 * whole / parts)
    # chunk + time - whole with chunk = 0.3 whole.
    assert seen(4, "pipelined", kernels) == pytest.approx(gather(4) - 0.7 * whole)


def test_the_backward_of_an_asynchronous_layer_hides_behind_its_product() -> None:
    op = Collective("fc1.scatter", "tp", None, 0, "reduce_scatter", BYTES,
                    backward_hidden="fc1:fprop")  # fmt: skip
    kernels = windows(100.0, lambda parts: 100.0 / parts)
    found = {}
    for overlap in ("none", "asynchronous"):
        result = visible(op, shard(4), FABRIC, stack(overlap), "h100", kernels)
        assert result is not None
        found[overlap] = float(result.backward[0])
    scatter = collective_time_s(
        FABRIC, "reduce_scatter", BYTES, size=np.array([4]), stride=np.array([1])
    )
    assert found["none"] == pytest.approx(float(scatter[0]))
    assert found["asynchronous"] == 0.0


def test_across_nodes_nothing_is_pipelined() -> None:
    kernels = windows(100.0, lambda parts: 100.0 / parts)
    assert seen(16, "pipelined", kernels) == pytest.approx(gather(16))


def test_data_parallel_traffic_waits_for_the_ports() -> None:
    terms = {
        "matmul": {"forward": np.array([3.0, 3.0])},
        "ep_comm": {"forward": np.array([2.0] * 2)},
    }
    wire = {"inside": {"forward": np.array([0.5] * 2)}, "across": {"forward": np.array([2.0] * 2)}}
    times = LayerTimes(terms, wire, None, np.zeros(1))  # type: ignore[arg-type]
    # The first group spans both nodes, the second stays in one.
    window = _window(times, "forward", FABRIC, np.array([2, 8]), np.array([8, 1]))
    assert window.tolist() == pytest.approx([3.0, 4.5])


def test_merged_passes_hide_exchanges_behind_the_other_pass() -> None:
    def two(value: float) -> NDArray[np.float64]:
        return np.array([value, value])

    # Only the first group spans nodes. 5 s of dispatch and combine each way; 3 s of products
    # forward and 6 s backward: forward exchanges hide behind the backward, and the reverse.
    seen = Visible(two(5), two(5), (two(5), two(5)), np.array([True, False]), two(1) > 0)
    terms = {
        "matmul": {"forward": two(3), "backward": two(6)},
        "ep_comm": {"forward": two(5), "backward": two(5)},
    }
    merged = merge_passes([seen], terms, contention=0.1)
    assert merged["forward"].tolist() == pytest.approx([0.5, 5])
    assert merged["backward"].tolist() == pytest.approx([2 + 0.3, 5])


def test_gathering_each_tensor_pays_a_ring_for_each() -> None:
    def parameter_ns(*, each: bool) -> int:
        request = read_request(
            "gpt2-xl", "dgx-a100:16", overrides={"stack": "deepspeed-zero3-2021"}
        )
        layers = request.machine.stack.layers.model_copy(update={"gathers_each_tensor": each})
        stack = request.machine.stack.model_copy(update={"layers": layers})
        machine = replace(request.machine, stack=stack)
        one, ranks = np.array([1]), np.array([128])
        configs = Configs(
            microbatch=one, tp=one, cp=one, cp_kind=np.array([0]), ep=one, etp=one,
            sequence_parallel=np.array([False]), dp_replicate=one, dp_shard=ranks, pp=one,
            zero_stage=np.array([3]), reshard=np.array([0]),
        )  # fmt: skip
        priced = price_configs(request.workload, machine, configs)
        return int(priced.kinds[0][Field.FORWARD, 0])

    # A ring over 128 ranks: 16 hops of 14 us and 112 of 3.4 us are 0.6 ms a tensor; the layer has
    # a dozen, and its own products hide less than that.
    assert parameter_ns(each=True) - parameter_ns(each=False) > 3_000_000


def test_gradients_that_every_rank_gets_whole_are_summed_over_replicas_at_once() -> None:
    elements, one = np.array([64]), np.array([1])
    mesh = Mesh(ways=np.array([8]), stride=one, replicas=np.array([4]), replica_stride=8 * one)
    machine = read_request("gpt2-xl", "dgx-a100:4", overrides={"stack": "internevo"}).machine
    wire = Wire(machine.stack.layers, 8)
    none = GatheredBytes(0 * one, 0 * one)

    def sent(stage: int, role: str) -> list[tuple[str, int, float, int]]:
        found = calls(elements, mesh, np.array([stage]), machine.rules, Pieces(5, 1), none, wire)
        return [
            (call.kind, int(call.size[0]), float(call.bytes[0]), call.count)
            for call in found
            if call.role == role and call.active[0]
        ]

    # InternEvo: 2 bytes each, over 8 x 4 ranks; its FSDP scatters over 8 and sums over 4 replicas.
    assert sent(1, "gradient") == [("all_reduce", 32, 128.0, 1)]
    assert sent(3, "gradient") == [("reduce_scatter", 8, 128.0, 1), ("all_reduce", 4, 16.0, 1)]
    # Five tensors after the update; a layer at once where FSDP wraps layers.
    assert sent(1, "parameter") == [("all_gather", 8, 25.6, 5)]
    assert sent(3, "parameter") == [("all_gather", 8, 128.0, 1)]
