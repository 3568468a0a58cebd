"""What a rank holds at the peak of a step, from the modules on it: a naive walk."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from planner.models.spec import AttentionSpec, BlockSpec, LatentAttentionSpec, MoeSpec
from tests.oracle import memory_walk as tensors
from tests.oracle import memory_walk_state as parameters
from tests.oracle.memory_walk import Case
from tests.oracle.memory_walk_order import most_in_flight
from tests.oracle.memory_walk_recompute import kept_and_short

Chunks = list[tuple[int, int]]
"""First layer, and the one behind the last, of each chunk of a rank."""


def on_rank(case: Case, rank: int, chunks: Chunks) -> dict[str, int]:
    """Bytes of every category of ``evaluate`` that is tensors."""
    held, blocks, last = [], case.blocks(), case.pp * case.vpp - 1
    for n, (start, stop) in enumerate(chunks):
        stage = n * case.pp + rank
        weights = [each for block in blocks[start:stop] for each in parameters.layer(case, block)]
        ahead = parameters.embedding(case) if stage == 0 else []
        behind = parameters.head(case) if stage == last else []
        if stage == last:
            ahead = ahead or parameters.tables_of_predictions(case)
        held.append([*ahead, *weights, *behind])
    found = parameters.state(case, held, first=rank == 0)
    sizes, shorts = [], []
    for n, (start, stop) in enumerate(chunks):
        stage = n * case.pp + rank
        size, short = chunk(case, blocks[start:stop], first=stage == 0, end=stage == last)
        sizes.append(size)
        shorts.append(short)
    alive = most_in_flight(case.pp, case.vpp, case.microbatches, rank, sizes)
    # Deviation by design: the chunk with the most short-lived bytes counts beside the most
    # microbatches in flight, whether or not both fall together.
    net, gone = max((beside - gone, gone) for each in shorts for beside, gone in each)
    # torchtitan's optimizer drops gradients, so that each step's backward makes them anew.
    made = found["gradients"] if case.dtensor else 0
    several = case.microbatches > 1
    moments = [Moment(made if several else 0, alive - gone, net + gone)]
    if not several:
        assert case.pp == 1
        moments.append(Moment(made, 0, draining(case, blocks)))
    # One fp32 copy of the parameters of the rank: torch.optim.AdamW (foreach).
    moments.append(Moment(made, 0, 0, found["optimizer"] // 2 if case.dtensor else 0))
    most = max(moments, key=lambda moment: sum(moment))
    found["gradients"] -= made - most.gradients
    return found | {
        "parameters": sum(map(parameters.elements, held)),
        "activations": most.activations,
        "working": most.working,
        "optimizer_update": most.update,
        "buffers": buffers(case, held, rank, chunks),
        "receive_buffers": received(case, rank),
    }


class Moment(NamedTuple):
    """Bytes of a rank that are not there all the time."""

    gradients: int
    activations: int
    working: int
    update: int = 0


def draining(case: Case, blocks: list[BlockSpec]) -> int:
    """Most bytes of the end of the only backward: the activations of the layer at work alone, less
    the gradients that it has not made yet, beside the unit behind it that is being reduced."""
    most = behind = 0
    for block in blocks:
        units = parameters.layer(case, block)
        kept, short = layer_at_work(case, block)
        held = parameters.state(case, [units], first=False)["gradients"] if case.dtensor else 0
        most = max(most, kept + short - held)
        behind = max(behind, in_flight(case, units))
    if len(blocks) == 1:
        behind = in_flight(case, output_weights(case))
    return max(most + behind, tensors.embedding(case) + lookup(case))


def layer_at_work(case: Case, block: BlockSpec) -> tuple[int, int]:
    """Kept and short-lived bytes of a layer, with what is unsharded while it runs."""
    kept, short = kept_and_short(case, block)
    units = parameters.layer(case, block)
    return kept, max(short + gathered(case, units, ahead=1), reduced(case, units) - kept)


def lookup(case: Case) -> int:
    """Short-lived bytes of the lookup's backward."""
    units = parameters.embedding(case)
    running = case.gathered + gathered(case, units, ahead=0)
    return max(running, end_reduced(case, units, False) - tensors.embedding(case))


def chunk(
    case: Case, blocks: list[BlockSpec], *, first: bool, end: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Bytes that a microbatch leaves on a chunk; and at each moment that may be the peak, the
    short-lived bytes and those of the microbatch that are gone by then."""
    size = short = behind = 0
    for block in blocks:
        units = parameters.layer(case, block)
        kept, working = layer_at_work(case, block)
        size += kept
        short = max(short, working)
        if len(blocks) > 1:
            # The unit behind is on its way while this one runs, its own activations gone.
            behind = max(behind, in_flight(case, units) - kept)
    moments = []
    if first:
        size += tensors.embedding(case)
    if end:
        units = output_weights(case)
        kept = tensors.head(case)
        size += kept
        loss = tensors.head_backward(case)
        if case.dtensor and case.pp > 1:
            # The schedule holds the 16-bit logits until the loss is over.
            loss += 2 * case.tokens * case.vocabulary * (case.chunks == 1)
        by_then = 0 if case.chunks > 1 else kept
        loss += gathered(case, units, ahead=0)
        moments.append((max(loss, end_reduced(case, units, case.chunks > 1) - by_then), 0))
        behind = max(behind, in_flight(case, units))
        moments.append((short + behind + waiting(case), kept))
    else:
        moments.append((short + behind, 0))
    if first:
        # The backward of the lookup: nothing of its microbatch is left.
        moments.append((lookup(case), size))
    return size, moments


def waiting(case: Case) -> int:
    """The 16-bit gradient of the predictions' lookups where the embedding's module is theirs: it is
    summed with the embedding's own, behind all layers."""
    shared = case.pp == 1 and case.model.mtp
    return 2 * parameters.elements(parameters.embedding(case)[:1]) if shared else 0


def output_weights(case: Case) -> list[parameters.Parameter]:
    """Those that the head uses, be they its own or the embedding's."""
    own = parameters.head(case)
    shared = case.model.tied_embeddings and case.pp == 1
    return [*own, parameters.embedding(case)[0]] if shared else own


def gathered(case: Case, units: list[parameters.Parameter], ahead: int) -> int:
    """A unit's 16-bit weights while it runs, and those of the unit that is fetched ahead."""
    return (1 + ahead) * 2 * parameters.elements(units) if case.dtensor and case.zero == 3 else 0


def reduces_each(case: Case) -> bool:
    """FSDP2 reduces gradients in each backward; under a pipeline once per step."""
    return case.dtensor and (case.zero == 3 or (case.zero == 2 and case.pp == 1))


def in_flight(case: Case, units: list[parameters.Parameter]) -> int:
    """The fp32 buffer in which a unit's gradients are reduced."""
    return 4 * parameters.elements(units) if reduces_each(case) else 0


def reduced(case: Case, units: list[parameters.Parameter]) -> int:
    """The end of a layer's backward: its gradients in 16 bits; its input and the gradient of that,
    as they are and gathered over tp."""
    if not reduces_each(case):
        return 0
    ways = case.tp if case.sp else 1
    made = gathered(case, units, ahead=1) + 2 * parameters.elements(units)
    return made + 2 * case.residual * (1 + ways)


def end_reduced(case: Case, units: list[parameters.Parameter], pieces: bool) -> int:
    """As ``reduced``, of the head or the lookup: gradients in 16 bits, in fp32 for the reduction
    (two pieces' at once where the loss runs in pieces), and the reduced ones."""
    if not reduces_each(case):
        return 0
    size = parameters.elements(units)
    own = sum(parameters.shard(case, unit) for unit in units)
    return gathered(case, units, ahead=0) + (2 + 4 * (1 + pieces)) * size + 4 * own


def buffers(case: Case, held: list[list[parameters.Parameter]], rank: int, chunks: Chunks) -> int:
    """Tensors that stay and are no parameters, in torchtitan: each layer's rotary factors, what its
    router counts, the step of each parameter's optimizer, and of a loss in pieces the gradient of
    the head's input (summed in fp32, and its copy in 16 bits)."""
    if not case.dtensor:
        return dispatchers(case, rank, chunks)
    cache = case.stack.rotary_cache_bytes
    each = cache.get(case.model.family, cache["default"])
    total, blocks = 0, case.blocks()
    for start, stop in chunks:
        for block in blocks[start:stop]:
            width = 0
            if isinstance(block.mixer, AttentionSpec):
                width = block.mixer.head_dim
            elif isinstance(block.mixer, LatentAttentionSpec):
                width = block.mixer.qk_rope_head_dim
            total += case.sequence * width * each
            if isinstance(block.feed_forward, MoeSpec):
                total += 8 * block.feed_forward.experts
    for weights in held:
        names = ["", *(weight.stored_in for weight in weights)]
        total += 4 * sum(a != b for a, b in pairwise(names))
    if case.chunks > 1 and rank == case.pp - 1:
        total += 3 * case.gathered
    return total


def dispatchers(case: Case, rank: int, chunks: Chunks) -> int:
    """``probs`` in fp32 and ``routing_map`` that each MoEAlltoAllTokenDispatcher has as attributes,
    those of prediction modules too."""
    if case.stack.layers.routing_maps != "megatron":
        return 0
    blocks = [block for start, stop in chunks for block in case.blocks()[start:stop]]
    if rank == case.pp - 1:
        blocks += case.predictions()
    parts = [block.feed_forward for block in blocks]
    return sum(5 * case.rows * part.experts for part in parts if isinstance(part, MoeSpec))


def received(case: Case, rank: int) -> int:
    """PyTorch's pipelining stage receives each microbatch in a buffer of its own: activations from
    the stage before, gradients from the one behind."""
    if not case.dtensor or case.pp == 1:
        return 0
    last, neighbours = case.pp * case.vpp - 1, 0
    for n in range(case.vpp):
        stage = n * case.pp + rank
        neighbours += (stage > 0) + (stage < last)
    return case.microbatches * neighbours * case.residual
