"""Stage sums, peaks and step times for brute force, written a second time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_models.step import Field
from planner.request import Request
from tests.oracle.brute_prices import Chunk, Prices
from tests.oracle.layouts import (
    Layout,
    Option,
)
from tests.oracle.timeline import (
    finish_times,
    held,
    homes,
    most_live_bytes,
    most_with_weights,
    padded,
    splits,
)
from tests.oracle.vocabulary import Ends, finish, most_live

GROUPS = ("full:", "partitioned:")


def waiting_products(prices: Prices, x: Layout, m: int) -> tuple[int, int, int]:
    """In how many microbatches of a step the product waits; its time and its operands."""
    most, each, operands = prices.put_off
    if x.schedule not in ("1f1b", "interleaved"):
        return 0, 0, 0
    return min(most, m), each, operands


def sum_chunk(
    prices: Prices, start: bool, end: bool, many: bool, first: int, size: int, option: Option,
    *, halves: bool, stays: int = 0, alternates: bool = True, several: bool = False,
) -> Chunk:  # fmt: skip
    """A virtual stage of ``size`` layers from ``first`` on; ``start`` and ``end`` of the model,
    ``many`` pipeline ranks, a backward in ``halves``. ``stays``: of what the head kept, what its
    last backward leaves. ``alternates``: backwards follow forwards of their stage in general, and
    gather the weights that these gave back. ``several``: its rank has more virtual stages."""
    key = (start, end, many, first, size, option, halves, stays, alternates, several)
    if key in prices.chunks:
        return prices.chunks[key]
    mode, limit = option
    forward = backward = gradient = update = static = activation = working = made = step = 0
    draining = sent = behind = cached = weights = waiting = 0
    unsummed = left = 0
    units: list[tuple[int, int]] = []
    for place, row in enumerate(prices.layers[first : first + size]):
        here = mode
        if mode == "full" and place >= limit:
            here = "none"
        elif "/" in mode:
            here = mode.split("/")[place >= limit]
        again = here != "none"
        kept, short, more = row[Field.ACT_NONE], row[Field.WORK_NONE], 0
        if again:
            start_of = len(Field) + 3 * prices.policies.index(here)
            kept, short, more = row[start_of : start_of + 3]
        if here == "everything_saveable" and several:
            kept += prices.casts[first + place]
        forward += row[Field.FORWARD]
        backward += row[Field.BACKWARD] + more
        backward += 0 if alternates else row[Field.GATHER_LATE]
        units.append((kept, row[Field.GATHERED]))
        weights += row[Field.WEIGHT_BACKWARD]
        waiting += row[Field.DEFERRED]
        unsummed += row[Field.LATE_GRADIENTS]
        if halves and mode == "full" and again and not start:
            # Once more for the gradient of every weight.
            backward += row[Field.WEIGHT_PASSES] * more
            weights += row[Field.WEIGHT_PASSES] * more
            waiting += row[Field.DEFERRED_AGAIN] - row[Field.DEFERRED]
            left += row[Field.LEFT_AGAIN]
        gradient += row[Field.GRADIENT]
        update += row[Field.OPTIMIZER] + row[Field.PARAMETER]
        static += row[Field.STATIC]
        activation += kept
        working = max(working, short)
        cached = max(cached, row[Field.ACT_NONE] - kept)
        draining = max(draining, kept + short - row[Field.NEW_GRADIENTS])
        if size > 1:
            sent = max(sent, row[Field.IN_FLIGHT] - kept)
            behind = max(behind, row[Field.IN_FLIGHT])
        made += row[Field.NEW_GRADIENTS]
        step += row[Field.UPDATE_BYTES]
    together = int(mode.split(":")[1]) if mode.startswith(GROUPS) else 1
    if together > 1 and size:
        parts = [row[len(Field) + 3 * prices.policies.index(mode)]
                 for row in prices.layers[first : first + size]]  # fmt: skip
        activation += max(parts) * (math.ceil(size / together) * together - size)
    for row in ([prices.embedding] if start else []) + ([prices.head] if end else []):
        forward += row[Field.FORWARD]
        backward += row[Field.BACKWARD]
        backward += 0 if alternates else row[Field.GATHER_LATE]
        gradient += row[Field.GRADIENT] + (prices.tied_sync if many else 0)
        update += row[Field.OPTIMIZER] + row[Field.PARAMETER]
        static += row[Field.STATIC]
        activation += row[Field.ACT_NONE]
        made += row[Field.NEW_GRADIENTS]
        step += row[Field.UPDATE_BYTES]
    # The unit behind, a layer or the head, still reduces its gradients; its activations are gone.
    if end:
        sent = max(sent, prices.head[Field.IN_FLIGHT])
        behind = behind if size > 1 else prices.head[Field.IN_FLIGHT]
    if halves and not start:
        late = (row[Field.LATE_GRADIENTS] for row in prices.layers[first : first + size])
        sent += max(late, default=0)
    on_top = prices.head[Field.GATHERED] if end else 0
    below = prices.embedding[Field.GATHERED] if start else 0
    everything = on_top + below + sum(weight for _, weight in units)
    working += sent + on_top + left_gathered(units, below, prices.ahead)
    draining += behind + everything
    # While a layer's backward runs, what the head kept is gone; at the embedding's, everything is.
    if end:
        loss = prices.head[Field.WORK_NONE] + (cached if prices.blocks_stay else 0)
        working = max(working - prices.head[Field.ACT_NONE] + stays, loss)
        draining += stays
    if start:
        short = prices.embedding[Field.WORK_NONE] + everything - below
        draining = max(draining, prices.embedding[Field.ACT_NONE] + short)
        working = max(working, short - activation)
        weights, waiting, unsummed = backward, 0, 0
    elif end:
        weights += prices.head[Field.WEIGHT_BACKWARD]
        waiting += prices.head[Field.DEFERRED]
        unsummed += prices.head[Field.LATE_GRADIENTS]
    working = max(working, left)
    chunk = Chunk(
        forward, backward, gradient, update, static, made, activation, working, draining, step,
        backward - weights, weights, max(waiting, 0), unsummed, everything,
    )  # fmt: skip
    prices.chunks[key] = chunk
    return chunk


def left_gathered(units: Sequence[tuple[int, int]], below: int, ahead: int) -> int:
    """Most bytes that a backward through ``units`` (activations and weights of each layer) has of
    both beyond all their activations; with the unit ``below`` or a layer gathered ``ahead``."""
    alive = [kept for kept, _ in units]
    there = [0] * len(units)
    most = 0
    for layer in reversed(range(len(units))):
        for one in range(max(layer - ahead, 0), layer + 1):
            there[one] = units[one][1]
        early = below if layer < ahead else 0
        most = max(most, sum(alive) + sum(there) + early - sum(kept for kept, _ in units))
        alive[layer] = 0
    return most


@dataclass(frozen=True)
class Apart:
    """Layers outside the pipeline: what all ranks do for them in a step, and hold."""

    time: int = 0
    static: int = 0
    made: int = 0
    kept: int = 0
    working: int = 0
    step: int = 0
    ahead: bool = False


def apart_of(prices: Prices, before: range, behind: range, mode: str) -> Apart:
    """The layers outside, each in ``mode``."""
    time = static = made = kept = step = 0
    rows = [prices.shares[n] for n in (*before, *behind)]
    most: list[int] = []
    late: list[int] = []
    parts: list[int] = []
    for row in rows:
        own, short, more = row[Field.ACT_NONE], row[Field.WORK_NONE], 0
        if mode != "none":
            start_of = len(Field) + 3 * prices.policies.index(mode)
            own, short, more = row[start_of : start_of + 3]
        time += row[Field.FORWARD] + row[Field.BACKWARD] + more
        time += row[Field.GRADIENT] + row[Field.OPTIMIZER] + row[Field.PARAMETER]
        static += row[Field.STATIC]
        made += row[Field.NEW_GRADIENTS]
        step += row[Field.UPDATE_BYTES]
        parts.append(own)
        most.append(short)
        late.append(max(row[Field.IN_FLIGHT] - own, 0) if len(rows) > 1 else 0)
    together = int(mode.split(":")[1]) if mode.startswith(GROUPS) else 1
    kept = sum(parts) + max(parts) * (math.ceil(len(parts) / together) * together - len(parts))
    return Apart(time, static, made, kept, max(most) + max(late), step, bool(before))


def chunks_of(
    prices: Prices, x: Layout, m: int, sizes: Sequence[int], options: Sequence[Option],
    begin: int = 0,
) -> list[Chunk]:  # fmt: skip
    """All virtual stages, in order, from layer ``begin`` on; ``options`` per rank."""
    count, _, operands = waiting_products(prices, x, m)
    chunks, first, stages = [], begin, x.pp * x.vpp
    home = homes(x.schedule, x.pp, x.vpp)
    for j, size in enumerate(sizes):
        start, end = j == 0, j == stages - 1
        many = home[0] != home[-1]
        bare = prices.ends is not None
        chunk = sum_chunk(
            prices,
            start and not bare,
            end and not bare,
            many,
            first,
            size,
            options[home[j]],
            halves=splits(x.schedule),
            alternates=x.schedule == "1f1b",
            stays=operands if end and count == m else 0,
            several=x.vpp > 1,
        )
        if prices.ends is not None:
            chunk = with_parts(chunk, prices.ends)
        if x.schedule in prices.waiting:
            # Sending is the rank's work: the output and the input's gradient, to other ranks.
            stays, stayed = (end or home[j + 1] == home[j]), (start or home[j - 1] == home[j])
            on = 0 if stays else transfer(prices, first + size)[0]
            back = 0 if stayed else transfer(prices, first)[1]
            halves = {"inputs": chunk.inputs + back} if j else {"weights": chunk.weights + back}
            chunk = replace(
                chunk, forward=chunk.forward + on, backward=chunk.backward + back, **halves
            )
        chunks.append(chunk)
        first += size
    return chunks


def with_parts(chunk: Chunk, ends: Ends) -> Chunk:
    """A rank's layers with its parts of embedding and head; the head's passes are apart."""
    rows = (ends.embedding, ends.head)
    return replace(
        chunk,
        forward=chunk.forward + ends.embedding[Field.FORWARD],
        backward=chunk.backward + ends.embedding[Field.BACKWARD],
        gradient=chunk.gradient + ends.both(Field.GRADIENT),
        update=chunk.update + ends.both(Field.OPTIMIZER) + ends.both(Field.PARAMETER),
        static=chunk.static + ends.both(Field.STATIC) + ends.both(Field.NEW_GRADIENTS),
        step=chunk.step + ends.both(Field.UPDATE_BYTES),
        working=max(chunk.working, *(row[Field.WORK_NONE] for row in rows)),
    )


def transfer(prices: Prices, cut: int) -> tuple[int, int]:
    """Time of the transfers at a cut between layers, on and back."""
    on, back = prices.late[cut] if prices.late else (0, 0)
    return prices.hop + on, prices.hop + back


def rank_peak(
    prices: Prices, x: Layout, m: int, rank: int, own: Sequence[Chunk], size: int = 0,
    apart: Apart | None = None,
) -> int:  # fmt: skip
    """Peak bytes of a device of ``rank``."""
    split = splits(x.schedule)
    if prices.ends is not None:
        live = most_live(x.schedule, x.pp, m, rank) * own[0].activation
        static = prices.fixed + own[0].static + prices.ends.kept(x.schedule, x.pp, m)
        first = live + own[0].working + (own[0].made if m > 1 else 0)
        emptied = own[0].made + (own[0].draining if m == 1 else 0)
        return static + max(first, emptied, own[0].made + own[0].step)
    sizes = [c.activation for c in own] + [c.waiting for c in own if split]
    sizes += [c.unsummed for c in own if split]
    live = most_live_bytes(x.schedule, x.pp, x.vpp, m, rank, sizes, size)
    if any(c.gathered for c in own):
        weights = [c.gathered for c in own]
        live = most_with_weights(x.schedule, x.pp, x.vpp, m, rank, sizes, weights, size)
    if prices.stay:
        stages = held(x.schedule, x.pp, x.vpp, rank)
        for j, n, chunk in zip(stages, padded(x.schedule, x.pp, x.vpp, m, rank), own, strict=True):
            ends = prices.embedding[Field.ACT_NONE] * (j == 0)
            ends += prices.head[Field.ACT_NONE] * (j == x.pp * x.vpp - 1)
            live += n * (chunk.activation - ends)
    static, made = prices.fixed + sum(c.static for c in own), sum(c.made for c in own)
    home = homes(x.schedule, x.pp, x.vpp)
    for j in held(x.schedule, x.pp, x.vpp, rank):
        beside = home[max(j - 1, 0) : j] + home[j + 1 : j + 2]
        static += m * prices.receive * sum(other != rank for other in beside)
        static += (m - 1) * prices.output * (j == len(home) - 1)
        if j == len(home) - 1:
            count, _, operands = waiting_products(prices, x, m)
            static += min(count, m - 1) * operands
    if apart is not None:
        working, step = max(c.working for c in own), sum(c.step for c in own)
        everything = made + apart.made
        moments = [everything + step + apart.step]
        if apart.ahead:
            moments.append(live + apart.kept + made + working)
            moments.append(everything + apart.kept + apart.working)
        else:
            loss = prices.head[Field.WORK_NONE] if rank == x.pp - 1 else 0
            moments.append(live + everything + working)
            moments.append(live + apart.kept + max(apart.made + apart.working, loss))
        return static + apart.static + max(moments)
    # A split backward keeps all activations until the last gradient of weights is there.
    moments = [live + max(c.working for c in own) + (made if m > 1 or split else 0)]
    moments.append(made + sum(c.step for c in own))
    if m == 1 and not split:
        moments.append(made + max(c.draining for c in own))
    return static + max(moments)


def hops_of(prices: Prices, x: Layout, sizes: Sequence[int]) -> int | list[tuple[int, int]]:
    """What passes between the end of a virtual stage and the arrival behind it, on and back."""
    if x.schedule in prices.waiting:
        return 0
    return [transfer(prices, sum(sizes[: j + 1])) for j in range(len(sizes))]


def step_time(
    prices: Prices, x: Layout, m: int, chunks: Sequence[Chunk], sizes: Sequence[int], size: int = 0
) -> int:
    """The step: pipeline and exposed reduction, then the update behind the norm's barrier."""
    durations = [t for c in chunks for t in (c.forward, c.backward, c.inputs, c.weights)]
    own = [[chunks[j] for j in held(x.schedule, x.pp, x.vpp, r)] for r in range(x.pp)]
    hops = hops_of(prices, x, sizes)
    put_off = waiting_products(prices, x, m)[:2]
    if prices.ends is not None:
        lags = [(hops, hops)] * x.pp if isinstance(hops, int) else hops
        forward, backward = [c.forward for c in chunks], [c.backward for c in chunks]
        ends = finish(x.schedule, x.pp, m, forward, backward, lags, prices.ends)
    else:
        ends = finish_times(x.schedule, x.pp, x.vpp, m, durations, hops, size, put_off)
    reduced = max(
        end + prices.bucket + sum(c.gradient for c in own[rank]) for rank, end in enumerate(ends)
    )
    return reduced + max(sum(c.update for c in each) for each in own) + prices.sync


def work_per_rank(request: Request, x: Layout, prices: Prices) -> float:
    """Forward and backward of all microbatches, shared evenly by the ranks."""
    rows = (*prices.layers, prices.embedding, prices.head)
    each = sum(row[Field.FORWARD] + row[Field.BACKWARD] for row in rows)
    return request.global_batch // (x.dp * x.microbatch) * each / x.pp
