"""Loops whose transfers have an iteration to themselves (MaxText,
``pipeline_delay_activation_forwarding``), by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.layout import Schedule
from cost_models.leaf import Completion, Leaf, stage_costs
from cost_models.step_time import simulate_step
from cost_models.surrogate import surrogate_ns
from planner.certify import verify
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from tests.rows import POLICIES, row


def leaf(schedule: Schedule, *, pp: int, vpp: int, m: int, hop: int) -> Leaf:
    """A layer of 2 ns forward and 4 ns backward on each virtual stage, and nothing at the ends."""
    return Leaf(
        schedule=schedule, pp=pp, vpp=vpp, microbatches=m, sequence=(0,) * (pp * vpp),
        kinds=(row(FORWARD=2, BACKWARD=4, ACT_NONE=8),), embedding=row(), head=row(), hop_ns=hop,
        bucket_ns=0, tied_sync_ns=0, sync_ns=0, fixed_bytes=0, capacity_bytes=10_000,
        uneven=False, policies=POLICIES,
    )  # fmt: skip


def finish(each: Leaf) -> int:
    stages = each.pp * each.vpp
    completion = Completion(tuple(range(stages + 1)), (("none", 0),) * stages)
    ranks = stage_costs(each, completion)
    time = simulate_step(each, ranks)
    assert surrogate_ns(each, ranks) <= time.total_ns
    return max(time.timeline.finish_ns)


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "m"),
    [("gpipe_delayed", 2, 1, 4), ("gpipe_delayed", 4, 1, 12), ("looped_bfs_delayed", 4, 2, 8)],
)
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_the_bubble_is_twice_as_long_and_transfers_are_hidden(
    schedule: Schedule, pp: int, vpp: int, m: int, hop: int
) -> None:
    """``bubble_iterations`` of layers/pipeline.py: 2 (pp - 1), of either direction, beside m passes
    of each virtual stage; a transfer of up to a pass adds nothing to that."""
    assert finish(leaf(schedule, pp=pp, vpp=vpp, m=m, hop=hop)) == (m * vpp + 2 * (pp - 1)) * 6


def test_a_transfer_longer_than_a_pass_takes_its_own_time() -> None:
    """5 ns on and back: rank 0 ends its forwards at 5, 10, 15, 20 and rank 1, 5 ns behind, begins
    its own at 10, 15, 20 and 25; its backwards run from 27 to 43, 4 ns each, and rank 0's from 36,
    5 ns each."""
    assert finish(leaf("gpipe_delayed", pp=2, vpp=1, m=4, hop=5)) == 56


def test_it_pays_where_transfers_are_slow() -> None:
    """Without the delay every pass but a rank's own waits for its transfer: at 2 ns each of 64
    forwards and 64 backwards, of 6 iterations more."""
    plain = leaf("gpipe", pp=4, vpp=1, m=64, hop=0)
    waits = replace(plain, sends=((2, 2),) * 5)
    delayed = leaf("gpipe_delayed", pp=4, vpp=1, m=64, hop=2)
    assert finish(plain) < finish(delayed) < finish(waits)


def request(**job: object) -> Request:
    spec = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 64, **job}
    return read_request("llama-3.2-1b", "dgx-h100:1", None, spec)


def test_twice_as_many_microbatches_as_stages() -> None:
    """configs/types.py: "Delayed activation forwarding requires at least 2 * num_stages
    microbatches"."""
    given = {"pp": 4, "dp_shard": 2, "zero_stage": 3, "schedule": "gpipe_delayed"}
    found = evaluate(request(), given | {"microbatch_size": 4})
    assert found.layout.num_microbatches == 8
    with pytest.raises(InputError, match="at least 2 x pp microbatches"):
        evaluate(request(), given | {"microbatch_size": 8})


def test_a_plan_with_it_is_verified() -> None:
    fixed = {"pp": 4, "tp": 1, "cp": 1, "microbatch_size": 1}
    asked = request(constraints={"schedule": "gpipe_delayed", "fix": fixed, "recompute": "full"})
    found = plan(asked)
    assert found.layout.schedule == "gpipe_delayed"
    assert verify(found) == []
