"""Peak bytes of a leaf's ranks: the moments of a step, and the activations alive in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cost_models.idle_passes import idle_bytes
from cost_models.layout import place_of
from cost_models.leaf import ChunkCosts, Leaf, RankCosts
from cost_models.resharding import held_at_peaks
from cost_models.schedule import live_peaks
from cost_models.step import Field


def peak_bytes(leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]) -> int:
    """Most bytes that a device of ``rank`` holds at once.

    One of three moments: all activations in flight with the loss or the first backward; where a
    step is one microbatch, the last backward with all gradients; the optimizer step. With more
    microbatches the gradients of the first are there when the last are in flight.
    """
    static = leaf.fixed_bytes + leaf.step_buffer_bytes(rank)
    static += sum([chunk.static_bytes for chunk in chunks])
    if leaf.outside is not None:
        static += leaf.outside.in_mode.static_bytes
    return static + max([moment.total for moment in moments(leaf, rank, chunks)])


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of a rank beside its static ones at one moment of the step."""

    name: str
    gradients: int
    """Of those that the step's backward makes anew."""
    activations: int
    working: int
    step: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.activations + self.working + self.step


def moments(leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]) -> tuple[Moment, ...]:
    """The moments of which one is the peak; see :func:`peak_bytes`."""
    made = sum([chunk.gradient_bytes for chunk in chunks])
    step = sum([chunk.step_bytes for chunk in chunks])
    live, _ = live_activations(leaf, rank, chunks)
    working, freed = max([(chunk.working_bytes, chunk.freed_bytes) for chunk in chunks])
    # Gradients come as activations go only where one backward makes both ends meet.
    there = made if leaf.microbatches > 1 or leaf.splits_backward else 0
    most = Moment("first backward" if freed else "loss", there, live - freed, working + freed, 0)
    if rank != place_of(leaf.schedule, leaf.pp, leaf.stages - 1)[0]:
        most = replace(most, name="first backward")
    update = Moment("optimizer step", made, 0, 0, step)
    if leaf.outside is not None:
        return tuple(_with_outside(leaf, rank, most, update, live))
    if leaf.microbatches > 1 or leaf.splits_backward:
        return most, update
    draining = max([chunk.draining_bytes for chunk in chunks])
    return (
        most,
        Moment("last backward", made, 0, draining, 0),
        update,
    )


def _with_outside(
    leaf: Leaf, rank: int, most: Moment, update: Moment, live: int
) -> Iterator[Moment]:
    """The moments of a pipeline of several microbatches with layers outside. What those ahead of it
    keep stays until their backward, the last one. Of those behind, loss and backward run beside all
    that the pipeline keeps; then their gradients are there. Scanned layers make their gradients in
    one array for all."""
    assert leaf.outside is not None
    costs = leaf.outside.in_mode
    kept, made, working = costs.activation_bytes, costs.gradient_bytes, costs.working_bytes
    if leaf.outside.ahead:
        yield replace(most, activations=most.activations + kept)
        yield Moment("last backward", update.gradients + made, kept, working, 0)
    else:
        yield replace(most, gradients=most.gradients + made)
        yield Moment("first backward", made, live + kept, working, 0)
        if rank == place_of(leaf.schedule, leaf.pp, leaf.stages - 1)[0]:
            yield Moment("loss", 0, live + kept, leaf.head[Field.WORK_NONE], 0)
    yield replace(update, gradients=update.gradients + made, step=update.step + costs.step_bytes)


def live_activations(
    leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]
) -> tuple[int, tuple[int, ...]]:
    """Most activation bytes alive at once, with what a split backward holds beside them or other
    chunks of gathered weights and what idle passes keep, and the microbatches per chunk that
    they belong to."""
    peaks = held_at_peaks(leaf, rank)
    sizes = [chunk.activation_bytes for chunk in chunks]
    halves = [chunk.split for chunk in chunks if chunk.split]
    sizes += [half.deferred_bytes for half in halves]
    sizes += [half.late_gradient_bytes for half in halves]
    if leaf.reshards:
        sizes += [chunk.gathered_bytes for chunk in chunks]
    size, peak = max(
        (sum([n * size for n, size in zip(peak, sizes, strict=True)]), peak) for peak in peaks
    )
    return size + idle_bytes(leaf, rank, chunks), peak[: leaf.vpp]


def peaks(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> tuple[int, ...]:
    """Peak bytes of every rank."""
    return tuple(peak_bytes(leaf, rank, costs.chunks) for rank, costs in enumerate(ranks))


def fits(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> bool:
    """Whether every rank's peak is within capacity, and what leaves the devices within the hosts'
    room."""
    devices = all(
        peak_bytes(leaf, rank, costs.chunks) <= leaf.capacity_bytes
        for rank, costs in enumerate(ranks)
    )
    return devices and hosts_hold(leaf, ranks)


def fits_alone(leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]) -> bool:
    """Whether a rank's peak is within capacity, and what its devices send to a node within the
    room there, whatever other ranks send."""
    if peak_bytes(leaf, rank, chunks) > leaf.capacity_bytes:
        return False
    if leaf.hosts is None:
        return True
    return host_bytes(leaf, rank, chunks) * leaf.hosts.most_on_node(rank) <= leaf.hosts.room


def hosts_hold(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> bool:
    """Whether every node has room for what its devices send to it."""
    if leaf.hosts is None:
        return True
    sizes = [host_bytes(leaf, rank, costs.chunks) for rank, costs in enumerate(ranks)]
    return leaf.hosts.fullest(sizes) <= leaf.hosts.room


def host_bytes(leaf: Leaf, rank: int, chunks: tuple[ChunkCosts, ...]) -> int:
    """Most bytes that one device of ``rank`` has on its host: state and outputs of its layers and
    those outside the pipeline, and the modules' inputs of the microbatches in flight."""
    waiting = 0
    if any(chunk.host_inputs for chunk in chunks):
        waiting = max(
            sum([n * chunk.host_inputs for n, chunk in zip(peak, chunks, strict=False)])
            for peak in live_peaks(
                leaf.schedule, leaf.pp, leaf.vpp, leaf.microbatches, rank, leaf.round_size,
                leaf.order,
            )
        )  # fmt: skip
    outside = 0 if leaf.outside is None else leaf.outside.in_mode.host_bytes
    return sum([chunk.host_bytes for chunk in chunks]) + waiting + outside
