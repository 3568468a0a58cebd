"""What passes of the bubble keep (MaxText, layers/pipeline.py), by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.host_outputs import Sent
from cost_models.idle_passes import bubble_passes, idle_bytes, on_ends
from cost_models.layout import Schedule
from cost_models.leaf import Completion, Leaf, stage_costs
from cost_models.peaks import live_activations, peaks
from hardware_profiles.loader import load_stack
from planner.certify import verify
from planner.leaves import Incumbent, Opening
from planner.pipeline import evaluate, plan, read_request
from planner.recount_host import outputs_held
from planner.request import Request
from tests.rows import POLICIES, row


def leaf(schedule: Schedule, *, pp: int, vpp: int, m: int, idle: int) -> Leaf:
    """Layers that keep 8 bytes each, one on each virtual stage, between an embedding that keeps 100
    and a head that keeps 1,000."""
    return Leaf(
        schedule=schedule, pp=pp, vpp=vpp, microbatches=m, sequence=(0,) * (pp * vpp),
        kinds=(row(FORWARD=2, BACKWARD=4, ACT_NONE=8),), embedding=row(ACT_NONE=100),
        head=row(ACT_NONE=1000), hop_ns=0, bucket_ns=0, tied_sync_ns=0, sync_ns=0, fixed_bytes=0,
        capacity_bytes=100_000, uneven=False, policies=POLICIES, idle_passes=idle,
    )  # fmt: skip


def alive(each: Leaf) -> list[int]:
    stages = each.pp * each.vpp
    completion = Completion(tuple(range(stages + 1)), (("none", 0),) * stages)
    ranks = stage_costs(each, completion)
    return [live_activations(each, rank, own.chunks)[0] for rank, own in enumerate(ranks)]


def test_four_microbatches_on_four_stages_keep_seven() -> None:
    """Of 4 + 3 iterations; ends are outside the loop and keep 4."""
    assert bubble_passes("gpipe", 4) == 3
    found = alive(leaf("gpipe", pp=4, vpp=1, m=4, idle=3))
    assert found == [7 * 8 + 4 * 100, 7 * 8, 7 * 8, 7 * 8 + 4 * 1000]


def test_delayed_loops_keep_twice_the_bubble() -> None:
    assert bubble_passes("gpipe_delayed", 4) == bubble_passes("looped_bfs_delayed", 4) == 6
    assert alive(leaf("gpipe_delayed", pp=4, vpp=1, m=8, idle=6))[1] == 14 * 8


def test_repeats_share_one_bubble() -> None:
    """8 microbatches of 2 repeats and 3 iterations: 19 passes of a chunk on every rank. Rank 1 is
    idle once before its first pass and twice behind its last."""
    each = leaf("looped_bfs", pp=4, vpp=2, m=8, idle=3)
    assert alive(each) == [19 * 8 + 800, 19 * 8, 19 * 8, 19 * 8 + 8000]
    assert [on_ends(each, rank) for rank in range(4)] == [(0, 3), (1, 2), (2, 1), (3, 0)]


def test_other_schedules_and_stacks_keep_nothing_of_it() -> None:
    assert bubble_passes("1f1b", 4) == bubble_passes("interleaved", 4) == 0
    each = leaf("gpipe", pp=4, vpp=1, m=4, idle=0)
    assert idle_bytes(each, 0, ()) == 0
    stays = {name: load_stack(name).idle_passes_stay for name in ("torchtitan", "maxtext-tpu")}
    assert stays == {"torchtitan": False, "maxtext-tpu": True}


@pytest.mark.parametrize(
    ("schedule", "vpp", "m", "idle"),
    [("gpipe", 1, 4, 3), ("gpipe_delayed", 1, 8, 6), ("looped_bfs", 2, 8, 3)],
)
def test_the_solver_knows_the_room_that_they_take(
    schedule: Schedule, vpp: int, m: int, idle: int
) -> None:
    """With as many bytes as the fullest rank needs there is a completion, with one less none."""
    each = leaf(schedule, pp=4, vpp=vpp, m=m, idle=idle)
    each = replace(each, embedding=row(), head=row())
    stages = 4 * vpp
    completion = Completion(tuple(range(stages + 1)), (("none", 0),) * stages)
    most = max(peaks(each, stage_costs(each, completion)))
    for capacity, expected in ((most, True), (most - 1, False)):
        incumbent = Incumbent(0.0)
        opening = Opening(replace(each, capacity_bytes=capacity), {}, incumbent, lambda: None)
        opening.close((("none", 0),), per_stage=False)
        assert (incumbent.best is not None) == expected


def request(**job: object) -> Request:
    spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 64, **job}
    return read_request("llama-3.2-1b", "dgx-h100:1", None, spec)


def test_a_layout_of_the_stack_counts_them() -> None:
    """16 layers on 4 stages, whole inputs of 2,048 tokens x 2,048 x 2 bytes: 4 layers of 8 + 3
    passes, and of 8 + 6 delayed."""
    given = {"pp": 4, "dp_shard": 2, "zero_stage": 3, "microbatch_size": 4, "recompute": "full"}
    size = 4 * 2048 * 2048 * 2
    kept = []
    for schedule in ("gpipe", "gpipe_delayed"):
        found = evaluate(request(), given | {"schedule": schedule})
        terms = {term.name: term.bytes for term in found.prediction.stages[1].memory}
        kept.append(terms["activations"])
    assert kept == [4 * size * 11, 4 * size * 14]


def test_outputs_on_the_hosts_are_those_of_all_iterations() -> None:
    given = {
        "pp": 4, "dp_shard": 2, "zero_stage": 3, "microbatch_size": 4,
        "recompute": "minimal_offloaded",
    }  # fmt: skip
    held = [
        outputs_held(evaluate(request(), given | {"schedule": name}).layout, request())
        for name in ("gpipe", "gpipe_delayed")
    ]
    assert held[0] * 14 == held[1] * 11


def test_a_leaf_refuses_what_the_hosts_have_no_room_for() -> None:
    """A layer on each of 4 ranks that sends 10 bytes a pass: 70 of 4 microbatches and 3 passes."""
    each = leaf("gpipe", pp=4, vpp=1, m=4, idle=3)
    kept = each.modes["full"].kept
    for room, refused in ((70, False), (69, True)):
        found = Sent((kept,), (np.array([[10]]),), room).refuse(each, 0)
        assert (found.kinds[0][kept] == each.capacity_bytes) == refused


def test_a_plan_with_repeats_is_verified() -> None:
    fixed = {"pp": 4, "tp": 1, "cp": 1, "microbatch_size": 1, "vpp": 2}
    found = plan(request(constraints={"schedule": "looped_bfs", "fix": fixed}))
    assert verify(found) == []
