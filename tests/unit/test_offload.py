"""What the hosts hold, what crosses their links, and layouts that they or the margin refuse."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster
from hardware_profiles.schema import ClusterSpec, Kind, Sourced
from planner.certify import verify
from planner.errors import InfeasibleError, InputError
from planner.memory_margin import margin_of, usable_bytes
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.request import Request
from tests.unit.offloading import PARAMETERS, predicted, term


def test_the_host_holds_what_leaves_the_device() -> None:
    """16 bytes of optimizer state and gradient per parameter on one node, half as many on each of
    two; a gradient and a weight of 2 bytes cross each device's link."""
    one = predicted(global_batch=8, optimizer_offload=True)
    two = predicted("dgx-h100:2", global_batch=16, optimizer_offload=True)
    none = predicted(global_batch=8)
    assert none.host is None
    assert one.host is not None
    assert two.host is not None
    assert one.host.bytes_per_node == 16 * PARAMETERS == 2 * two.host.bytes_per_node
    assert one.host.link_bytes_per_step == 4 * PARAMETERS // 8
    assert (term(one, "optimizer"), term(one, "gradients")) == (0, 0)
    assert term(none, "optimizer") == pytest.approx(12 * PARAMETERS / 8, rel=1e-5)


def test_weights_on_the_host_cross_its_link_for_each_pass() -> None:
    """2 more bytes there; they come for the forward and for the backward of each microbatch."""
    found = predicted(global_batch=16, optimizer_offload=True, parameter_offload=True)
    assert found.host is not None
    assert found.host.bytes_per_node == 18 * PARAMETERS
    share = PARAMETERS // 8
    assert found.host.link_bytes_per_step == share * (4 + 2 * 2 * 2)
    assert term(found, "weights") == 0


def streamed(**job: Any) -> Prediction:
    spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 16, **job}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, spec)
    chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}
    return evaluate(request, chosen).prediction


def test_state_that_the_device_updates_crosses_the_link_twice() -> None:
    """Two fp32 moments come for the update and leave behind it, in turn with it: 16 bytes per
    parameter over the link, and no fp32 Adam on the host."""
    none, state = streamed(), streamed(optimizer_offload=True)
    assert state.host is not None
    assert state.host.bytes_per_node == pytest.approx(8 * PARAMETERS, rel=1e-4)
    assert state.host.link_bytes_per_step == pytest.approx(16 * PARAMETERS / 8, rel=1e-4)
    assert term(none, "optimizer") == pytest.approx(8 * PARAMETERS / 8, rel=1e-3)
    assert term(state, "optimizer") == 0
    link = load_cluster("dgx-h100:1").groups[0].node.host_link.si
    assert state.step_time_s - none.step_time_s == pytest.approx(
        state.host.link_bytes_per_step / link, rel=1e-3
    )


def test_weights_that_the_device_updates_come_as_they_are_kept() -> None:
    """4 bytes for the forward and the backward of both microbatches, and twice for the update, at
    which the moments are there too: more than what the backward holds."""
    found = streamed(optimizer_offload=True, parameter_offload=True)
    assert found.host is not None
    assert found.host.bytes_per_node == pytest.approx(12 * PARAMETERS, rel=1e-4)
    assert found.host.link_bytes_per_step == pytest.approx(
        PARAMETERS / 8 * (2 * 12 + 2 * 2 * 4), rel=1e-4
    )
    assert term(found, "weights") == 0
    assert term(found, "optimizer_update") == pytest.approx(12 * PARAMETERS / 8, rel=1e-3)


def test_weights_alone_leave_where_the_device_updates() -> None:
    """The moments stay: weights come for the four passes of two microbatches and, twice, for the
    update; Muon's, of which nothing is streamed but they, do too."""
    none, found = streamed(), streamed(parameter_offload=True)
    assert found.host is not None
    assert found.host.bytes_per_node == pytest.approx(4 * PARAMETERS, rel=1e-4)
    assert found.host.link_bytes_per_step == pytest.approx(
        PARAMETERS / 8 * (2 * 4 + 2 * 2 * 4), rel=1e-4
    )
    assert term(found, "weights") == 0
    assert term(found, "optimizer") == term(none, "optimizer")
    assert found.max_peak_bytes < none.max_peak_bytes
    assert found.step_time_s > none.step_time_s
    assert streamed(parameter_offload=True, optimizer="muon").host is not None
    with pytest.raises(InputError, match="only with the optimizer state"):
        evaluate(
            read_request(
                "llama-3.1-8b", "dgx-h100:1", None,
                {"stack": "deepspeed-hf", "parameter_offload": True, "global_batch": 16},
            ),
            {"zero_stage": 3},
        )  # fmt: skip


def test_muon_keeps_more_of_what_it_leaves_to_adam() -> None:
    """On the hosts, 4 bytes per parameter, and 4 more of both tables (128,256 x 4,096) and of the
    gains of 65 norms; all of it crosses the link twice."""
    none = streamed(optimizer="muon")
    found = streamed(optimizer="muon", optimizer_offload=True)
    assert found.host is not None
    others = 2 * 128_256 * 4096 + 65 * 4096
    there = 4 * PARAMETERS + 4 * others
    assert found.host.bytes_per_node == pytest.approx(there, rel=1e-4)
    assert found.host.link_bytes_per_step == pytest.approx(2 * there / 8, rel=1e-4)
    assert term(none, "optimizer") == pytest.approx(there / 8, rel=1e-3)
    assert term(found, "optimizer") == 0
    link = load_cluster("dgx-h100:1").groups[0].node.host_link.si
    assert found.step_time_s - none.step_time_s == pytest.approx(
        found.host.link_bytes_per_step / link, rel=1e-3
    )


def with_memory(cluster: ClusterSpec, size: float) -> ClusterSpec:
    """The cluster with ``size`` bytes of host memory in a node."""
    (group,) = cluster.groups
    memory = Sourced(value=size, unit="B", kind=Kind.ASSUMED, source="test")
    node = group.node.model_copy(update={"host_memory": memory})
    return cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})


def beside_state(recompute: str, **job: Any) -> Prediction:
    spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 16, **job}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, spec)
    chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": recompute}
    return evaluate(request, chosen).prediction


def test_hosts_hold_outputs_beside_state() -> None:
    """Two fp32 moments per parameter, and on each of 8 devices the queries, keys and values (48
    heads of 128 in 16 bits) of 2,048 tokens in 32 layers, which cross the link twice for each of
    two microbatches."""
    both = beside_state("qkv_proj_offloaded", optimizer_offload=True)
    outputs = 32 * 2048 * 48 * 128 * 2
    assert both.host is not None
    assert both.host.bytes_per_node == pytest.approx(8 * PARAMETERS + 8 * outputs, rel=1e-4)
    crossing = 16 * PARAMETERS / 8 + 2 * 2 * outputs
    assert both.host.link_bytes_per_step == pytest.approx(crossing, rel=1e-4)
    alone = beside_state("qkv_proj_offloaded")
    streams = beside_state("full", optimizer_offload=True)
    full = beside_state("full")
    # The state comes behind the backward: what one adds to the step the other does not change.
    added = streams.step_time_s - full.step_time_s
    assert both.step_time_s - alone.step_time_s == pytest.approx(added, rel=1e-3)


def test_a_node_without_room_for_both_takes_neither() -> None:
    """Each alone fits into a host that holds a byte less than both."""
    found = beside_state("qkv_proj_offloaded", optimizer_offload=True)
    assert found.host is not None
    assert found.fits
    room = found.host.bytes_per_node

    def fits(recompute: str, size: int, **job: Any) -> bool:
        spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 16, **job}
        asked = read_request("llama-3.1-8b", "dgx-h100:1", None, spec)
        cluster = with_memory(asked.cluster, size)
        chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": recompute}
        return evaluate(
            Request(asked.model, cluster, asked.job, asked.stack), chosen
        ).prediction.fits

    assert fits("qkv_proj_offloaded", room, optimizer_offload=True)
    assert not fits("qkv_proj_offloaded", room - 1, optimizer_offload=True)
    assert fits("full", room - 1, optimizer_offload=True)
    assert fits("qkv_proj_offloaded", room - 1)


def test_weights_and_outputs_share_the_link_of_a_backward() -> None:
    """On a link of 1 GB/s weights take longer than either pass, which outputs leave beside in the
    forward, the other way; in the backward they come behind the weights."""

    def taken(recompute: str, **job: Any) -> float:
        spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 16, **job}
        asked = read_request("llama-3.1-8b", "dgx-h100:1", None, spec)
        (group,) = asked.cluster.groups
        slow = Sourced(value=1, unit="GB/s", kind=Kind.ASSUMED, source="test")
        node = group.node.model_copy(update={"host_link": slow})
        cluster = asked.cluster.model_copy(
            update={"groups": (group.model_copy(update={"node": node}),)}
        )
        chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": recompute}
        request = Request(asked.model, cluster, asked.job, asked.stack)
        return evaluate(request, chosen).prediction.step_time_s

    weights = {"optimizer_offload": True, "parameter_offload": True}
    back = 2 * 32 * 2048 * 48 * 128 * 2 / 1e9
    with_weights = taken("qkv_proj_offloaded", **weights) - taken("save_qkv_proj", **weights)
    # Less what hides beside collectives, which leave the link alone.
    assert 0.75 * back < with_weights < back


def test_a_plan_that_overfills_the_host_is_infeasible() -> None:
    """16 bytes of 405 billion parameters are 6.5 TB; a node has 2 TB, and 4 nodes have 8."""
    job = {"optimizer_offload": True, "stack": "deepspeed-hf", "sequence_length": 2048}
    three = read_request("llama-3.1-405b", "dgx-h100:3", None, {**job, "global_batch": 24})
    reason = r"host memory of .* per node does not hold what is offloaded \(state alone takes "
    with pytest.raises(InfeasibleError, match=reason):
        plan(three)
    refused = evaluate(three, {"zero_stage": 3}).prediction
    assert not refused.fits
    assert refused.host is not None
    assert refused.host.bytes_per_node > (refused.host.capacity_bytes_per_node or 0)
    assert refused.step_time_s > 0
    found = plan(read_request("llama-3.1-405b", "dgx-h100:8", None, {**job, "global_batch": 64}))
    host = found.prediction.host
    assert host is not None
    assert host.capacity_bytes_per_node is not None
    assert host.bytes_per_node <= host.capacity_bytes_per_node


def test_the_margin_is_given_or_earned() -> None:
    """A layout fits if its peak and the margin are within the device; it is priced either way."""
    layout = {"tp": 4, "zero_stage": 1, "recompute": "full", "microbatch_size": 1}
    overrides = {"stack": "megatron-core", "global_batch": 8, "sequence_length": 4096}
    peaks, fits = [], []
    for margin in (0.0, 1.0, None):
        job = overrides | ({} if margin is None else {"memory_margin": margin})
        found = evaluate(read_request("llama-3.1-8b", "dgx-h100:1", None, job), layout).prediction
        assert found.step_time_s > 0
        peaks.append(found.max_peak_bytes)
        fits.append(found.fits)
    assert len(set(peaks)) == 1
    assert fits == [True, True, True]
    margins = [margin / 100 for margin in range(101)]
    capacity = round(1.5 * peaks[0])
    assert [peaks[0] <= usable_bytes(capacity, m) for m in margins] == [m <= 0.5 for m in margins]
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, overrides)
    assert request.memory_margin == margin_of("megatron-core")
    assert request.memory_margin[0] > 0


def test_a_layout_that_does_not_fit_is_priced() -> None:
    job = {"stack": "megatron-core", "global_batch": 8, "sequence_length": 4096}
    found = evaluate(
        read_request("llama-3.1-70b", "dgx-h100:1", None, job), {"tp": 8, "zero_stage": 0}
    ).prediction
    assert not found.fits
    assert found.step_time_s > 0
    assert found.max_peak_bytes > 80e9


def test_a_share_of_the_optimizer_stays_and_is_updated_on_the_devices() -> None:
    """DeepSpeed's offload_optimizer.ratio of 0.3: of 8.03 billion parameters over eight devices,
    70 % have 16 bytes each on the device, gradients in fp32 among them."""
    found = {}
    for share in (1.0, 0.3):
        job = {"stack": "deepspeed-hf", "sequence_length": 2048, "global_batch": 8,
               "optimizer_offload": True, "optimizer_offload_share": share}  # fmt: skip
        asked = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
        found[share] = evaluate(asked, {"zero_stage": 3}).prediction
        assert evaluate(asked, {"zero_stage": 3}).prediction == found[share]
    parameters = 8_030_261_248
    left = term(found[0.3], "optimizer") - term(found[1.0], "optimizer")
    assert left == pytest.approx(0.7 * 16 * parameters / 8, rel=1e-4)
    hosts = [found[share].host for share in (1.0, 0.3)]
    assert hosts[0] is not None
    assert hosts[1] is not None
    assert hosts[1].bytes_per_node == pytest.approx(0.3 * hosts[0].bytes_per_node, rel=1e-4)
    # 28 bytes of arithmetic each, over the share of the host's bandwidth, for 70 % fewer.
    node, spec = asked.cluster.groups[0].node, asked.stack.offload
    assert node.host_memory_bandwidth is not None
    assert spec is not None
    assert spec.adam_efficiency is not None
    rate = node.host_memory_bandwidth.si * spec.adam_efficiency.si
    faster = found[1.0].step_time_s - found[0.3].step_time_s
    assert faster == pytest.approx(0.7 * 28 * parameters / rate, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "zero_stage", "message"),
    [
        ({}, 2, "ZeRO stage 3 only"),
        ({"optimizer": "lion"}, 3, "all optimizer state of lion or none"),
        ({"stack": "deepspeed-pipe"}, 1, "all optimizer state of adamw or none"),
        ({"optimizer_offload": False}, 3, "without optimizer_offload"),
    ],
)
def test_where_no_share_of_the_optimizer_stays(
    changes: dict[str, object], zero_stage: int, message: str
) -> None:
    job = {"stack": "deepspeed-hf", "sequence_length": 2048, "global_batch": 8,
           "optimizer_offload": True, "optimizer_offload_share": 0.5}  # fmt: skip

    def ask() -> None:
        asked = read_request("llama-3.1-8b", "dgx-h100:1", None, job | changes)
        evaluate(asked, {"zero_stage": zero_stage})

    with pytest.raises(InputError, match=message):
        ask()


def test_a_plan_with_a_share_of_the_optimizer_on_the_hosts_verifies() -> None:
    job = {"stack": "deepspeed-hf", "sequence_length": 4096, "global_batch": 8,
           "optimizer_offload": True, "optimizer_offload_share": 0.4}  # fmt: skip
    found = plan(read_request("llama-3.1-8b", "dgx-h100:1", None, job))
    assert found.layout.zero_stage == 3
    assert verify(found) == []
