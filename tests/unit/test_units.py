"""Quantities: GB is 1e9 bytes, GiB is 2**30, and bits become bytes."""

from __future__ import annotations

import pytest

from hardware_profiles import units


@pytest.mark.parametrize(
    ("value", "unit", "si"),
    [
        (80, "GB", 80e9),
        (80, "GiB", 80 * 2**30),
        (400, "Gb/s", 50e9),
        (450, "GB/s", 450e9),
        (1, "GiB/s", 2**30),
        (312, "TFLOP/s", 312e12),
        (2, "PFLOP/s", 2e15),
        (5, "us", 5e-6),
        (5, "µs", 5e-6),
        (700, "W", 700.0),
        (1.2, "kW", 1200.0),
        (3, "h", 10800.0),
        (50, "%", 0.5),
        (7, "", 7.0),
    ],
)
def test_to_si(value: float, unit: str, si: float) -> None:
    assert units.to_si(value, unit) == pytest.approx(si, rel=1e-12)


@pytest.mark.parametrize("unit", ["parsec", "gb", "GBps", "XB", "GB/h", "iB"])
def test_unknown_units_are_refused(unit: str) -> None:
    with pytest.raises(units.UnitError, match="unknown unit"):
        units.factor(unit)


@pytest.mark.parametrize(
    ("text", "base", "si"),
    [
        ("80 GiB", "B", 80 * 2**30),
        ("50GB/s", "B/s", 50e9),
        ("5us", "s", 5e-6),
        ("3", "GiB", 3 * 2**30),
        ("1_000", "s", 1000.0),
        (".5 ms", "s", 5e-4),
        ("1e3 GB", "B", 1e12),
    ],
)
def test_parse_quantity(text: str, base: str, si: float) -> None:
    assert units.parse_quantity(text, base=base) == pytest.approx(si, rel=1e-12)


@pytest.mark.parametrize("text", ["", "GB", "-3 GB", "3 GB GB", "nan", "1.2.3 s"])
def test_bad_quantities(text: str) -> None:
    with pytest.raises(units.UnitError):
        units.parse_quantity(text, base="B")


@pytest.mark.parametrize(
    ("text", "count"),
    [("1024", 1024), ("4M", 4_000_000), ("4Mi", 4 * 2**20), ("1.5k", 1500), ("2B", 2 * 10**9)],
)
def test_parse_count(text: str, count: int) -> None:
    assert units.parse_count(text) == count


@pytest.mark.parametrize("text", ["", "1.5", "-4", "4GB", "many", "0.0001k"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(units.UnitError):
        units.parse_count(text)


def test_formatting() -> None:
    assert units.format_bytes(80 * 2**30) == "80.0 GiB"
    assert units.format_bytes(512) == "512 B"
    assert units.format_bytes(3 * 2**40) == "3.0 TiB"
    assert units.format_seconds(18.23) == "18.2 s"
    assert units.format_seconds(0.431) == "431 ms"
    assert units.format_seconds(12.1e-6) == "12.1 us"
    assert units.format_seconds(5e-9) == "5 ns"
    assert units.format_seconds(4321.0) == "4,321 s"
    assert units.format_count(8.03e9) == "8.03 B"
    assert units.format_count(12) == "12"
