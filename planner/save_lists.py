"""Lists of a layer's outputs that stay while the rest runs again: their names, and all of a stack.

A list of one's own is ``custom:`` and names joined by ``+``; ``NAME@host`` waits on the host. A
name that stands for several tensors (``qkv``) is written where all of them are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, combinations, product
from typing import TypeAlias

from cost_models.graph import LayerKind
from cost_models.layout import OutputKind, RecomputeMode, RecomputePolicy
from cost_models.named_outputs import (
    LAYER_INPUT,
    PARTS,
    expanded,
    no_better,
    pieces,
    unneeded,
)
from cost_models.ops import Attention, Op
from hardware_profiles.stack_words import OutputName, SavedOp, SaveLists
from planner.errors import InputError, did_you_mean
from planner.shards import ONE

CUSTOM = "custom"
HOST = "@host"


def words(lists: SaveLists) -> tuple[str, ...]:
    """Everything that a list of one's own may name."""
    parts = tuple(part for name in lists.separate for part in PARTS[name])
    return (*lists.outputs, *parts, *lists.latents, *(f"{name}{HOST}" for name in lists.hosted))


def read(mode: RecomputeMode, lists: SaveLists, stack_name: str) -> RecomputePolicy:
    """The list that ``mode`` names; :class:`InputError` where the stack has none such."""
    asked = mode.removeprefix(f"{CUSTOM}:").split("+")
    known = words(lists)
    hosted_parts = {f"{part}{HOST}" for name in lists.hosted for part in PARTS.get(name, ())}
    hosted_parts &= {f"{part}{HOST}" for name in lists.separate for part in PARTS[name]}
    for word in asked:
        if word not in known and word not in hosted_parts:
            raise InputError(
                f"recompute is {mode!r}; {stack_name} keeps any of {', '.join(known)}",
                hint=did_you_mean(word, list(known)),
            )
    kept = expanded(word for word in asked if not word.endswith(HOST))
    hosted = expanded(word.removesuffix(HOST) for word in asked if word.endswith(HOST))
    if kept & hosted:
        both = ", ".join(sorted(kept & hosted))
        raise InputError(f"recompute is {mode!r}: {both} both on the device and on the host")
    return RecomputePolicy(name_of(kept, hosted), keeps=kept | hosted, offloads=hosted)


def name_of(kept: frozenset[OutputKind], hosted: frozenset[OutputKind]) -> RecomputeMode:
    """What a list is called: joined names where all of their tensors are treated alike."""
    found: list[str] = []
    for tensors, where in ((kept, ""), (hosted, HOST)):
        left: set[str] = set(tensors)
        for name, parts in PARTS.items():
            if left.issuperset(parts):
                left = (left - set(parts)) | {name}
        found += (f"{name}{where}" for name in left)
    return f"{CUSTOM}:{'+'.join(sorted(found))}"


def searched(lists: SaveLists, kinds: Iterable[LayerKind]) -> Iterator[RecomputeMode]:
    """Lists that the search looks at.

    All that keep outputs and parts of them on the device, and all that send some outputs to the
    host and keep others: whole ones, or either half of a product of two. Of two tensors that a list
    may keep either of, the one that spares no more is kept where the other is.
    """
    for n in range(1, len(lists.outputs) + 1):
        for kept in combinations(lists.outputs, n):
            yield f"{CUSTOM}:{'+'.join(kept)}"
    pairs = _no_better_anywhere(tuple(kinds))
    alone = [name for name in lists.outputs if name not in lists.separate]
    apart = [part for name in lists.separate for part in PARTS[name]]
    if apart:
        for n in range(1, len(apart) + len(alone) + 1):
            for parts in combinations((*alone, *apart), n):
                if all(one not in parts or other in parts for one, other in pairs):
                    yield name_of(expanded(parts), frozenset())
    yield from _with_hosts(lists, pairs)


Pairs: TypeAlias = frozenset[tuple[OutputKind, OutputKind]]


def _with_hosts(lists: SaveLists, pairs: Pairs) -> Iterator[RecomputeMode]:
    places = [_places(name, lists, pairs) for name in lists.outputs]
    if LAYER_INPUT in lists.hosted:
        places.append(("", f"{LAYER_INPUT}{HOST}"))
    for choice in product(*places):
        names = [name for name in choice if name]
        if any(HOST in name for name in names):
            yield f"{CUSTOM}:{'+'.join(names)}"


def _places(name: OutputName | SavedOp, lists: SaveLists, pairs: Pairs) -> tuple[str, ...]:
    """Where an output may be in a list that sends some to the host: nowhere, on the device, there;
    and its halves apart. Where one half spares no more than the other, it is not kept without the
    other, and of the two on different sides it is the one on the host: as many bytes on each."""
    if name not in lists.hosted:
        return "", name
    whole = ("", name, f"{name}{HOST}")
    halves = PARTS.get(name, ())
    if name not in lists.separate or len(halves) != 2:
        return whole
    first, second = halves
    apart = [first, f"{first}{HOST}", f"{first}+{second}{HOST}"]
    if (second, first) not in pairs:
        apart += [second, f"{second}{HOST}", f"{first}{HOST}+{second}"]
    return (*whole, *apart)


def _no_better_anywhere(kinds: tuple[LayerKind, ...]) -> Pairs:
    """Pairs of tensors of which the first spares no more than the second in any kind of layer."""
    of_kinds = [(no_better(kind.ops(ONE)), outputs_of(kind)) for kind in kinds]
    pairs = frozenset(chain.from_iterable(found for found, _ in of_kinds))
    return frozenset(
        pair
        for pair in pairs
        if all(pair in found or pair[0] not in outputs for found, outputs in of_kinds)
    )


def outputs_of(kind: LayerKind) -> set[OutputKind]:
    """Outputs by which lists of what is kept differ for a layer: those that a gradient needs."""
    ops = kind.ops(ONE)
    last = unneeded(ops)
    needed: tuple[Op, ...] = tuple(op for op in ops if op.name not in last)
    found: set[OutputKind] = {piece.name for op in needed for piece in pieces(op, ops)}
    if any(isinstance(op, Attention) for op in ops):
        found.add("attention")
    return found | {LAYER_INPUT}
