"""Weight gradients of the output layer that wait until the pipeline drains."""

from __future__ import annotations

from dataclasses import replace

from planner.pipeline import EvaluatedLayout, evaluate, read_request

SEQUENCE, VOCAB, HIDDEN = 4096, 128_256, 4096


def evaluated(limit: int, *, samples: int = 64, pp: int = 4, vpp: int = 1) -> EvaluatedLayout:
    job = {"sequence_length": SEQUENCE, "global_batch": samples, "stack": "nemo"}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    stack = request.stack.model_copy(update={"deferred_head_gradients": limit})
    layout = {
        "tp": 2, "pp": pp, "vpp": vpp, "sequence_parallel": True, "microbatch_size": 1,
        "recompute": "none",
    }  # fmt: skip
    return evaluate(replace(request, stack=stack), layout)


def waiting(evaluation: EvaluatedLayout) -> list[int]:
    """Bytes of operands that wait, by rank."""
    return [
        sum(term.bytes or 0 for term in stage.memory if term.name == "deferred_products")
        for stage in evaluation.prediction.stages
    ]


def test_the_last_rank_keeps_both_operands_of_the_products_that_wait() -> None:
    each = SEQUENCE * (VOCAB // 2 + HIDDEN // 2) * 2
    for limit, samples, count in ((0, 64, 0), (5, 64, 5), (22, 16, 15)):
        assert waiting(evaluated(limit, samples=samples)) == [0, 0, 0, count * each]
    assert waiting(evaluated(5, vpp=2)) == [0, 0, 0, 5 * each]


def test_without_a_pipeline_nothing_waits() -> None:
    assert waiting(evaluated(22, pp=1)) == [0]
    assert evaluated(22, pp=1).prediction.step_time_s == evaluated(0, pp=1).prediction.step_time_s


def test_a_stage_with_the_longest_passes_ends_sooner_by_what_waits() -> None:
    """The last of four stages has the head and as many layers as the others: it is the bottleneck.
    More microbatches that wait make the step shorter, by less than their products take."""
    times = [evaluated(limit).prediction.step_time_s for limit in (0, 4, 16)]
    assert times[0] > times[1] > times[2]
    product = 2 * SEQUENCE * HIDDEN * VOCAB / 2 / 400e12
    assert times[0] - times[1] < 4 * product
