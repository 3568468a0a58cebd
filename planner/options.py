"""Which recomputation options of a leaf can matter."""

from __future__ import annotations

import numpy as np

from cost_models.layout import ALL_AT_ONCE
from cost_models.leaf import Leaf, Recompute
from cost_models.recompute import group_of, in_parts, is_counted
from cost_models.step import Field

FEW = 16
"""Options below which looking at all of them takes no longer than ruling some out."""


def runnable(
    options: tuple[Recompute, ...], *, tp: int, sequence_parallel: bool
) -> tuple[Recompute, ...]:
    """``options`` less inputs in parts where no rank holds what another does too: the software
    refuses them there."""
    if tp > 1 and not sequence_parallel:
        return options
    return tuple(option for option in options if not in_parts(option[0]))


def undominated(leaf: Leaf, options: tuple[Recompute, ...]) -> tuple[Recompute, ...]:
    """``options`` less those of whole stages than which another costs no more of anything.

    In every kind of layer the other keeps no more, works with no more and repeats no more, and
    sends no more to hosts that hold state. A step's
    time and a rank's peak grow with each of these, so a completion with the first is never better
    than the same one with the other. Of equals the first stays; numbers of whole layers all do.
    What runs several layers again together keeps more where a stage is no multiple of them: it
    rules nothing out.
    """
    whole = [option for option in options if not is_counted(option[0])]
    if len(whole) < FEW:
        return options
    fields = [leaf.modes[mode] for mode, _ in whole]
    costs = np.array([[kind[row] for kind in leaf.kinds for row in rows] for rows in fields])
    if leaf.hosts is not None:
        sent = np.array([leaf.hosts.of_mode(mode) for mode, _ in whole])
        costs = np.concatenate([costs, sent], axis=1)
    alone = np.array([group_of(mode) == 1 for mode, _ in whole])
    dropped: set[Recompute] = set()
    for index, option in enumerate(whole):
        no_more = np.all(costs <= costs[index], axis=1)
        equal = np.all(costs == costs[index], axis=1)
        equal[:index] = False
        if np.any(no_more & ~equal & alone):
            dropped.add(option)
    return tuple(option for option in options if option not in dropped)


def with_room(leaf: Leaf, options: tuple[Recompute, ...]) -> tuple[Recompute, ...]:
    """``options`` less those of whole stages for which all ranks together have too little memory.

    Each rank has its layers' state, what they keep of one microbatch, or of all where all forwards
    come first, and beside that what one of its layers works with: the most demanding one where a
    rank holds them all, the least where each holds some.
    """
    whole = [option for option in options if not is_counted(option[0])]
    if len(whole) < FEW:
        return options
    kinds = [np.array(kind) for kind in leaf.kinds]
    layers = [leaf.sequence.count(index) for index in range(len(kinds))]
    kept, working = (
        np.array([kind[[getattr(leaf.modes[mode], name) for mode, _ in whole]] for kind in kinds])
        for name in ("kept", "working")
    )
    alive = leaf.microbatches if leaf.schedule in ALL_AT_ONCE else 1
    if leaf.outside is None and (leaf.vpp == 1 or (not leaf.uneven and len(kinds) == 1)):
        # Of several chunks, alike, these keep as many passes of the whole rank.
        alive += leaf.idle_passes // leaf.vpp
    need = sum(
        count * (kind[Field.STATIC] + alive * each)
        for count, kind, each in zip(layers, kinds, kept, strict=True)
    )
    if leaf.pp == 1:
        need = need + np.max(working, axis=0)
    elif not leaf.uneven:
        need = need + leaf.pp * np.min(working, axis=0)
    room = leaf.pp * (leaf.capacity_bytes - leaf.fixed_bytes)
    dropped = {option for option, most in zip(whole, need > room, strict=True) if most}
    return tuple(option for option in options if option not in dropped)
