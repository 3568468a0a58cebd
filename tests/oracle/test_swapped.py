"""Muon's groups of matrices on drives: the planner equals brute force, lost gradients left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from planner.request import Request
from tests.oracle.brute import brute_force
from tests.oracle.compare import agreed
from tests.oracle.layouts import every_layout
from tests.oracle.swapped import drives_lose_gradients
from tests.oracle.test_offload import offloaded, roomy_hosts, with_memory


def test_planner_equals_brute_force_with_muon_on_the_drives() -> None:
    """Buckets and groups of a few matrices; gradients are lost of parts that are too small or no
    multiple, so that some models do not run. The memory beside the drives has room."""
    count: Counter[str] = Counter()
    for seed in range(9000, 9040):
        drawn = offloaded(seed, "deepspeed-nvme", loop="muon")
        if drawn is None:
            continue
        request = in_small_buckets(drawn, seed)
        time = agreed(seed, request).time
        count["all"] += 1
        count["feasible"] += time is not None
        lost = [drives_lose_gradients(request, x) for x in every_layout(drawn)]
        count["gradients lost"] += all(lost)
        assert time is None or not all(lost)
        slow = replace(request, cluster=with_memory(request.cluster, 10**15, rate=1e8))
        roomy = brute_force(replace(request, cluster=with_memory(request.cluster, 10**15))).time
        if roomy is not None:
            slower = brute_force(slow).time
            assert slower is not None
            assert slower > roomy, seed
            count["waits for drives"] += 1
    assert count["feasible"] > 3, count
    assert count["gradients lost"] > 1, count
    assert count["waits for drives"] > 3, count


def in_small_buckets(request: Request, seed: int) -> Request:
    """The request with buckets and groups of thousands of elements, and parts of hundreds."""
    rng, offload = Random(f"swapped {seed}"), request.stack.offload
    assert offload is not None
    assert offload.drives is not None
    drives = offload.drives.model_copy(
        update={
            "buffer_elements": rng.choice((5_000, 100_000)),
            "part_elements": rng.choice((1, 2_000, 8_000)),
            "part_multiple": rng.choice((1, 16)),
        }
    )
    state = request.stack.state.model_copy(
        update={"reduction_elements": rng.choice((5_000, 10**9))}
    )
    stack = request.stack.model_copy(
        update={"offload": offload.model_copy(update={"drives": drives}), "state": state}
    )
    return roomy_hosts(replace(request, stack=stack))
