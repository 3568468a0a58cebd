"""``pytest tests/golden --update-golden`` rewrites the expected files; look at the diff."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The update switch."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite instead of compare."""
    return bool(request.config.getoption("--update-golden"))
