"""A leaf of the search: every degree fixed, the partition and recompute of stages still open.

:class:`Leaf` holds integers per layer kind (``cost_models.step.Field``). A :class:`Completion`
says which layers each virtual stage holds and what it recomputes. From the two follow

* the stages' times and peak bytes (:func:`stage_costs`),
* the step time by exact simulation (:func:`simulate_step`),
* a *surrogate*, a bound proved to be at most the simulated time: ``cost_models.surrogate``.

Step time = ``max over ranks (finish + exposed gradient reduction) + max over ranks (optimizer +
exposed parameter gather) + sync``: clipping by the global gradient norm is a barrier. Where ranks
wait for their transfers (``Leaf.sends``), these are part of a chunk's forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cost_models.deferral import NOTHING, Deferral
from cost_models.given_order import GivenOrder
from cost_models.host_room import NOWHERE, HostRoom
from cost_models.layout import (
    SPLIT_BACKWARD,
    V_SHAPED,
    RecomputeMode,
    Schedule,
    crosses_ranks,
    running_counts,
    stage_of,
)
from cost_models.recompute import ModeRows, counts_of, group_of, mode_rows, parts_of, shares_of
from cost_models.resharding import beyond_activations
from cost_models.schedule import beside_passes
from cost_models.split_backward import SplitBackward, split_backward, weight_passes_ns
from cost_models.step import Field
from cost_models.vocabulary import SharedEnds

if TYPE_CHECKING:
    from cost_models.outside import Outside

Row = tuple[int, ...]
"""One value per :class:`Field`, then the rows of the policies."""

Recompute = tuple[RecomputeMode, int]
"""Mode and, for ``full`` and mixed ones, how many layers at the front of a chunk it changes."""


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
    """Once per step, all ranks at once: gradient norm, layers outside the pipeline."""
    fixed_bytes: int
    """Context, communicators, allocator slack, the user's reserve."""
    capacity_bytes: int
    uneven: bool
    """Whether virtual stages may hold different numbers of layers."""
    late: tuple[tuple[int, int], ...] = ()
    """Per cut between layers (from before the first to after the last), by how much its transfer
    takes longer than ``hop_ns``, on and back; empty where all cuts carry the same."""
    sends: tuple[tuple[int, int], ...] = ()
    """Per cut, transfers on and back for which the sending rank waits, in place of ``hop_ns`` and
    ``late``; empty where they run beside its work."""
    policies: tuple[RecomputeMode, ...] = ()
    """Recomputation that ``kinds`` has prices of."""
    outside: Outside | None = None
    """Layers that all ranks run beside the pipeline, in equal shares (``cost_models.outside``)."""
    idle_forward: bool = False
    """Whether blocks that the last layers' forward leaves free stay beside the loss."""
    round_size: int = 0
    """Microbatches of a round (``cost_models.rounds``); 0: the usual number, or no rounds."""
    order: GivenOrder | None = None
    """What every rank runs, where the user gave it."""
    receive_bytes: int = 0
    """One receive buffer of a pipeline stage; there is one per microbatch and neighbour."""
    output_bytes: int = 0
    """Output of a microbatch on the last virtual stage, kept until the step ends; the one at work
    is counted with the head."""
    shared: SharedEnds | None = None
    """Parts of embedding and head that every rank holds; ``embedding`` and ``head`` are nothing
    then."""
    ahead: int = 0
    """Layers whose weights a backward gathers before the one that runs."""
    deferral: Deferral = NOTHING
    """Weight gradients of the output layer that wait for the pipeline to drain."""
    hosts: HostRoom | None = None
    """What the devices send to their hosts; None: nothing."""
    idle_passes: int = 0
    """Passes of the bubble whose activations stay (``cost_models.idle_passes``)."""

    @cached_property
    def reshards(self) -> bool:
        """Whether forwards give gathered weights back, and backwards do not."""
        return any(row[Field.GATHERED] for row in (*self.kinds, self.embedding, self.head))

    def held(self, rank: int) -> list[int]:
        """Virtual stages of a rank, by chunk."""
        return [stage_of(self.schedule, self.pp, rank, chunk) for chunk in range(self.vpp)]

    def received_bytes(self, rank: int) -> int:
        """Receive buffers of a rank: activations but on the first virtual stage, gradients but on
        the last."""
        if not self.receive_bytes:
            return 0
        neighbours = sum([self.sends_on(j - 1) + self.sends_on(j) for j in self.held(rank)])
        return self.receive_bytes * self.microbatches * neighbours

    def kept_output_bytes(self, rank: int) -> int:
        """Outputs of earlier microbatches that a rank keeps until the step ends."""
        last = self.stages - 1 in self.held(rank)
        return self.output_bytes * (self.microbatches - 1) if last else 0

    def step_buffer_bytes(self, rank: int) -> int:
        """Bytes of a rank that stay for a step, whatever layers it holds."""
        shared = 0 if self.shared is None else self.shared.static_bytes
        kept = self.kept_output_bytes(rank) + self.deferred_bytes(rank)
        return self.received_bytes(rank) + kept + shared

    def deferred_bytes(self, rank: int) -> int:
        """Operands of products that a rank puts off, beside those of the microbatch at work."""
        last = self.stages - 1 in self.held(rank)
        return self.deferral.beside_loss_bytes(self.microbatches) if last else 0

    def sends_on(self, stage: int) -> bool:
        """Whether a virtual stage sends its output to another rank (-1: there is none)."""
        return 0 <= stage < self.stages - 1 and crosses_ranks(self.schedule, self.pp, stage)

    def ends_on(self, stage: int) -> tuple[Row | None, Row | None]:
        """What a virtual stage has of embedding and head."""
        if self.shared is not None:
            return self.shared.embedding, self.shared.head
        last = stage == self.stages - 1
        return self.embedding if stage == 0 else None, self.head if last else None

    @property
    def stages(self) -> int:
        """Virtual stages."""
        return self.pp * self.vpp

    @property
    def tied_ns(self) -> int:
        """Reduction of a tied embedding's gradient: not where one rank has both ends."""
        return 0 if self.pp == 1 or self.schedule in V_SHAPED else self.tied_sync_ns

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return self.schedule in SPLIT_BACKWARD

    @property
    def modes(self) -> dict[RecomputeMode, ModeRows]:
        """Rows of ``kinds`` for each mode."""
        return mode_rows(self.policies)

    def parts(self, mode: RecomputeMode) -> tuple[ModeRows, ModeRows]:
        """Rows of a virtual stage's first layers and of the rest."""
        front, rest = parts_of(mode)
        return self.modes[front], self.modes[rest]

    @cached_property
    def least_sends(self) -> tuple[int, int]:
        """The least of ``sends`` on and back, of any cut."""
        if not self.sends:
            return 0, 0
        return min(on for on, _ in self.sends), min(back for _, back in self.sends)

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """``counts[i][kind]``: layers of each kind among the first ``i``."""
        return running_counts(self.sequence, len(self.kinds))

    @cached_property
    def chunk_cache(self) -> dict[tuple[object, ...], ChunkCosts]:
        """Costs of chunks by what they hold; see :func:`chunk_costs`."""
        return {}


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
    """With the transfer of the output, where the rank waits for it; so the backward."""
    backward_ns: int
    gradient_ns: int
    update_ns: int
    static_bytes: int
    gradient_bytes: int
    """Gradients that the step's backward makes anew."""
    activation_bytes: int
    working_bytes: int
    """Most short-lived bytes beside all activations of the microbatches in flight."""
    freed_bytes: int
    """Of the activations, those gone by then."""
    draining_bytes: int
    """Most bytes of a layer's backward when no other has activations left, less the gradients that
    this backward is about to make."""
    step_bytes: int
    """Short-lived bytes of the optimizer step."""
    late_on_ns: int = 0
    late_back_ns: int = 0
    """Transfers of the output on and of its gradient back, beyond the least hop."""
    split: SplitBackward | None = None
    """Where the schedule splits the backward."""
    host_bytes: int = 0
    """State that a device keeps on its host."""
    host_inputs: int = 0
    """Modules' inputs of one microbatch that wait there."""
    gathered_bytes: int = 0
    """Weights that a backward leaves gathered."""

    @property
    def late_ns(self) -> int:
        """Both directions."""
        return self.late_on_ns + self.late_back_ns


def chunk_costs(leaf: Leaf, stage: int, first: int, last: int, recompute: Recompute) -> ChunkCosts:
    """Costs of virtual stage ``stage`` holding layers ``first .. last - 1``.

    Chunks of the same layers in the same place (an end, or between) cost the same, and most chunks
    of a model are alike: results are kept per leaf.
    """
    held = tuple([b - a for a, b in zip(leaf.counts[first], leaf.counts[last], strict=True)])
    parts = counts_of(recompute, leaf.counts, first, last)
    late = leaf.late[last] if leaf.late and leaf.sends_on(stage) else (0, 0)
    sent = sent_ns(leaf, stage, first, last)
    beyond = beyond_activations(leaf, stage, first, last, recompute[0]) if leaf.reshards else 0
    key = (stage == 0, stage == leaf.stages - 1, recompute[0], held, parts, late, sent, beyond)
    if key not in leaf.chunk_cache:
        leaf.chunk_cache[key] = held_costs(leaf, *key)
    return leaf.chunk_cache[key]


def sent_ns(leaf: Leaf, stage: int, first: int, last: int) -> tuple[int, int]:
    """What a stage's forward and backward wait for: the transfers of its output and of its input's
    gradient, where these go to other ranks."""
    if not leaf.sends:
        return 0, 0
    on = leaf.sends[last][0] if leaf.sends_on(stage) else 0
    return on, leaf.sends[first][1] if leaf.sends_on(stage - 1) else 0


def held_costs(
    leaf: Leaf, at_start: bool, at_end: bool, mode: RecomputeMode, held: tuple[int, ...],
    parts: tuple[tuple[int, ...], ...], late: tuple[int, int], sends: tuple[int, int],
    beyond: int = 0,
) -> ChunkCosts:  # fmt: skip
    """Costs of ``held`` layers per kind, ``parts`` in each mode but the last; ``beyond`` them."""
    forward, backward = sends
    gradient = update = static = activation = working = draining = made = 0
    step = freed = sent = behind = idle = gathered = 0
    in_front, behind_it = leaf.parts(mode)
    kept, extra, layers = in_front.kept, in_front.extra, sum(held)
    for kind, total, changed, *more in zip(leaf.kinds, held, *parts, strict=True):
        if not total:
            continue
        forward += total * kind[Field.FORWARD]
        backward += total * kind[Field.BACKWARD]
        gradient += total * kind[Field.GRADIENT]
        update += total * (kind[Field.OPTIMIZER] + kind[Field.PARAMETER])
        static += total * kind[Field.STATIC]
        made += total * kind[Field.NEW_GRADIENTS]
        step += total * kind[Field.UPDATE_BYTES]
        gathered += total * kind[Field.GATHERED]
        shares = [(changed, in_front), (total - changed, behind_it)]
        shares = shares_of(leaf.modes, mode, (changed, *more), total) if more else shares
        for count, (act, work, added) in shares:
            if count:
                backward += count * kind[added]
                activation += count * kind[act]
                working = max(working, kind[work])
                draining = max(draining, kind[act] + kind[work] - kind[Field.NEW_GRADIENTS])
                idle = max(idle, kind[Field.ACT_NONE] - kind[act])
                if layers > 1:
                    sent = max(sent, kind[Field.IN_FLIGHT] - kind[act])
                    behind = max(behind, kind[Field.IN_FLIGHT])
    # The last group of layers that run again together keeps as much as a whole one.
    most = max([row[kept] for row, n in zip(leaf.kinds, parts[0], strict=True) if n], default=0)
    activation += -sum(parts[0]) % group_of(mode) * most
    for end, present in ((leaf.embedding, at_start), (leaf.head, at_end)):
        if present:
            forward += end[Field.FORWARD]
            backward += end[Field.BACKWARD]
            gradient += end[Field.GRADIENT] + leaf.tied_ns
            update += end[Field.OPTIMIZER] + end[Field.PARAMETER]
            static += end[Field.STATIC]
            activation += end[Field.ACT_NONE]
            made += end[Field.NEW_GRADIENTS]
            step += end[Field.UPDATE_BYTES]
            gathered += end[Field.GATHERED]
    if leaf.shared is not None:
        forward += leaf.shared.forward_ns
        backward += leaf.shared.backward_ns
        gradient += leaf.shared.total(Field.GRADIENT)
        update += leaf.shared.total(Field.OPTIMIZER, Field.PARAMETER)
        step += leaf.shared.total(Field.UPDATE_BYTES)
    # What a unit reduces is in flight while the one before it works, without the former's
    # activations; the head's, before any other.
    if at_end:
        sent = max(sent, leaf.head[Field.IN_FLIGHT])
        behind = behind if layers > 1 else leaf.head[Field.IN_FLIGHT]
    if leaf.splits_backward and not at_start:
        # Of the unit whose backward runs, the sum of the last microbatch's is not made yet.
        unsummed = [k[Field.LATE_GRADIENTS] for k, n in zip(leaf.kinds, held, strict=True) if n]
        sent += max(unsummed, default=0)
    working += sent + beyond + at_end * leaf.head[Field.GATHERED]
    draining += behind + gathered
    if at_end:
        # The loss works beside all activations, the layers without what the head kept. What a layer
        # does not keep was in blocks that the loss's larger tensors do not fit into.
        left = leaf.deferral.left_bytes(leaf.microbatches)
        loss, freed = leaf.head[Field.WORK_NONE], leaf.head[Field.ACT_NONE] - left
        draining, loss = draining + left, loss + (idle if leaf.idle_forward else 0)
        working, freed = max((loss, 0), (working - freed, freed))
    if at_start:
        # Nothing of the microbatch is left when the embedding's backward runs.
        short = leaf.embedding[Field.WORK_NONE] + gathered - leaf.embedding[Field.GATHERED]
        draining = max(draining, leaf.embedding[Field.ACT_NONE] + short)
        working, freed = max((working, freed), (short - activation, activation))
    if leaf.shared is not None:
        working, freed = max((working, freed), (leaf.shared.working_bytes, 0))
    split = None
    if leaf.splits_backward:
        again = parts[0] if mode == "full" and not at_start else (0,) * len(held)
        passes = weight_passes_ns(leaf.kinds, again, extra)
        backward += passes
        left = sum([n * k[Field.LEFT_AGAIN] for k, n in zip(leaf.kinds, again, strict=True)])
        working = max(working, left)
        split = split_backward(
            backward, leaf.kinds, held, again=again, again_ns=passes,
            head=leaf.head if at_end else None, at_start=at_start,
        )  # fmt: skip
    if not at_end:
        forward, backward, late = beside_passes(leaf.schedule, forward, backward, leaf.hop_ns, late)
    on_host = (leaf.hosts or NOWHERE).of_layers(held, mode, at_start=at_start, at_end=at_end)
    return ChunkCosts(
        forward, backward, gradient, update, static, made, activation, working, freed, draining,
        step, *late, split, *on_host, gathered,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankCosts:
    """One pipeline rank: its chunks, and what they add up to."""

    chunks: tuple[ChunkCosts, ...]
    work_ns: int
    """Forward and backward of one microbatch through all chunks, and through a part of the head."""
    gradient_ns: int
    update_ns: int


def rank_costs(leaf: Leaf, chunks: tuple[ChunkCosts, ...]) -> RankCosts:
    """Sum the chunks of a rank."""
    return RankCosts(
        chunks=chunks,
        work_ns=sum([chunk.forward_ns + chunk.backward_ns for chunk in chunks])
        + (0 if leaf.shared is None else leaf.shared.head_ns),
        gradient_ns=leaf.bucket_ns + sum([chunk.gradient_ns for chunk in chunks]),
        update_ns=sum([chunk.update_ns for chunk in chunks]),
    )


def stage_costs(leaf: Leaf, completion: Completion) -> tuple[RankCosts, ...]:
    """Costs of every rank under ``completion``."""
    bounds = completion.bounds
    chunks = [
        chunk_costs(leaf, j, bounds[j], bounds[j + 1], completion.recompute[j])
        for j in range(leaf.stages)
    ]
    held = [tuple([chunks[j] for j in leaf.held(rank)]) for rank in range(leaf.pp)]
    return tuple([rank_costs(leaf, own) for own in held])
