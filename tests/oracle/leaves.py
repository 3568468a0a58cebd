"""Random leaves: integers per layer, a schedule, and a memory that may bind."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from cost_models.deferral import Deferral
from cost_models.layout import Schedule
from cost_models.leaf import Completion, Leaf, Recompute, Row, stage_costs
from cost_models.peaks import peaks
from cost_models.recompute import mode_rows
from cost_models.step import Field
from tests.rows import POLICIES


def draw_row(rng: Random, scale: int = 1000) -> Row:
    """Prices of one layer: recomputation keeps less, works longer and needs more room meanwhile."""

    def up_to(limit: int) -> int:
        return rng.randrange(limit + 1)

    none = up_to(4 * scale)
    selective = up_to(none)
    full = up_to(selective)
    working = up_to(scale // 2)
    places = mode_rows(POLICIES)
    row = [0] * (len(Field) + 3 * len(POLICIES))
    forward = up_to(scale)
    row[Field.FORWARD], row[Field.BACKWARD] = forward, up_to(2 * scale)
    less = up_to(forward // 2)
    more = less + up_to(forward)
    row[Field.WEIGHT_BACKWARD] = up_to(row[Field.BACKWARD])
    row[Field.DEFERRED] = up_to(2 * scale) - scale
    # Not drawn, so that what is stays what it was.
    row[Field.WEIGHT_PASSES] = forward % 10
    row[Field.DEFERRED_AGAIN] = max(row[Field.DEFERRED], 0) + none // 3
    row[Field.LEFT_AGAIN] = row[Field.WEIGHT_PASSES] * (none // 2)
    row[Field.LATE_GRADIENTS] = rng.choice((0, up_to(scale)))
    row[Field.GRADIENT], row[Field.PARAMETER] = up_to(scale), up_to(scale)
    row[Field.OPTIMIZER] = up_to(scale)
    row[Field.STATIC], row[Field.NEW_GRADIENTS] = 1 + up_to(scale), up_to(scale // 3)
    row[Field.IN_FLIGHT] = rng.choice((0, up_to(scale)))
    row[Field.UPDATE_BYTES] = rng.choice((0, up_to(scale)))
    row[Field.ACT_NONE], row[Field.WORK_NONE] = none, working
    for name, kept, extra in (("selective", selective, less), ("full", full, more)):
        rows = places[name]
        row[rows.kept], row[rows.working], row[rows.extra] = kept, working + none - kept, extra
    return tuple(row)


def draw_leaf(
    rng: Random, *, schedule: Schedule, pp: int, vpp: int, microbatches: int, layers: int,
    uneven: bool = True, tight: bool = True,
) -> Leaf:  # fmt: skip
    """A leaf with one to three kinds of layers; ``tight`` memory may refuse some completions."""
    kinds = rng.randint(1, min(3, layers))
    cuts = sorted(rng.sample(range(1, layers), kinds - 1)) if kinds > 1 else []
    sequence = tuple(sum(position >= cut for cut in cuts) for position in range(layers))
    scale = rng.choice((10, 1000, 100_000))
    sends = draw_sends(rng, layers, scale) if pp > 1 else ()
    free = Leaf(
        schedule=schedule, pp=pp, vpp=vpp, microbatches=microbatches, sequence=sequence,
        kinds=tuple(draw_row(rng, scale) for _ in range(kinds)),
        embedding=draw_row(rng, rng.choice((scale, 4 * scale))),
        head=draw_row(rng, rng.choice((scale, 4 * scale))),
        hop_ns=0 if sends else rng.choice((0, scale // 10, scale)),
        late=() if sends else draw_late(rng, layers, scale), sends=sends,
        bucket_ns=rng.choice((0, scale, 20_000 * scale)), tied_sync_ns=rng.choice((0, scale)),
        sync_ns=rng.choice((0, scale)),
        fixed_bytes=scale, capacity_bytes=1 << 50, uneven=uneven, policies=POLICIES,
        idle_forward=rng.random() < 0.5,
    )  # fmt: skip
    free = replace(free, deferral=deferral_of(free))
    if not tight:
        return free
    height = -(-layers // free.stages)
    bounds = [min(layers, height * j) for j in range(free.stages + 1)]
    bounds[-1] = layers
    even = Completion(tuple(bounds), (("none", 0),) * free.stages)
    need = max(peaks(free, stage_costs(free, even)))
    capacity = int(need * rng.uniform(0.6, 1.1))
    return Leaf(**{**_fields(free), "capacity_bytes": capacity})  # type: ignore[arg-type]


def deferral_of(leaf: Leaf) -> Deferral:
    """Half of the pipelines that can put a part of the head's backward off."""
    backward, static = leaf.head[Field.BACKWARD], leaf.head[Field.STATIC]
    if leaf.pp == 1 or leaf.schedule not in ("1f1b", "interleaved") or static % 2:
        return Deferral()
    # Not drawn, so that what is stays what it was.
    count = min(leaf.microbatches, 1 + static // 2 % (leaf.microbatches + 3))
    return Deferral(count, backward // (1 + static % 3), static % (leaf.head[Field.ACT_NONE] + 1))


def draw_late(rng: Random, layers: int, scale: int) -> tuple[tuple[int, int], ...]:
    """What the transfer at each cut takes beyond the least; nothing for most leaves."""
    if rng.random() < 0.6:
        return ()
    most = rng.choice((scale // 10, scale, 3 * scale))
    return tuple((rng.randint(0, most), rng.randint(0, most)) for _ in range(layers + 1))


def draw_sends(rng: Random, layers: int, scale: int) -> tuple[tuple[int, int], ...]:
    """For how long a rank waits for what it sends at each cut; half of the leaves do not wait."""
    if rng.random() < 0.5:
        return ()
    least, more = rng.choice((0, scale // 10, 2 * scale)), rng.choice((0, 0, scale))
    draw = [(least + rng.randint(0, more), least + rng.randint(0, more)) for _ in range(layers + 1)]
    return tuple(draw)


def _fields(leaf: Leaf) -> dict[str, object]:
    return {name: getattr(leaf, name) for name in Leaf.__dataclass_fields__}


def draw_options(rng: Random, layers: int) -> tuple[Recompute, ...]:
    """Some modes and counts, in ascending order of time."""
    options: list[Recompute] = []
    if rng.random() < 0.8:
        options.append(("none", 0))
    if rng.random() < 0.4:
        options.append(("selective", 0))
    if rng.random() < 0.7 or not options:
        options += [("full", count) for count in range(1, layers + 1) if rng.random() < 0.6]
        options.append(("full", layers + 1))
    return tuple(options)
