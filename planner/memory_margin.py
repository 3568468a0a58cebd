"""How much more than predicted a device must have for a layout to fit with 95 % confidence.

The margin is a quantile of measured over predicted peak memory on published runs, made by
``benchmarks/memory/margins.py`` and kept beside this module. A stack with enough runs of its own
lineage has its own; the others share the pooled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95
_DATA = Path(__file__).parent / "memory_margin.yaml"
_PARTS = 1_000_000


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    from hardware_profiles.documents import read_document

    document = read_document(_DATA)
    assert isinstance(document, dict)
    return document


def margin_of(stack: str) -> tuple[float, str]:
    """Relative margin of a stack, and where it is from."""
    table = _table()
    for group in table["groups"]:
        if stack in group["stacks"]:
            return float(group["margin"]), str(group["source"])
    return float(table["pooled"]["margin"]), str(table["pooled"]["source"])


def usable_bytes(capacity_bytes: int, margin: float) -> int:
    """Most predicted bytes that fit a device of ``capacity_bytes`` with ``margin``."""
    return capacity_bytes * _PARTS // (_PARTS + round(margin * _PARTS))
