"""Pipelines whose stages give gathered weights back behind a forward and keep them behind a
backward (``state.keeps_after_backward``)."""

from __future__ import annotations

import pytest

from cost_models.resharding import resharded_peaks
from hardware_profiles.loader import load_stack
from planner.errors import InputError
from planner.pipeline import EvaluatedLayout, Request, evaluate, read_request
from planner.studies.communication import communication


def request(**job: object) -> Request:
    values = {"stack": "torchtitan", "sequence_length": 4096, "global_batch": 64, "loss": "whole"}
    return read_request("llama-3.1-8b", "dgx-h100:2", None, values | job)


def evaluated(zero: int, **layout: object) -> EvaluatedLayout:
    values = {"pp": 4, "zero_stage": zero, "recompute": "none", **layout}
    return evaluate(request(), values)


@pytest.mark.parametrize(
    "layout", [{}, {"schedule": "gpipe"}, {"schedule": "interleaved", "vpp": 2}], ids=str
)
def test_a_unit_is_gathered_once_per_microbatch_and_once_more(layout: dict[str, object]) -> None:
    """As traces of torchtitan 0.3.0 count: every pass behind a forward, and the first."""
    result = evaluated(3, **layout)
    count = {
        call.phase: call.count
        for call in communication(request(), result).stages[1]
        if call.kind == "all_gather" and call.group == "dp_shard"
    }
    layers, m = 8, result.layout.num_microbatches
    assert count == {"step": layers, "backward": layers * m}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_a_stage_needs_no_more_than_with_its_weights_gathered_all_step(
    recompute: str, microbatch: int
) -> None:
    kept, given = (
        evaluated(zero, recompute=recompute, microbatch_size=microbatch).prediction
        for zero in (2, 3)
    )
    assert given.step_time_s > kept.step_time_s
    for more, less in zip(kept.stages, given.stages, strict=True):
        assert less.peak_bytes < more.peak_bytes


def test_activations_or_weights_of_each_layer_are_there() -> None:
    """Where a layer's activations are larger than its weights, all weights but the ones at work."""
    kept, given = (evaluated(zero).prediction.stages[1] for zero in (2, 3))
    unit = 2 * (kept.parameters // 8)
    # Two layers stay gathered: the one at work and the one before it.
    assert kept.allocated_bytes - given.allocated_bytes == 6 * unit


def test_half_a_backward_finds_no_weights_to_give_gradients_to() -> None:
    with pytest.raises(InputError, match="in two halves"):
        evaluated(3, schedule="zbv", vpp=2)
    assert evaluated(2, schedule="zbv", vpp=2).prediction.step_time_s > 0


def test_what_a_rank_holds_beside_the_stage_at_work() -> None:
    assert resharded_peaks("1f1b", 4, 1, 8, 1) == ((3, 0),)
    assert resharded_peaks("gpipe", 4, 1, 8, 1) == ((8, 0),)
    # All forwards come first: at the first backward no chunk is gathered, later the last one is.
    entries = set(resharded_peaks("looped_bfs", 2, 2, 4, 0))
    assert (4, 4, 0, 0) in entries
    assert (4, 0, 0, 1) in entries
    assert (4, 4, 0, 1) not in entries
    # PyTorch's runtime gathers three stages ahead when the step begins.
    assert (1, 0, 0, 0, 1, 1, 0) not in {e[:7] for e in entries}
    assert any(e[4:] == (0, 1, 1, 0) for e in resharded_peaks("looped_bfs", 2, 4, 4, 0))


def test_a_stack_whose_stages_recompute_some_layers_cannot_keep_weights() -> None:
    stack = load_stack("torchtitan").model_dump()
    with pytest.raises(ValueError, match="recompute alike"):
        type(load_stack("torchtitan")).model_validate(stack | {"recompute_layer_count": True})
