"""Stages that a user names: what follows from the schedule is filled in, and all else refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from planner import pipeline
from planner.errors import InputError
from planner.request import Request

V = {
    "pp": 2, "schedule": "zbv",
    "stages": [
        {"chunks": [{"layers": [0, 6]}, {"layers": [23, 32]}]},
        {"chunks": [{"layers": [6, 14]}, {"layers": [14, 23]}]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def request_() -> Request:
    flags = {"stack": "torchtitan", "sequence_length": 4096, "global_batch": 64}
    return pipeline.read_request("llama-3.1-8b", "dgx-h100:1", None, flags)


def test_embedding_head_and_devices_follow_from_a_v(request_: Request) -> None:
    found = pipeline.evaluate(request_, V).layout
    places = [[(c.has_embedding, c.has_head) for c in stage.chunks] for stage in found.stages]
    assert places == [[(True, False), (False, True)], [(False, False), (False, False)]]
    assert [stage.devices for stage in found.stages] == [(0, 4), (4, 8)]


def test_a_v_has_two_virtual_stages_unasked(request_: Request) -> None:
    layout = {"pp": 2, "schedule": "dualpipev"}
    found = pipeline.evaluate(request_, layout).layout
    assert found.vpp == 2
    assert found == pipeline.evaluate(request_, {**layout, "vpp": 2}).layout


def test_a_filled_layout_comes_back_as_it_is(request_: Request) -> None:
    found = pipeline.evaluate(request_, V).layout
    assert pipeline.evaluate(request_, found.model_dump(mode="json")).layout == found


def _chunk(layout: dict[str, Any], rank: int, index: int) -> dict[str, Any]:
    found: dict[str, Any] = layout["stages"][rank]["chunks"][index]
    return found


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "a gap": (
        lambda x: _chunk(x, 1, 0).update(layers=[7, 14]),
        "stages[1].chunks[0] is virtual stage 1 of 4 and holds layers [7, 14]; it should start "
        "at layer 6",
        "rank r holds virtual stages r and 3 - r",
    ),
    "an overlap": (lambda x: _chunk(x, 1, 0).update(layers=[3, 14]), "start at layer 6", "3 - r"),
    "backwards": (lambda x: _chunk(x, 0, 0).update(layers=[0, -1]), "start at layer 0", "3 - r"),
    "a loop's order": (
        lambda x: x.update(schedule="interleaved", vpp=2),
        "stages[0].chunks[1] is virtual stage 2 of 4", "rank r holds virtual stages r, 2 + r",
    ),
    "too few layers": (
        lambda x: _chunk(x, 0, 1).update(layers=[23, 31]),
        "the stages hold 31 layers, the model has 32", "last_exclusive",
    ),
    "a rank too few": (lambda x: x["stages"].pop(), "1 stages for pp = 2 ranks", ""),
    "a chunk too many": (
        lambda x: x["stages"][0]["chunks"].append({"layers": [3, 4]}),
        "stages[0] has 3 chunks, but vpp = 2", "",
    ),
    "the head elsewhere": (
        lambda x: _chunk(x, 1, 1).update(has_head=True),
        "stages[1].chunks[1].has_head = true: under zbv it is false", "leave has_head out",
    ),
    "other devices": (
        lambda x: x["stages"][0].update(devices=[0, 2]),
        "stages[0].devices = [0, 2], but rank 0 of 2 holds devices [0, 4]", "leave devices out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_stages_that_are_not_those_of_the_schedule_are_refused(
    name: str, request_: Request
) -> None:
    change, message, hint = WRONG[name]
    layout = copy.deepcopy(V)
    change(layout)
    with pytest.raises(InputError) as refusal:
        pipeline.evaluate(request_, layout)
    assert message in refusal.value.message
    assert hint in (refusal.value.hint or "")
