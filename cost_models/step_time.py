"""The time of a step: the schedule's timeline, exposed reductions, and the update behind them."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models import vocabulary_timeline
from cost_models.layout import DELAYED, place_of
from cost_models.leaf import Leaf, RankCosts
from cost_models.schedule import Durations, Timeline, simulate


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step's time and what it is made of, in ns."""

    total_ns: int
    critical_rank: int
    """The rank on which the pipeline and its gradient reduction end last."""
    pipeline_ns: int
    gradient_ns: int
    update_rank: int
    update_ns: int
    sync_ns: int
    timeline: Timeline


def simulate_step(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> StepTime:
    """The step's exact time under the schedule."""
    places = [place_of(leaf.schedule, leaf.pp, j) for j in range(leaf.stages)]
    chunks = [ranks[rank].chunks[chunk] for rank, chunk in places]
    hop: int | list[tuple[int, int]] = leaf.hop_ns
    if leaf.late or leaf.schedule in DELAYED:
        hop = [(leaf.hop_ns + c.late_on_ns, leaf.hop_ns + c.late_back_ns) for c in chunks]
    halves = [chunk.split for chunk in chunks if chunk.split]
    times = Durations(
        [chunk.forward_ns for chunk in chunks], [chunk.backward_ns for chunk in chunks],
        [half.inputs_ns for half in halves], [half.weights_ns for half in halves],
    )  # fmt: skip
    if leaf.shared is not None:
        hops = [(hop, hop)] * leaf.stages if isinstance(hop, int) else hop
        timeline = vocabulary_timeline.simulate(
            leaf.schedule, leaf.pp, leaf.microbatches, times, leaf.shared.times, hops
        )
    else:
        timeline = simulate(
            leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, times, hop, leaf.round_size,
            leaf.order, (leaf.deferral.microbatches, leaf.deferral.each_ns),
        )  # fmt: skip
    ends = [end + rank.gradient_ns for end, rank in zip(timeline.finish_ns, ranks, strict=True)]
    critical = ends.index(max(ends))
    updates = [rank.update_ns for rank in ranks]
    update = updates.index(max(updates))
    return StepTime(
        total_ns=ends[critical] + updates[update] + leaf.sync_ns,
        critical_rank=critical,
        pipeline_ns=timeline.finish_ns[critical],
        gradient_ns=ranks[critical].gradient_ns,
        update_rank=update,
        update_ns=updates[update],
        sync_ns=leaf.sync_ns,
        timeline=timeline,
    )
