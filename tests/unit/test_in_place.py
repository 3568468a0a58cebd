"""Fitted constants go into profiles without touching anything else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def in_place() -> ModuleType:
    spec = importlib.util.spec_from_file_location("in_place", FOLDER / "in_place.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["in_place"] = module
    spec.loader.exec_module(module)
    return module


TEXT = """name: thing
# A comment that stays.
rate: {value: 5, unit: us, kind: assumed, source: "a guess"}
kernels:
  matmul:
    bf16: {sustained: 0.9, k0: 3}
    fp8: {sustained: 1.0}
"""


def test_a_number_with_provenance_keeps_its_unit(in_place: ModuleType) -> None:
    new = in_place.set_places(TEXT, ["rate"], 7.5e-6, "a fit")
    assert new == TEXT.replace(
        '{value: 5, unit: us, kind: assumed, source: "a guess"}',
        '{value: 7.5, unit: us, kind: fitted, source: "a fit"}',
    )


def test_a_star_reaches_every_key(in_place: ModuleType) -> None:
    new = in_place.set_places(TEXT, ["kernels", "matmul", "*", "sustained"], 0.81234, "a fit")
    assert new == TEXT.replace("0.9", "0.8123").replace("1.0", "0.8123")


def test_a_place_that_is_not_stated_is_left_alone(in_place: ModuleType) -> None:
    assert in_place.set_places(TEXT, ["kernels", "attention"], 1.0, "a fit") == TEXT
    assert in_place.set_places(TEXT, ["kernels", "matmul", "fp8", "k0"], 1.0, "a fit") == TEXT
