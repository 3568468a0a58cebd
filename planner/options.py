"""Which recomputation options of a leaf can matter."""

from __future__ import annotations

import numpy as np

from cost_models.leaf import Leaf, Recompute
from cost_models.recompute import group_of

FEW = 16
"""Options below which looking at all of them takes no longer than ruling some out."""


def undominated(leaf: Leaf, options: tuple[Recompute, ...]) -> tuple[Recompute, ...]:
    """``options`` less those of whole stages than which another costs no more of anything.

    In every kind of layer the other keeps no more, works with no more and repeats no more. A step's
    time and a rank's peak grow with each of these, so a completion with the first is never better
    than the same one with the other. Of equals the first stays; numbers of whole layers all do.
    What runs several layers again together keeps more where a stage is no multiple of them: it
    rules nothing out.
    """
    whole = [option for option in options if option[0] != "full"]
    if len(whole) < FEW:
        return options
    fields = [leaf.modes[mode] for mode, _ in whole]
    costs = np.array([[kind[row] for kind in leaf.kinds for row in rows] for rows in fields])
    alone = np.array([group_of(mode) == 1 for mode, _ in whole])
    dropped: set[Recompute] = set()
    for index, option in enumerate(whole):
        no_more = np.all(costs <= costs[index], axis=1)
        equal = np.all(costs == costs[index], axis=1)
        equal[:index] = False
        if np.any(no_more & ~equal & alone):
            dropped.add(option)
    return tuple(option for option in options if option not in dropped)
