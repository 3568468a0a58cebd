"""``verify`` rejects a plan in which any one semantic number was changed, digests repaired."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from planner import certify
from planner.pipeline import plan, read_request
from planner.plan import Plan, digest
from planner.studies.verify import verify
from tests.oracle.amount import of

REQUESTS = {
    "dense": ("gpt2-xl", "dgx-a100:1", {"sequence_length": 1024, "global_batch": 64}),
    "experts": (
        "mixtral-8x7b",
        "dgx-h100:2",
        {"sequence_length": 4096, "global_batch": 64, "constraints": {"max": {"tp": 4}}},
    ),
}

Path = tuple[str | int, ...]


@pytest.fixture(scope="module", params=REQUESTS)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    model, cluster, job = REQUESTS[request.param]
    return plan(read_request(model, cluster, None, job)).model_dump(mode="json")


def numbers(value: object, path: Path = ()) -> Iterator[tuple[Path, int | float | bool]]:
    """Every number and flag of a JSON document, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, bool | int | float):
        yield path, value


def changed(document: dict[str, Any], path: Path, value: object) -> dict[str, Any]:
    """A copy with one value replaced and the inputs' digests repaired."""
    result = copy.deepcopy(document)
    target: Any = result
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    for entry in result["inputs"].values():
        entry["digest"] = digest(entry["document"])
    return result


def other(value: int | float | bool) -> int | float | bool:
    """A value near by that is not the same after rounding."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 1.001 if value else 0.001


def is_rejected(document: dict[str, Any]) -> bool:
    """Whether the document no longer parses, or is refuted."""
    try:
        parsed = Plan.model_validate(document)
    except ValidationError:
        return True
    return bool(verify(parsed))


def test_the_unchanged_plan_holds(document: dict[str, Any]) -> None:
    assert verify(Plan.model_validate(document)) == []


def test_any_changed_number_of_the_answer_is_rejected(document: dict[str, Any]) -> None:
    answer = [found for found in numbers(document) if found[0][0] != "inputs"]
    accepted = []
    for path, value in Random("changed").sample(answer, of(len(answer))):
        if not is_rejected(changed(document, path, other(value))):
            accepted.append(path)
    assert accepted == []


@pytest.mark.parametrize(("kind", "inner"), [("p2p", 2), ("a2a_p2p", 1), ("a2a_p2p", 4)])
def test_levels_of_context_parallelism_that_do_not_exist_are_rejected(
    kind: str, inner: int
) -> None:
    """Of four ranks two exchange heads, or none do, without a replay of the search too."""
    job = {"sequence_length": 1024, "global_batch": 64, "constraints": {"fix": {"cp": 4}}}
    found = plan(read_request("gpt2-xl", "dgx-a100:1", None, job))
    assert certify.verify(found) == []
    layout = found.layout.model_copy(update={"cp_kind": kind, "cp_inner": inner})
    findings = certify.verify(found.model_copy(update={"layout": layout}))
    assert f"cp_kind {kind} with cp_inner {inner} is no way to run the stack" in findings


def test_a_changed_input_is_rejected(document: dict[str, Any]) -> None:
    """Numbers of the inputs that the price or the space depends on."""
    job = ("inputs", "job", "document")
    cases: list[tuple[Path, object]] = [
        ((*job, "global_batch"), document["inputs"]["job"]["document"]["global_batch"] * 2),
        ((*job, "sequence_length"), 512),
        ((*job, "optimizer"), "sgd"),
        ((*job, "memory_reserve_bytes"), 1 << 30),
        (("inputs", "model", "document", "hidden"), 2048),
        (("inputs", "model", "document", "vocab"), 70000),
        (("inputs", "cluster", "document", "groups", 0, "count"), 4),
        (
            ("inputs", "cluster", "document", "groups", 0, "node", "device", "memory_bandwidth",
             "value"), 1.0,
        ),
    ]  # fmt: skip
    accepted = [path for path, value in cases if not is_rejected(changed(document, path, value))]
    assert accepted == []


def test_a_repaired_digest_is_needed(document: dict[str, Any]) -> None:
    broken = copy.deepcopy(document)
    broken["inputs"]["job"]["document"]["tolerance"] = 0.02
    assert any("digest" in finding for finding in verify(Plan.model_validate(broken)))
