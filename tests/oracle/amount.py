"""How many random instances are compared with brute force: few in the quick run, all in the long.

``PLANNER_ORACLE_INSTANCES`` is the number of ``test_oracle``; every other comparison takes the
share of its own full number that this is of 1000.
"""

from __future__ import annotations

import os

INSTANCES = int(os.environ.get("PLANNER_ORACLE_INSTANCES", "250"))


def of(full: int, least: int = 1) -> int:
    """Of ``full`` instances those of this run, and no fewer than ``least``."""
    return min(full, max(least, full * INSTANCES // 1000))
