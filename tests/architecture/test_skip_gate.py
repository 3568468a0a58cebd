"""The gate on skipped tests, run on a small suite of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.architecture.skip_gate import allowed_skips

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="not today")
def test_skips():
    pass
"""
CONFTEST = """
from tests.architecture.skip_gate import SkipGate

def pytest_configure(config):
    config.pluginmanager.register(SkipGate({allowed!r}))
"""


def run_suite(folder: Path, allowed: set[str]) -> tuple[int, str]:
    (folder / "test_small.py").write_text(SUITE)
    (folder / "conftest.py").write_text(CONFTEST.format(allowed=allowed))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_an_unlisted_skip_fails_the_run(tmp_path: Path) -> None:
    code, out = run_suite(tmp_path, set())
    assert code == 1
    assert "NOT IN tests/allowed_skips.txt): test_small.py::test_skips" in out


def test_a_listed_skip_is_printed_and_passes(tmp_path: Path) -> None:
    code, out = run_suite(tmp_path, {"test_small.py::test_skips"})
    assert code == 0
    assert "skipped (allowed): test_small.py::test_skips: Skipped: not today" in out


def test_the_list_has_comments_and_reasons() -> None:
    text = "# why\n\ntests/a.py::test_b  needs a GPU\ntests/c.py::test_d\n"
    assert allowed_skips(text) == {"tests/a.py::test_b", "tests/c.py::test_d"}
