"""Rows of a priced table by name, for leaves made by hand."""

from __future__ import annotations

from cost_models.recompute import mode_rows
from cost_models.step import Field

POLICIES = ("selective", "full")


def row(
    *, selective: tuple[int, int, int] = (0, 0, 0), full: tuple[int, int, int] = (0, 0, 0),
    **values: int,
) -> tuple[int, ...]:  # fmt: skip
    """Prices by field name, then (kept, working, extra) of two policies; the rest is zero."""
    result = [values.get(field.name, 0) for field in Field] + [0] * 3 * len(POLICIES)
    for name, sizes in zip(POLICIES, (selective, full), strict=True):
        for place, size in zip(mode_rows(POLICIES)[name], sizes, strict=True):
            result[place] = size
    return tuple(result)
