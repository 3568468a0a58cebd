"""Inputs of layers on hosts that bind, in parts and in groups: the planner equals brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from planner.hosting import cannot_offload
from planner.refute import better_layout
from planner.request import Request
from tests.oracle.brute import brute_force
from tests.oracle.compare import compare, differences
from tests.oracle.host_memory import bytes_on_nodes, least_on_node
from tests.oracle.instances import draw
from tests.oracle.layouts import every_layout, partitions
from tests.oracle.test_offload import with_memory

INSTANCES = 40
STACKS = ("megatron-deepspeed", "deepspeed-pipe")
MODES = (None, None, "full", "full:2", "partitioned", "partitioned:2", "partitioned:3")


def offloaded(seed: int) -> Request | None:
    """The instance of ``seed`` with the inputs of its layers on the hosts, whose memory is what
    some completion needs or a little less; None where it has no layout."""
    rng = Random(f"checkpoints {seed}")
    request = draw(seed, rng.choice(STACKS))
    stack = request.stack.model_copy(update={"schedules": ("1f1b",), "recompute_groups": 3})
    limits = request.job.constraints.model_copy(
        update={"recompute": rng.choice(MODES), "schedule": None}
    )
    changes = {
        "activation_offload": True, "optimizer_offload": rng.random() < 0.3, "optimizer": "adamw",
        "precision": "bf16", "allow_recompute": True, "constraints": limits,
    }  # fmt: skip
    request = replace(request, stack=stack, job=request.job.model_copy(update=changes))
    request = replace(request, cluster=with_memory(request.cluster, 10**15))
    layouts = list(every_layout(request))
    if not layouts or cannot_offload(request):
        return None
    x = rng.choice([x for x in layouts if x.pp > 1] or layouts)
    layers, uneven = request.model.layer_count, request.stack.uneven_stages
    sizes = rng.choice(list(partitions(layers, x.schedule, x.pp, x.vpp, uneven, False)))
    m = request.global_batch // (x.dp * x.microbatch)
    sent = bytes_on_nodes(request, x, sizes, [("full", 0)] * x.pp, m)
    needed = max(*sent, least_on_node(request, x))
    room = int(needed * rng.choice((1, 1, 0.98, 1.3)))
    return replace(request, cluster=with_memory(request.cluster, room))


def test_planner_equals_brute_force_with_the_inputs_of_layers_on_the_hosts() -> None:
    """The optimum, its bound and the recheck; hosts, parts and groups are in it often enough."""
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in range(INSTANCES):
        request = offloaded(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        found = differences(each)
        problems += found
        time = each.answer.time
        roomy = replace(request, cluster=with_memory(request.cluster, 10**15))
        count["all"] += 1
        count["feasible"] += time is not None
        count["bound by hosts"] += brute_force(roomy).time != time
        modes = {mode for mode, _ in each.answer.options or ()}
        count["on hosts"] += bool(modes - {"none"})
        count["in parts"] += any(mode.startswith("partitioned") for mode in modes)
        count["groups of parts"] += any(mode.startswith("partitioned:") for mode in modes)
        if time is not None and not found:
            assert better_layout(request, time) is None, seed
            assert better_layout(request, time + 1) is not None, seed
        count["pipeline"] += each.answer.layout is not None and each.answer.layout.pp > 1
    assert not problems, "\n".join(problems[:20])
    assert count["all"] >= 0.5 * INSTANCES, count
    assert count["feasible"] >= 0.2 * count["all"], count
    assert count["bound by hosts"] >= 0.05 * count["all"], count
    for name in ("on hosts", "in parts", "groups of parts", "pipeline"):
        assert count[name], count
