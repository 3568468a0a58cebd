"""Layers on the host where memory binds: the planner equals brute force over every number."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cost_models.step import Field
from planner.refute import better_layout
from planner.request import Request
from planner.search import Search
from planner.specs import ConstraintSpec
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.test_offload import with_memory

STACK = "megatron-core-cpu-offload"


def roomy(seed: int) -> Request:
    """The instance of ``seed`` without limits of its own, on roomy devices and hosts."""
    request = draw(seed, STACK)
    changes = {"constraints": ConstraintSpec(), "allow_recompute": True}
    request = replace(request, job=request.job.model_copy(update=changes))
    cluster = with_memory(request.cluster, 10**15)
    return replace(request, cluster=cluster, capacity_bytes=10**15)


def test_the_planner_finds_the_number_of_layers() -> None:
    count: Counter[str] = Counter()
    for seed in range(20):
        request = roomy(seed)
        best = None if request.unsupported else Search(request).run().best
        if best is None:
            continue  # no pipeline, or no figures of a kernel
        leaf = best.leaf
        kept = sum(leaf.kinds[kind][Field.ACT_NONE] for kind in leaf.sequence)
        fix = {name: int(best.degrees[name]) for name in ("tp", "microbatch_size")}
        limits = {"constraints": ConstraintSpec(fix=fix)}
        for share in (5, 2):
            tight = replace(
                request,
                job=request.job.model_copy(update=limits),
                capacity_bytes=best.peak_bytes - kept // share,
            )
            each = compare(seed, request=tight)
            assert not differences(each), seed
            time = each.answer.time
            count["all"] += 1
            if time is None:
                continue
            count["feasible"] += 1
            count["sent"] += any(mode.startswith("offload:") for mode, _ in each.answer.options)
            assert better_layout(tight, time) is None, seed
            assert better_layout(tight, time + 1) is not None, seed
    assert count["sent"] > 5, count
