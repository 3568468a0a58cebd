"""Run the planner as a user does: a process, its exit code and both streams."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


@dataclass(frozen=True)
class Result:
    """What a process left behind."""

    code: int
    out: str
    err: str


def planner(
    *args: str | Path, stdin: str | bytes | None = None, env: dict[str, str] | None = None
) -> Result:
    """Run ``python -m planner ARGS`` in the repository; an absent ``stdin`` is empty."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "planner", *map(str, args)],
        input=data if data is not None else b"",
        capture_output=True,
        cwd=ROOT,
        env={**clean_environment(), **(env or {})},
        timeout=TIMEOUT_S,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def clean_environment() -> dict[str, str]:
    """This process's environment without what changes the planner's output."""
    drop = {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "PLANNER_DEBUG", "PYTHONIOENCODING"}
    return {key: value for key, value in os.environ.items() if key not in drop}
