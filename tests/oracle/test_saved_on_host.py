"""All that a layer saves on the hosts, or its input alone: the planner equals brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hardware_profiles.schema import ClusterSpec
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw, number

SEEDS = (5046, 5054, 5066, 5110, 5131, 5254, 5262, 5297)


def with_host(cluster: ClusterSpec, link: float, memory: float) -> ClusterSpec:
    (group,) = cluster.groups
    changes = {"host_link": number(link, "B/s"), "host_memory": number(memory, "B")}
    node = group.node.model_copy(update=changes)
    return cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})


@pytest.mark.parametrize(("memory", "least"), [(1e13, 6), (1e3, 0)])
def test_the_search_finds_what_goes_to_the_host(memory: float, least: int) -> None:
    """A link so fast that it costs less than running again; hosts with room and without."""
    used: Counter[str] = Counter()
    for seed in SEEDS:
        request = draw(seed, "llm-foundry")
        roomy = replace(request, cluster=with_host(request.cluster, 1e14, memory))
        each = compare(seed, stack="llm-foundry", request=roomy)
        assert not differences(each), seed
        used.update(mode for mode, _ in each.answer.options)
    assert used["offloaded"] >= least
    assert (used["offloaded"] > 0) == (least > 0)


def test_over_a_slow_link_nothing_is_sent() -> None:
    for seed in SEEDS[:4]:
        request = draw(seed, "llm-foundry")
        slow = replace(request, cluster=with_host(request.cluster, 1e6, 1e13))
        each = compare(seed, stack="llm-foundry", request=slow)
        assert not differences(each), seed
        assert not any("offloaded" in mode for mode, _ in each.answer.options)
