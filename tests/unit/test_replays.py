"""The rules of vTrain's predictor hold in the steps that it made, and not in steps that differ."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ACCURACY = Path(__file__).parents[2] / "benchmarks" / "accuracy"
sys.path.append(str(ACCURACY))

import judgement  # noqa: E402
import readings  # noqa: E402
import replays  # noqa: E402

DATA = ACCURACY / "data"


@pytest.fixture(scope="module")
def found() -> list[readings.Step]:
    rows = judgement.read(ACCURACY / "results" / "left_out.csv", DATA / "runs.csv")
    return readings.steps(rows, DATA / "runs.csv")


def test_reductions_are_those_of_the_table_to_the_nanosecond(found: list[readings.Step]) -> None:
    added = replays.reductions(found)
    table = replays.table_of(DATA / "vtrain_all_reduce.csv")
    known = set(added) & set(table)
    assert len(known) == 11
    assert all(set(added[place]) == {table[place]} for place in known)
    assert all(len(set(times)) == 1 for times in added.values())


def test_a_longer_reduction_can_take_less(found: list[readings.Step]) -> None:
    assert replays.shorter_for_more(replays.reductions(found)) == ((4, 969), (4, 1161))


def test_stages_add_the_predictors_hops_and_no_recomputation(found: list[readings.Step]) -> None:
    lines = replays.lines(found)
    hops, depths = replays.hops(lines), replays.by_depth(lines)
    assert len(hops) > 5
    assert max(map(abs, hops)) < 1e-9
    assert len(depths) > 5
    assert max(map(abs, depths)) < 1e-9


def test_a_clock_would_not_agree(found: list[readings.Step]) -> None:
    shaken = [
        replace(step, stated_s=step.stated_s * (1 + 1e-4 * (index % 7 - 3)))
        for index, step in enumerate(found)
    ]
    added = replays.reductions(shaken)
    assert any(len(set(times)) > 1 for times in added.values())
    assert max(map(abs, replays.hops(replays.lines(shaken)))) > 1e-3


def test_equal_launches_cost_the_same(found: list[readings.Step]) -> None:
    read = readings.layer_times(found, "measured_s")
    launches = replays.launches(found, read, replays.table_of(DATA / "vtrain_all_reduce.csv"))
    alone = [cell for cell in launches.cells if cell[1] == 1]
    assert len(alone) > 1
    assert len({round(1e9 * launches.equal[cell]) for cell in alone}) == 1
    assert launches.low_s < launches.equal[alone[0]] < launches.high_s


def test_no_time_of_equal_launches_ranks_their_sweeps(found: list[readings.Step]) -> None:
    """Where they take what is read, each sweep's best is found: what is lost is the launches'."""
    read = readings.layer_times(found, "measured_s")
    table = replays.table_of(DATA / "vtrain_all_reduce.csv")
    kinds = replays.launches(found, read, table)
    for time_s in (1e-3, kinds.low_s, kinds.high_s, 6e-3):
        costs = replays.regrets_at(found, read, table, kinds, time_s)
        assert len(costs) == 24
        assert max(costs) > 0.08
    as_read = {cell: 1e-3 + replays.reduced_s(cell, table) for cell in read}
    assert max(replays.regrets_at(found, as_read, table, kinds, 1e-3)) == 0
