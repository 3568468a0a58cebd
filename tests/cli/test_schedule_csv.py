"""``--schedule-csv`` and ``export torchtitan`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.process import planner

FILES = Path(__file__).parents[1] / "data" / "schedules"
REQUEST = ("llama-3.1-8b", "dgx-h100:4", "--stack", "torchtitan", "--global-batch", "64")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of PyTorch's DualPipeV, given as a file that is then gone."""
    folder = tmp_path_factory.mktemp("own")
    order = folder / "own.csv"
    order.write_text((FILES / "DualPipeV.csv").read_text())
    out = folder / "plan.json"
    result = planner("plan", *REQUEST, "--schedule-csv", order, "-o", out)
    assert result.code == 0, result.err
    order.unlink()
    return out


def test_a_plan_is_verified_without_the_file(made: Path) -> None:
    document = json.loads(made.read_text())
    assert document["layout"]["schedule"] == "given_v_split"
    assert document["certificate"]["status"] == "optimal"
    assert planner("verify", made).code == 0


def test_another_order_in_a_plan_is_refuted(made: Path, tmp_path: Path) -> None:
    document = json.loads(made.read_text())
    actions = document["inputs"]["job"]["document"]["schedule_actions"]
    assert actions[0].startswith("0F0,0F1,")
    from planner.plan import digest

    job = document["inputs"]["job"]
    for row, changed in ((0, actions[1]), (0, "0F0")):
        job["document"]["schedule_actions"] = [*actions[:row], changed, *actions[row + 1 :]]
        job["digest"] = digest(job["document"])
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(document))
        assert planner("verify", path).code == 6


def test_an_exported_order_is_the_one_that_was_given(made: Path, tmp_path: Path) -> None:
    result = planner("export", "torchtitan", made, "--files", tmp_path, "--format", "lines")
    assert result.code == 0, result.err
    assert (tmp_path / "schedule.csv").read_text() == (FILES / "DualPipeV.csv").read_text()
    flags = dict(line.split(" ", 1) for line in result.out.splitlines() if " " in line)
    layout = json.loads(made.read_text())["layout"]
    assert flags["--parallelism.pipeline-parallel-schedule-csv"] == str(tmp_path / "schedule.csv")
    assert flags["--parallelism.pipeline-parallel-schedule"] == "ZBVZeroBubble"
    assert flags["--parallelism.pipeline-parallel-degree"] == "4"
    parts = flags["--parallelism.module-fqns-per-model-part"].split()
    assert len(parts) == 8
    assert parts[0].startswith("tok_embeddings,layers.0,")
    assert parts[-1].endswith("norm,lm_head")
    assert ",".join(parts).count("layers.") == 32
    samples = layout["microbatch_size"] * layout["num_microbatches"]
    assert flags["--training.local-batch-size"] == str(samples)
    assert result.out.splitlines()[-1].startswith("activation-checkpoint:")

    unsaid = planner("export", "torchtitan", made)
    assert (unsaid.code, unsaid.out) == (2, "")
    assert "a file that is not there yet: schedule.csv" in unsaid.err
    assert "hint: --files FOLDER" in unsaid.err
    document = json.loads(planner("export", "torchtitan", made, "--format", "json").out)
    assert document["files"]["schedule.csv"] == (tmp_path / "schedule.csv").read_text()
    again = planner("export", "torchtitan", made, "--files", tmp_path)
    assert again.code == 0
    (tmp_path / "schedule.csv").write_text("0F0\n")
    other = planner("export", "torchtitan", made, "--files", tmp_path)
    assert other.code == 2
    assert "something else in it" in other.err


def test_named_schedules_and_no_pipeline_are_exported(tmp_path: Path) -> None:
    for flags, wanted in (
        (
            ("--fix", "pp=2", "--schedule", "1f1b", "--forbid", "cp"),
            "pipeline-parallel-schedule 1F1B",
        ),
        (("--forbid", "pp,cp"), "pipeline-parallel-degree 1 "),
    ):
        out = tmp_path / "plan.json"
        assert planner("plan", *REQUEST, *flags, "-o", out).code == 0
        result = planner("export", "torchtitan", out, "--files", tmp_path)
        assert result.code == 0
        assert f"--parallelism.{wanted}" in result.out
        assert "schedule-csv" not in result.out
        assert not (tmp_path / "schedule.csv").exists()
    assert planner("export", "megatron-core", out).code == 2


def test_evaluate_takes_the_order_with_other_layouts_beside_it() -> None:
    order = ("--schedule-csv", FILES / "Interleaved1F1B.csv")
    lines = '{"recompute": "full"}\n{"pp": 2, "schedule": "1f1b"}\n{"pp": 2}\n'
    result = planner("evaluate", *REQUEST, *order, "--layouts", "-", stdin=lines)
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [each["status"] for each in found[:2]] == ["ok", "ok"]
    assert "pp = 2, but the given order has 4" in found[2]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0B0\n1F0,1Z0\n", "row 2, column 2: '1Z0' is no action"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "0B0 waits for 1B0 forever"),
    ],
)
def test_faults_are_user_errors(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(text)
    for command in ("plan", "evaluate"):
        result = planner(command, *REQUEST, "--schedule-csv", path)
        assert result.code == 2
        assert said in " ".join(result.err.split())
        assert "hint:" in result.err
        assert "Traceback" not in result.err


def test_a_batch_without_so_many_microbatches_has_no_plan() -> None:
    order = ("--schedule-csv", FILES / "ZBVZeroBubble.csv")
    result = planner("plan", *REQUEST[:-1], "36", *order)
    assert result.code == 3
    assert "the given order has 8 microbatches" in " ".join((result.err + result.out).split())
