"""Rounds of microbatches: how many go through a virtual stage before the next one has its turn.

More than ``pp`` of them leave time for transfers (what returns to the first rank is awaited later),
and hold more activations: the range from depth-first to breadth-first of Lamy-Poirier (arXiv
2211.05953), which Grattafiori et al. (arXiv 2407.21783, section 3.3.2) tune.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from cost_models.graph import Bools, Int64

RoundRule = Literal["pp", "equal", "at_least_pp", "any"]
"""What a stack can run; ``StackSpec.rounds``."""


def usual_round(pp: int, microbatches: int) -> int:
    """Microbatches of a round: ``pp``, or more where that makes rounds of equal size."""
    return microbatches // max(1, microbatches // pp)


def runs_in_rounds(pp: int, microbatches: int, size: int) -> bool:
    """Whether rounds of ``size`` have an order of work on every rank: one of fewer than ``pp`` may
    wait for forwards that come later in its own order."""
    if microbatches <= pp:
        return size == microbatches
    return pp <= size <= microbatches and not 0 < microbatches % size < pp


def round_sizes(rule: RoundRule, pp: int, microbatches: int) -> tuple[int, ...]:
    """Sizes of rounds that a stack can run, the smallest first; none where it cannot run so many
    microbatches."""
    if rule == "pp":
        return (pp,) if microbatches % pp == 0 else ()
    if rule == "equal":
        usual = usual_round(pp, microbatches)
        return (usual,) if runs_in_rounds(pp, microbatches, usual) else ()
    if rule == "at_least_pp" and microbatches < pp:
        return ()
    sizes = range(min(pp, microbatches), microbatches + 1)
    return tuple([size for size in sizes if runs_in_rounds(pp, microbatches, size)])


def runnable(rule: RoundRule, pp: Int64, microbatches: Int64) -> Bools:
    """Whether :func:`round_sizes` has any, for arrays of one length."""
    rest: Int64 = np.zeros_like(pp)
    if rule == "pp":
        rest = microbatches % pp
    elif rule == "equal":
        rest = microbatches % np.maximum(microbatches // pp, 1)
    elif rule == "at_least_pp":
        rest = np.maximum(pp - microbatches, 0)
    result: Bools = rest == 0
    return result
