"""A layout with everything that its prediction is made of."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.configs import PricedConfigs
from cost_models.leaf import (
    Completion,
    Leaf,
    RankCosts,
)
from cost_models.peaks import fits
from cost_models.step_time import StepTime
from planner.plan import Layout


@dataclass(frozen=True)
class Priced:
    """One layout priced: everything that a prediction is made of."""

    layout: Layout
    leaf: Leaf
    completion: Completion
    tables: PricedConfigs
    ranks: tuple[RankCosts, ...]
    step: StepTime

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return fits(self.leaf, self.ranks)
