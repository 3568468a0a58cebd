"""What recomputation costs and frees: one policy, three rows of a priced table.

A policy names modules whose forward is run again, or runs the whole layer again but for the ops of
a save list (``cost_models.layout.RecomputePolicy``). Time, kept bytes and working bytes all follow
from the modules of ops and saved tensors; nothing is stated per policy.

``full:N`` and ``partitioned:N`` keep one input for ``N`` consecutive layers of a stage and have all
of their tensors back at once. In the table a layer keeps its part of that input; what the last
group of a stage has beyond its layers' parts is added where the stage is known
(``cost_models.leaf``).

Where a stack can mix two modes in a virtual stage, ``A/B`` stands for A in so many of its first
layers and B in the rest; ``full`` is ``full/none``. A layout may name more of them, with numbers:
in ``A/3*B/C`` three layers in mode B follow those in A.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layer_times import LayerTimes
from cost_models.layout import RecomputeMode, RecomputePolicy
from cost_models.memory import Activations
from cost_models.step import Field


class ModeRows(NamedTuple):
    """Rows of a priced table for one mode."""

    kept: int
    working: int
    extra: int
    """Extra backward time."""


@lru_cache(maxsize=256)
def mode_rows(policies: tuple[RecomputeMode, ...]) -> dict[RecomputeMode, ModeRows]:
    """The rows of every mode in a table priced for ``policies``, ``none`` first."""
    result = {"none": ModeRows(Field.ACT_NONE, Field.WORK_NONE, Field.EXTRA_NONE)}
    for index, name in enumerate(policies):
        first = len(Field) + 3 * index
        result[name] = ModeRows(first, first + 1, first + 2)
    return result


def row_count(policies: tuple[RecomputePolicy, ...]) -> int:
    """Rows of a table priced for ``policies``."""
    return len(Field) + 3 * len(policies)


def write_modes(
    rows: Int64, kind: LayerKind, shard: Shard, times: LayerTimes,
    policies: tuple[RecomputePolicy, ...],
) -> None:  # fmt: skip
    """Fill the rows of ``none`` and of every policy."""
    places = mode_rows(tuple(policy.name for policy in policies))
    activations = Activations(kind, shard)
    rows[Field.ACT_NONE], rows[Field.WORK_NONE] = activations.under(None)
    rows[Field.EXTRA_NONE] = 0
    for policy in policies:
        kept, working, _ = places[policy.name]
        rows[kept], rows[working] = activations.under(policy)
        if policy.group > 1:
            rows[kept] = -(-rows[kept] // policy.group)
            rows[working] += (policy.group - 1) * rows[Field.ACT_NONE]
    if policies:
        rows[[places[policy.name].extra for policy in policies]] = times.recompute_ns(policies)


MIXED = "/"
"""Between the mode of a virtual stage's first layers and that of the rest."""
TIMES = "*"
"""Behind the number of layers of a mode between those two."""


@lru_cache(maxsize=4096)
def parts_of(mode: RecomputeMode) -> tuple[RecomputeMode, RecomputeMode]:
    """Modes of a virtual stage's first layers and of the rest; the same where all are alike."""
    names = names_of(mode)
    return names[0], names[-1]


@lru_cache(maxsize=4096)
def names_of(mode: RecomputeMode) -> tuple[RecomputeMode, ...]:
    """Modes of a virtual stage's layers from the first ones on, two at least."""
    if mode == "full":
        return "full", "none"
    front, *more = mode.split(MIXED)
    return front, *(part.rpartition(TIMES)[2] for part in more or [front])


def cuts_of(recompute: tuple[RecomputeMode, int], first: int, last: int) -> tuple[int, ...]:
    """Where layers ``first .. last - 1`` of a virtual stage go over from each mode to the next."""
    mode, limit = recompute
    if not is_counted(mode):
        return (last,)
    between = [int(part.partition(TIMES)[0]) for part in mode.split(MIXED)[1:-1]]
    return tuple(min(last, first + count) for count in accumulate((limit, *between)))


def counts_of(
    recompute: tuple[RecomputeMode, int], counts: tuple[tuple[int, ...], ...], first: int, last: int
) -> tuple[tuple[int, ...], ...]:
    """Of layers ``first .. last - 1``, how many of each kind are in each mode but the last; of
    ``counts[i][kind]`` among the first ``i``."""
    mode, limit = recompute
    found, start = [], counts[first]
    if TIMES not in mode:
        end = counts[min(last, first + limit) if is_counted(mode) else last]
        return (tuple([b - a for a, b in zip(start, end, strict=True)]),)
    for cut in cuts_of(recompute, first, last):
        end = counts[cut]
        found.append(tuple([b - a for a, b in zip(start, end, strict=True)]))
        start = end
    return tuple(found)


def shares_of(
    rows: dict[RecomputeMode, ModeRows], mode: RecomputeMode, counts: tuple[int, ...], total: int
) -> list[tuple[int, ModeRows]]:
    """Layers of one kind in each mode of a virtual stage, with the rows of that mode; ``counts`` of
    all modes but the last, which the rest of ``total`` have."""
    named = [rows[name] for name in names_of(mode)]
    return list(zip((*counts, total - sum(counts)), named, strict=True))


def is_counted(mode: RecomputeMode) -> bool:
    """Whether a mode comes with the number of a virtual stage's first layers that it changes."""
    return mode == "full" or MIXED in mode


@lru_cache(maxsize=256)
def group_of(mode: RecomputeMode) -> int:
    """Layers that a mode runs again together: N of ``full:N``, else 1; of a virtual stage with two
    modes, those at its front."""
    name, _, count = parts_of(mode)[0].partition(":")
    return int(count) if name in ("full", "partitioned") and count else 1


@lru_cache(maxsize=256)
def in_parts(mode: RecomputeMode) -> bool:
    """Whether tensor-parallel ranks keep parts of inputs: ``partitioned`` and ``partitioned:N``."""
    return mode.partition(":")[0] == "partitioned"


@lru_cache(maxsize=256)
def keeps_inputs(mode: RecomputeMode) -> bool:
    """Whether a mode keeps nothing but inputs of layers, which a job may send to the hosts."""
    return mode.partition(":")[0] in ("full", "partitioned", "tiled")


def move_checkpoints(
    rows: Int64, policies: tuple[RecomputePolicy, ...], bytes_per_s: float, *, waits: bool
) -> None:
    """Move the inputs that full recomputation keeps to the host.

    Two of them are on the device while one is on its way, and what of the way is longer than the
    layer's own pass is waited for; where each copy ``waits``, one is, and every pass waits.
    """
    places = mode_rows(tuple(policy.name for policy in policies))
    forward_ns, backward_ns = rows[Field.FORWARD].copy(), rows[Field.BACKWARD].copy()
    for policy in policies:
        if not keeps_inputs(policy.name):
            continue
        kept, working, extra = places[policy.name]
        size = rows[kept].copy()
        way = np.ceil(size / bytes_per_s * 1e9).astype(np.int64)
        if waits:
            passes = 2 * way
        else:
            passes = np.maximum(way - forward_ns, 0)
            passes += np.maximum(way - backward_ns - rows[extra], 0)
        rows[kept] = 0
        rows[working] += (1 if waits else 2) * size * policy.group
        rows[extra] += passes
