"""Brute force: every layout, partition and recomputation; no tables, bounds or solver.

Only the prices of one layer are the cost model's (nanoseconds and bytes per layer kind, from
``price_configs``): they define the problem. All layouts of an instance are priced in one call;
:func:`priced_alone` prices one of them by itself, and the tests compare the two. Stage sums,
memory, live activations, schedules and the search itself are written here a second time.

A branch is left only where a single rank's own work is no shorter than the best step so far, or
where a rank does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product

import numpy as np

from cost_models.configs import Configs, PricedConfigs, price_configs
from cost_models.step import Field
from planner.request import Request
from tests.oracle.layouts import (
    CP_KINDS,
    Layout,
    Option,
    every_layout,
    partitions,
    parts,
    recompute_choices,
    rounds,
)
from tests.oracle.timeline import GIVEN, finish_times, held, homes, most_live_bytes, splits
from tests.oracle.vocabulary import Ends, ends_of, finish, most_live


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sums over one virtual stage."""

    forward: int
    backward: int
    gradient: int
    update: int
    static: int
    made: int
    activation: int
    working: int
    draining: int
    step: int
    inputs: int
    """Of a backward in two halves, the first; then the second, and what waits for it."""
    weights: int
    waiting: int
    unsummed: int
    """Gradients of weights that wait for the next microbatch."""


@dataclass
class Prices:
    """One layout's integers per layer, and the chunks summed from them so far."""

    layers: tuple[tuple[int, ...], ...]
    embedding: tuple[int, ...]
    head: tuple[int, ...]
    hop: int
    bucket: int
    tied_sync: int
    sync: int
    fixed: int
    receive: int
    output: int
    """What the last stage keeps of each microbatch until the step ends."""
    capacity: int
    policies: tuple[str, ...]
    """Recomputation in the order of its rows: kept, working, extra time of each."""
    late: tuple[tuple[int, int], ...] = ()
    """Per cut between layers, what its transfers take beyond ``hop``."""
    waiting: tuple[str, ...] = ()
    """Schedules in which a rank waits until what it sends has arrived."""
    put_off: tuple[int, int, int] = (0, 0, 0)
    """Of the last stage's backward: in how many microbatches at most a part waits, for how long it
    runs and what it reads."""
    blocks_stay: bool = False
    """Whether what a layer does not keep stays cached beside the loss."""
    ends: Ends | None = None
    """Parts of embedding and head that every rank has."""
    shares: tuple[tuple[int, ...], ...] = ()
    """As ``layers``, run by all stages at once, on a share of the batch each."""
    chunks: dict[tuple[object, ...], Chunk] = field(default_factory=dict)

    def key(self) -> tuple[object, ...]:
        """Everything that defines the problem."""
        return (self.layers, self.embedding, self.head, self.hop, self.bucket, self.tied_sync,
                self.sync, self.fixed, self.receive, self.output, self.capacity, self.late,
                self.waiting, self.put_off, self.blocks_stay, self.ends, self.shares)  # fmt: skip


@dataclass
class Answer:
    """The optimum, or ``time`` None where nothing fits."""

    time: int | None = None
    layout: Layout | None = None
    sizes: tuple[int, ...] = ()
    options: tuple[Option, ...] = ()
    round_size: int = 0
    uniform_time: int | None = None
    """The best step with equal layers per virtual stage and one recompute mode for all layers."""
    layouts: int = 0
    completions: int = 0
    """Completions that were looked at, in full or in part."""


def _configs(layouts: Sequence[Layout]) -> Configs:
    def column(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return np.array([getattr(x, name) for x in layouts], dtype=np.int64)

    return Configs(
        microbatch=column("microbatch"), tp=column("tp"), cp=column("cp"),
        cp_kind=np.array(
            [CP_KINDS.index(x.cp_kind) + (5 * x.cp_inner if x.cp_kind in CP_KINDS[3:] else 0)
             for x in layouts],
            dtype=np.int64,
        ),
        ep=column("ep"), etp=column("etp"), sequence_parallel=column("sp").astype(bool),
        dp_replicate=column("dp_replicate"), dp_shard=column("dp_shard"), pp=column("pp"),
        zero_stage=column("zero"), reshard=column("reshard"),
    )  # fmt: skip


def _usable(request: Request) -> int:
    """Most bytes of a prediction that fit: the device's memory is that and the margin on it."""
    memory = request.capacity_bytes or int(request.machine.device.memory_capacity.si)
    margin = request.job.memory_margin
    return memory if not margin else int(memory / (1 + Fraction(str(margin))))


def price_all(request: Request, layouts: Sequence[Layout]) -> list[Prices]:
    """Prices of each layout."""
    tables = price_configs(
        request.workload, request.machine, _configs(layouts), reserve_bytes=request.reserve_bytes,
        capacity_bytes=_usable(request),
    )  # fmt: skip
    return [_take(request, tables, index) for index in range(len(layouts))]


def priced_alone(request: Request, layout: Layout) -> Prices:
    """Prices of one layout by itself."""
    return price_all(request, [layout])[0]


def _take(request: Request, tables: PricedConfigs, index: int) -> Prices:
    rows = {
        name: tuple(table[:, index].tolist())
        for name, table in zip(tables.kind_names, tables.kinds, strict=True)
    }
    apart = {
        name: tuple(table[:, index].tolist())
        for name, table in zip(tables.kind_names, tables.outside, strict=False)
    }
    return Prices(
        shares=tuple(apart[name] for name in request.workload.layers if apart),
        layers=tuple(rows[name] for name in request.workload.layers),
        embedding=tuple(tables.embedding[:, index].tolist()),
        head=tuple(tables.head[:, index].tolist()),
        hop=int(tables.hop_ns[index]),
        bucket=int(tables.bucket_ns[index]),
        tied_sync=int(tables.tied_sync_ns[index]),
        sync=int(tables.sync_ns[index]),
        fixed=int(tables.fixed_bytes[index]),
        receive=int(tables.receive_bytes[index]),
        output=int(tables.output_bytes[index]),
        capacity=tables.capacity_bytes,
        policies=tables.policies,
        late=tuple((int(on[index]), int(back[index])) for on, back in tables.late),
        waiting=request.stack.blocking_transfers,
        put_off=_put_off(request, tables, index),
        blocks_stay=request.stack.idle_forward
        and not (request.job.loss == "chunked" and request.stack.loss_chunks > 1),
        ends=ends_of(tables, index),
    )


def _put_off(request: Request, tables: PricedConfigs, index: int) -> tuple[int, int, int]:
    most, found = request.stack.deferred_head_gradients, tables.put_off
    if not most or found is None or not found.each_ns[index]:
        return 0, 0, 0
    return most, int(found.each_ns[index]), int(found.each_bytes[index])


def waiting_products(prices: Prices, x: Layout, m: int) -> tuple[int, int, int]:
    """In how many microbatches of a step the product waits; its time and its operands."""
    most, each, operands = prices.put_off
    if x.schedule not in ("1f1b", "interleaved"):
        return 0, 0, 0
    return min(most, m), each, operands


def sum_chunk(
    prices: Prices, start: bool, end: bool, many: bool, first: int, size: int, option: Option,
    *, halves: bool, stays: int = 0,
) -> Chunk:  # fmt: skip
    """A virtual stage of ``size`` layers from ``first`` on; ``start`` and ``end`` of the model,
    ``many`` pipeline ranks, a backward in ``halves``. ``stays``: of what the head kept, what its
    last backward leaves."""
    key = (start, end, many, first, size, option, halves, stays)
    if key in prices.chunks:
        return prices.chunks[key]
    mode, limit = option
    forward = backward = gradient = update = static = activation = working = made = step = 0
    draining = sent = behind = cached = weights = waiting = 0
    unsummed = left = 0
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
        forward += row[Field.FORWARD]
        backward += row[Field.BACKWARD] + more
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
    together = int(mode.split(":")[1]) if mode.startswith("full:") else 1
    if together > 1 and size:
        parts = [row[len(Field) + 3 * prices.policies.index(mode)]
                 for row in prices.layers[first : first + size]]  # fmt: skip
        activation += max(parts) * (math.ceil(size / together) * together - size)
    for row in ([prices.embedding] if start else []) + ([prices.head] if end else []):
        forward += row[Field.FORWARD]
        backward += row[Field.BACKWARD]
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
    working, draining = working + sent, draining + behind
    # While a layer's backward runs, what the head kept is gone; at the embedding's, everything is.
    if end:
        loss = prices.head[Field.WORK_NONE] + (cached if prices.blocks_stay else 0)
        working = max(working - prices.head[Field.ACT_NONE] + stays, loss)
        draining += stays
    if start:
        short = prices.embedding[Field.WORK_NONE]
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
        backward - weights, weights, max(waiting, 0), unsummed,
    )  # fmt: skip
    prices.chunks[key] = chunk
    return chunk


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
    together = int(mode.split(":")[1]) if mode.startswith("full:") else 1
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
            stays=operands if end and count == m else 0,
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


class BruteForce:
    """Looks at everything and remembers the best."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.answer = Answer()
        self.choices = recompute_choices(request)

    def run(self) -> Answer:
        layouts = list(every_layout(self.request))
        self.answer.layouts = len(layouts)
        if not layouts:
            return self.answer
        prices = self.prices(layouts)
        # Short ones first, so that later ones end early; the order changes nothing else.
        layouts.sort(key=lambda x: work_per_rank(self.request, x, prices[x.config()]))
        for x in layouts:
            self._layout(x, prices[x.config()])
        return self.answer

    def prices(self, layouts: Sequence[Layout]) -> dict[tuple[object, ...], Prices]:
        """Prices by :meth:`Layout.config`."""
        distinct = list({x.config(): x for x in layouts}.values())
        priced = price_all(self.request, distinct)
        return {x.config(): each for x, each in zip(distinct, priced, strict=True)}

    def best_of(self, x: Layout, prices: Prices) -> int | None:
        """The best step of one layout by itself."""
        self.answer = Answer(layouts=1)
        self._layout(x, prices)
        return self.answer.time

    def _microbatches(self, x: Layout) -> int:
        return self.request.global_batch // (x.dp * x.microbatch)

    def _layout(self, x: Layout, prices: Prices) -> None:
        stack, layers = self.request.stack, self.request.model.layer_count
        m = self._microbatches(x)
        free = self.request.free_stages
        if x.outside:
            for option in self.choices:
                self._with_outside(x, prices, m, option)
            return
        for sizes in partitions(layers, x.schedule, x.pp, x.vpp, stack.uneven_stages, free):
            height = max(sizes)
            most = max(limit for _, limit in self.choices)
            useful = [o for o in self.choices if o[1] <= height or o[1] == most]
            if x.vpp > 1 or x.schedule.startswith(GIVEN):
                useful = [o for o in useful if "/" not in o[0]]
            if splits(x.schedule):
                useful = [o for o in useful if o[0] in ("none", "full")]
            if len(set(sizes)) == 1:
                for option in useful:
                    if not option[1] or option[1] >= height:
                        self._uniform(x, prices, m, sizes, option)
            # Ranks of several chunks have one option for all, whatever the stack allows.
            if stack.recompute_per_stage and x.vpp == 1 and not x.schedule.startswith(GIVEN):
                for options in product(useful, repeat=x.pp):
                    self._completion(x, prices, m, sizes, options)
            else:
                for option in useful:
                    self._completion(x, prices, m, sizes, (option,) * x.pp)

    def _with_outside(self, x: Layout, prices: Prices, m: int, option: Option) -> None:
        """Equal stages of what is in the pipeline; one mode for all layers."""
        before, inside, behind = parts(self.request, x.outside)
        sizes = [len(inside) // (x.pp * x.vpp)] * (x.pp * x.vpp)
        options = (option,) * x.pp
        self.answer.completions += 1
        apart = apart_of(prices, before, behind, option[0])
        chunks = chunks_of(prices, x, m, sizes, options, inside.start)
        for rank in range(x.pp):
            own = [chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)]
            if rank_peak(prices, x, m, rank, own, apart=apart) > prices.capacity:
                return
        time = step_time(prices, x, m, chunks, sizes) + apart.time
        if self.answer.time is None or time < self.answer.time:
            self.answer.time, self.answer.layout = time, x
            self.answer.sizes, self.answer.options = tuple(sizes), options
            self.answer.round_size = 0

    def _uniform(
        self, x: Layout, prices: Prices, m: int, sizes: Sequence[int], option: Option
    ) -> None:
        for size in rounds(self.request, x):
            time = self._evaluate(
                x, prices, m, sizes, (option,) * x.pp, self.answer.uniform_time, size
            )
            if time is not None:
                self.answer.uniform_time = time

    def _completion(
        self, x: Layout, prices: Prices, m: int, sizes: Sequence[int], options: tuple[Option, ...]
    ) -> None:
        for size in rounds(self.request, x):
            self.answer.completions += 1
            time = self._evaluate(x, prices, m, sizes, options, self.answer.time, size)
            if time is not None:
                self.answer.time, self.answer.layout = time, x
                self.answer.sizes, self.answer.options = tuple(sizes), options
                self.answer.round_size = size

    def _evaluate(
        self, x: Layout, prices: Prices, m: int, sizes: Sequence[int],
        options: tuple[Option, ...], best: int | None, size: int,
    ) -> int | None:  # fmt: skip
        """The step's time where it fits and is below ``best``."""
        chunks = chunks_of(prices, x, m, sizes, options)
        for rank in range(x.pp):
            own = [chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)]
            if best is not None and m * sum(c.forward + c.backward for c in own) >= best:
                return None
            if rank_peak(prices, x, m, rank, own, size) > prices.capacity:
                return None
        time = step_time(prices, x, m, chunks, sizes, size)
        return time if best is None or time < best else None


def brute_force(request: Request) -> Answer:
    """The optimum of ``request`` over everything that fits."""
    return BruteForce(request).run()
