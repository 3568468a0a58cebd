"""Layers outside the pipeline: which numbers MaxText runs, and what one small case holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from cost_models.leaf import Completion, Leaf, Row, stage_costs
from cost_models.outside import Outside, leading, outside_bounds, outside_numbers, recomputing
from cost_models.peaks import moments, peaks
from cost_models.step import Field
from cost_models.step_time import simulate_step
from hardware_profiles.documents import DocumentError, validate
from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import StackSpec
from planner.errors import InputError
from planner.layouts import complete_layout
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.plan import Layout
from planner.recount_host import outputs_held
from planner.request import Request
from planner.specs import JobSpec
from planner.studies.communication import communication


def maxtext_accepts(
    layers: int, dense: int, stages: int, *, pipelined: int, repeats: int, per_stage: int
) -> bool:
    """MaxText's own checks (configs/types.py; pyconfig's set_and_validate_pipeline_config):
    stages x repeats x layers per stage are the pipelined layers, at least one, and not more than
    there are, less the dense ones of DeepSeek."""
    return stages * repeats * per_stage == pipelined and 0 < pipelined <= layers - dense


@pytest.mark.parametrize(("layers", "dense"), [(12, 0), (7, 0), (13, 3), (8, 1)])
def test_the_numbers_are_those_that_the_software_accepts(layers: int, dense: int) -> None:
    kinds = ("dense",) * dense + ("moe",) * (layers - dense)
    for stages, repeats in product(range(2, 6), range(1, 5)):
        accepted = [
            layers - pipelined
            for pipelined, per_stage in product(range(1, layers + 1), repeat=2)
            if maxtext_accepts(
                layers, dense, stages, pipelined=pipelined, repeats=repeats, per_stage=per_stage
            )
        ]
        numbers = outside_numbers(kinds, "looped_bfs", stages * repeats)
        if accepted:
            assert sorted(numbers) == sorted(accepted)
        else:
            # What is left is refused under the rule of equal stages.
            assert (layers - numbers[0]) % (stages * repeats) or numbers == (layers,)


def test_what_leads_is_the_first_of_two_kinds() -> None:
    assert leading(("a", "a", "a")) == 0
    assert leading(("d", "d", "m", "m")) == 2
    assert leading(("d", "m", "d", "m")) is None
    assert outside_numbers(("d", "m", "d", "m"), "gpipe", 2) == (0,)
    assert outside_numbers(("d", "m") * 5, "gpipe", 2, longest=2) == (2, 6)
    assert outside_numbers(("d", "m", "m") * 4, "gpipe", 2, longest=2) == (0,)
    assert outside_numbers(("a",) * 5, "gpipe", 2, longest=4) == (1, 3)
    assert outside_numbers(("a",) * 4, "1f1b", 2) == (0,)


def row(**fields: int) -> Row:
    values = [0] * len(Field)
    for name, value in fields.items():
        values[Field[name]] = value
    return tuple(values)


INSIDE = row(
    FORWARD=10, BACKWARD=20, GRADIENT=1, OPTIMIZER=2, STATIC=100, NEW_GRADIENTS=30, ACT_NONE=7,
    WORK_NONE=5, UPDATE_BYTES=4,
)  # fmt: skip
SHARE = row(
    FORWARD=11, BACKWARD=21, GRADIENT=3, OPTIMIZER=2, PARAMETER=1, STATIC=100, NEW_GRADIENTS=30,
    ACT_NONE=14, WORK_NONE=10, UPDATE_BYTES=4,
)  # fmt: skip
HEAD = row(FORWARD=1, BACKWARD=2, STATIC=50, ACT_NONE=3, WORK_NONE=40)


def small(*, ahead: bool) -> Leaf:
    """Five layers, two stages of two layers, one outside; four microbatches, no recomputation."""
    sequence = (0, 1, 1, 1, 1) if ahead else (0,) * 5
    kinds = (INSIDE, INSIDE) if ahead else (INSIDE,)
    counts = (1, 0) if ahead else (1,)
    leaf = Leaf(
        schedule="gpipe", pp=2, vpp=1, microbatches=4, sequence=sequence, kinds=kinds,
        embedding=row(), head=HEAD, hop_ns=0, bucket_ns=0, tied_sync_ns=0, sync_ns=6,
        fixed_bytes=1000, capacity_bytes=1 << 30, uneven=False,
        outside=Outside((SHARE,) * len(kinds), counts, ahead),
    )  # fmt: skip
    return recomputing(leaf, "none")


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_that_of_the_pipeline_and_of_the_layers_outside(ahead: bool) -> None:
    leaf = small(ahead=ahead)
    bounds = outside_bounds(leaf)
    assert bounds == ((1, 3, 5) if ahead else (0, 2, 4))
    completion = Completion(bounds, (("none", 0),) * 2)
    alone = replace(leaf, outside=None, sync_ns=6)
    without = simulate_step(alone, stage_costs(alone, completion)).total_ns
    # Forward and backward of one layer, its reduction, its update: 11 + 21 + 3 + 2 + 1.
    assert simulate_step(leaf, stage_costs(leaf, completion)).total_ns == without + 38


def test_layers_behind_the_pipeline_run_beside_all_that_it_keeps() -> None:
    leaf = small(ahead=False)
    ranks = stage_costs(leaf, Completion(outside_bounds(leaf), (("none", 0),) * 2))
    # Static: 1000 fixed, 2 x 100 of the stage and 100 of the layer outside; the last rank 50 more.
    # First rank, in flight 4 x 2 x 7 = 56: backward outside 56 + 14 kept + 30 gradients + 10 = 110,
    # the pipeline's first 56 + 5 working + 60 + 30 gradients = 151.
    # Last rank, in flight 4 x (14 + 3) = 68: loss 68 + 14 + 40 = 122; backward outside
    # 68 + 14 + 30 + 10 = 122; the pipeline's first 68 + max(5 - 3, 40) + 90 = 198.
    assert peaks(leaf, ranks) == (1300 + 151, 1350 + 198)
    found = {moment.total for moment in moments(leaf, 1, ranks[1].chunks)}
    assert {122, 198} <= found


def test_layers_ahead_of_the_pipeline_keep_theirs_through_it() -> None:
    leaf = small(ahead=True)
    ranks = stage_costs(leaf, Completion(outside_bounds(leaf), (("none", 0),) * 2))
    # First rank: 56 in flight + 14 kept + 5 working + 60 gradients = 135; the last backward
    # 60 + 30 gradients + 14 + 10 = 114; the update 90 + 8 + 4 = 102.
    assert {moment.total for moment in moments(leaf, 0, ranks[0].chunks)} == {135, 114, 102}
    # Last rank: 68 + 14 + 40 + 60 = 182.
    assert peaks(leaf, ranks) == (1300 + 135, 1350 + 182)


def request(model: str, cluster: str, batch: int, stack: str = "maxtext-gpu") -> Request:
    job = JobSpec(sequence_length=2048, global_batch=batch, stack=stack)
    return Request(read_model(model), load_cluster(cluster), job, load_stack(stack))


def layers_of(layout: Layout) -> list[tuple[int, int]]:
    return [chunk.layers for stage in layout.stages for chunk in stage.chunks]


def test_the_fewest_that_leave_equal_stages_are_the_default() -> None:
    """Llama 3.1 8B has 32 layers, DeepSeek-V3 3 dense and 58 sparse ones: 58 = 8 x 7 + 2."""
    llama, deepseek = (
        request("llama-3.1-8b", "dgx-h100:3", 24),
        request("deepseek-v3", "dgx-h100:8", 64),
    )
    assert complete_layout({"pp": 3, "tp": 4}, llama).layers_outside == 2
    assert layers_of(complete_layout({"pp": 3, "tp": 4}, llama)) == [(0, 10), (10, 20), (20, 30)]
    layout = complete_layout({"pp": 8}, deepseek)
    assert layout.layers_outside == 5
    assert layers_of(layout)[0] == (5, 12)
    assert layers_of(layout)[-1] == (54, 61)
    # Given stages say it themselves.
    again = complete_layout(layout.model_dump(include={"pp", "schedule", "stages"}), deepseek)
    assert again == layout


@pytest.mark.parametrize(
    ("stack", "layout", "message"),
    [
        ("maxtext-gpu", {"pp": 4, "layers_outside": 3}, "leave 0, 4, 8"),
        ("maxtext-gpu", {"pp": 4, "layers_outside": 32}, "leave 0, 4, 8"),
        ("maxtext-gpu", {"layers_outside": 4}, "pp = 1 is no pipeline"),
        ("megatron-core", {"pp": 4, "layers_outside": 4}, "pipelines all layers"),
        ("maxtext-gpu", {"pp": 4, "layers_outside": -4}, "layers_outside"),
    ],
)
def test_numbers_that_do_not_run(stack: str, layout: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        complete_layout(layout, request("llama-3.1-8b", "dgx-h100:1", 16, stack))
    assert refused.value.hint


def test_stages_with_dense_layers_of_a_sparse_model_do_not_run() -> None:
    deepseek = request("deepseek-v3", "dgx-h100:8", 64)
    halves = [{"chunks": [{"layers": [0, 30]}]}, {"chunks": [{"layers": [30, 61]}]}]
    with pytest.raises(InputError, match="the first 3 of another kind outside"):
        complete_layout({"pp": 2, "stages": halves}, deepseek)


def test_a_prediction_tells_the_layers_outside() -> None:
    llama = request("llama-3.1-8b", "dgx-h100:1", 16)
    inside, beside = (evaluate(llama, {"pp": 4, "layers_outside": number}) for number in (0, 4))
    terms = {term.name: term.seconds or 0 for term in beside.prediction.time}
    assert 0 < terms["layers_outside"] < beside.prediction.step_time_s
    assert sum(terms.values()) == pytest.approx(beside.prediction.step_time_s, rel=1e-12)
    # 28 / 4 in the stage and 4 beside it, of 32.
    assert [stage.layers for stage in beside.prediction.stages] == [11] * 4
    assert [stage.layers for stage in inside.prediction.stages] == [8] * 4
    for stage in beside.prediction.stages:
        assert sum(term.bytes or 0 for term in stage.memory) == stage.peak_bytes
    each = 218_112_000
    parameters = [result.prediction.stages[1].parameters for result in (inside, beside)]
    assert parameters == [8 * each, 11 * each]


def test_their_gradients_are_summed_over_the_stages() -> None:
    """ZeRO 1 over 2 ranks, 4 stages: reduce-scatters of 2, the sums over replicas of 4."""
    llama = request("llama-3.1-8b", "dgx-h100:1", 16)
    found = evaluate(llama, {"pp": 4, "layers_outside": 4, "zero_stage": 1})
    calls = [c for c in communication(llama, found).stages[1] if c.group == "dp_replicate"]
    assert [(c.kind, c.ranks, c.count) for c in calls] == [("all_reduce", 4, 4)]


def test_outputs_on_the_hosts_take_as_much_room_wherever_layers_run_but_for_the_bubble() -> None:
    """Of 32 layers and 8 microbatches, and of 3 iterations on padding for those in the pipeline."""
    llama = request("llama-3.1-8b", "dgx-h100:1", 16)
    held = [
        outputs_held(
            complete_layout(
                {"pp": 4, "layers_outside": number, "recompute": "minimal_offloaded"}, llama
            ),
            llama,
        )
        for number in (0, 4, 28)
    ]
    each = held[0] // (32 * (8 + 3))
    # Per token and layer in bf16: 6,144 of queries, keys and values, 4,096 of the output, 28,672
    # of the MLP (no gradient needs its last product); 2,048 tokens on each of a node's 8 devices,
    # a quarter of the layers.
    assert each == 2 * (6144 + 4096 + 28672) * 2048 * 8 // 4
    assert held == [each * (32 * 8 + 3 * (32 - number)) for number in (0, 4, 28)]


def test_a_stack_with_layers_outside_has_equal_stages() -> None:
    stack = load_stack("maxtext-gpu").model_dump(mode="json")
    with pytest.raises(DocumentError, match="outside_layers needs equal stages"):
        validate(StackSpec, stack | {"uneven_stages": True}, where="stack")


def test_state_that_data_parallelism_splits_is_whole_on_every_stage() -> None:
    """Of 8 ranks 2 stages, 2 replicas, 2 shards: state over 4 of them, inside and outside alike."""
    held = []
    for number in (0, 16):
        llama = request("llama-3.1-8b", "dgx-h100:1", 16, "maxtext-gpu-sharded-optimizer")
        layout = {"pp": 2, "dp_replicate": 2, "zero_stage": 3, "layers_outside": number}
        priced = evaluate(llama, layout).priced
        kinds = priced.leaf.kinds if not number else priced.leaf.outside.kinds  # type: ignore[union-attr]
        held.append([kinds[0][field] for field in (Field.WEIGHT_BYTES, Field.OPTIMIZER_BYTES)])
    assert held[0] == held[1]
    # fp32 weights and both moments over 4 ranks, a copy of the shard in 16 bits over 2.
    elements = 218_112_000
    assert held[0] == [elements // 4 * 4 + elements // 2 * 2, elements // 4 * 8]
