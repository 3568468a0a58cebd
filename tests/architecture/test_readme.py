"""Every command that the README shows runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(?:bash|sh|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def readme_commands() -> list[str]:
    """Lines of the README's shell blocks that start with ``planner``, prompts removed."""
    text = README.read_text() if README.exists() else ""
    lines = (
        line.strip().removeprefix("$ ")
        for block in _BLOCK.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if line.startswith("planner ")]


def test_the_readme_shows_a_plan_and_an_export() -> None:
    commands = readme_commands()
    assert any(line.startswith("planner plan ") for line in commands)
    assert any("| planner export megatron-core" in line for line in commands)
    assert {line.split()[1] for line in commands} <= {*COMMANDS, "--version", "--help"}


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_runs(command: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "planner"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m planner "$@"\n')
    script.chmod(0o755)
    own = tmp_path / "own.csv"
    own.write_text("0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n")
    command = command.replace(" own.csv", f" {own}")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
