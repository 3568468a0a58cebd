"""Limits that no layout can keep are refused before the search, with the user's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.process import planner

ORDER = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
REQUEST = ("llama-3.1-8b", "dgx-h100:1")


@pytest.mark.parametrize(
    ("flags", "said", "hint"),
    [
        (("--fix", "tp=16"), "tp=16, which does not divide the 8 devices", "1, 2, 4, 8"),
        (("--fix", "tp=4,pp=4"), "tp=4 x pp=4 = 16, which does not divide", "1, 2, 4, 8"),
        (
            ("--fix", "tp=2,cp=1,pp=1,dp_replicate=1,dp_shard=2"),
            "= 4, but dgx-h100:1 has 8 devices",
            "leave dp_shard out",
        ),
        (
            ("--schedule", "interleaved", "--fix", "pp=1"),
            "--fix pp=1 leaves one",
            "drop --fix pp=1",
        ),
        (("--fix", "vpp=2", "--forbid", "pp"), "--forbid pp leaves one", "drop --forbid pp"),
    ],
)
def test_limits_that_contradict_each_other(flags: tuple[str, ...], said: str, hint: str) -> None:
    result = planner("plan", *REQUEST, *flags)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert hint in result.err.split("hint: ")[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fix", "pp=4"), "--fix pp=4, but the order has 2 rows"),
        (("--forbid", "pp"), "--forbid pp, but the order has 2 rows"),
        (("--fix", "vpp=2"), "--fix vpp=2, but the order has vpp = 1"),
    ],
)
def test_limits_that_contradict_the_order(
    flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    order = tmp_path / "own.csv"
    order.write_text(ORDER)
    own = ("--stack", "torchtitan", "--schedule-csv", order, "--global-batch", "8")
    result = planner("plan", *REQUEST, *own, *flags)
    assert result.code == 2
    assert said in result.err
    assert planner("plan", *REQUEST, *own, "--fix", "pp=2", "--seq-len", "2048").code == 0


def test_a_plan_with_unknown_or_missing_keys_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert planner("plan", *REQUEST, "-o", path).code == 0
    made = json.loads(path.read_text())
    faults = (
        (made | {"extra": 1}, 2, "unknown key 'extra'"),
        ({k: v for k, v in made.items() if k != "inputs"}, 2, "inputs is missing"),
        (made | {"layout": made["layout"] | {"tp": -1}}, 6, "refuted: not a valid plan"),
    )
    for document, code, said in faults:
        path.write_text(json.dumps(document))
        result = planner("verify", path)
        assert (result.code, said in result.err) == (code, True), result.err


def test_networks_described_per_sample_speak_of_samples() -> None:
    flags = ("--stack", "torch-pipelining", "--global-batch", "64")
    for command in ("plan", "evaluate"):
        out = planner(command, "unet-2015", "dgx-h100:1", *flags, "--format", "table").out
        assert "samples/s per device" in out
        assert "tokens/s" not in out
