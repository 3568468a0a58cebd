"""Seconds of one layer by category and phase, and what recomputation repeats of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.graph import Int64
from cost_models.layout import RecomputePolicy
from cost_models.repeat import Real, Repeats

NS = 1_000_000_000


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer by category and phase; ``nanoseconds`` sums them exactly."""

    terms: dict[str, dict[str, Real]]
    wire: dict[str, dict[str, Real]]
    """Seconds for which collectives keep links busy, ``inside`` nodes and ``across``, by phase."""
    repeats: Repeats
    weights: Real
    """Of the backward's matrix products, those that give the gradients of weights."""
    merged: dict[str, Real] | None = None
    """``ep_comm`` by phase where a pipeline merges the passes of two microbatches."""
    places: Int64 | None = None
    """Column of ``repeats`` of each configuration; None: its own. Many configurations repeat alike,
    and policies are many too."""

    def in_pipeline(self, pp: Int64) -> LayerTimes:
        """The same layer in pipelines of ``pp`` stages: merging takes more than one."""
        if self.merged is None:
            return self
        plain, merged = self.terms["ep_comm"], self.merged
        repeats = self.repeats if self.places is None else self.repeats.take(self.places)
        exchange = {p: np.where(pp > 1, merged[p], plain[p]) for p in plain}
        hidden = plain["forward"] - exchange["forward"]
        return LayerTimes(
            {**self.terms, "ep_comm": exchange}, self.wire,
            replace(repeats, exchange_hidden=hidden), self.weights,
        )  # fmt: skip

    def nanoseconds(self, phase: str) -> Int64:
        """Integer time of a phase: the sum of its rounded terms."""
        parts = [to_ns(term[phase]) for term in self.terms.values()]
        total: Int64 = np.sum(parts, axis=0, dtype=np.int64)
        return total

    def recompute_ns(self, policies: tuple[RecomputePolicy, ...]) -> Int64:
        """Extra backward time: the forward of what each policy runs again; (policies, configs)."""
        again = to_ns(self.repeats.seconds(policies))
        return again if self.places is None else again[:, self.places]

    def take(self, index: Int64) -> LayerTimes:
        """The times of the configurations at ``index``."""
        terms, wire = (
            {name: {p: v[index] for p, v in by_phase.items()} for name, by_phase in table.items()}
            for table in (self.terms, self.wire)
        )
        merged = None if self.merged is None else {p: v[index] for p, v in self.merged.items()}
        places = index if self.places is None else self.places[index]
        return LayerTimes(terms, wire, self.repeats, self.weights[index], merged, places)


def to_ns(seconds: Real) -> Int64:
    """Seconds as integer nanoseconds."""
    return np.rint(seconds * NS).astype(np.int64)
