"""State that is on the drives of a node and passes through its memory."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.certify import verify
from planner.errors import InfeasibleError, InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.report.parts import host_words
from planner.request import Request
from planner.specs import JobSpec
from tests.unit.offloading import BOTH, PARAMETERS, predicted


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
