"""The entry point: version, help, typing errors, start-up, pipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from planner import __version__
from planner.cli.main import COMMANDS
from tests.cli.process import ROOT, clean_environment, planner

HEAVY = ["numpy", "ortools", "planner.plan", "planner.specs", "rich", "yaml"]


def test_version_is_one_line_on_stdout() -> None:
    result = planner("--version")
    assert (result.code, result.out, result.err) == (0, f"planner {__version__}\n", "")


def test_help_names_every_command() -> None:
    result = planner("--help")
    assert result.code == 0
    assert [
        line.split()[0]
        for line in result.out.split("Commands:")[1].splitlines()
        if line.startswith("  ") and line[2] != " "
    ] == list(COMMANDS)


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["plan", "--help"]])
def test_start_up_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from planner.cli.main import run\n"
        f"assert run({args!r}) == 0\n"
        f"found = {HEAVY!r}\n"
        "sys.stderr.write(' '.join(name for name in found if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr == ""


def test_no_arguments_print_the_help_and_exit_2() -> None:
    result = planner()
    assert result.code == 2
    assert "Usage: planner" in result.out + result.err


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["plna"], "no such command 'plna'", "did you mean 'plan'?"),
        (["evaluat", "x", "y"], "no such command 'evaluat'", "did you mean 'evaluate' or"),
        (["plan", "a", "b", "--fixx", "tp=8"], "No such option: --fixx", "did you mean --fix?"),
        (["plan"], "Missing argument 'MODEL'", "planner plan --help lists the flags"),
        (["schema", "laoyut"], "no schema for 'laoyut'", "did you mean 'layout'"),
        (["catalog", "modle"], "no catalogue of 'modle'", "'model'"),
        (["export", "megatron"], "no exporter for 'megatron'", "'megatron-core'"),
    ],
)
def test_typing_errors_exit_2_with_a_hint(args: list[str], message: str, hint: str) -> None:
    result = planner(*args)
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[-1].startswith("hint: ")
    assert hint in lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "0"], "--seq-len 0: must be at least 1"),
        (["--seq-len", "-8"], "--seq-len -8: must be at least 1"),
        (["--seq-len", "4.5"], "--seq-len: '4.5' is not a whole number"),
        (["--global-batch", "many"], "--global-batch: cannot read 'many' as a count"),
        (["--reserve", "2GX"], "--reserve: unknown unit 'GX'"),
        (["--reserve", "-1GiB"], "--reserve -1GiB: must not be negative"),
        (["--fix", "tp"], "--fix tp: expected DEGREE=VALUE"),
        (["--fix", "tpp=8"], "--fix: no degree 'tpp'"),
        (["--fix", "tp=0"], "--fix tp 0: must be at least 1"),
        (["--fix", "tp=2", "--fix", "tp=4"], "--fix sets tp to both 2 and 4"),
        (["--forbid", "cpp"], "--forbid: no degree 'cpp'"),
        (["--time-limit", "0"], "--time-limit 0: must be more than 0 seconds"),
        (["--global-batch", "8", "--global-batch-tokens", "4M"], "both set the batch"),
        (["--no-recompute", "--recompute", "full"], "--no-recompute contradicts --recompute full"),
    ],
)
def test_flag_values_are_checked_before_anything_is_read(flags: list[str], message: str) -> None:
    result = planner("plan", "no-such-model", "no-such-cluster", *flags)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[0]


def test_a_pipe_closed_by_its_reader_is_silent() -> None:
    done = subprocess.run(
        f"{sys.executable} -m planner schema plan | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_help_to_a_closed_pipe_is_silent() -> None:
    done = subprocess.run(
        f"sleep 0.3 | {{ {sys.executable} -m planner --help; echo $? >&2; }} | true",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        check=True,
    )
    assert done.stderr == "0\n"


def test_an_internal_error_says_how_to_see_the_traceback(monkeypatch, capsys) -> None:
    from planner.cli import failures

    monkeypatch.delenv("PLANNER_DEBUG", raising=False)
    assert failures.exit_code_of(ZeroDivisionError("1 / 0\nin two lines")) == 1
    err = capsys.readouterr().err
    assert err.startswith("internal error: ZeroDivisionError: 1 / 0 in two lines\nhint: ")
    assert "PLANNER_DEBUG=1" in err
    monkeypatch.setenv("PLANNER_DEBUG", "1")
    try:
        _ = 1 // int("0")
    except ZeroDivisionError as error:
        failures.exit_code_of(error)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_is_130(capsys) -> None:
    from planner.cli import failures

    assert failures.exit_code_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "planner", "schema", "plan"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment(),
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: cannot be written: No space left on device\n"
