"""A factor of tp that splits feed-forwards along the stream's width: sizes and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.communication import group_of
from cost_models.graph import LayerKind, Shard
from cost_models.ops import Collective, GroupedMatMul, MatMul
from cost_models.traffic import layer_calls
from planner.errors import InputError
from planner.models.spec import ModelSpec
from planner.pipeline import evaluate, read_request
from planner.request import Request
from planner.tensor_transpose import transpose_faults

ASKED = {"stack": "maxtext-tpu", "sequence_length": 2048, "global_batch": 16}
LAYOUT: dict[str, Any] = {"tp": 8, "dp_shard": 2, "zero_stage": 1}


def job(**changes: Any) -> dict[str, Any]:
    return {**ASKED, "tensor_transpose": 2, **changes}


def place(tp: int, ways: int) -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(2048, one, tp * one, one, one, one, one > 0, 0 * one, transposed=ways)


def request_of() -> Request:
    return read_request("llama-3.1-8b", "tpu-v5p-32:1", None, job())


def layer() -> LayerKind:
    (kind,) = request_of().workload.kinds.values()
    return kind


@pytest.mark.parametrize(("tp", "ways"), [(2, 2), (8, 2), (8, 4), (8, 8)])
def test_products_keep_their_work_and_change_their_shape(tp: int, ways: int) -> None:
    ops = {op.name: op for op in layer().ops(place(tp, ways)) if isinstance(op, MatMul)}
    straight = tp // ways
    for name, n, k in (
        ("fc1", 2 * 14336 // straight, 4096 // ways), ("fc2", 4096 // ways, 14336 // straight),
        ("qkv", 6144 // tp, 4096), ("proj", 4096, 4096 // tp),
    ):  # fmt: skip
        assert (int(np.ravel(ops[name].n)[0]), int(np.ravel(ops[name].k)[0])) == (n, k), name


def test_groups_lie_inside_each_other() -> None:
    groups = {
        op.group: [int(each[0]) for each in group_of(op, place(8, 2))]
        for op in layer().ops(place(8, 2))
        if isinstance(op, Collective) and op.group.startswith("tp") and np.all(op.active)
    }
    assert groups == {"tp_transposed": [2, 1], "tp_straight": [4, 2]}


def test_the_residual_stream_is_split_by_the_factor_alone() -> None:
    """Each of the other ranks keeps the same of it, where tensor parallelism alone keeps a part."""
    kind = layer()
    assert int(kind.boundary_bytes(place(8, 2))[0]) == 2048 * 4096 * 2 // 2
    assert int(kind.boundary_bytes(place(8, 1))[0]) == 2048 * 4096 * 2 // 8


def test_a_layout_is_priced_with_it() -> None:
    plain = evaluate(read_request("llama-3.1-8b", "tpu-v5p-32:1", None, ASKED), LAYOUT)
    found = evaluate(request_of(), LAYOUT)
    assert found.prediction.step_time_s != plain.prediction.step_time_s
    assert any("tensor_transpose 2" in note for note in found.prediction.assumptions)


def test_an_fsdp_axis_changes_what_layers_send() -> None:
    """And the plan's print-out knows the groups; whole gradients are summed where t is 1."""
    one = np.ones(1, dtype=np.int64)
    machine = request_of().machine
    for ways, t, kinds in ((4, 1, {"all_reduce"}), (4, 4, {"reduce_scatter", "all_gather"})):
        shard = replace(place(2 * t, 2), fsdp=ways * one, piped=one > 1)
        calls = layer_calls(layer(), shard, machine)
        over = {call.kind for call in calls if call.group == "dp_shard"}
        assert over == kinds
        sent = [call for call in calls if call.kind == "send_recv"]
        assert {call.ranks for call in sent} == {2 * t * ways}


def test_a_pipeline_gathers_columns_of_weights() -> None:
    one = np.ones(1, dtype=np.int64)
    shard = replace(place(8, 2), fsdp=one, piped=one > 0)
    calls = layer_calls(layer(), shard, request_of().machine)
    gathered = [c for c in calls if c.name == "fc2.weights"]
    assert [(c.phase, c.ranks, c.bytes) for c in gathered] == [
        ("forward", 2, 4096 * 14336 * 2 // 4)
    ]
    ops = {op.name: op for op in layer().ops(shard) if isinstance(op, MatMul)}
    assert [int(np.ravel(n)[0]) for n in ops["fc2"].alike] == [2, 1, 1]
    assert [int(np.ravel(n)[0]) for n in ops["fc1"].alike] == [1, 2, 1]


@pytest.mark.parametrize("layout", [
    {"tp": 8, "dp_shard": 2, "zero_stage": 3}, {"tp": 2, "dp_shard": 8, "zero_stage": 3},
    {"tp": 4, "pp": 2, "dp_shard": 2, "zero_stage": 3}, {"tp": 8, "pp": 2, "zero_stage": 0},
    {"tp": 8, "cp": 2, "zero_stage": 3}, {"tp": 2, "cp": 2, "dp_shard": 4, "zero_stage": 3},
    {"tp": 2, "dp_shard": 2, "dp_replicate": 4, "zero_stage": 3},
    {"tp": 2, "dp_shard": 4, "dp_replicate": 2, "zero_stage": 3},
    {"tp": 4, "dp_shard": 2, "dp_replicate": 2, "zero_stage": 3},
    {"tp": 4, "cp": 2, "dp_shard": 2, "zero_stage": 3},
    {"tp": 4, "cp": 2, "pp": 2, "zero_stage": 0},
    {"tp": 4, "cp": 2, "dp_shard": 2, "zero_stage": 1},
    {"tp": 2, "cp": 2, "cp_kind": "a2a", "dp_shard": 4, "zero_stage": 3},
    {"tp": 4, "pp": 2, "dp_shard": 2, "zero_stage": 2},
    {"tp": 4, "pp": 2, "dp_shard": 2, "zero_stage": 3, "recompute": "everything_saveable"},
])  # fmt: skip
def test_layouts_beside_other_axes_have_a_price(layout: dict[str, Any]) -> None:
    found = evaluate(request_of(), layout)
    assert found.prediction.step_time_s > 0
    if layout.get("zero_stage") == 3:
        assert any("fsdp" in note for note in found.prediction.assumptions)


@pytest.mark.parametrize(
    ("model", "layout", "reason"),
    [
        ("llama-3.1-8b", {"tp": 1, "dp_shard": 16, "zero_stage": 1}, "does not divide tp"),
        ("mixtral-8x7b", {"tp": 4, "etp": 4, "dp_shard": 4, "zero_stage": 3}, "neither tensor nor"),
        (
            "mixtral-8x7b",
            {"tp": 2, "etp": 2, "ep": 2, "dp_shard": 8, "zero_stage": 3},
            "neither tensor nor an expert axis",
        ),
    ],
)
def test_layouts_that_fail_in_the_software_are_refused(
    model: str, layout: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        evaluate(read_request(model, "tpu-v5p-32:1", None, job()), layout)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("mixtral-8x7b", {"tp": 2, "etp": 2, "dp_shard": 8, "zero_stage": 3}),
        ("deepseek-v2-lite", {"tp": 2, "etp": 2, "dp_shard": 8, "zero_stage": 3}),
        ("deepseek-v3", {"tp": 2, "etp": 2, "dp_shard": 8, "zero_stage": 3}),
    ],
)
def test_other_layers_have_a_price(model: str, layout: dict[str, Any]) -> None:
    found = evaluate(read_request(model, "tpu-v5p-32:1", None, job()), layout)
    plain = evaluate(read_request(model, "tpu-v5p-32:1", None, ASKED), layout)
    assert found.prediction.step_time_s != plain.prediction.step_time_s


def test_experts_split_columns_of_rows_instead_of_their_width() -> None:
    """As many FLOPs and bytes of weights as with tensor; tokens' copies have all of the width
    inside, whose sums over the axis are their only calls."""
    (kind,) = read_request("mixtral-8x7b", "tpu-v5p-32:1", None, job()).workload.kinds.values()
    one = np.ones(1, dtype=np.int64)
    ops = {}
    for transposed in (1, 4):
        shard = replace(place(4, transposed), etp=4 * one)
        ops[transposed] = {op.name: op for op in kind.ops(shard)}
    for name in ("expert_fc1", "expert_fc2"):
        plain, other = ops[1][name], ops[4][name]
        assert isinstance(plain, GroupedMatMul)
        assert isinstance(other, GroupedMatMul)
        sizes = [float(np.prod([np.ravel(d)[0] for d in (op.groups, op.rows, op.n, op.k)]))
                 for op in (plain, other)]  # fmt: skip
        assert sizes[0] == pytest.approx(sizes[1])
    total = ops[4]["expert_fc1.sum"]
    assert isinstance(total, Collective)
    assert int(np.ravel(total.forward_bytes)[0]) == 2048 * 2 * 2 * 14336 * 2
    assert "dispatch" not in ops[4]


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("llama-3.1-8b", {"stack": "torchtitan"}, "has no tensor_transpose"),
        ("llama-3.1-8b", {"tensor_transpose": 3}, "does not split over tensor_transpose 3"),
    ],
)
def test_what_cannot_have_it_says_so(model: str, changes: dict[str, Any], reason: str) -> None:
    node = "dgx-h100:2" if changes.get("stack") else "tpu-v5p-32:1"
    with pytest.raises(InputError, match=reason):
        evaluate(read_request(model, node, None, job(**changes)), LAYOUT)


def test_parallel_sub_blocks_are_refused() -> None:
    """No model that the stack has is made of them."""
    request = request_of()
    assert isinstance(request.model, ModelSpec)
    (name,) = request.model.blocks
    block = request.model.blocks[name].model_copy(update={"parallel": True, "norms": 1})
    model = request.model.model_copy(update={"blocks": {name: block}})
    (found,) = transpose_faults(replace(request, model=model))
    assert "has other layers" in str(found)
