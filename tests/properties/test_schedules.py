"""Schedules, stages and surrogates on random leaves and completions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.layout import (
    CHUNKED,
    DELAYED,
    IN_ROUNDS,
    NAMED,
    OVER_PIPELINE,
    SPLIT_BACKWARD,
    V_SHAPED,
    Schedule,
    stage_of,
)
from cost_models.leaf import (
    Completion,
    Leaf,
    stage_costs,
)
from cost_models.orders import rank_order
from cost_models.partitions import interleaved_bounds
from cost_models.peaks import peak_bytes
from cost_models.rounds import round_sizes
from cost_models.schedule import (
    Durations,
    beside_passes,
    live_at_first_backward,
    live_peaks,
    simulate,
)
from cost_models.step_time import simulate_step
from cost_models.surrogate import surrogate_ns
from tests.oracle.layouts import partitions
from tests.oracle.leaves import draw_leaf, draw_options
from tests.oracle.timeline import (
    WORKS,
    finish_times,
    live_vectors,
    most_live_bytes,
    rank_actions,
)

Shape = tuple[Schedule, int, int, int, int]
"""Schedule, pp, vpp, microbatches, microbatches of a round (0: without rounds)."""


@st.composite
def shapes(draw: st.DrawFn, *, chunked: bool = False) -> Shape:
    # Those whose ranks share the vocabulary: tests/unit/test_vocabulary_parallel.py.
    plain = [name for name in NAMED if name not in OVER_PIPELINE]
    schedule = draw(st.sampled_from(CHUNKED if chunked else plain))
    if schedule not in CHUNKED:
        return schedule, draw(st.integers(1, 6)), 1, draw(st.integers(1, 14)), 0
    pp = draw(st.integers(2, 6))
    vpp = 2 if schedule in V_SHAPED else draw(st.integers(2, 4))
    m = draw(st.integers(2 * pp if schedule == "dualpipev" else 1, 4 * pp))
    size = draw(st.sampled_from(round_sizes("any", pp, m))) if schedule in IN_ROUNDS else 0
    return schedule, pp, vpp, m, size


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes())
def test_orders_run_every_action_once(shape: Shape) -> None:
    schedule, pp, vpp, m, size = shape
    for rank in range(pp):
        order = [
            (WORKS[a.work], stage_of(schedule, pp, rank, a.chunk), a.microbatch)
            for a in rank_order(schedule, pp, vpp, m, rank, size)
        ]
        assert order == rank_actions(schedule, pp, vpp, m, rank, size)
        done = [(work, s, i) for work, s, i in order if work in "FB"]
        done += [("B", s, i) for work, s, i in order if work == "I" and ("W", s, i) in order]
        assert len(set(done)) == len(done) == 2 * vpp * m
        assert len(order) == len(set(order))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes(), st.integers(0, 2**32 - 1))
def test_simulation_is_the_longest_path(shape: Shape, seed: int) -> None:
    schedule, pp, vpp, m, size = shape
    rng = Random(seed)
    forward = [rng.randint(0, 50) for _ in range(pp * vpp)]
    backward = [rng.randint(0, 90) for _ in range(pp * vpp)]
    hop: int | list[tuple[int, int]] = rng.choice((0, 1, 30))
    if rng.random() < 0.5:
        hop = [(rng.randint(0, 30), rng.randint(0, 30)) for _ in range(pp * vpp)]
    inputs, weights = ([rng.randint(0, 50) for _ in range(pp * vpp)] for _ in range(2))
    if schedule in DELAYED and not isinstance(hop, int):
        hop = [(on, on) for on, _ in hop]
    each = zip(forward, backward, inputs, weights, strict=True)
    durations = [time for times in each for time in times]
    lags = hop
    if schedule in DELAYED:
        each_hop = [hop] * (pp * vpp) if isinstance(hop, int) else [on for on, _ in hop]
        lags = []
        for stage, own in enumerate(each_hop):
            here = forward[stage], backward[stage]
            longer = beside_passes(schedule, *here, own, (0, 0))
            lags.append((own + longer[2][0], own + longer[2][1]))
            if stage < pp * vpp - 1:
                forward[stage], backward[stage] = longer[:2]
    times = Durations(forward, backward, inputs, weights)
    timeline = simulate(schedule, pp, vpp, m, times, lags, size)
    assert list(timeline.finish_ns) == finish_times(schedule, pp, vpp, m, durations, hop, size)
    for rank in range(pp):
        assert timeline.busy_ns[rank] == sum(
            (forward, backward, inputs, weights)[WORKS.index(work)][stage]
            for work, stage, _ in rank_actions(schedule, pp, vpp, m, rank, size)
        )
        assert timeline.busy_ns[rank] <= timeline.finish_ns[rank]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes(), st.integers(0, 2**32 - 1))
def test_live_peaks_equal_a_walk(shape: Shape, seed: int) -> None:
    schedule, pp, vpp, m, size = shape
    rng = Random(seed)
    for rank in range(pp):
        listed = live_peaks(schedule, pp, vpp, m, rank, size)
        assert set(listed) <= set(live_vectors(schedule, pp, vpp, m, rank, size))
        width = 3 * vpp if schedule in SPLIT_BACKWARD else vpp
        for sizes in ([1] * width, [rng.randint(0, 9) for _ in range(width)]):
            most = max(sum(n * s for n, s in zip(v, sizes, strict=True)) for v in listed)
            assert most == most_live_bytes(schedule, pp, vpp, m, rank, sizes, size)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.integers(2, 8), st.integers(2, 5), st.integers(1, 40))
def test_longer_rounds_hold_no_less_at_the_first_backward(pp: int, vpp: int, m: int) -> None:
    for rank in range(pp):
        before = (0,) * vpp
        for size in round_sizes("any", pp, m):
            live = live_at_first_backward(pp, vpp, m, rank, size)
            assert all(a <= b for a, b in zip(before, live, strict=True))
            peaks = live_peaks("interleaved", pp, vpp, m, rank, size)
            assert any(all(a >= b for a, b in zip(p, live, strict=True)) for p in peaks)
            before = live


def completions(leaf: Leaf, rng: Random) -> list[Completion]:
    """A few completions, with one option for all virtual stages or one each."""
    layers = len(leaf.sequence)
    every = partitions(layers, leaf.schedule, leaf.pp, leaf.vpp, leaf.uneven)
    options = draw_options(rng, layers)
    found = []
    for sizes in rng.sample(every, min(4, len(every))):
        bounds = tuple(sum(sizes[:j]) for j in range(leaf.stages + 1))
        found.append(Completion(bounds, (rng.choice(options),) * leaf.stages))
        per_rank = [rng.choice(options) for _ in range(leaf.pp)]
        found.append(Completion(bounds, tuple(per_rank) * leaf.vpp))
    return found


@settings(deadline=None, derandomize=True, max_examples=400)
@given(shapes(), st.integers(1, 14), st.integers(0, 2**32 - 1))
def test_surrogate_is_at_most_the_simulated_step(shape: Shape, layers: int, seed: int) -> None:
    schedule, pp, vpp, m, size = shape
    rng = Random(seed)
    leaf = draw_leaf(
        rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m, layers=layers, tight=False
    )
    leaf = replace(leaf, round_size=size)
    for completion in completions(leaf, rng):
        assert completion.bounds[0] == 0
        assert completion.bounds[-1] == layers
        ranks = stage_costs(leaf, completion)
        assert surrogate_ns(leaf, ranks) <= simulate_step(leaf, ranks).total_ns


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.sampled_from(("interleaved", "zbv")), st.integers(2, 6), st.integers(2, 4),
    st.integers(1, 30), st.booleans(),
)  # fmt: skip
def test_interleaved_bounds_partition_the_layers(
    schedule: Schedule, pp: int, vpp: int, layers: int, uneven: bool
) -> None:
    vpp = 2 if schedule in V_SHAPED else vpp
    leaf = draw_leaf(
        Random(layers), schedule=schedule, pp=pp, vpp=vpp, microbatches=pp, layers=layers,
        uneven=uneven, tight=False,
    )  # fmt: skip
    found = list(interleaved_bounds(leaf))
    sizes = [[b - a for a, b in itertools.pairwise(x)] for x in found]
    possible = uneven or layers % (pp * vpp) == 0
    expected = partitions(layers, schedule, pp, vpp, uneven) if possible else []
    assert sorted(sizes) == sorted(expected)
    assert all(min(each) >= 0 and sum(each) == layers for each in sizes)


def test_ranks_of_a_v_balance() -> None:
    """The first rank has embedding and head, so fewer layers than the others fit it best; with 32
    layers on two ranks these are 15 and 17, which chunks of one height do not make."""
    leaf = draw_leaf(Random(0), schedule="zbv", pp=2, vpp=2, microbatches=4, layers=32, tight=False)
    assert (0, 7, 15, 24, 32) in set(interleaved_bounds(leaf))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes(), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_a_stage_with_a_layer_more_never_needs_less(shape: Shape, layers: int, seed: int) -> None:
    schedule, pp, vpp, m, _ = shape
    rng = Random(seed)
    leaf = draw_leaf(
        rng, schedule=schedule, pp=pp, vpp=vpp, microbatches=m, layers=layers, tight=False
    )
    for option in draw_options(rng, layers):
        if vpp > 1:
            continue
        for rank in range(pp):
            first = rng.randrange(layers)
            last = rng.randint(first, layers - 1)
            smaller = _peak(leaf, rank, first, last, option)
            assert smaller <= _peak(leaf, rank, first, last + 1, option)
            if first:
                assert smaller <= _peak(leaf, rank, first - 1, last, option)


def _peak(leaf: Leaf, rank: int, first: int, last: int, option: tuple[str, int]) -> int:
    from cost_models.leaf import chunk_costs

    return peak_bytes(leaf, rank, (chunk_costs(leaf, rank, first, last, option),))  # type: ignore[arg-type]
