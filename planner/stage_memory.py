"""Where the bytes of a pipeline rank go, by name, and as the three figures that tools show.

*Allocated* is what is in tensors, *reserved* what the caching allocator holds for them, *device*
what the driver shows. They are taken at their own peaks: flat buffers of the optimizer step are not
alive with the activations, but the blocks that activations leave behind cannot serve them, so the
allocator holds both. Neither do blocks serve another stream than the one that they were allocated
on: where reduced gradients have a stream of their own, the allocator holds them beside the largest
of everything else (PyTorch documentation, CUDA semantics, memory management).
"""

from __future__ import annotations

from dataclasses import replace

from cost_models.configs import shard_of
from cost_models.fragments import split_rest
from cost_models.leaf import Leaf, RankCosts, Row, stage_costs
from cost_models.peaks import live_activations, moments, peak_bytes  # fmt: skip
from cost_models.reserve import CACHED, INSIDE, OUTSIDE
from cost_models.step import Field
from planner.buffer_sizes import exact_state
from planner.plan import StagePrediction, Term
from planner.priced import Priced

_SUMMED = (
    Field.WEIGHT_BYTES, Field.GRADIENT_BYTES, Field.OPTIMIZER_BYTES, Field.STEP_BYTES,
    Field.BUFFER_BYTES, Field.STATIC, Field.NEW_GRADIENTS, Field.PARAMETERS,
    Field.LEFT_BLOCKS, Field.LOOKUP_BLOCK,
)  # fmt: skip

_ALWAYS = ("weights", "gradients", "optimizer", "activations", "working")
"""Terms that are told even where they are 0."""


def stage_prediction(priced: Priced, rank: int, costs: RankCosts) -> StagePrediction:
    """The memory of one rank, with how much it computes and holds."""
    leaf = priced.leaf
    sums = _sums(priced, rank)
    _, live = live_activations(leaf, rank, costs.chunks)
    chunks, made = costs.chunks, sums[Field.NEW_GRADIENTS]
    own_blocks = _own_blocks(priced)
    peak = peak_bytes(priced.leaf, rank, costs.chunks)
    idle = 0
    if leaf.idle_forward:
        # Cached, in no tensor.
        leaf = replace(leaf, idle_forward=False)
        chunks = stage_costs(leaf, priced.completion)[rank].chunks
        idle = peak - peak_bytes(leaf, rank, chunks)
    rests = _rests(priced, leaf)
    split = peak_bytes(leaf, rank, chunks)
    chunks = stage_costs(rests, priced.completion)[rank].chunks
    split -= peak_bytes(rests, rank, chunks)
    leaf, left, lookup = rests, sums[Field.LEFT_BLOCKS], sums[Field.LOOKUP_BLOCK]
    if own_blocks:
        made = sums[Field.GRADIENT_BYTES]
        leaf = _in_one_pool(leaf)
        chunks = stage_costs(leaf, priced.completion)[rank].chunks
    moment = max(moments(leaf, rank, chunks), key=lambda each: each.total)
    in_flight = "+".join(str(n) for n in live)
    pads = f", beside {leaf.idle_passes} idle passes" if leaf.idle_passes else ""
    activations, working = moment.activations, moment.working
    reserve = {name: int(values[0]) for name, values in priced.tables.reserve.terms.items()}
    apart = sums[Field.STATIC] + sums[Field.NEW_GRADIENTS] - left - lookup
    apart -= sum(sums[field] for field in _SUMMED[:5])
    if not own_blocks:
        # Static bytes that are none of the sums: the head's own placeholder.
        reserve["dummy_gradients"] += apart
    exact = exact_state(priced, rank)
    held = {
        "weights": sums[Field.WEIGHT_BYTES],
        "gradients": sums[Field.GRADIENT_BYTES],
        "optimizer": sums[Field.OPTIMIZER_BYTES],
    }
    alignment = sum(held.values()) - sum((exact or held).values())
    held = dict(exact or held)
    held["gradients"] -= made - moment.gradients
    held["buffers"] = sums[Field.BUFFER_BYTES]
    held["receive_buffers"] = leaf.received_bytes(rank)
    held["kept_outputs"] = leaf.kept_output_bytes(rank)
    held["vocabulary_buffers"] = 0 if leaf.shared is None else leaf.shared.held_bytes
    held["deferred_products"] = leaf.deferred_bytes(rank)
    step = sums[Field.STEP_BYTES]
    kept_free = leaf.fixed_bytes - int(priced.tables.reserve.total[0])
    inside = sum(held.values()) + sum(reserve[name] for name in INSIDE)
    short_lived = activations + working + moment.step
    allocated = inside + max(short_lived, step)
    reserved = inside + short_lived + step + alignment
    reserved += sum(reserve[name] for name in CACHED) + idle + left + split + lookup
    outside = sum(reserve[name] for name in OUTSIDE)
    streams = peak - kept_free - outside - reserved if own_blocks else 0
    reserved += streams
    terms = [
        *(Term(name=name, bytes=size) for name, size in held.items()),
        Term(name="activations", bytes=activations,
             detail=f"{in_flight} microbatches in flight; the peak is at the {moment.name}{pads}"),
        Term(name="working", bytes=working,
             detail="short-lived buffers, gathered weights, unreduced gradients"),
        Term(name="optimizer_update", bytes=moment.step,
             detail="copies made by the update, and what comes from the host for it"),
        Term(name="optimizer_step", bytes=step, detail="flat buffers of the optimizer step"),
        Term(name="alignment", bytes=alignment, detail="most that bucket ends may still add"),
        Term(name="stream_blocks", bytes=streams,
             detail="reduced gradients, on a stream of their own, beside the peak of the others"),
        Term(name="left_blocks", bytes=left,
             detail="remains of the blocks in which weights were made, before they were copied"),
        Term(name="lookup_block", bytes=lookup,
             detail="block of the embedding's dense gradient, larger than any activation's"),
        Term(name="split_blocks", bytes=split,
             detail="remains of the blocks of score matrices that layer inputs were put in"),
        Term(name="idle_forward", bytes=idle,
             detail="blocks of the last layers' forward that the loss's larger tensors leave free"),
    ]  # fmt: skip
    for name in (*INSIDE, *CACHED, *OUTSIDE):
        detail = priced.tables.reserve.details[name]
        terms.append(Term(name=name, bytes=reserve[name], detail=detail))
    terms.append(Term(name="reserve", bytes=kept_free, detail="kept free as asked"))
    return StagePrediction(
        peak_bytes=peak,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        device_bytes=peak - kept_free,
        memory=tuple(term for term in terms if term.bytes or term.name in _ALWAYS),
        compute_s=(costs.work_ns * leaf.microbatches + _outside_ns(leaf)) / 1e9,
        layers=sum(
            priced.completion.bounds[j + 1] - priced.completion.bounds[j] for j in leaf.held(rank)
        )
        + priced.layout.layers_outside,
        parameters=sums[Field.PARAMETERS],
    )


def _outside_ns(leaf: Leaf) -> int:
    """Forward and backward of the layers outside the pipeline."""
    if leaf.outside is None:
        return 0
    return leaf.outside.in_mode.forward_ns + leaf.outside.in_mode.backward_ns


def _own_blocks(priced: Priced) -> bool:
    """Whether reduced gradients keep blocks of their own (``cost_models.unsharded``)."""
    stack = priced.tables.machine.stack
    return stack.new_gradients and stack.stream_pools and priced.layout.zero_stage >= 2


def _rests(priced: Priced, leaf: Leaf) -> Leaf:
    """The leaf without what its layer inputs leave of blocks that they split: in no tensor."""
    machine, workload = priced.tables.machine, priced.tables.workload
    if not machine.stack.splits_blocks or machine.offload.checkpoints:
        return leaf
    shard = shard_of(workload, priced.tables.configs)

    def row(name: str, costs: Row) -> Row:
        values = list(costs)
        for policy in workload.policies:
            rest = split_rest(workload.kinds[name], shard, policy)
            values[leaf.modes[policy.name].kept] -= int(rest[0])
        return tuple(values)

    names = priced.tables.kind_names
    kinds = tuple(row(name, kind) for name, kind in zip(names, leaf.kinds, strict=True))
    return replace(leaf, kinds=kinds)


def _in_one_pool(leaf: Leaf) -> Leaf:
    """The leaf's tensors themselves: reduced gradients are there once the backward made them."""

    def row(costs: Row) -> Row:
        values = list(costs)
        values[Field.STATIC] = sum(costs[field] for field in _SUMMED[:5])
        values[Field.STATIC] -= costs[Field.GRADIENT_BYTES]
        values[Field.NEW_GRADIENTS] = costs[Field.GRADIENT_BYTES]
        return tuple(values)

    return replace(
        leaf, kinds=tuple(row(kind) for kind in leaf.kinds), embedding=row(leaf.embedding),
        head=row(leaf.head),
    )  # fmt: skip


def _sums(priced: Priced, rank: int) -> dict[Field, int]:
    """Fields summed over what the rank holds."""
    leaf, bounds = priced.leaf, priced.completion.bounds
    sums = dict.fromkeys(_SUMMED, 0)
    for j in leaf.held(rank):
        before, after = leaf.counts[bounds[j]], leaf.counts[bounds[j + 1]]
        for field in sums:
            for kind, low, high in zip(leaf.kinds, before, after, strict=True):
                sums[field] += kind[field] * (high - low)
            sums[field] += sum([end[field] for end in leaf.ends_on(j) if end is not None])
    if leaf.outside is not None:
        for field in sums:
            each = [kind[field] for kind in leaf.outside.kinds]
            sums[field] += sum(n * size for n, size in zip(leaf.outside.counts, each, strict=True))
    return sums
