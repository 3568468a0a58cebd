"""Kinds of context parallelism that a job lists layer by layer."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import InputError
from planner.exports.megatron_core import export
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication
from planner.studies.verify import verify

STACK = "megatron-core-offload"


def request(listed: tuple[str, ...], model: str = "llama-3.1-8b", **job: Any) -> Request:
    document = {"stack": STACK, "sequence_length": 65_536, "global_batch": 4, **job}
    return read_request(model, "dgx-h100:4", None, {**document, "cp_kinds": listed})


def step_ns(listed: tuple[str, ...], **layout: Any) -> int:
    asked = {"zero_stage": 1, "tp": 2, "cp": 4, "recompute": "none", **layout}
    return round(evaluate(request(listed), asked).prediction.step_time_s * 1e9)


def test_half_the_layers_of_each_kind_take_the_mean_of_both() -> None:
    ring, exchange = (step_ns((), cp_kind=kind) for kind in ("p2p", "a2a"))
    assert ring != exchange
    assert 2 * step_ns(("p2p", "a2a")) == ring + exchange
    assert step_ns(("p2p",)) == ring
    thrice = step_ns(("p2p", "a2a", "a2a", "a2a"))
    assert 4 * thrice == ring + 3 * exchange


def test_a_layer_keeps_what_its_own_kind_keeps() -> None:
    """Each call of a ring is one of the layers that have one."""
    asked = {"zero_stage": 1, "tp": 2, "cp": 4, "recompute": "none"}
    found = {}
    for listed in (("p2p",), ("a2a",), ("p2p", "a2a")):
        one = request(listed)
        calls = communication(one, evaluate(one, asked)).stages[0]
        found[listed] = {
            kind: sum(call.bytes for call in calls if call.kind == kind and call.group == "cp")
            for kind in ("send_recv", "all_to_all")
        }
    both = found["p2p", "a2a"]
    assert 2 * both["send_recv"] == found["p2p",]["send_recv"] > 0
    assert 2 * both["all_to_all"] == found["a2a",]["all_to_all"] > 0


def test_inner_groups_are_those_of_the_layers_with_two_levels() -> None:
    with pytest.raises(InputError, match="cp_inner"):
        step_ns(("a2a_p2p", "p2p"))
    halves = [step_ns((), cp_kind="a2a_p2p", cp_inner=2), step_ns((), cp_kind="p2p")]
    assert 2 * step_ns(("a2a_p2p", "p2p"), cp_inner=2) == sum(halves)


@pytest.mark.parametrize(
    ("stack", "listed", "said"),
    [
        ("megatron-core", ("p2p", "a2a"), "one kind of context parallelism for all"),
        (STACK, ("p2p", "a2a", "a2a"), "do not repeat evenly over the 32 layers"),
        (STACK, ("a2a_all_gather", "p2p"), "has no a2a_all_gather context parallelism"),
    ],
)
def test_a_list_that_nothing_runs_is_refused(
    stack: str, listed: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        request(listed, stack=stack)


def test_a_layout_cannot_name_another_kind() -> None:
    with pytest.raises(InputError, match="the job lists kinds by layer"):
        step_ns(("p2p", "a2a"), cp_kind="a2a")


def test_windows_are_asked_of_the_layers_that_have_them() -> None:
    """gpt-oss: every other layer has a window, which a ring does not run."""
    asked = {"zero_stage": 1, "tp": 2, "cp": 4, "recompute": "none"}
    stack = {"stack": STACK}
    fits = request(("all_gather", "p2p"), "gpt-oss-20b", **stack)
    assert evaluate(fits, asked).layout.cp_kind == "all_gather"
    with pytest.raises(InputError, match="sliding windows is all_gather or a2a"):
        evaluate(request(("p2p", "all_gather"), "gpt-oss-20b", **stack), asked)


def test_a_plan_around_a_list_is_proved_checked_and_exported() -> None:
    limits = {"fix": {"cp": 4, "pp": 2}}
    found = plan(request(("p2p", "a2a"), constraints=limits))
    assert found.certificate.status == "optimal"
    assert found.layout.cp_kind == "p2p"
    assert verify(found) == []
    assert any("p2p in 16, a2a in 16" in note for note in found.prediction.assumptions)
    flags = {name: values for name, *values in export(found).flags}
    assert flags["--cp-comm-type"] == ["p2p", "a2a"] * 16
