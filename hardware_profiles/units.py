"""Parse and print quantities. GiB is not GB: binary prefixes are powers of 1024."""

from __future__ import annotations

import re

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_PLAIN = {"": 1.0, "W": 1.0, "kW": 1e3, "USD/h": 1.0, "1": 1.0, "%": 0.01, "count": 1.0}
_RATE = re.compile(r"^([KMGTPE]i?|k)?(FLOP|B|b)(/s)?$")
_QUANTITY = re.compile(r"^\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*(\S*)\s*$")


class UnitError(ValueError):
    """A unit or quantity that cannot be read."""


def factor(unit: str) -> float:
    """The factor from ``unit`` to its SI base (bytes, seconds, FLOP/s, bytes/s, watts).

    Bits (``Gb/s``) become bytes. Raises :class:`UnitError` for an unknown unit.
    """
    if unit in _PLAIN:
        return _PLAIN[unit]
    if unit in _TIME:
        return _TIME[unit]
    match = _RATE.match(unit)
    if match is None:
        raise UnitError(f"unknown unit {unit!r}; known forms: GB, GiB, GB/s, Gb/s, TFLOP/s, us, W")
    prefix, base, _ = match.groups()
    scale = _BINARY[prefix] if prefix and prefix.endswith("i") else _SI[prefix or ""]
    return scale / 8 if base == "b" else scale


def dimension(unit: str) -> str:
    """What ``unit`` measures, as its SI base: ``B``, ``B/s``, ``FLOP``, ``FLOP/s``, ``s``, ``W``,
    ``USD/h``, or nothing for a plain number. Raises :class:`UnitError` for an unknown unit."""
    if unit in _TIME:
        return "s"
    if unit in _PLAIN:
        return {"W": "W", "kW": "W", "USD/h": "USD/h"}.get(unit, "")
    match = _RATE.match(unit)
    if match is None:
        return str(factor(unit))
    return ("FLOP" if match[2] == "FLOP" else "B") + (match[3] or "")


def to_si(value: float, unit: str) -> float:
    """``value`` in ``unit`` as SI base units."""
    return value * factor(unit)


def parse_quantity(text: str, *, base: str) -> float:
    """Read ``"80 GiB"``, ``"50GB/s"``, ``"5us"`` as SI; a bare number counts in ``base``."""
    match = _QUANTITY.match(text)
    if match is None:
        raise UnitError(f"cannot read {text!r} as a number with a unit such as {base!r}")
    number, unit = match.groups()
    return to_si(float(number.replace("_", "")), unit or base)


def parse_count(text: str) -> int:
    """Read a count with an optional SI prefix: ``"4M"`` is 4,000,000 and ``"1024"`` is 1,024."""
    match = _QUANTITY.match(text)
    if match is None or match.group(2) not in {*_SI, *_BINARY, "B", "b", "m"}:
        raise UnitError(f"cannot read {text!r} as a count such as 4096, 4M or 4Mi")
    number, unit = match.groups()
    prefix = {"B": "G", "b": "G", "m": "M"}.get(unit, unit)
    value = float(number.replace("_", "")) * (_SI.get(prefix) or _BINARY[prefix])
    if value != int(value):
        raise UnitError(f"{text!r} is not a whole number")
    return int(value)


def format_bytes(value: float) -> str:
    """Bytes with a binary prefix: ``"71.3 GiB"``."""
    for suffix, scale in (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if abs(value) >= scale:
            return f"{value / scale:,.1f} {suffix}"
    return f"{value:,.0f} B"


def format_seconds(value: float) -> str:
    """Seconds with a prefix that keeps three digits: ``"18.2 s"``, ``"431 ms"``, ``"12.1 us"``."""
    for suffix, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            scaled = value / scale
            return f"{scaled:,.3g} {suffix}" if abs(scaled) < 1000 else f"{scaled:,.0f} {suffix}"
    return f"{value / 1e-9:.3g} ns"


def format_count(value: float) -> str:
    """A count with an SI prefix: ``"8.03 B"`` (parameters), ``"4.19 M"`` (tokens)."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:g}"
