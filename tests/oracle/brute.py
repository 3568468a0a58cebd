"""Brute force: every layout, partition and recomputation; no tables, bounds or solver.

Only the prices of one layer are the cost model's (nanoseconds and bytes per layer kind, from
``price_configs``): they define the problem. All layouts of an instance are priced in one call;
:func:`priced_alone` prices one of them by itself, and the tests compare the two. Stage sums,
memory, live activations, schedules and the search itself are written here a second time.

A branch is left only where a single rank's own work is no shorter than the best step so far, or
where a rank does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from planner.request import Request
from tests.oracle.brute_prices import Prices, price_all
from tests.oracle.brute_sums import (
    apart_of,
    chunks_of,
    rank_peak,
    step_time,
    work_per_rank,
)
from tests.oracle.host_memory import hosts_hold, padding_has_room
from tests.oracle.layouts import (
    Layout,
    Option,
    every_layout,
    partitions,
    parts,
    recompute_choices,
    rounds,
)
from tests.oracle.timeline import GIVEN, held, splits


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
            if x.tp == 1 or x.sp:
                # No rank holds what another holds too: the software refuses to split it.
                useful = [o for o in useful if not o[0].startswith("partitioned")]
            if x.pp == 1:
                # Every layer outside a pipeline has a policy.
                useful = [o for o in useful if o[0] != "everything_saveable"]
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
        if not hosts_hold(self.request, x, sizes, options, m):
            return
        apart = apart_of(prices, before, behind, option[0])
        chunks = chunks_of(prices, x, m, sizes, options, inside.start)
        for rank in range(x.pp):
            own = [chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)]
            if rank_peak(prices, x, m, rank, own, apart=apart) > prices.capacity:
                return
        time = step_time(prices, x, m, chunks, sizes) + apart.time
        better = self.answer.time is None or time < self.answer.time
        if better and padding_has_room(self.request, x, option[0], m):
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
        if not hosts_hold(self.request, x, sizes, options, m):
            return None
        chunks = chunks_of(prices, x, m, sizes, options)
        for rank in range(x.pp):
            own = [chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)]
            if best is not None and m * sum(c.forward + c.backward for c in own) >= best:
                return None
            if rank_peak(prices, x, m, rank, own, size) > prices.capacity:
                return None
        time = step_time(prices, x, m, chunks, sizes, size)
        better = best is None or time < best
        return time if better and padding_has_room(self.request, x, options[0][0], m) else None


def brute_force(request: Request) -> Answer:
    """The optimum of ``request`` over everything that fits."""
    return BruteForce(request).run()
