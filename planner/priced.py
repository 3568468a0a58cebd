"""A layout with everything that its prediction is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_models.configs import PricedConfigs
from cost_models.graph import LayerKind
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
        """Whether every device has room, and every host."""
        return fits(self.leaf, self.ranks)

    def modules(self, stage: int) -> Iterator[LayerKind]:
        """What a virtual stage holds, in the order of its modules."""
        workload, bounds = self.tables.workload, self.completion.bounds
        everywhere = self.leaf.shared is not None
        if stage == 0 or everywhere:
            yield workload.embedding
        for name in workload.layers[bounds[stage] : bounds[stage + 1]]:
            yield workload.kinds[name]
        if stage == self.leaf.stages - 1 or everywhere:
            yield workload.head
