"""Orders of work of one's own: the search against brute force, and the recheck against both."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from planner.refute import better_layout
from planner.request import Request
from planner.specs import ConstraintSpec
from tests.oracle.amount import of
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw
from tests.oracle.orders import draw_order


def with_an_order(seed: int) -> Request | None:
    """The instance of a seed with a random order that some layout of it may run."""
    request, rng = draw(seed), Random(f"order {seed}")
    devices, batch, layers = request.devices, request.global_batch, request.model.layer_count
    shapes = [
        (pp, vpp, on_v)
        for pp in range(2, 5)
        for vpp in (1, 2, 3)
        for on_v in {False, vpp == 2}
        if devices % pp == 0 and pp * vpp <= layers + 2
    ]
    counts = [m for m in range(1, 9) if batch % m == 0]
    if not shapes:
        return None
    pp, vpp, on_v = rng.choice(shapes)
    rows = draw_order(rng, pp, vpp, rng.choice(counts), on_v=on_v)
    free = rng.random() < 0.3
    stack = request.stack.model_copy(
        update={
            "schedules": ("1f1b", "interleaved", "interleaved_zero_bubble"),
            "rules": tuple(rule for rule in request.stack.rules if rule != "no_pipeline"),
            "given_orders": True, "free_virtual_stages": True, "offload": None,
            "uneven_stages": free or request.stack.uneven_stages,
        }
    )  # fmt: skip
    limits = ConstraintSpec(virtual_stages="free" if free else "even")
    job = request.job.model_copy(update={"schedule_actions": tuple(rows), "constraints": limits})
    return replace(request, job=job, stack=stack)


def test_given_orders_equal_brute_force_and_hold_in_the_recheck() -> None:
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in range(9_000_000, 9_000_000 + of(200, 160)):
        request = with_an_order(seed)
        if request is None or request.model.layer_count * len(request.job.schedule_actions) > 24:
            continue
        each = compare(seed, request=request)
        problems += differences(each)
        best = each.result.best
        count["feasible" if best else "infeasible"] += 1
        if best is None:
            continue
        count[best.leaf.schedule] += 1
        count["one stage per rank"] += best.leaf.vpp == 1
        count["free"] += request.free_stages
        count["recomputed"] += best.completion.recompute[0][0] != "none"
        assert better_layout(request, best.time_ns) is None
        assert better_layout(request, best.time_ns + 1) is not None
    print(dict(count))
    assert not problems, "\n".join(problems[:20])
    wanted = (
        "given", "given_split", "given_v", "given_v_split", "one stage per rank", "free",
        "recomputed", "infeasible",
    )  # fmt: skip
    assert not [name for name in wanted if not count[name]], count
