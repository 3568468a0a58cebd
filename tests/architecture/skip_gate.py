"""A pytest plugin (``-p tests.architecture.skip_gate``): skips must be on the committed list.

Prints every skipped test and fails the run when one is not in ``tests/allowed_skips.txt``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ALLOWED = Path(__file__).parents[1] / "allowed_skips.txt"


def allowed_skips(text: str) -> set[str]:
    """Test ids of a list: the part of each line before two spaces; ``#`` starts a comment."""
    lines = (line.strip() for line in text.splitlines())
    return {line.split("  ")[0] for line in lines if line and not line.startswith("#")}


class SkipGate:
    """Collects skips and judges them at the end of the session."""

    def __init__(self, allowed: set[str]) -> None:
        self.allowed = allowed
        self.skipped: dict[str, str] = {}

    def unlisted(self) -> list[str]:
        """Skipped tests that the list does not name."""
        return sorted(self.skipped.keys() - self.allowed)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that skips itself counts as one skip."""
        if report.skipped:
            self.skipped[report.nodeid] = str(report.longrepr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that is skipped, not one that is expected to fail."""
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped[report.nodeid] = str(reason)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that passed otherwise."""
        if self.unlisted() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was skipped and which of it nobody allowed."""
        for name, reason in sorted(self.skipped.items()):
            verdict = "allowed" if name in self.allowed else "NOT IN tests/allowed_skips.txt"
            terminalreporter.write_line(f"skipped ({verdict}): {name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Register the gate with the committed list."""
    config.pluginmanager.register(SkipGate(allowed_skips(ALLOWED.read_text())), "skip-gate")
