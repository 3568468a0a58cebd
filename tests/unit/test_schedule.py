"""Schedules against PyTorch's own tables and timelines worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.layout import Schedule
from cost_models.orders import Pass, rank_order, warmup_forwards
from cost_models.schedule import Durations, live_peaks, simulate

TABLES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "pipeline_schedules.json").read_text()
)["schedules"]


@pytest.mark.parametrize(
    ("schedule", "table"),
    [("gpipe", "GPipe"), ("1f1b", "1F1B"), ("interleaved", "Interleaved1F1B")],
)
def test_orders_equal_pytorch(schedule: Schedule, table: str) -> None:
    theirs = TABLES[table]
    pp, vpp, m = theirs["pp"], theirs["vpp"], theirs["microbatches"]
    for rank in range(pp):
        ours = [
            f"{chunk * pp + rank}{'F' if work == Pass.FORWARD else 'B'}{microbatch}"
            for work, chunk, microbatch in rank_order(schedule, pp, vpp, m, rank)
        ]
        assert ours == _actions(theirs["order"][str(rank)], m)


def _actions(slots: list[str], microbatches: int) -> list[str]:
    """The work in a row of PyTorch's tables: no idle slots, no ``REDUCE_GRAD``.

    The 1F1B table numbers the last rank's forwards from 1 (its last is microbatch 8 of 0..7), a
    slip in the printed table: its backwards, which follow them one by one, are numbered from 0.
    """
    actions = [slot for slot in slots if slot and not slot.endswith("REDUCE_GRAD")]
    if any(action.endswith(f"F{microbatches}") for action in actions):
        for index, action in enumerate(actions):
            stage, forward, number = action.partition("F")
            if forward:
                actions[index] = f"{stage}F{int(number) - 1}"
    return actions


@pytest.mark.parametrize(
    ("schedule", "table"),
    [("gpipe", "GPipe"), ("1f1b", "1F1B"), ("interleaved", "Interleaved1F1B")],
)
def test_live_microbatches_equal_pytorch(schedule: Schedule, table: str) -> None:
    """What a rank holds, walked along PyTorch's own tables: every vector of microbatches per chunk
    is under one that is listed, and every listed one occurs."""
    theirs = TABLES[table]
    pp, vpp, m = theirs["pp"], theirs["vpp"], theirs["microbatches"]
    for rank in range(pp):
        live, seen = [0] * vpp, set()
        for action in _actions(theirs["order"][str(rank)], m):
            stage, forward, _ = action.partition("F")
            chunk = int(stage if forward else action.partition("B")[0]) // pp
            live[chunk] += 1 if forward else -1
            seen.add(tuple(live))
        listed = set(live_peaks(schedule, pp, vpp, m, rank))
        assert listed <= seen
        for vector in seen:
            assert any(all(a >= b for a, b in zip(most, vector, strict=True)) for most in listed)


def test_warmup() -> None:
    # 1F1B: the ranks after this one; interleaved: twice those, and pp for each earlier chunk.
    assert [warmup_forwards("1f1b", 4, 1, 8, rank) for rank in range(4)] == [3, 2, 1, 0]
    assert [warmup_forwards("interleaved", 4, 2, 8, rank) for rank in range(4)] == [10, 8, 6, 4]
    assert warmup_forwards("1f1b", 4, 1, 2, 0) == 2
    assert warmup_forwards("gpipe", 4, 1, 8, 3) == 8


def test_1f1b_timeline() -> None:
    """Two ranks, two microbatches, a hop of 1; rank 0 takes 2 + 4, rank 1 takes 3 + 5.

    ========  ==========================  =========================
    time      rank 0                      rank 1
    ========  ==========================  =========================
    0-2       F0                          waits for F0 + hop = 3
    2-4       F1                          3-6 F0, 6-11 B0
    12-16     B0 (11 + hop)               11-14 F1, 14-19 B1
    20-24     B1 (19 + hop)
    ========  ==========================  =========================
    """
    timeline = simulate("1f1b", 2, 1, 2, Durations([2, 3], [4, 5]), 1)
    assert timeline.finish_ns == (24, 19)
    assert timeline.busy_ns == (2 * (2 + 4), 2 * (3 + 5))


def test_what_the_last_stage_puts_off() -> None:
    """The timeline above, with 2 of the last backward of 5 put off behind both, or behind one.

    Rank 1: F0 3-6, B0 6-9, F1 9-12, B1 12-15, and the two products 15-19. Rank 0: B0 10-14 (9 +
    hop), B1 16-20 (15 + hop). Of the first microbatch only: B1 12-17, its product 17-19; rank 0
    ends at 22.
    """
    times = Durations([2, 3], [4, 5])
    both = simulate("1f1b", 2, 1, 2, times, 1, put_off=(2, 2))
    assert both.finish_ns == (20, 19)
    assert both.busy_ns == (2 * (2 + 4), 2 * (3 + 5))
    assert simulate("1f1b", 2, 1, 2, times, 1, put_off=(1, 2)).finish_ns == (22, 19)


def test_gpipe_timeline() -> None:
    """The same ranks, all forwards first.

    Rank 0: F0 0-2, F1 2-4. Rank 1: F0 3-6, F1 6-9, B0 9-14, B1 14-19. Rank 0: B0 15-19, B1 20-24.
    A third microbatch adds a forward and a backward of the slower rank: 3 + 5.
    """
    assert simulate("gpipe", 2, 1, 2, Durations([2, 3], [4, 5]), 1).finish_ns == (24, 19)
    assert simulate("gpipe", 2, 1, 3, Durations([2, 3], [4, 5]), 1).finish_ns == (32, 27)


def test_interleaved_timeline() -> None:
    """Two ranks with two chunks each: virtual stages 0 and 2 on rank 0, 1 and 3 on rank 1.

    Forwards take 1, 2, 1, 3, backwards 2, 4, 2, 6, a hop 1. ``2F1`` is the forward of virtual
    stage 2, microbatch 1. Rank 0 runs all its forwards first (warm-up 2 + 2), rank 1 two of them.

    rank 0: 0F0 0-1, 0F1 1-2, 2F0 5-6, 2F1 7-8, 2B0 17-19, 2B1 26-28, 0B0 30-32, 0B1 34-36
    rank 1: 1F0 2-4, 1F1 4-6, 3F0 7-10, 3B0 10-16, 3F1 16-19, 3B1 19-25, 1B0 25-29, 1B1 29-33
    """
    timeline = simulate("interleaved", 2, 2, 2, Durations([1, 2, 1, 3], [2, 4, 2, 6]), 1)
    assert timeline.finish_ns == (36, 33)
    assert timeline.busy_ns == (2 * (1 + 1 + 2 + 2), 2 * (2 + 3 + 4 + 6))


def test_equal_stages_reach_the_closed_form() -> None:
    # Without hops, 1F1B of equal stages takes (m + pp - 1) (f + b); interleaving by v divides the
    # fill by v: m v w + (pp - 1) w for chunks of w.
    assert max(simulate("1f1b", 4, 1, 8, Durations([2] * 4, [4] * 4), 0).finish_ns) == (8 + 3) * 6
    assert (
        max(simulate("interleaved", 4, 2, 8, Durations([1] * 8, [2] * 8), 0).finish_ns)
        == 8 * 6 + 3 * 3
    )


def test_live_activations() -> None:
    assert live_peaks("gpipe", 4, 1, 8, 2) == ((8,),)
    assert [live_peaks("1f1b", 4, 1, 8, rank) for rank in range(4)] == [
        ((4,),), ((3,),), ((2,),), ((1,),)
    ]  # fmt: skip
    assert live_peaks("1f1b", 4, 1, 2, 0) == ((2,),)
    # Rank 0 holds both microbatches of both chunks; rank 1 runs backwards of its second chunk
    # between the forwards: 1F0 1F1 3F0 3B0 3F1 3B1.
    assert live_peaks("interleaved", 2, 2, 2, 0) == ((2, 2),)
    assert live_peaks("interleaved", 2, 2, 2, 1) == ((2, 1),)


def test_a_round_may_hold_more_than_pp_microbatches() -> None:
    # Three microbatches on two ranks: one round of three.
    assert warmup_forwards("interleaved", 2, 2, 3, 1) == 3
    times = Durations([1] * 4, [1] * 4)
    assert max(simulate("interleaved", 2, 2, 3, times, 0).finish_ns) >= 12


def test_a_schedule_that_cannot_run_is_refused() -> None:
    # One microbatch is left for the last round: an action waits for one that never comes.
    with pytest.raises(ValueError, match="deadlocks"):
        simulate("interleaved", 4, 3, 5, Durations([1] * 12, [1] * 12), 0, 4)
