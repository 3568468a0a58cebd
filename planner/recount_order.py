"""The user's own order of work, read from its text a second time for the recheck."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


class OrderShape(NamedTuple):
    """What the text of an order fixes."""

    schedule: str
    pp: int
    vpp: int
    microbatches: int


@lru_cache(maxsize=64)
def order_shape(rows: tuple[str, ...]) -> OrderShape | None:
    """The shape of an order; None without one."""
    if not rows:
        return None
    actions = [re.findall(r"(\d+)([FBIW])(\d+)", row) for row in rows]
    stages = [{int(stage) for stage, _, _ in row} for row in actions]
    # The last stage is back on the first rank of a V only.
    turns = "_v" if len(stages[0]) == 2 and max(map(max, stages)) in stages[0] else ""
    splits = "_split" if any(work == "I" for row in actions for _, work, _ in row) else ""
    microbatches = 1 + max(int(index) for row in actions for _, _, index in row)
    return OrderShape(f"given{turns}{splits}", len(rows), len(stages[0]), microbatches)


def impossible_order(
    rows: tuple[str, ...], schedule: str, pp: int, vpp: int, microbatches: int
) -> str | None:
    """Why a layout does not run the given order, or None."""
    shape = order_shape(rows)
    if shape is None:
        return "no order of work is given"
    if shape != (schedule, pp, vpp, microbatches):
        return (
            f"the given order is {shape.schedule} of pp {shape.pp}, vpp {shape.vpp} and "
            f"{shape.microbatches} microbatches"
        )
    return None
