"""Schedules whose ranks share embedding and head: orders, timeline, and bytes counted by hand."""

from __future__ import annotations

from random import Random

import pytest

from cost_models.layout import OVER_PIPELINE, Schedule
from cost_models.schedule import Durations, live_peaks
from cost_models.step import Field
from cost_models.vocabulary_orders import rank_steps
from cost_models.vocabulary_timeline import HeadTimes, simulate
from hardware_profiles.loader import load_cluster, load_stack
from planner.layouts import complete_layout
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, MlpSpec, ModelSpec
from planner.predict import predict, price
from planner.request import Request
from planner.specs import JobSpec
from tests.oracle import vocabulary as again

RANKS, LAYERS, HIDDEN, TOKENS, VOCABULARY = 8, 16, 1024, 2048, 100_001


@pytest.mark.parametrize("schedule", OVER_PIPELINE)
def test_orders_are_those_of_the_forks_offsets(schedule: Schedule) -> None:
    for pp in range(2, 14):
        for m in (*range(1, 30), 64):
            for rank in range(pp):
                assert list(rank_steps(schedule, pp, m, rank)) == again.order(schedule, pp, m, rank)


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_microbatches_in_flight_are_those_of_the_paper(pp: int) -> None:
    """Section 5.2 of arXiv 2411.05288: p + 2, p + 1, and 1.5 p on the first rank."""
    counts = {
        schedule: [live_peaks(schedule, pp, 1, 128, rank)[0][0] for rank in range(pp)]
        for schedule in OVER_PIPELINE
    }
    assert counts["1f1b_vocab_1"] == [pp - rank + 2 for rank in range(pp)]
    assert counts["1f1b_vocab_2"] == [pp - rank + 1 for rank in range(pp)]
    assert counts["1f1b_interlaced"] == [pp * 3 // 2 - rank for rank in range(pp)]


@pytest.mark.parametrize("schedule", OVER_PIPELINE)
def test_every_pass_runs_once_in_order(schedule: Schedule) -> None:
    for pp in (2, 3, 5, 8):
        for m in (1, 2, 7, 20):
            for rank in range(pp):
                steps = rank_steps(schedule, pp, m, rank)
                heads = m if schedule == "1f1b_interlaced" else m + 1
                for work, count in (("F", m), ("B", m), ("S", heads)):
                    assert [i for kind, i in steps if kind == work] == list(range(count))


@pytest.mark.parametrize("schedule", OVER_PIPELINE)
def test_timelines_are_longest_paths(schedule: Schedule) -> None:
    rng = Random(schedule)
    for _ in range(60):
        pp, m = rng.randint(2, 7), rng.randint(1, 20)
        forward = [rng.randint(1, 50) for _ in range(pp)]
        backward = [rng.randint(1, 90) for _ in range(pp)]
        hops = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(pp)]
        head = [0] * 64
        head[Field.FORWARD], head[Field.WEIGHT_BACKWARD] = rng.randint(1, 30), rng.randint(1, 20)
        head[Field.BACKWARD] = head[Field.WEIGHT_BACKWARD] + rng.randint(0, 20)
        ends = again.Ends(
            (0,) * 64, tuple(head), arrive=rng.randint(0, 9), arrive_wide=rng.randint(0, 9),
            gradient=rng.randint(0, 9), scalar=rng.randint(0, 3), hidden=0, element=2,
        )  # fmt: skip
        own, later = ends.parts(schedule)
        at_once = schedule == "1f1b_interlaced"
        beside = max(ends.gradient - head[Field.WEIGHT_BACKWARD], 0)
        times = HeadTimes(
            own, later, ends.arrive if at_once else ends.arrive_wide,
            3 * ends.scalar + ends.gradient,
            ends.arrive + 3 * ends.scalar + beside if at_once else 0,
        )  # fmt: skip
        found = simulate(schedule, pp, m, Durations(forward, backward), times, hops)
        expected = again.finish(schedule, pp, m, forward, backward, hops, ends)
        assert list(found.finish_ns) == expected


def _request(*, batch: int = 16) -> Request:
    block = BlockSpec(
        mixer=AttentionSpec(heads=8, kv_heads=8, head_dim=128),
        feed_forward=MlpSpec(intermediate=4 * HIDDEN, gated=False, activation="gelu"),
    )
    model = ModelSpec(
        name="small", family="test", source="test", hidden=HIDDEN, vocab=VOCABULARY,
        tied_embeddings=False, norm="layer", norm_bias=True, blocks={"dense": block},
        layers=(LayerRun(block="dense", count=LAYERS),),
    )  # fmt: skip
    job = JobSpec(
        sequence_length=TOKENS, global_batch=batch, precision="fp16",
        stack="megatron-vocabulary-parallel",
    )  # fmt: skip
    return Request(model, load_cluster("dgx-a100:1"), job, load_stack(job.stack or ""))


@pytest.mark.parametrize("schedule", OVER_PIPELINE)
def test_bytes_of_a_rank_counted_by_hand(schedule: Schedule) -> None:
    """Every rank has its rows of both ends, 16 bytes each, and one softmax in fp32."""
    request = _request()
    layout = complete_layout({"pp": RANKS, "schedule": schedule, "recompute": "none"}, request)
    priced = price(layout, request)
    rows = -(-VOCABULARY // (128 * RANKS)) * 128
    norm = 2 * HIDDEN
    ends = 2 * rows * HIDDEN + norm
    layer = 12 * HIDDEN**2
    hidden = TOKENS * HIDDEN
    held = rows * TOKENS * 4 + 2 * hidden  # the softmax, and the head's input
    copies = {"1f1b_vocab_1": 3 * 2 + 2 * 4, "1f1b_vocab_2": 4 * 2 + 2 * 4, "1f1b_interlaced": 6}
    for rank, stage in enumerate(predict(priced, request).stages):
        terms = {term.name: term.bytes for term in stage.memory}
        state = terms["weights"] + terms["gradients"] + terms["optimizer"]
        own = ends + LAYERS // RANKS * layer
        assert state == pytest.approx(16 * own, rel=2e-3)
        assert stage.parameters == pytest.approx(own, rel=2e-3)
        # Norms of the layers and their biases are the rest of the state; statistics and token ids
        # of the buffers.
        buffers = held + copies[schedule] * hidden
        assert terms["vocabulary_buffers"] == pytest.approx(buffers, rel=5e-2)
        assert sum(terms.values()) == stage.peak_bytes
        alive = live_peaks(schedule, RANKS, 1, 16, rank)[0][0]
        if rank == 0:
            of_one = terms["activations"] / alive
        assert terms["activations"] == pytest.approx(of_one * alive)


@pytest.mark.parametrize("schedule", OVER_PIPELINE)
def test_parts_of_a_time_add_up(schedule: Schedule) -> None:
    request = _request()
    layout = complete_layout({"pp": RANKS, "schedule": schedule}, request)
    prediction = predict(price(layout, request), request)
    assert sum(term.seconds for term in prediction.time) == pytest.approx(prediction.step_time_s)


def test_no_rank_has_the_whole_vocabulary_to_itself() -> None:
    """All ranks are as busy as another; plain 1F1B waits for the last."""
    request = _request(batch=64)
    layout = complete_layout({"pp": RANKS, "schedule": "1f1b_vocab_2"}, request)
    shared = price(layout, request)
    # Ranks differ in their transfers only: the first and the last have one neighbour.
    busy = shared.step.timeline.busy_ns
    assert busy[0] == busy[-1] < busy[1] == pytest.approx(busy[0], rel=0.05)
    plain = Request(
        request.model, request.cluster,
        request.job.model_copy(update={"stack": "megatron-core-fp16"}),
        load_stack("megatron-core-fp16"),
    )  # fmt: skip
    whole = price(complete_layout({"pp": RANKS, "schedule": "1f1b"}, plain), plain)
    assert shared.step.total_ns < whole.step.total_ns
    reached = [max(s.peak_bytes for s in predict(p, r).stages)
               for p, r in ((shared, request), (whole, plain))]  # fmt: skip
    assert reached[0] < reached[1]
