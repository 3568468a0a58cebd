"""Bad input of every kind: exit code 2, nothing on stdout, the user's numbers and often a hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.process import Result, planner

MODEL = "llama-3.1-8b"
CLUSTER = "dgx-h100:1"
TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip


def refused(result: Result, *said: str, hint: str | None = None) -> None:
    """Exit code 2 and an ``error:`` that holds every part of ``said``."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for part in said:
        assert part in result.err
    if hint is not None:
        [line] = [line for line in result.err.splitlines() if line.startswith("hint: ")]
        assert hint in line


def written(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_missing_model_file(tmp_path: Path) -> None:
    refused(planner("plan", tmp_path / "absent.json", CLUSTER), "absent.json")


def test_unknown_model_name_gets_the_nearest() -> None:
    refused(planner("plan", "llama-3.1-8c", CLUSTER), "llama-3.1-8c", hint="llama-3.1-8b")


def test_model_that_is_not_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, "model.yaml", "a: [1, 2\nb: }")
    refused(planner("plan", path, CLUSTER), "model.yaml", "not valid YAML at line")


def test_model_that_is_a_list(tmp_path: Path) -> None:
    refused(planner("plan", written(tmp_path, "m.json", [1, 2]), CLUSTER), "expected a mapping")


def test_empty_model(tmp_path: Path) -> None:
    refused(planner("plan", written(tmp_path, "m.yaml", ""), CLUSTER), "empty")


def test_config_without_hidden_size(tmp_path: Path) -> None:
    config = {key: value for key, value in TINY.items() if key != "hidden_size"}
    refused(planner("plan", written(tmp_path, "config.json", config), CLUSTER), "hidden_size")


@pytest.mark.parametrize("value", [0, -4, 2.5, "many"])
def test_sizes_must_be_positive_whole_numbers(tmp_path: Path, value: object) -> None:
    path = written(tmp_path, "config.json", {**TINY, "num_hidden_layers": value})
    refused(planner("plan", path, CLUSTER), "num_hidden_layers", str(value))


def test_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, "config.json", {**TINY, "model_type": "lama"})
    refused(planner("plan", path, CLUSTER), "lama", hint="llama")


def test_unknown_key_in_a_job_gets_the_nearest(tmp_path: Path) -> None:
    job = written(tmp_path, "job.yaml", "sequence_lenght: 4096\n")
    refused(
        planner("plan", MODEL, CLUSTER, job),
        "unknown key 'sequence_lenght'",
        hint="sequence_length",
    )


@pytest.mark.parametrize("text", ["global_batch: 0", "global_batch: -8", "tolerance: 2"])
def test_job_values_out_of_range(tmp_path: Path, text: str) -> None:
    job = written(tmp_path, "job.yaml", text)
    refused(planner("plan", MODEL, CLUSTER, job), text.split(":")[0], text.split()[-1])


def test_unknown_cluster_gets_the_nearest() -> None:
    refused(planner("plan", MODEL, "dgx-h10:4"), "dgx-h10", hint="dgx-h100")


@pytest.mark.parametrize("nodes", ["0", "-2", "x", ""])
def test_node_count_must_be_positive(nodes: str) -> None:
    refused(planner("plan", MODEL, f"dgx-h100:{nodes}"), f"dgx-h100:{nodes}")


def test_unknown_key_in_a_cluster(tmp_path: Path) -> None:
    path = written(tmp_path, "cluster.yaml", "node: dgx-h100\nnodse: 4\n")
    refused(planner("plan", MODEL, path), "unknown key 'nodse'", hint="'nodes'")


def test_groups_of_unlike_nodes_are_said_to_come_later(tmp_path: Path) -> None:
    text = "groups:\n  - {node: dgx-h100, count: 1}\n  - {node: dgx-a100-80, count: 1}\n"
    refused(planner("plan", MODEL, written(tmp_path, "cluster.yaml", text)), "unlike")


def test_batch_that_no_degree_divides() -> None:
    result = planner("plan", MODEL, "dgx-h100:1", "--global-batch", "7", "--fix", "dp_shard=8")
    assert result.code in (2, 3)
    assert "7" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("flag", ["--precision=bf61", "--optimizer=adam", "--schedule=zb"])
def test_words_that_are_not_choices(flag: str) -> None:
    refused(planner("plan", MODEL, CLUSTER, flag), flag.split("=")[1])


def test_ten_megabytes_of_garbage_on_stdin() -> None:
    garbage = bytes(range(256)) * (10 * 4096)
    refused(planner("plan", "-", CLUSTER, stdin=garbage), "standard input")


def test_ten_megabytes_of_text_on_stdin() -> None:
    refused(planner("plan", "-", CLUSTER, stdin=b"x" * (10 * 2**20)), "larger than 8 MiB")


def test_two_inputs_cannot_both_be_stdin() -> None:
    refused(planner("plan", "-", "-", stdin=json.dumps(TINY)), "only one of MODEL, CLUSTER and JOB")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("{}", "schema_version"),
        ("[]", "expected a mapping"),
        ("{\x00}", "not a text file"),
        ('{"ways_out": []}', "infeasible"),
    ],
)
@pytest.mark.parametrize("command", [["verify", "-"], ["export", "megatron-core"]], ids=str)
def test_what_is_not_a_plan(command: list[str], text: str, said: str) -> None:
    result = planner(*command, stdin=text)
    if text == "{}":
        assert (result.code, result.out) == (2, "")
        assert "missing" in result.err
    else:
        refused(result, said)


def test_missing_plan_file(tmp_path: Path) -> None:
    refused(planner("verify", tmp_path / "absent.json"), "absent.json: no such file")


def test_output_folder_that_does_not_exist(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "plan.json"
    result = planner("plan", MODEL, CLUSTER, "--output", target)
    refused(result, "cannot be written")


def test_a_layout_in_flags_and_in_a_file() -> None:
    result = planner("evaluate", MODEL, CLUSTER, "--tp", "2", "--layouts", "-", stdin="{}")
    refused(result, "--tp and --layouts both name layouts")


def test_missing_measurements() -> None:
    refused(planner("validate", "absent.csv"), "absent.csv")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_folder_and_a_file_in_another_encoding(tmp_path: Path, place: int) -> None:
    for name, said in ((tmp_path, "folder"), (tmp_path / "latin.yaml", "is not UTF-8")):
        (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
        given: list[str | Path] = [MODEL, CLUSTER]
        given[place : place + 1] = [name]
        refused(planner("plan", *given), said)


def test_a_batch_that_is_a_slip_is_refused_at_once(tmp_path: Path) -> None:
    job = written(tmp_path, "job.yaml", f"global_batch: {10**30}\n")
    refused(planner("plan", MODEL, CLUSTER, job), "global_batch", "1000000000")


def test_a_stack_where_it_does_not_run() -> None:
    result = planner("plan", MODEL, "tpu-v5p-8", "--stack", "megatron-core")
    refused(result, "does not run on tpu-v5p", hint="--stack maxtext-tpu")


def test_the_stack_that_was_taken_is_told(tmp_path: Path) -> None:
    limits = ["--fix", "microbatch_size=1", "--fix", "pp=1", "-o", tmp_path / "plan.json"]
    result = planner("plan", "gpt2", "tpu-v5p-8", *limits)
    assert result.code == 0
    assert "note: planned for maxtext-tpu: megatron-core 0.13 does not run on" in result.err


TITAN = ("--stack", "torchtitan", "--seq-len", "4096", "--global-batch", "64")


def test_schedule_that_the_stack_lacks_names_stacks_that_have_it() -> None:
    result = planner("plan", MODEL, CLUSTER, "--stack", "megatron-core", "--schedule", "zbv")
    refused(result, "megatron-core 0.13 has no schedule zbv (it has 1f1b, interleaved)")
    refused(result, hint="torchtitan")


def test_recomputation_that_the_stack_lacks() -> None:
    result = planner("plan", MODEL, CLUSTER, "--stack", "torchtitan", "--recompute", "fulll")
    refused(result, "recompute is 'fulll'", hint="'full'")


@pytest.mark.parametrize("flags", [("--vpp", "3"), ("--vpp", "1")])
def test_v_with_other_than_two_virtual_stages(flags: tuple[str, str]) -> None:
    result = planner("evaluate", MODEL, CLUSTER, *TITAN, "--pp", "2", "--schedule", "zbv", *flags)
    refused(result, f"vpp = {flags[1]}", hint="--vpp 2")


def test_virtual_stages_without_a_pipeline() -> None:
    result = planner("evaluate", MODEL, CLUSTER, *TITAN, "--schedule", "zbv")
    refused(result, "schedule zbv with pp = 1", hint="--pp 2")


def test_dualpipev_says_how_many_microbatches_it_needs() -> None:
    layout = ("--pp", "4", "--schedule", "dualpipev", "--microbatch-size", "8")
    result = planner("evaluate", MODEL, CLUSTER, *TITAN, *layout)
    refused(result, "microbatches 4 x 8", "at least 2 x pp microbatches")


def test_context_parallelism_that_the_stack_lacks() -> None:
    layout = ("--cp", "4", "--cp-kind", "a2a_p2p", "--cp-inner", "2")
    result = planner("evaluate", MODEL, CLUSTER, *TITAN, *layout)
    refused(result, "torchtitan has no a2a_p2p context parallelism; it has all_gather")


def test_inner_group_of_context_parallelism_is_to_be_named() -> None:
    layout = ("--cp", "8", "--cp-kind", "a2a_p2p")
    refused(planner("evaluate", MODEL, CLUSTER, *layout), "cp = 8", hint="cp_inner 2 or 4")


@pytest.mark.parametrize(
    ("typed", "meant"), [("ZBVZeroBubble", "zbv"), ("1F1B", "1f1b"), ("DualPipeV", "dualpipev")]
)
def test_schedules_by_the_names_of_their_classes_get_ours(typed: str, meant: str) -> None:
    result = planner("plan", MODEL, CLUSTER, "--stack", "torchtitan", "--schedule", typed)
    assert "did you mean" in result.err
    refused(result, typed, hint=repr(meant))
