"""The fullest node: which pipeline stages its devices belong to decides what its host must hold."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest

from cost_models.host_room import HostRoom
from hardware_profiles.loader import load_cluster, load_stack
from planner.certify import verify
from planner.models.reader import read_model
from planner.pipeline import evaluate, plan
from planner.plan import Plan
from planner.request import Request
from planner.specs import JobSpec


@pytest.mark.parametrize(("of_rank", "of_node"), [*product((1, 2, 4, 6, 8, 12, 16, 24), (4, 8))])
def test_the_fullest_node_is_counted_device_by_device(of_rank: int, of_node: int) -> None:
    pp = 8 if of_rank * 8 % of_node == 0 else 16
    sizes = [3 + (7 * rank) % 5 for rank in range(pp)]
    room = HostRoom((), 0, 0, (), 0, of_rank, of_node)
    nodes: dict[int, list[int]] = {}
    for device in range(pp * of_rank):
        nodes.setdefault(device // of_node, []).append(device // of_rank)
    assert room.fullest(sizes) == max(sum(sizes[rank] for rank in n) for n in nodes.values())
    for rank in range(pp):
        assert room.most_on_node(rank) == max(n.count(rank) for n in nodes.values())


def uneven(edges: tuple[int, ...]) -> Plan:
    """Llama 3.1 405B on four nodes of 2 TB, one stage on each."""
    stack = load_stack("megatron-core")
    job = JobSpec(sequence_length=1024, global_batch=4, stack=stack.name, optimizer_offload=True)
    request = Request(read_model("llama-3.1-405b"), load_cluster("dgx-h200:4"), job, stack)
    layout = {"tp": 8, "pp": 4, "recompute": "full"}
    stages: list[dict[str, Any]] = [
        {"chunks": [{"layers": [first, last]}]} for first, last in pairwise(edges)
    ]
    return evaluate(request, {**layout, "stages": stages})


def test_a_stage_that_overfills_its_node_does_not_fit() -> None:
    """16 bytes of the parameters of 44 layers and the embedding are more than the node's 2 TB,
    though those of all layers are less than four nodes'."""
    for edges, fits in (((0, 31, 63, 95, 126), True), ((0, 44, 72, 100, 126), False)):
        found = uneven(edges).prediction
        assert found.host is not None
        assert found.host.capacity_bytes_per_node == 2 * 10**12
        most = max(stage.parameters for stage in found.stages)
        assert found.host.bytes_per_node == 8 * 16 * most
        assert found.host.link_bytes_per_node_per_step == 8 * found.host.link_bytes_per_step
        assert found.fits == fits == (found.host.bytes_per_node <= 2 * 10**12)


@pytest.mark.parametrize("nodes", [2, 4])
def test_no_plan_overfills_a_node(nodes: int) -> None:
    """With the host's memory just above what even stages need, no lopsided plan is found, and the
    recheck finds no better one."""
    cluster = load_cluster(f"dgx-h100:{nodes}")
    group = cluster.groups[0]
    assert group.node.host_memory is not None
    model = read_model("llama-3.2-1b")
    held = 16 * 1_235_814_400 / nodes / 1e9
    memory = group.node.host_memory.model_copy(update={"value": 1.25 * held, "unit": "GB"})
    node = group.node.model_copy(update={"host_memory": memory})
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})
    job = JobSpec(
        sequence_length=1024, global_batch=16, stack="megatron-core", optimizer_offload=True,
        constraints={"fix": {"pp": 2 * nodes, "microbatch_size": 1}},
    )  # fmt: skip
    request = Request(model, cluster, job, load_stack("megatron-core"))
    found = plan(request)
    assert found.prediction.fits
    assert found.prediction.host is not None
    capacity = found.prediction.host.capacity_bytes_per_node
    assert capacity is not None
    assert found.prediction.host.bytes_per_node <= capacity
    assert verify(found) == []


def test_megatron_copies_gradients_to_the_host_in_fp32() -> None:
    """The host's gradient has the dtype of its fp32 parameter; the weight comes back in bf16."""
    found = uneven((0, 31, 63, 95, 126)).prediction
    assert found.host is not None
    assert found.host.link_bytes_per_step == 6 * max(stage.parameters for stage in found.stages)
