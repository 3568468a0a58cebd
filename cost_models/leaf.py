"""A leaf of the search: every degree fixed, the partition and recompute of stages still open.

:class:`Leaf` holds integers per layer kind (``cost_models.step.Field``). A :class:`Completion`
says which layers each virtual stage holds and what it recomputes. From the two follow

* the stages' times and peak bytes (:func:`stage_costs`),
* the step time by exact simulation (:func:`simulate_step`),
* a *surrogate*: a bound proved to be at most the simulated time (:func:`surrogate_ns`).

Step time = ``max over ranks (finish + exposed gradient reduction) + max over ranks (optimizer +
exposed parameter gather) + sync``: clipping by the global gradient norm is a barrier.

Why the surrogate is a lower bound. Write ``f, b`` for a stage's forward and backward, ``w = f + b``,
``d`` for the hop, ``m`` for microbatches, ``k = pp - s``. From the first forward of rank ``s``:

1. its work: ``m * w_s`` (all its chunks);
2. nesting: the first forward feeds the next rank and the last backward waits for it, so
   ``Z_s >= f_s0 + b_s0 + 2 d + Z_{s+1}`` with the times of the rank's first chunk;
3. in 1F1B, forward ``i + k`` of rank ``s`` follows backward ``i``: a chain of ``q = (m-1) // k``
   more round trips through ranks ``s..pp-1``, and ``r = (m-1) mod k`` backwards after it:
   ``(1 + q) (S_s + 2 (k-1) d) + r b_s`` with ``S_s`` the sum of ``w`` from ``s`` on;
4. at ``s = 0`` the remainder ``r`` can make its round trip through the last ``r`` ranks:
   ``(1 + q) (S_0 + 2 (pp-1) d) + S_{pp-r} + 2 (r-1) d``;
5. in GPipe, all forwards then all backwards are two flow shops of equal jobs:
   ``S_s + 2 (k-1) d + (m-1) max w``.

Each is the length of a path in the graph of the schedule, so it cannot exceed the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from cost_models.layout import RecomputeMode, Schedule
from cost_models.schedule import Timeline, live_peaks, simulate
from cost_models.step import Field

Row = tuple[int, ...]
"""One value per :class:`Field`."""

Recompute = tuple[RecomputeMode, int]
"""Mode and, for ``full``, the number of layers at the front of a chunk that are recomputed."""


@dataclass(frozen=True)
class Leaf:
    """Costs of one configuration; times in ns, sizes in bytes."""

    schedule: Schedule
    pp: int
    vpp: int
    microbatches: int
    sequence: tuple[int, ...]
    """Index into ``kinds`` of each layer."""
    kinds: tuple[Row, ...]
    embedding: Row
    head: Row
    hop_ns: int
    bucket_ns: int
    """The last bucket of gradients: nothing is left to hide it."""
    tied_sync_ns: int
    """Reduction of a tied embedding's gradient between first and last stage."""
    sync_ns: int
    """Once per step: gradient norm."""
    fixed_bytes: int
    """Context, communicators, allocator slack, the user's reserve."""
    capacity_bytes: int
    uneven: bool
    """Whether virtual stages may hold different numbers of layers."""

    @property
    def stages(self) -> int:
        """Virtual stages."""
        return self.pp * self.vpp

    @cached_property
    def prefix(self) -> tuple[tuple[int, ...], ...]:
        """``prefix[field][i]``: the field summed over the first ``i`` layers."""
        result = []
        for field in Field:
            total, sums = 0, [0]
            for kind in self.sequence:
                total += self.kinds[kind][field]
                sums.append(total)
            result.append(tuple(sums))
        return tuple(result)

    @cached_property
    def kind_counts(self) -> tuple[tuple[int, ...], ...]:
        """``kind_counts[kind][i]``: layers of that kind among the first ``i``."""
        result = []
        for kind in range(len(self.kinds)):
            total, sums = 0, [0]
            for other in self.sequence:
                total += other == kind
                sums.append(total)
            result.append(tuple(sums))
        return tuple(result)


@dataclass(frozen=True, slots=True)
class Completion:
    """``bounds`` are the ``stages + 1`` layer boundaries of the virtual stages in order;
    ``recompute`` has one entry per virtual stage."""

    bounds: tuple[int, ...]
    recompute: tuple[Recompute, ...]


@dataclass(frozen=True, slots=True)
class ChunkCosts:
    """One virtual stage."""

    forward_ns: int
    backward_ns: int
    gradient_ns: int
    update_ns: int
    static_bytes: int
    activation_bytes: int
    working_bytes: int


def chunk_costs(leaf: Leaf, stage: int, first: int, last: int, recompute: Recompute) -> ChunkCosts:
    """Costs of virtual stage ``stage`` holding layers ``first .. last - 1``."""
    prefix, mode = leaf.prefix, recompute[0]

    def total(field: Field) -> int:
        return prefix[field][last] - prefix[field][first]

    backward = total(Field.BACKWARD)
    split = first
    if mode == "none":
        activation = total(Field.ACT_NONE)
        working = _largest(leaf, Field.WORK_NONE, first, last)
    elif mode == "selective":
        backward += total(Field.SELECTIVE)
        activation = total(Field.ACT_SELECTIVE)
        working = _largest(leaf, Field.WORK_SELECTIVE, first, last)
    else:
        split = min(last, first + recompute[1])
        backward += prefix[Field.FULL][split] - prefix[Field.FULL][first]
        activation = (
            prefix[Field.ACT_FULL][split] - prefix[Field.ACT_FULL][first]
            + prefix[Field.ACT_NONE][last] - prefix[Field.ACT_NONE][split]
        )  # fmt: skip
        working = max(
            _largest(leaf, Field.WORK_FULL, first, split),
            _largest(leaf, Field.WORK_NONE, split, last),
        )
    forward = total(Field.FORWARD)
    gradient = total(Field.GRADIENT)
    update = total(Field.OPTIMIZER) + total(Field.PARAMETER)
    static = total(Field.STATIC)
    gathered = _largest(leaf, Field.GATHERED, first, last)
    for end, present in ((leaf.embedding, stage == 0), (leaf.head, stage == leaf.stages - 1)):
        if present:
            forward += end[Field.FORWARD]
            backward += end[Field.BACKWARD]
            gradient += end[Field.GRADIENT] + (leaf.tied_sync_ns if leaf.pp > 1 else 0)
            update += end[Field.OPTIMIZER] + end[Field.PARAMETER]
            static += end[Field.STATIC]
            activation += end[Field.ACT_NONE]
            working = max(working, end[Field.WORK_NONE])
            gathered = max(gathered, end[Field.GATHERED])
    return ChunkCosts(
        forward, backward, gradient, update, static, activation, working + gathered
    )


def _largest(leaf: Leaf, field: Field, first: int, last: int) -> int:
    largest = 0
    for kind, counts in enumerate(leaf.kind_counts):
        if counts[last] > counts[first]:
            largest = max(largest, leaf.kinds[kind][field])
    return largest


@dataclass(frozen=True, slots=True)
class RankCosts:
    """One pipeline rank: its chunks, and what they add up to."""

    chunks: tuple[ChunkCosts, ...]
    gradient_ns: int
    update_ns: int
    peak_bytes: int

    @property
    def work_ns(self) -> int:
        """Forward and backward of one microbatch through all chunks."""
        return sum(chunk.forward_ns + chunk.backward_ns for chunk in self.chunks)


def rank_costs(leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]) -> RankCosts:
    """Sum the chunks of a rank and find its peak bytes."""
    peaks = live_peaks(leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank)
    activations = max(
        sum(live * chunk.activation_bytes for live, chunk in zip(peak, chunks, strict=True))
        for peak in peaks
    )
    return RankCosts(
        chunks=chunks,
        gradient_ns=leaf.bucket_ns + sum(chunk.gradient_ns for chunk in chunks),
        update_ns=sum(chunk.update_ns for chunk in chunks),
        peak_bytes=leaf.fixed_bytes
        + sum(chunk.static_bytes for chunk in chunks)
        + activations
        + max(chunk.working_bytes for chunk in chunks),
    )


def stage_costs(leaf: Leaf, completion: Completion) -> tuple[RankCosts, ...]:
    """Costs of every rank under ``completion``."""
    bounds = completion.bounds
    chunks = [
        chunk_costs(leaf, j, bounds[j], bounds[j + 1], completion.recompute[j])
        for j in range(leaf.stages)
    ]
    return tuple(
        rank_costs(leaf, rank, tuple(chunks[rank :: leaf.pp])) for rank in range(leaf.pp)
    )


def fits(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> bool:
    """Whether every rank's peak is within capacity."""
    return all(rank.peak_bytes <= leaf.capacity_bytes for rank in ranks)


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
    forward = [ranks[j % leaf.pp].chunks[j // leaf.pp].forward_ns for j in range(leaf.stages)]
    backward = [ranks[j % leaf.pp].chunks[j // leaf.pp].backward_ns for j in range(leaf.stages)]
    timeline = simulate(
        leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, forward, backward, leaf.hop_ns
    )
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


@dataclass(frozen=True, slots=True)
class Label:
    """Bounds over ranks ``s .. pp - 1``; smaller is better in every field.

    ``nested`` is Z of the module docstring, ``ends`` the bound on finish plus gradients, both from
    the first forward of rank ``s``; ``work`` is S, ``widest`` the largest w, ``update`` the largest
    update, ``tail`` S at rank ``pp - r`` once that rank is passed.
    """

    work: int
    widest: int
    nested: int
    ends: int
    update: int
    tail: int

    def dominates(self, other: Label) -> bool:
        """Whether every field is at most the other's."""
        return (
            self.work <= other.work
            and self.widest <= other.widest
            and self.nested <= other.nested
            and self.ends <= other.ends
            and self.update <= other.update
            and self.tail <= other.tail
        )

    def objective_ns(self, leaf: Leaf) -> int:
        """The surrogate once rank 0 is in."""
        return self.ends + self.update + leaf.sync_ns


EMPTY_LABEL = Label(0, 0, 0, 0, 0, 0)


def extend_label(leaf: Leaf, label: Label, rank: int, costs: RankCosts) -> Label:
    """Prepend ``rank`` to a label that covers the ranks after it."""
    m, hop, k = leaf.microbatches, leaf.hop_ns, leaf.pp - rank
    first = costs.chunks[0]
    work = label.work + costs.work_ns
    widest = max(label.widest, costs.work_ns)
    nested = m * costs.work_ns
    ends = 0
    if rank < leaf.pp - 1:
        nested = max(nested, first.forward_ns + first.backward_ns + 2 * hop + label.nested)
        ends = first.forward_ns + hop + label.ends
    loops, rest = divmod(m - 1, k)
    trip = work + 2 * (k - 1) * hop
    tail = label.tail
    if leaf.schedule == "1f1b":
        nested = max(nested, (1 + loops) * trip + rest * first.backward_ns)
        if k == (m - 1) % leaf.pp:
            tail = work + 2 * (k - 1) * hop
        if rank == 0:
            nested = max(nested, (1 + loops) * trip + tail)
    elif leaf.schedule == "gpipe":
        nested = max(nested, trip + (m - 1) * widest)
        tail = 0
    return Label(
        work=work,
        widest=widest if leaf.schedule == "gpipe" else 0,
        nested=nested,
        ends=max(ends, nested + costs.gradient_ns),
        update=max(label.update, costs.update_ns),
        tail=tail if leaf.schedule == "1f1b" else 0,
    )


def surrogate_ns(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> int:
    """A lower bound on :func:`simulate_step`; see the module docstring."""
    label = EMPTY_LABEL
    for rank in reversed(range(leaf.pp)):
        label = extend_label(leaf, label, rank, ranks[rank])
    return label.objective_ns(leaf)


def interleaved_bounds(leaf: Leaf) -> Iterator[tuple[int, ...]]:
    """The partitions of the interleaved schedule: equal chunks, the first and last may be lighter.

    Every virtual stage holds ``h`` layers, the first ``h - x`` and the last ``h - y`` with
    ``0 <= x, y <= h``: what even splitting with the embedding and the loss counted as layers, or a
    smaller first and last stage, can express.
    """
    layers, stages = len(leaf.sequence), leaf.stages
    height = -(-layers // stages)
    while stages * height - layers <= 2 * height:
        spare = stages * height - layers
        for x in range(max(0, spare - height), min(spare, height) + 1):
            y = spare - x
            if not leaf.uneven and spare:
                continue
            bounds = [0, *(height * (j + 1) - x for j in range(stages - 1)), layers]
            if stages == 1 or (bounds[1] >= 0 and bounds[-2] <= layers and y >= 0):
                yield tuple(bounds)
        height += 1
        if stages <= 2 and height > layers + 1:
            return
