"""The planner, run to gap 0, equals brute force on random tiny instances.

The long run takes thousands, in as many processes as ``PLANNER_ORACLE_PROCESSES`` says. The counts
per dimension are printed, and the shares that make the comparison worth something are asserted.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.oracle.amount import INSTANCES
from tests.oracle.compare import compare, cover, differences

PROCESSES = int(os.environ.get("PLANNER_ORACLE_PROCESSES", "1"))
PARTS = 8 * PROCESSES
WANTED = (
    "optimum: tp > 1", "optimum: cp > 1", "optimum: pp > 1", "optimum: vpp > 1", "optimum: ep > 1",
    "optimum: etp > 1", "optimum: sp > 0", "optimum: dp > 1",
    "optimum: dp_replicate and dp_shard > 1",
    "optimum: zero stage 0", "optimum: zero stage 1", "optimum: zero stage 2",
    "optimum: zero stage 3", "optimum: recompute none", "optimum: recompute selective",
    "optimum: recompute full", "optimum: recompute of some of a stage's layers",
    "optimum: recompute differs by stage", "optimum: uneven stages",
    "optimum: an end stage without layers", "optimum: schedule gpipe", "optimum: schedule 1f1b",
    "optimum: schedule interleaved", "model: mixed", "model: prediction modules",
    "constraint: fix", "constraint: max",
    "constraint: forbid", "constraint: size of rounds", "several nodes", "devices 3", "devices 5",
    "devices 6", "devices 7",
)  # fmt: skip
"""What at least one instance must have."""
RARE = ("optimum: recompute differs by stage",)
"""What a few hundred instances need not have."""


def several(seeds: range) -> tuple[Counter[str], list[str]]:
    """The instances of ``seeds``: the counts and the differences."""
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in seeds:
        each = compare(seed)
        cover(each, count)
        problems += differences(each)
    return count, problems


@pytest.fixture(scope="module")
def run() -> tuple[Counter[str], list[str]]:
    """All instances, once: the counts and the differences."""
    count: Counter[str] = Counter()
    problems: list[str] = []
    start = time.monotonic()
    parts = [range(first, INSTANCES, PARTS) for first in range(PARTS)]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for counted, found in map(several, parts) if PROCESSES == 1 else pool.map(several, parts):
            count += counted
            problems += found
    elapsed = time.monotonic() - start
    print(f"\n{INSTANCES} instances, {INSTANCES / elapsed:.1f} per second")
    for name, number in sorted(count.items()):
        print(f"{number:>10,}  {name}")
    return count, problems


def test_planner_equals_brute_force(run: tuple[Counter[str], list[str]]) -> None:
    _, problems = run
    assert not problems, "\n".join(problems[:20])


def test_the_instances_are_hard_enough(run: tuple[Counter[str], list[str]]) -> None:
    count, _ = run
    assert count["instances"] == INSTANCES
    assert count["infeasible"] >= 0.3 * count["instances"]
    assert count["infeasible: memory"] >= 0.2 * count["instances"]
    assert count["no uniform plan reaches the optimum"] >= 0.3 * count["feasible"]


def test_every_dimension_is_covered(run: tuple[Counter[str], list[str]]) -> None:
    count, _ = run
    known = RARE if INSTANCES < 1000 else ()
    assert not [name for name in WANTED if not count[name] and name not in known]
