"""The commands end to end, as processes: a plan, its recheck, its price, its flags."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.plan import Plan
from tests.cli.process import ROOT, clean_environment, planner

REQUEST = ("llama-3.1-8b", "dgx-h100:1")
BATCH = ("--global-batch", "64", "--seq-len", "4096")


@pytest.fixture(scope="module")
def plan_text() -> str:
    result = planner("plan", *REQUEST, *BATCH)
    assert result.code == 0, result.err
    return result.out


@pytest.fixture
def plan(plan_text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(plan_text)
    return document


def on_a_terminal(*args: str, columns: int = 80, env: dict[str, str] | None = None) -> str:
    """What a command shows on a pseudo-terminal."""
    leader, follower = pty.openpty()
    colours = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    environment = {**clean_environment(), **colours, **(env or {})}
    with subprocess.Popen(
        [sys.executable, "-m", "planner", *args],
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        env=environment,
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:
                break
            if not block:
                break
            shown += block
        assert process.wait(timeout=120) == 0, shown.decode()
    os.close(leader)
    return shown.decode().replace("\r\n", "\n")


def test_plan_prints_json_into_a_pipe(plan: dict[str, Any]) -> None:
    parsed = Plan.model_validate(plan)
    layout = parsed.layout
    devices = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp * layout.pp
    assert devices == 8
    assert parsed.prediction.fits
    assert parsed.certificate.status in ("optimal", "feasible")


def test_the_same_request_gives_the_same_bytes(plan_text: str) -> None:
    assert planner("plan", *REQUEST, *BATCH).out == plan_text


def test_plan_prints_a_table_on_a_terminal() -> None:
    shown = on_a_terminal("plan", *REQUEST, *BATCH)
    assert "llama-3.1-8b on dgx-h100:1" in shown
    assert "Certificate" in shown
    assert "\x1b[" in shown


def test_no_color_is_respected_on_a_terminal() -> None:
    coloured = on_a_terminal("catalog", "stack")
    plain = on_a_terminal("catalog", "stack", env={"NO_COLOR": "1"})
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert "\x1b[" in coloured
    assert not colour.search(plain)


def test_output_goes_to_a_file_whole(tmp_path: Path, plan_text: str) -> None:
    target = tmp_path / "plan.json"
    result = planner("plan", *REQUEST, *BATCH, "--output", target)
    assert (result.code, result.out) == (0, "")
    assert target.read_text() == plan_text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_stdin_is_the_plan_from_the_file(tmp_path: Path) -> None:
    config = (
        '{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, '
        '"num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32000, '
        '"max_position_embeddings": 4096}'
    )
    path = tmp_path / "config.json"
    path.write_text(config)
    flags = ("--global-batch", "32", "--seq-len", "2048")
    layouts = [
        json.loads(planner("plan", reference, "dgx-h100:1", *flags, stdin=stdin).out)["layout"]
        for reference, stdin in ((path, None), ("-", config))
    ]
    assert layouts[0] == layouts[1]


def test_one_device() -> None:
    result = planner("plan", "gpt2-xl", "rtx-4090:1", "--global-batch", "64")
    document = json.loads(result.out)
    assert result.code in (0, 3)
    if result.code == 0:
        assert document["layout"]["tp"] * document["layout"]["pp"] == 1


def test_constraints_are_obeyed() -> None:
    result = planner(
        "plan", *REQUEST, *BATCH, "--fix", "tp=4", "--max", "pp=1", "--forbid", "cp,vpp"
    )
    layout = json.loads(result.out)["layout"]
    assert (layout["tp"], layout["pp"], layout["cp"], layout["vpp"]) == (4, 1, 1, 1)


def test_a_limit_without_a_proof_is_4() -> None:
    result = planner(
        "plan", *REQUEST, *BATCH, "--tolerance", "0", "--time-limit", "0.0001", "--require-optimal"
    )
    assert result.code == 4
    assert result.err.startswith("error: ")
    assert "--time-limit" in result.err


def test_verify_accepts_a_plan(plan_text: str) -> None:
    result = planner("verify", "-", "--format", "json", stdin=plan_text)
    assert result.code == 0, result.err
    assert json.loads(result.out) == {"holds": True, "findings": []}


@pytest.mark.parametrize(
    "path",
    [("prediction", "step_time_s"), ("certificate", "lower_bound_s"), ("layout", "tp"),
     ("prediction", "max_peak_bytes"), ("certificate", "space_size")],
    ids=".".join,
)  # fmt: skip
def test_verify_refutes_a_changed_plan(plan: dict[str, Any], path: tuple[str, str]) -> None:
    section, name = path
    plan[section][name] = plan[section][name] * 2
    result = planner("verify", "-", "--format", "json", stdin=json.dumps(plan))
    assert result.code == 6
    assert result.err.startswith("refuted: ")


def test_export_feeds_a_launch_script(plan_text: str, plan: dict[str, Any]) -> None:
    result = planner("export", "megatron-core", stdin=plan_text)
    assert result.code == 0, result.err
    words = result.out.split()
    assert words[words.index("--tensor-model-parallel-size") + 1] == str(plan["layout"]["tp"])
    assert words[words.index("--global-batch-size") + 1] == "64"


def test_evaluate_prices_the_plan_as_the_plan_does(plan: dict[str, Any]) -> None:
    result = planner(
        "evaluate", *REQUEST, *BATCH, "--layouts", "-", stdin=json.dumps(plan["layout"])
    )
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["status"] == "ok"
    assert record["prediction"]["step_time_s"] == plan["prediction"]["step_time_s"]
    assert record["prediction"]["max_peak_bytes"] == plan["prediction"]["max_peak_bytes"]


def test_evaluate_answers_line_by_line_in_order() -> None:
    lines = [
        '{"tp": 8, "id": "a"}',
        "",
        '{"tp": 3}',
        '{"tpp": 8, "id": 7}',
        "   ",
        '{"tp": 1, "dp_shard": 8, "zero_stage": 0, "microbatch_size": 8}',
    ]
    result = planner("evaluate", *REQUEST, *BATCH, "--layouts", "-", stdin="\n".join(lines))
    assert result.code == 0, result.err
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record.get("id") for record in records] == ["a", None, 7, None]
    assert [record["status"] for record in records] == ["ok", "error", "error", "infeasible"]
    assert records[2]["error"]["code"] == "bad_input"
    assert "tpp" in records[2]["error"]["message"]
    assert "tp" in records[2]["error"]["hint"]
    assert records[3]["prediction"]["fits"] is False
    assert records[3]["prediction"]["step_time_s"] > 0


def test_evaluate_tells_the_collectives_when_asked() -> None:
    flags = ("--tp", "2", "--zero-stage", "1")
    body = json.loads(planner("evaluate", *REQUEST, *BATCH, *flags, "--comm").out)
    (stage,) = body["communication"]["stages"]
    kinds = {(call["group"], call["kind"]) for call in stage["calls"]}
    assert {("tp", "all_gather"), ("tp", "reduce_scatter"), ("world", "all_reduce")} <= kinds
    line = planner("evaluate", *REQUEST, *BATCH, "--layouts", "-", "--comm", stdin='{"tp": 2}')
    assert json.loads(line.out)["communication"]["layers"]["embedding"]
    table = planner("evaluate", *REQUEST, *BATCH, *flags, "--comm", "--format", "table")
    assert "Communication of a step" in table.out


def test_evaluate_of_lines_that_are_not_json_is_2() -> None:
    stdin = '{"tp": 8}\nnot json\n[1]\n{"tp": 4}\n'
    result = planner("evaluate", *REQUEST, *BATCH, "--layouts", "-", stdin=stdin)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["status"] for record in records] == ["ok", "error", "error", "ok"]
    assert result.code == 2
    assert "2 of 4 lines read are not JSON objects" in result.err


def test_evaluate_gives_up_on_a_stream_of_garbage() -> None:
    stdin = b"\xff\xfe garbage\n" * 1000
    result = planner("evaluate", *REQUEST, *BATCH, "--layouts", "-", stdin=stdin)
    assert result.code == 2
    assert len(result.out.splitlines()) == 20
    assert "20 of 20 lines read are not JSON objects" in result.err


def test_evaluate_of_flags_prints_a_table() -> None:
    flags = ("--tp", "4", "--sequence-parallel", "--microbatch-size", "2", "--format", "table")
    result = planner("evaluate", *REQUEST, *BATCH, *flags)
    assert result.code == 0, result.err
    assert "tp 4 + sp" in result.out


def test_infeasible_is_3_with_a_diagnosis_on_both_streams() -> None:
    result = planner("plan", "llama-3.1-405b", "rtx-4090:1", "--format", "json")
    assert result.code == 3
    document = json.loads(result.out)
    assert document["certificate"]["status"] == "infeasible"
    assert document["needed_bytes"] > document["capacity_bytes"]
    assert sum(term["bytes"] for term in document["memory"]) == document["needed_bytes"]
    assert result.err.startswith("error: ")
    assert "GiB" in result.err


def test_catalog_shows_a_model_with_its_parameters() -> None:
    document = json.loads(planner("catalog", "model", "deepseek-v3").out)
    assert document["parameters"].keys() == {"total", "embedding", "active", "mtp", "vision"}
    assert document["parameters"]["total"] > document["parameters"]["active"] > 0


@pytest.mark.parametrize("kind", ["model", "cluster", "node", "device", "link", "stack"])
def test_catalog_lists_every_kind(kind: str) -> None:
    entries = json.loads(planner("catalog", kind).out)
    assert entries
    first = entries[0]["name"]
    assert json.loads(planner("catalog", kind, first).out)["name"]


def test_catalog_search() -> None:
    found = json.loads(planner("catalog", "--search", "h100").out)
    assert found["device"]
    assert all("h100" in str(entry).lower() for entries in found.values() for entry in entries)
    assert planner("catalog", "--search", "no such thing").code == 2


def test_catalog_filters_models_by_family_layers_and_size() -> None:
    def names(*flags: str) -> list[str]:
        return [entry["name"] for entry in json.loads(planner("catalog", *flags).out)]

    hybrids = names("--layers", "mamba2")
    assert "nemotron-3-nano-30b-a3b" in hybrids
    assert "llama-3.1-8b" not in hybrids
    assert names("model", "--family", "glm") == ["glm-4.5", "glm-4.5-air", "glm-5"]
    huge = names("--min-params", "1000B")
    assert "gpt-1t" in huge
    assert "kimi-k2" in huge
    assert names("--min-params", "1000B", "--max-params", "1010B") == ["gpt-1t"]
    entry = json.loads(planner("catalog", "--family", "glm", "--search", "air").out)[0]
    assert entry["parameters"]["total"] == 106_852_245_504
    assert entry["source"].startswith("config.json of")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device", "--family", "x"], "only models have a family"),
        (["--layers", "vision", "--max-params", "1B"], "has 'vision' layers and has at most 1B"),
        (["--min-params", "many"], "cannot read 'many'"),
    ],
)
def test_catalog_filters_that_leave_nothing(arguments: list[str], message: str) -> None:
    result = planner("catalog", *arguments)
    assert result.code == 2
    assert message in result.err


def test_a_schedule_without_its_pipeline_is_refused() -> None:
    flags = ("--stack", "torchtitan", "--seq-len", "2048", "--global-batch", "64")
    asked = ("--schedule", "zbv", "--format", "json")
    without = planner("plan", "llama-3.1-8b", "dgx-h100:1", *flags, *asked, "--forbid", "pp")
    assert (without.code, without.out) == (2, "")
    assert "zbv" in without.err
    assert "hint:" in without.err
    with_ = planner("plan", "llama-3.1-8b", "dgx-h100:1", *flags, *asked, "--fix", "pp=2")
    assert json.loads(with_.out)["layout"]["schedule"] == "zbv"
    assert "was asked for" not in " ".join(json.loads(with_.out)["warnings"])


def test_a_best_layout_without_the_pipeline_of_an_asked_schedule_says_so() -> None:
    flags = ("--seq-len", "2048", "--global-batch", "64", "--schedule", "interleaved")
    found = json.loads(planner("plan", "llama-3.2-1b", "dgx-h100:1", *flags).out)
    assert found["layout"]["pp"] == 1
    assert "schedule interleaved was asked for" in " ".join(found["warnings"])


def test_drives_that_no_job_uses_are_said() -> None:
    result = planner("plan", "llama-3.1-8b", "dgx-h100:1", "--stack", "deepspeed-nvme")
    assert "nothing is offloaded" in " ".join(json.loads(result.out)["warnings"])


def test_catalog_shows_what_a_stack_says_in_sentences_apart() -> None:
    out = planner("catalog", "stack", "mindformers", "--format", "table").out
    table, notes = out.split("\nNotes\n")
    table, others = table.split("\nOther jobs and kernels of it, which no stack here describes\n")
    assert " - fine_grain_interleave: " in others
    assert "not_described" not in table
    assert notes.count("\n - ") >= 2
    assert "notes" not in table


def test_state_that_a_plan_offloads_is_said(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("stack: deepspeed-nvme\noptimizer_offload: true\nparameter_offload: true\n")
    out = planner("plan", "llama-3.1-8b", "dgx-h100:1", job, "--format", "table").out
    assert "optimizer offloaded · weights offloaded" in " ".join(out.split())
    assert "nothing is offloaded" not in out
