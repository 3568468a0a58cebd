"""Pipelines whose stages give weights back behind a forward: the planner equals brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from planner.refute import better_layout
from planner.request import Request
from tests.oracle.brute import BruteForce, brute_force
from tests.oracle.brute_sums import chunks_of, rank_peak
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.layouts import every_layout, partitions
from tests.oracle.timeline import held

INSTANCES = 90


def resharded(seed: int) -> Request | None:
    """The instance of ``seed`` with torchtitan, a pipeline, and memory that a layout whose weights
    come and go just has, or a little less; None where it has none."""
    request, rng = draw(seed, "torchtitan"), Random(f"resharded {seed}")
    limits = request.job.constraints.model_copy(update={"fix": {}, "max": {}, "forbid": ("tp",)})
    request = replace(
        request, job=request.job.model_copy(update={"constraints": limits}), capacity_bytes=10**15
    )
    layouts = [x for x in every_layout(request) if x.zero == 3 and x.pp > 1]
    if request.unsupported is not None or not layouts:
        return None
    x = rng.choice(layouts)
    fix = {"pp": x.pp, "microbatch_size": x.microbatch}
    limits = limits.model_copy(update={"fix": fix})
    request = replace(request, job=request.job.model_copy(update={"constraints": limits}))
    prices = BruteForce(request).prices([x])[x.config()]
    layers, uneven = request.model.layer_count, request.stack.uneven_stages
    sizes = rng.choice(
        list(partitions(layers, x.schedule, x.pp, x.vpp, uneven, request.free_stages))
    )
    m = request.global_batch // (x.dp * x.microbatch)
    option = ("none", 0)
    chunks = chunks_of(prices, x, m, sizes, (option,) * x.pp)
    peak = max(
        rank_peak(prices, x, m, rank, [chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)])
        for rank in range(x.pp)
    )
    return replace(request, capacity_bytes=int(peak * rng.choice((1, 1.0005, 0.999, 1.02))))


def test_the_planner_finds_layouts_whose_weights_come_and_go() -> None:
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in range(8000, 8000 + INSTANCES):
        request = resharded(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        found = differences(each)
        problems += [f"{seed}: {text}" for text in found]
        count["all"] += 1
        x, time = each.answer.layout, each.answer.time
        if time is None or x is None or found:
            continue
        count["feasible"] += 1
        assert better_layout(request, time) is None, seed
        assert better_layout(request, time + 1) is not None, seed
        if x.zero == 3:
            count["chosen"] += 1
            count[x.schedule] += 1
            limits = request.job.constraints
            kept = limits.model_copy(update={"fix": {**limits.fix, "zero_stage": 2}})
            job = request.job.model_copy(update={"constraints": kept})
            # Weights that stay take less time: those that come and go are chosen for their room.
            other = brute_force(replace(request, job=job)).time
            assert other is None or other >= time
    assert not problems, "\n".join(problems[:20])
    assert count["chosen"] >= 0.1 * count["feasible"] > 0, count
    assert len([name for name in count if name in ("1f1b", "gpipe", "interleaved")]) >= 2, count


def test_no_half_of_a_backward_follows_a_forward_that_gave_weights_back() -> None:
    found = Counter[tuple[int, str]]()
    for seed in range(8000, 8030):
        request = draw(seed, "torchtitan")
        found.update((x.zero, x.schedule) for x in every_layout(request) if x.pp > 1)
    split = ("interleaved_zero_bubble", "zbv", "dualpipev")
    assert any(found[2, name] for name in split)
    assert not any(found[3, name] for name in split)
    assert found[3, "interleaved"]
    assert found[3, "1f1b"]
