"""Orders of work against those that PyTorch and Megatron-Core build (``benchmarks/schedules``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.layout import (
    IN_ROUNDS,
    SPLIT_BACKWARD,
    Schedule,
    crosses_ranks,
    place_of,
    stage_of,
)
from cost_models.orders import rank_order
from cost_models.rounds import round_sizes
from cost_models.schedule import Durations, live_peaks, simulate

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "pipeline_orders.json").read_text()
)["cases"]
IN_ROUNDS_OF: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "megatron_orders.json").read_text()
)["cases"]
NAMES: dict[str, Schedule] = {
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "interleaved_zero_bubble",
    "ZBVZeroBubble": "zbv",
    "DualPipeV": "dualpipev",
    "LoopedBFS": "looped_bfs",
}


def of_schedule(name: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["schedule"] == name]


@pytest.mark.parametrize("name", NAMES)
def test_orders_equal_pytorch(name: str) -> None:
    schedule, compared = NAMES[name], 0
    for case in of_schedule(name):
        pp, vpp, m = case["pp"], case["vpp"], case["microbatches"]
        if isinstance(case["order"], str):
            continue
        for rank, theirs in enumerate(case["order"]):
            ours = [
                f"{stage_of(schedule, pp, rank, chunk)}{'FBIW'[work]}{microbatch}"
                for work, chunk, microbatch in rank_order(schedule, pp, vpp, m, rank)
            ]
            assert " ".join(ours) == theirs, (pp, vpp, m, rank)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    "case",
    IN_ROUNDS_OF,
    ids=lambda case: "-".join(str(case[name]) for name in ("pp", "vpp", "microbatches", "size")),
)
def test_rounds_of_any_size_equal_megatron_core(case: dict[str, Any]) -> None:
    pp, vpp, m, size = (case[name] for name in ("pp", "vpp", "microbatches", "size"))
    for rank, theirs in enumerate(case["order"]):
        ours = [
            f"{stage_of('interleaved', pp, rank, chunk)}{'FB'[work]}{microbatch}"
            for work, chunk, microbatch in rank_order("interleaved", pp, vpp, m, rank, size)
        ]
        assert " ".join(ours) == theirs
    # It runs where megatron-core takes it: a last round of none or of at least pp.
    assert (size in round_sizes("at_least_pp", pp, m)) == (m % size == 0 or m % size >= pp)


@pytest.mark.parametrize("name", NAMES)
def test_what_pytorch_refuses(name: str) -> None:
    """Rounds of unequal size, and DualPipeV with fewer microbatches than virtual stages."""
    schedule = NAMES[name]
    for case in of_schedule(name):
        pp, m = case["pp"], case["microbatches"]
        refused = schedule in IN_ROUNDS and not round_sizes("equal", pp, m)
        refused |= schedule == "dualpipev" and m < 2 * pp
        assert isinstance(case["order"], str) == refused, case


@pytest.mark.parametrize("name", NAMES)
def test_live_microbatches_equal_a_walk_along_pytorchs_orders(name: str) -> None:
    schedule = NAMES[name]
    for case in of_schedule(name):
        pp, vpp, m = case["pp"], case["vpp"], case["microbatches"]
        if isinstance(case["order"], str):
            continue
        for rank, line in enumerate(case["order"]):
            alive, waiting, late, seen = [0] * vpp, [0] * vpp, [0] * vpp, set()
            for action in line.split():
                work = next(letter for letter in action if letter.isalpha())
                _, chunk = place_of(schedule, pp, int(action.split(work)[0]))
                alive[chunk] += {"F": 1, "B": -1, "I": 0, "W": -1}[work]
                waiting[chunk] += {"F": 0, "B": 0, "I": 1, "W": -1}[work]
                late[chunk] = {"F": late[chunk], "B": 0, "I": 0, "W": 1}[work]
                split = schedule in SPLIT_BACKWARD
                seen.add((*alive, *waiting, *late) if split else tuple(alive))
            listed = set(live_peaks(schedule, pp, vpp, m, rank))
            assert listed <= seen
            for vector in seen:
                assert any(
                    all(a >= b for a, b in zip(most, vector, strict=True)) for most in listed
                )


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_places(schedule: Schedule) -> None:
    for stage in range(8):
        rank, chunk = place_of(schedule, 4, stage)
        assert stage_of(schedule, 4, rank, chunk) == stage
    assert [place_of("zbv", 4, stage)[0] for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [crosses_ranks("zbv", 4, stage) for stage in (2, 3, 4)] == [True, False, True]


def test_zbv_timeline() -> None:
    """Two ranks, one microbatch, a hop of 1; stages 0 and 3 on rank 0, 1 and 2 on rank 1.

    Forwards take 2, gradients of inputs 3, of weights 5 (all 8 on stage 0, whose input needs none).
    Nothing is sent at the turn.

    rank 0: 0F 0-2, 3F 8-10, 3I 10-13, 3W 13-18, 0I (nothing) once 1I is there at 26, 0W 26-34
    rank 1: 1F 3-5, 2F 5-7, 2I 14-17, 2W 17-22, 1I 22-25, 1W 25-30
    """
    times = Durations([2] * 4, [8] * 4, [0, 3, 3, 3], [8, 5, 5, 5])
    timeline = simulate("zbv", 2, 2, 1, times, 1)
    assert timeline.finish_ns == (34, 30)
    assert timeline.busy_ns == (2 + 8 + 2 + 8, 2 * (2 + 8))


def test_zero_bubbles() -> None:
    """With forward, input and weight passes of one length ZB-V has no idle slot between the first
    forward and the last weight gradient of a rank; interleaved 1F1B does."""
    pp, m, n = 4, 12, 8
    times = Durations([1] * n, [2] * n, [1] * n, [1] * n)
    timeline = simulate("zbv", pp, 2, m, times, 0)
    for rank in range(pp):
        assert timeline.finish_ns[rank] - timeline.busy_ns[rank] <= rank
    plain = simulate("interleaved", pp, 2, m, times, 0)
    assert max(timeline.finish_ns) < max(plain.finish_ns)
    zb1p = simulate("interleaved_zero_bubble", pp, 2, m, times, 0)
    assert max(timeline.finish_ns) <= max(zb1p.finish_ns) < max(plain.finish_ns)
