"""A leaf small enough to work out by hand: two ranks, two layers, a heavier last rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.host_room import HostRoom
from cost_models.leaf import (
    Completion,
    Leaf,
    Recompute,
    stage_costs,
)
from cost_models.partitions import interleaved_bounds
from cost_models.peaks import fits, host_bytes, hosts_hold, live_activations, peaks
from cost_models.step import Field
from cost_models.step_time import simulate_step
from cost_models.surrogate import surrogate_ns
from tests.rows import POLICIES, row

NONE: Recompute = ("none", 0)

LAYER = row(
    FORWARD=2, BACKWARD=4, GRADIENT=3, OPTIMIZER=4, PARAMETER=1, STATIC=50, ACT_NONE=8,
    WORK_NONE=7, selective=(5, 10, 1), full=(2, 13, 2),
)  # fmt: skip
LEAF = Leaf(
    schedule="1f1b",
    pp=2,
    vpp=1,
    microbatches=2,
    sequence=(0, 0),
    kinds=(LAYER,),
    embedding=row(STATIC=20, ACT_NONE=1),
    head=row(FORWARD=1, BACKWARD=1, GRADIENT=7, OPTIMIZER=6, STATIC=30, ACT_NONE=7, WORK_NONE=5),
    hop_ns=1,
    bucket_ns=10,
    tied_sync_ns=2,
    sync_ns=8,
    fixed_bytes=100,
    capacity_bytes=200,
    uneven=True,
    policies=POLICIES,
)
EVEN = Completion((0, 1, 2), (NONE, NONE))


def test_step_of_the_even_split() -> None:
    """Rank 0 takes 2 + 4, rank 1 (with the head) 3 + 5: the timeline of ``test_schedule`` ends at
    24 and 19.

    Gradients: 10 (bucket) + 3 (layer) + 2 (tied) = 15 on rank 0, and 7 more for the head, 22, on
    rank 1; the pipeline with its reduction ends at max(24 + 15, 19 + 22) = 41. Updates: 4 + 1 = 5
    and 5 + 6 = 11. Step: 41 + 11 + 8 = 60.
    """
    step = simulate_step(LEAF, stage_costs(LEAF, EVEN))
    assert step.timeline.finish_ns == (24, 19)
    assert (step.pipeline_ns, step.gradient_ns, step.update_ns) == (19, 22, 11)
    assert (step.critical_rank, step.update_rank) == (1, 1)
    assert step.total_ns == 60


def test_a_rank_that_waits_for_its_transfers() -> None:
    """Cuts of 1 ns on and 2 ns back: rank 0 takes 3 + 4, rank 1 (it ends the pipeline) 3 + 7.

    Rank 0 runs F0 0-3, F1 3-6; rank 1 F0 3-6, B0 6-13, F1 13-16, B1 16-23; rank 0 B0 13-17 and B1
    23-27. A timeline in which the transfers kept nobody busy would end at 25: rank 1 would be free
    for F1 at 12.
    """
    leaf = replace(LEAF, hop_ns=0, sends=((1, 2),) * 3)
    ranks = stage_costs(leaf, EVEN)
    assert simulate_step(leaf, ranks).timeline.finish_ns == (27, 23)
    assert surrogate_ns(leaf, ranks) <= simulate_step(leaf, ranks).total_ns
    free = replace(LEAF, hop_ns=1, late=((0, 1),) * 3)
    assert simulate_step(free, stage_costs(free, EVEN)).timeline.finish_ns == (25, 19)


def test_surrogate_of_the_even_split() -> None:
    """Z_1 = 2 x 8 = 16, ends_1 = 16 + 22 = 38.

    Rank 0: own work 2 x 6 = 12; nesting 6 + 2 + 16 = 24; one round trip (6 + 8 + 2) and one more
    backward 4: 20; the round trip and rank 1's work again: 16 + 8 = 24. So Z_0 = 24 and ends_0 =
    max(24 + 15, 2 + 1 + 38) = 41. With the update 11 and the norm 8: 60, here the exact step.
    """
    assert surrogate_ns(LEAF, stage_costs(LEAF, EVEN)) == 60


def test_surrogate_of_gpipe() -> None:
    """S_0 + 2 d + (m - 1) max w = 14 + 2 + 8 = 24 as well; with three microbatches 32, and rank 1
    alone 24 + 22 = 46: max(32 + 15, 3 + 46) + 11 + 8 = 68."""
    leaf = replace(LEAF, schedule="gpipe")
    assert surrogate_ns(leaf, stage_costs(leaf, EVEN)) == 60
    longer = replace(leaf, microbatches=3)
    ranks = stage_costs(longer, EVEN)
    assert surrogate_ns(longer, ranks) == simulate_step(longer, ranks).total_ns == 68


def test_memory_of_the_even_split() -> None:
    """Rank 0: 100 fixed + 70 static + 2 x (8 + 1) live + 7 working = 195.

    Rank 1: 100 + 80 + 1 x (8 + 7) + max(5 for the loss, 7 for the layer once the head's 7 are gone)
    = 200, just the capacity.
    """
    ranks = stage_costs(LEAF, EVEN)
    assert peaks(LEAF, ranks) == (195, 200)
    assert live_activations(LEAF, 0, ranks[0].chunks) == (18, (2,))
    assert fits(LEAF, ranks)
    assert not fits(replace(LEAF, capacity_bytes=199), ranks)


@pytest.mark.parametrize(
    ("recompute", "backward", "peak"),
    [
        # 100 + 70 + 2 x (5 + 1) + 10; backward 4 + 1.
        (("selective", 0), 5, 192),
        # 100 + 70 + 2 x (2 + 1) + 13; backward 4 + 2.
        (("full", 1), 6, 189),
        (("full", 2), 6, 189),
    ],
)
def test_recompute_on_rank_0(recompute: Recompute, backward: int, peak: int) -> None:
    ranks = stage_costs(LEAF, Completion((0, 1, 2), (recompute, NONE)))
    assert ranks[0].chunks[0].backward_ns == backward
    assert peaks(LEAF, ranks) == (peak, 200)


def test_full_recompute_of_the_first_of_two_layers() -> None:
    """Both layers on rank 0, the first recomputed: backward 2 x 4 + 2; activations 2 + 8 + 1.

    Peak: 100 + 120 + 2 x 11 + max(13, 7) = 255. Rank 1 keeps the head only: 100 + 30 + 7 + 5.
    """
    ranks = stage_costs(LEAF, Completion((0, 2, 2), (("full", 1), NONE)))
    assert ranks[0].chunks[0].backward_ns == 10
    assert ranks[0].chunks[0].activation_bytes == 11
    assert peaks(LEAF, ranks) == (255, 142)


@pytest.mark.parametrize(("room", "holds"), [(70, True), (69, False)])
def test_hosts_that_are_full_to_the_byte_hold_what_is_sent(room: int, holds: bool) -> None:
    """Two ranks of one device each on one node: layers send 10 each, the ends 20 and 30."""
    leaf = replace(LEAF, hosts=HostRoom((10,), 20, 30, (0,), room, 1, 2))
    ranks = stage_costs(leaf, EVEN)
    assert [host_bytes(leaf, rank, costs.chunks) for rank, costs in enumerate(ranks)] == [30, 40]
    assert hosts_hold(leaf, ranks) == holds


def test_one_rank_has_no_tied_reduction() -> None:
    """One rank: work 2 x (12 + 2) = 28, gradients 10 + 2 x 3 + 7, updates 2 x 5 + 6, norm 8."""
    leaf = replace(LEAF, pp=1)
    ranks = stage_costs(leaf, Completion((0, 2), (NONE,)))
    step = simulate_step(leaf, ranks)
    assert step.total_ns == 28 + 23 + 16 + 8 == surrogate_ns(leaf, ranks)


def test_interleaved_partitions() -> None:
    """Six layers in four virtual stages: heights of 2 lack two layers at the ends together,
    heights of 3 leave both ends empty; 4 would need eight in the middle."""
    leaf = replace(LEAF, schedule="interleaved", vpp=2, sequence=(0,) * 6)
    assert sorted(interleaved_bounds(leaf)) == [
        (0, 0, 2, 4, 6), (0, 0, 3, 6, 6), (0, 1, 3, 5, 6), (0, 2, 4, 6, 6)
    ]  # fmt: skip
    assert list(interleaved_bounds(replace(leaf, uneven=False))) == []
    even = replace(leaf, uneven=False, sequence=(0,) * 8)
    assert list(interleaved_bounds(even)) == [(0, 2, 4, 6, 8)]


def test_new_gradients_are_there_once_a_microbatch_is_done() -> None:
    """One rank, two layers making 9 each and the head 6: 24, and 30 for the update of the head.

    Static 100 + 150, live 2 x 8 + 1 + 7 and the loss's 5, or the layer's 7 - 7: 29. With two
    microbatches 250 + 24 + max(29, 30). With one the gradients follow the activations, the last
    layer's own not yet there: 250 + max(29, 24 + max(8 + 7 - 9, 30)).
    """
    layer, head = list(LAYER), list(LEAF.head)
    layer[Field.NEW_GRADIENTS], head[Field.NEW_GRADIENTS] = 9, 6
    head[Field.UPDATE_BYTES] = 30
    leaf = replace(LEAF, pp=1, kinds=(tuple(layer),), head=tuple(head))
    one = replace(leaf, microbatches=1)
    whole = Completion((0, 2), (NONE,))
    assert peaks(leaf, stage_costs(leaf, whole)) == (250 + 24 + 30,)
    assert peaks(one, stage_costs(one, whole)) == (250 + 24 + 30,)
    head[Field.UPDATE_BYTES] = 3
    two, one = (replace(each, head=tuple(head)) for each in (leaf, one))
    assert peaks(two, stage_costs(two, whole)) == (250 + 24 + 29,)
    assert peaks(one, stage_costs(one, whole)) == (250 + max(29, 24 + 8 + 7 - 9),)


def test_a_reduction_is_in_flight_while_the_unit_before_works() -> None:
    """One rank, two layers that reduce 20 bytes each and a head that reduces 6.

    Live 2 x 8 + 1 + 7; the head's activations, 7, are gone when a layer works with 7. Beside the
    last layer are the head's 6; beside the first one the last one's 20, without its 8 of
    activations: 250 + 24 - 7 + 7 + 12. With a head that reduces 15, 15 count. A layer that has
    nothing but the head behind it has the head's 6 beside it: 250 + 8 + 1 + 7 - 7 + 7 + 6 - 50.
    """
    layer, head = list(LAYER), list(LEAF.head)
    layer[Field.IN_FLIGHT], head[Field.IN_FLIGHT] = 20, 6
    leaf = replace(LEAF, pp=1, microbatches=1, kinds=(tuple(layer),), head=tuple(head))
    whole = Completion((0, 2), (NONE,))
    assert peaks(leaf, stage_costs(leaf, whole)) == (250 + 24 + 12,)
    alone = replace(leaf, sequence=(0,))
    shorter = peaks(alone, stage_costs(alone, Completion((0, 1), (NONE,))))
    assert shorter == (250 - LAYER[Field.STATIC] + 9 + 7 + 6,)
    head[Field.IN_FLIGHT] = 15
    leaf = replace(leaf, head=tuple(head))
    assert peaks(leaf, stage_costs(leaf, whole)) == (250 + 24 + 15,)
