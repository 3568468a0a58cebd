"""The rule that an infeasible plan names first."""

from __future__ import annotations

import pytest

from planner.decisive import decisive_rules
from planner.errors import InfeasibleError
from planner.pipeline import plan, read_request
from planner.request import Request
from planner.space import build_space, expand, layout_rules


def request(**job: object) -> Request:
    return read_request("llama-3.2-1b", "dgx-h100", None, job)


@pytest.mark.parametrize("wish", [{"fix": {"zero_stage": 3}}, {"fix": {"ep": 3}}])
def test_as_many_layouts_break_a_wish_alone_as_are_possible_without_it(
    wish: dict[str, dict[str, int]],
) -> None:
    """Neither is anything that a layout has, so all of them break it."""
    found = decisive_rules(request(constraints=wish))
    meshes = build_space(request()).meshes
    layouts = expand(request(), meshes)
    for _, broken in layout_rules(request()):
        layouts = layouts.take(~broken(meshes.take(layouts.mesh), layouts))
    assert [*found.values()] == [len(layouts)]


def test_rules_that_hold_whatever_is_asked_are_not_named_first() -> None:
    """120 layouts break nothing but that this stack has no pipeline; none would without Muon."""
    job = {"stack": "deepspeed-nvme", "optimizer": "muon", "optimizer_offload": True}
    with pytest.raises(InfeasibleError, match=r"32 devices: .* loses gradients .*\(the only rule"):
        plan(read_request("llama-3.1-8b", "dgx-h100:4", None, job))


def test_two_wishes_that_contradict_each_other() -> None:
    """No layout breaks one alone: the one that removed most is named, and that it is not alone."""
    job = {"stack": "deepspeed-mics", "optimizer_offload": True}
    both = request(**job, constraints={"fix": {"ep": 3}})
    assert not decisive_rules(both)
    with pytest.raises(InfeasibleError, match="each of which breaks another rule too"):
        plan(both)
