"""What the hosts hold, what crosses their links, and layouts that they or the margin refuse."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import ClusterSpec, Kind, Sourced
from hardware_profiles.units import format_bytes
from planner.certify import verify
from planner.errors import InfeasibleError, InputError
from planner.memory_margin import margin_of, usable_bytes
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.report.parts import host_words
from planner.request import Request
from planner.specs import JobSpec

PARAMETERS = 8_030_261_248


def predicted(
    cluster: str = "dgx-h100:1", layout: dict[str, Any] | None = None, **job: Any
) -> Prediction:
    spec = JobSpec(sequence_length=2048, stack="deepspeed-hf", **job)
    request = Request(
        read_model("llama-3.1-8b"), load_cluster(cluster), spec, load_stack("deepspeed-hf")
    )
    chosen = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"} | (layout or {})
    return evaluate(request, chosen).prediction


def term(found: Prediction, name: str) -> int:
    return sum(each.bytes or 0 for each in found.stages[0].memory if each.name == name)


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


CHECKPOINTS = 32 * 2048 * 4096 * 2
"""Inputs of 32 layers: 2,048 tokens of 4,096 16-bit numbers."""


def test_checkpoints_on_the_host_leave_the_device() -> None:
    """What stays is twice one layer's input, on its way, beside what the layer works with."""
    here = predicted(global_batch=8)
    there = predicted(global_batch=8, activation_offload=True)
    assert here.host is None
    assert there.host is not None
    assert there.host.bytes_per_node == 8 * CHECKPOINTS
    assert there.host.link_bytes_per_step == 2 * CHECKPOINTS
    assert term(here, "activations") - term(there, "activations") == CHECKPOINTS
    assert there.max_peak_bytes < here.max_peak_bytes
    # 16 MiB cross the link in 0.3 ms, a layer's forward takes longer: nothing is waited for.
    assert there.step_time_s == here.step_time_s


def test_checkpoints_that_take_longer_than_a_layer_are_waited_for() -> None:
    """Over a thousandth of the link, 32 layers wait twice for what a pass does not hide."""
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    slow = node.model_copy(update={"host_link": node.host_link.model_copy(update={"value": 0.055})})
    group = cluster.groups[0].model_copy(update={"node": slow})
    cluster = cluster.model_copy(update={"groups": (group,)})
    stack, model = load_stack("deepspeed-hf"), read_model("llama-3.1-8b")
    steps = []
    for moved in (False, True):
        job = JobSpec(
            sequence_length=2048, stack="deepspeed-hf", global_batch=8, activation_offload=moved
        )
        request = Request(model, cluster, job, stack)
        layout = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}
        steps.append(evaluate(request, layout).prediction.step_time_s)
    assert 0 < steps[1] - steps[0] < 2 * CHECKPOINTS / 0.055e9
    assert steps[1] > 2 * CHECKPOINTS / 0.055e9


def test_a_plan_with_checkpoints_on_the_host_verifies() -> None:
    job = {"activation_offload": True, "stack": "deepspeed-hf", "sequence_length": 16384,
           "global_batch": 8}  # fmt: skip
    found = plan(read_request("llama-3.1-8b", "dgx-h100:1", None, job))
    full = {part.mode: part.layers for part in found.layout.stages[0].recompute}.get("full", 0)
    assert found.layout.stages[0].activation_offload_layers == full
    assert verify(found) == []


def test_a_pipeline_sends_the_inputs_of_its_layers_to_the_hosts() -> None:
    """GPT-3 over 8 stages and tp 8: the first has 12 layers of 8 microbatches of 2,048 x 12,288
    16-bit numbers, all on its node's host; each way is waited for."""
    size = 2048 * 12_288 * 2
    found = {}
    for mode, parts in (("full", 1), ("partitioned", 8)):
        for moved in (False, True):
            job = {"stack": "megatron-deepspeed", "sequence_length": 2048, "global_batch": 8,
                   "precision": "fp16", "activation_offload": moved,
                   "constraints": {"recompute": mode}}  # fmt: skip
            asked = read_request("gpt3-175b", "dgx-a100:8", None, job)
            layout = {"tp": 8, "pp": 8, "zero_stage": 0, "recompute": mode}
            found[moved] = evaluate(asked, layout).prediction
        here, there = found[False], found[True]
        assert there.host is not None
        assert there.host.bytes_per_node == 8 * 12 * 8 * size // parts
        assert there.host.link_bytes_per_step == 2 * 12 * 8 * size // parts
        assert term(here, "activations") - term(there, "activations") == 12 * 8 * size // parts
        # Eight microbatches and seven of filling, twelve layers each, there and back.
        way = 2 * size / parts / asked.cluster.groups[0].node.host_link.si
        waited = there.step_time_s - here.step_time_s
        assert waited == pytest.approx(15 * 12 * way, rel=0.01)


def test_a_pipeline_with_inputs_on_the_hosts_verifies() -> None:
    job = {"activation_offload": True, "stack": "megatron-deepspeed", "sequence_length": 2048,
           "global_batch": 32, "precision": "fp16", "constraints": {"fix": {"pp": 4}}}  # fmt: skip
    found = plan(read_request("gpt3-175b", "dgx-a100:8", None, job))
    assert verify(found) == []


def test_zero_3_of_2021_offloads_from_stage_2_on() -> None:
    """Ren et al., arXiv 2101.06840; stage 1 kept its state on the device."""
    job = {"stack": "deepspeed-zero3-2021", "sequence_length": 1024, "global_batch": 64,
           "precision": "fp16", "optimizer_offload": True}  # fmt: skip
    asked = read_request("gpt2-xl", "dgx-a100:1", None, job)
    with pytest.raises(InputError, match="ZeRO stage 2"):
        evaluate(asked, {"zero_stage": 1})
    assert evaluate(asked, {"zero_stage": 2}).prediction.host is not None
    more = read_request("gpt2-xl", "dgx-a100:1", None, job | {"parameter_offload": True})
    least = evaluate(more, {"zero_stage": 3}).prediction
    assert least.max_peak_bytes < evaluate(asked, {"zero_stage": 3}).prediction.max_peak_bytes


def test_megatron_keeps_checkpoints_on_the_device() -> None:
    job = {"activation_offload": True, "stack": "megatron-core", "global_batch": 8}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    with pytest.raises(InputError, match="keeps activations on the device"):
        evaluate(request, {"zero_stage": 1})


def test_checkpoints_that_overfill_the_host_do_not_fit() -> None:
    """126 layers of 16,384 x 131,072 16-bit numbers on 8 devices are 4.3 TB."""
    job = {"activation_offload": True, "stack": "deepspeed-hf", "sequence_length": 131072,
           "global_batch": 64}  # fmt: skip
    request = read_request("llama-3.1-405b", "dgx-h100:8", None, job)
    layout = {"zero_stage": 3, "recompute": "full", "microbatch_size": 1}
    found = evaluate(request, layout).prediction
    assert found.host is not None
    assert found.host.capacity_bytes_per_node is not None
    assert found.host.bytes_per_node > found.host.capacity_bytes_per_node
    assert not found.fits


def test_a_report_says_what_the_hosts_hold_and_lack() -> None:
    job = {"optimizer_offload": True, "stack": "deepspeed-hf", "sequence_length": 2048}
    said = []
    for nodes in (3, 8):
        cluster = f"dgx-h100:{nodes}"
        request = read_request("llama-3.1-405b", cluster, None, {**job, "global_batch": 8 * nodes})
        host = evaluate(request, {"zero_stage": 3}).prediction.host
        assert host is not None
        kept, words = host_words(host)
        assert kept.plain == format_bytes(host.bytes_per_node)
        assert f"{format_bytes(host.link_bytes_per_node_per_step)} a step" in words
        said.append(words)
    assert "of 1.8 TiB in the memory of the fullest node" in said[0]
    assert "too much" in said[0]
    assert "too much" not in said[1]


def on_drives(stack: str = "deepspeed-nvme", **job: Any) -> Prediction:
    spec = JobSpec(sequence_length=2048, stack=stack, global_batch=8, **job)
    cluster = load_cluster("dgx-h100:1")
    request = Request(read_model("llama-3.1-8b"), cluster, spec, load_stack(stack))
    layout = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}
    return evaluate(request, layout).prediction


def test_drives_hold_what_the_host_only_passes_on() -> None:
    """16 bytes per parameter on the drives; in memory 16 for each of a group's 10^9 (a shard has a
    few more) and 3 GB a device for weights, where the drives hold them too."""
    state = on_drives(optimizer_offload=True)
    both = on_drives(optimizer_offload=True, parameter_offload=True)
    assert state.host is not None
    assert both.host is not None
    assert (state.host.place, state.host.capacity_bytes_per_node) == ("drives", 30_720 * 10**9)
    assert state.host.bytes_per_node == 16 * PARAMETERS
    assert state.host.buffer_bytes_per_node == 8 * 16 * 10**9
    assert both.host.bytes_per_node == 18 * PARAMETERS
    assert both.host.buffer_bytes_per_node == state.host.buffer_bytes_per_node + 8 * 3 * 10**9
    assert state.max_peak_bytes == predicted(global_batch=8, optimizer_offload=True).max_peak_bytes


def test_a_step_reads_and_writes_all_state_on_the_drives() -> None:
    """16 bytes of each parameter at 52 GB/s and 16 at 28 GB/s beside what the host's Adam takes;
    2 more back where weights are there too."""
    host = predicted(global_batch=8, optimizer_offload=True)
    swapped = 16 * PARAMETERS / 52e9 + 16 * PARAMETERS / 28e9
    state = on_drives(optimizer_offload=True)
    assert state.step_time_s - host.step_time_s == pytest.approx(swapped, rel=1e-6)
    weights = predicted(global_batch=8, optimizer_offload=True, parameter_offload=True)
    both = on_drives(optimizer_offload=True, parameter_offload=True)
    more = both.step_time_s - weights.step_time_s - swapped
    # Each device's share of the drives, 6.5 GB/s, is slower than its link: gathers wait longer.
    assert more > 2 * PARAMETERS / 28e9


BOTH = {"optimizer_offload": True, "parameter_offload": True}


def test_the_drives_hold_one_part_and_the_memory_the_other() -> None:
    """16 bytes per parameter of state, 2 of weights; buffers as for what the drives hold."""
    state, weights = (on_drives(f"deepspeed-nvme-{p}", **BOTH) for p in ("optimizer", "parameters"))
    assert state.host is not None
    assert weights.host is not None
    assert (state.host.place, weights.host.place) == ("drives", "drives")
    assert state.host.bytes_per_node == 16 * PARAMETERS
    assert state.host.buffer_bytes_per_node == 8 * 16 * 10**9 + 2 * PARAMETERS
    assert weights.host.bytes_per_node == 2 * PARAMETERS
    assert weights.host.buffer_bytes_per_node == 8 * 3 * 10**9 + 16 * PARAMETERS
    alone = on_drives("deepspeed-nvme-parameters", optimizer_offload=True)
    assert alone.host is not None
    assert alone.host.place == "memory"
    assert alone.step_time_s == predicted(global_batch=8, optimizer_offload=True).step_time_s


def test_each_part_costs_what_its_place_takes() -> None:
    """State on the drives: 16 bytes read, 16 written of each parameter. Weights: 2 written; and the
    gathers wait for reads at 6.5 GB/s a device, as where both are there."""
    memory = predicted(global_batch=8, **BOTH).step_time_s
    swapped = 16 * PARAMETERS / 52e9 + 16 * PARAMETERS / 28e9
    state = on_drives("deepspeed-nvme-optimizer", **BOTH).step_time_s
    weights = on_drives("deepspeed-nvme-parameters", **BOTH).step_time_s
    assert state - memory == pytest.approx(swapped, rel=1e-6)
    assert weights - memory > 2 * PARAMETERS / 28e9
    both = on_drives("deepspeed-nvme", **BOTH).step_time_s
    assert both - memory == pytest.approx(state - memory + weights - memory, rel=1e-6)


def test_pipelined_swaps_hide_behind_the_update_but_for_the_first_and_the_last() -> None:
    """Drives read 16 and write 12 bytes per parameter beside the host's Adam, the shorter of both
    hidden in nine of ten groups; gradients are written before. Three groups have buffers."""
    host = predicted(global_batch=8, optimizer_offload=True)
    turns = on_drives("deepspeed-nvme", optimizer_offload=True)
    piped = on_drives("deepspeed-nvme-pipelined", optimizer_offload=True)
    drives = 16 * PARAMETERS / 52e9 + 12 * PARAMETERS / 28e9
    update = turns.step_time_s - host.step_time_s - drives - 4 * PARAMETERS / 28e9
    assert update == pytest.approx(0, abs=1e-4)
    adam = sum(t.seconds or 0.0 for t in host.time if t.name == "optimizer_and_gather")
    hidden = turns.step_time_s - piped.step_time_s
    assert hidden == pytest.approx(0.9 * min(adam, drives), rel=1e-3)
    assert piped.host is not None
    shard = -(-PARAMETERS // 8)
    assert piped.host.buffer_bytes_per_node == 8 * 48 * -(-shard // 10)


@pytest.mark.parametrize(("overlaps", "share"), [(["reads"], 16 / 52), (["writes"], 12 / 28)])
def test_reads_or_writes_may_be_pipelined_alone(overlaps: list[str], share: float) -> None:
    """What is hidden is no more than they take, in nine of ten groups."""
    stack = load_stack("deepspeed-nvme-pipelined")
    assert stack.offload is not None
    assert stack.offload.drives is not None
    one = stack.offload.drives.model_copy(update={"overlaps": tuple(overlaps)})
    spec = JobSpec(sequence_length=2048, stack=stack.name, global_batch=8, optimizer_offload=True)
    changed = stack.model_copy(update={"offload": stack.offload.model_copy(update={"drives": one})})
    request = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:1"), spec, changed)
    layout = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}
    found = evaluate(request, layout).prediction
    hidden = on_drives(optimizer_offload=True).step_time_s - found.step_time_s
    assert 0 < hidden <= 0.9 * share * PARAMETERS / 1e9 * 1.0001


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drives": None}, "states no NVMe drives"),
        ({"host_memory": {"value": 100, "unit": "GB"}}, "buffers for the drives"),
    ],
)
def test_nodes_without_what_drives_need_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        evaluate(with_node(change), {"zero_stage": 3, "microbatch_size": 1})


def test_drives_that_hold_too_little_do_not_fit() -> None:
    small = with_node({"drives": {"value": 100, "unit": "GB"}})
    found = evaluate(small, {"zero_stage": 3, "microbatch_size": 1}).prediction
    assert not found.fits
    assert found.host is not None
    assert "of 93.1 GiB in the NVMe drives" in host_words(found.host)[1]
    with pytest.raises(InfeasibleError, match=r"NVMe drives of 93.1 GiB per node do not hold"):
        plan(small)


def with_node(change: dict[str, Any]) -> Request:
    """A job that offloads to drives, on a node with other figures."""
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    figures = {
        name: value and node.host_memory and node.host_memory.model_copy(update=value)
        for name, value in change.items()
    }
    group = cluster.groups[0].model_copy(update={"node": node.model_copy(update=figures)})
    small = cluster.model_copy(update={"groups": (group,)})
    spec = JobSpec(
        sequence_length=2048, stack="deepspeed-nvme", global_batch=8, optimizer_offload=True
    )
    return Request(read_model("llama-3.1-8b"), small, spec, load_stack("deepspeed-nvme"))


@pytest.mark.parametrize("suffix", ["", "-optimizer", "-parameters", "-pipelined"])
def test_a_plan_on_drives_is_verified(suffix: str) -> None:
    spec = {"stack": f"deepspeed-nvme{suffix}", **BOTH}
    found = plan(read_request("llama-3.1-70b", "dgx-h100:1", None, {**spec, "global_batch": 32}))
    assert found.prediction.host is not None
    assert found.prediction.host.place == "drives"
    assert verify(found) == []


FSDP = {"zero_stage": 3, "microbatch_size": 1, "recompute": "full"}


def fsdp(stack: str, model: str = "llama-3.1-8b", **job: Any) -> Request:
    fields = {
        "sequence_length": 2048,
        "global_batch": 16,
        "optimizer_offload": True,
        "stack": stack,
    }
    return read_request(model, "dgx-h100:1", None, fields | {"parameter_offload": True} | job)


@pytest.mark.parametrize(
    "stack", ["torchtitan", "pytorch-fsdp1", "pytorch-fsdp2", "nemo-automodel"]
)
def test_fsdp_keeps_all_state_on_the_host(stack: str) -> None:
    """CPUOffloadPolicy: weights in fp32, their gradients and two moments, 16 bytes; 4 bytes come
    for each of two gathers and leave with each reduction, twice for two microbatches; AutoModel
    reduces behind the second one only."""
    found = evaluate(fsdp(stack), FSDP).prediction
    assert found.host is not None
    assert found.host.bytes_per_node == 16 * PARAMETERS
    crossings, waiting = (5, 2 * PARAMETERS) if stack == "nemo-automodel" else (6, 0)
    assert found.host.link_bytes_per_step == PARAMETERS // 8 * 4 * crossings
    held = [term(found, name) for name in ("optimizer", "gradients", "weights")]
    assert held == [0, waiting, 0]
    kept = evaluate(fsdp(stack, optimizer_offload=False, parameter_offload=False), FSDP).prediction
    assert found.step_time_s > kept.step_time_s


@pytest.mark.parametrize(
    ("stack", "asked", "said"),
    [
        ("torchtitan", "optimizer_offload", "optimizer_offload: true without parameter_offload"),
        ("torchtitan", "parameter_offload", "parameter_offload: true without optimizer_offload"),
    ],
)
def test_a_search_refuses_half_of_what_leaves_together(stack: str, asked: str, said: str) -> None:
    job = {"stack": stack, "sequence_length": 4096, "global_batch": 16, asked: True}
    with pytest.raises(InputError, match=said) as caught:
        read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    assert "optimizer_offload and parameter_offload together" in (caught.value.hint or "")


def test_fsdp_offloads_all_or_nothing_and_what_its_host_can_update() -> None:
    with pytest.raises(InputError, match="with the weights only"):
        fsdp("torchtitan", parameter_offload=False)
    with pytest.raises(InputError, match="no adamw_bf16 on the host"):
        evaluate(fsdp("torchtitan", optimizer="adamw_bf16"), FSDP)
    # AutoModel hands the policy on where ep is 1 only.
    with pytest.raises(InputError, match="keeps mixtures under ep on the device"):
        evaluate(fsdp("nemo-automodel", "mixtral-8x7b"), {**FSDP, "ep": 2})
    assert evaluate(fsdp("nemo-automodel", "mixtral-8x7b"), FSDP).prediction.host is not None


def test_weights_that_stay_gathered_come_from_the_host_once() -> None:
    """ZeRO 2: for each forward, under a pipeline for the step's first one; whole gradients of a
    pipeline wait on the device, in fp32, and their shards leave after its last backward."""
    twice = evaluate(fsdp("torchtitan"), {**FSDP, "zero_stage": 2}).prediction
    assert twice.host is not None
    assert twice.host.link_bytes_per_step == PARAMETERS // 8 * 4 * 2 * 2
    assert term(twice, "gradients") == 0
    resharded = evaluate(fsdp("torchtitan"), FSDP).prediction
    kept = evaluate(fsdp("torchtitan", optimizer_offload=False, parameter_offload=False), FSDP)
    exposed = [p.step_time_s - kept.prediction.step_time_s for p in (twice, resharded)]
    assert 0 < exposed[0] < exposed[1]
    layout = {"pp": 2, "dp_shard": 4, "zero_stage": 2, "recompute": "none"}
    piped = evaluate(fsdp("torchtitan"), layout).prediction
    own = evaluate(fsdp("torchtitan", optimizer_offload=False, parameter_offload=False), layout)
    assert piped.host is not None
    assert piped.host.link_bytes_per_step <= (PARAMETERS // 2 + 525_400_000) // 4 * 4 * 2
    sums = [term(p, "gradients") for p in (piped, own.prediction)]
    assert sums[0] == sums[1] > 4 * PARAMETERS // 2 * 0.9
    with pytest.raises(InputError, match="from ZeRO stage 3 on"):
        predicted(layout={"zero_stage": 2}, global_batch=16, **BOTH)


def test_plans_with_fsdp_on_the_host_are_certified() -> None:
    request = fsdp("torchtitan", "llama-3.2-1b")
    assert verify(plan(request)) == []


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
