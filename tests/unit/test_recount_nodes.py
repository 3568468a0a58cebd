"""The recheck's own sum of what devices send to their nodes, beside the search's."""

from __future__ import annotations

from typing import Any

import pytest

from cost_models.peaks import host_bytes
from hardware_profiles.loader import load_cluster, load_stack
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.recount import Mesh
from planner.recount_nodes import Nodes
from planner.request import Request
from planner.specs import JobSpec

OPTIMIZER = {"optimizer_offload": True}
CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("megatron-core", "llama-3.1-8b", OPTIMIZER, {"tp": 2, "pp": 4, "zero_stage": 1}),
    ("megatron-core", "llama-3.2-1b", OPTIMIZER, {"pp": 1, "zero_stage": 1}),
    ("megatron-core", "llama-3.2-1b", OPTIMIZER, {"pp": 4, "vpp": 2, "schedule": "interleaved"}),
    ("megatron-core", "mixtral-8x7b", OPTIMIZER, {"tp": 2, "pp": 4, "ep": 2, "zero_stage": 1}),
    ("megatron-core-offload", "llama-3.1-8b", {}, {"pp": 4, "zero_stage": 1}),
    ("megatron-core-offload", "llama-3.1-8b", {}, {"pp": 4, "vpp": 2, "schedule": "interleaved"}),
    ("deepspeed-hf", "llama-3.1-8b", OPTIMIZER | {"parameter_offload": True}, {"zero_stage": 3}),
    ("maxtext-gpu", "mixtral-8x7b", OPTIMIZER, {"pp": 2, "recompute": "minimal_offloaded"}),
    ("maxtext-gpu", "mixtral-8x7b", OPTIMIZER | {"optimizer": "muon"}, {"pp": 2, "ep": 2}),
    ("maxtext-gpu", "llama-3.1-8b", OPTIMIZER, {"pp": 2, "recompute": "custom:layer_input@host",
                                                "layers_outside": 2}),
)  # fmt: skip


def request_of(stack: str, model: str, job: dict[str, Any]) -> Request:
    spec = JobSpec(sequence_length=2048, global_batch=32, stack=stack, **job)
    return Request(read_model(model), load_cluster("dgx-h100:2"), spec, load_stack(stack))


@pytest.mark.parametrize(("stack", "model", "job", "given"), CASES)
def test_the_recheck_counts_what_the_search_counts(
    stack: str, model: str, job: dict[str, Any], given: dict[str, Any]
) -> None:
    """State of every rank's layers and ends, inputs of the microbatches in flight; the fullest
    node is full with all of its room and overfull with a byte less."""
    request = request_of(stack, model, job)
    found = evaluate(request, given)
    layout, priced = found.layout, found.priced
    leaf = priced.leaf
    assert leaf.hosts is not None
    nodes = Nodes(request, Mesh.of(layout), layout.dp_shard, layout.zero_stage, leaf)
    shared = [host_bytes(leaf, rank, costs.chunks) for rank, costs in enumerate(priced.ranks)]
    modes = [part.mode for stage in layout.stages for part in stage.recompute]
    mode = modes[0] if modes else "none"
    assert nodes.of_bounds(priced.completion.bounds, leaf.round_size, mode) == shared
    assert all(shared)
    assert nodes.room is not None
    fullest = leaf.hosts.fullest(shared) + nodes.room - leaf.hosts.room
    for room, holds in ((fullest, True), (fullest - 1, False)):
        nodes.room = room
        assert nodes.hold(shared) == holds
        assert all(nodes.hold_alone(rank, size) for rank, size in enumerate(shared)) or not holds
