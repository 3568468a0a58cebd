"""What a stage recomputes: as a user asks for it, as a plan states it, and read back from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cost_models.layout import RecomputeMode
from cost_models.leaf import Recompute
from cost_models.recompute import MIXED, group_of, in_parts, is_counted, parts_of
from hardware_profiles.schema import StackSpec
from planner.errors import InputError
from planner.plan import RecomputeLayers, Stage
from planner.recompute import named_policy
from planner.request import Request


def asked_recompute(name: str, layers: int | None, request: Request) -> Recompute:
    """What ``recompute`` and ``recompute_layers`` of a layout mean for every virtual stage.

    ``A/B`` is A in so many first layers and B in the rest, where the stack mixes modes; a mode of
    modules with a number of layers is then that mode there and none in the rest, and so are inputs
    in parts where full recomputation has a number.
    """
    stack, count = request.stack, request.model.layer_count if layers is None else layers
    front, mixed, rest = name.partition(MIXED)
    first = named_policy(front, stack)
    if mixed:
        second = named_policy(rest, stack)
        if not stack.recompute_mixed:
            raise InputError(
                f"recompute is {name!r}; {stack.name} runs all layers of a stage again in one way",
                hint=f"{first.name} or {second.name}",
            )
        named = second.keeps is None and (first.keeps is None or first.name == "full")
        if not named or not (first.name == "full" or first.modules > second.modules):
            raise InputError(
                f"recompute is {name!r}: the first layers run again all that the rest run again, "
                "and more",
                hint=f"{second.name}{MIXED}{first.name}, or either alone",
            )
        whole = (first.name, second.name) == ("full", "none")
        return "full" if whole else f"{first.name}{MIXED}{second.name}", count
    if first.name == "full":
        return "full", count
    if layers is not None and (
        (stack.recompute_mixed and first.modules) or _parts_of_some(first.name, stack)
    ):
        return f"{first.name}{MIXED}none", count
    return first.name, 0


def modes_of(recompute: Recompute, first: int, last: int) -> Iterator[tuple[int, RecomputeMode]]:
    """Layers ``first .. last - 1`` of a virtual stage with the mode of each."""
    mode, limit = recompute
    front, rest = parts_of(mode)
    upto = min(last, first + limit) if is_counted(mode) else last
    for place in range(first, last):
        yield place, front if place < upto else rest


def stated(
    chunks: Sequence[tuple[Recompute, int, int]], kinds: Sequence[str]
) -> tuple[RecomputeLayers, ...]:
    """A stage's recomputation in a plan, from that of its virtual stages and their layers: the
    mode of the first layers first."""
    counts: dict[tuple[str, str], int] = {}
    for recompute, first, last in chunks:
        for place, mode in modes_of(recompute, first, last):
            if mode != "none":
                key = kinds[place], mode
                counts[key] = counts.get(key, 0) + 1
    behind = {parts_of(mode)[1] for (mode, _), _, _ in chunks if is_counted(mode)}
    ordered = sorted(counts.items(), key=lambda item: item[0][1] in behind)
    return tuple(
        RecomputeLayers(kind=kind, mode=mode, layers=count) for (kind, mode), count in ordered
    )


def recompute_of(stage: Stage, request: Request) -> Recompute:
    """One option per stage, from what a plan states of it; numbers count layers at the front of
    each virtual stage."""
    totals: dict[str, int] = {}
    for part in stage.recompute:
        totals[part.mode] = totals.get(part.mode, 0) + part.layers
    if not totals:
        return "none", 0
    sizes = [chunk.layers[1] - chunk.layers[0] for chunk in stage.chunks]
    front, *rest = totals
    if front == "full" and not rest:
        return "full", _number(totals["full"], sizes)
    everywhere = not rest and totals[front] >= sum(sizes)
    if everywhere or not (request.stack.recompute_mixed or _parts_of_some(front, request.stack)):
        return front, 0
    if len(rest) > 1 or (rest and sum(totals.values()) != sum(sizes)):
        raise InputError(
            f"a stage of {sum(sizes)} layers recomputes {', '.join(totals)} in "
            f"{', '.join(map(str, totals.values()))} of them",
            hint="one mode in its first layers, and one other or none in all the rest",
        )
    return f"{front}{MIXED}{rest[0] if rest else 'none'}", _number(totals[front], sizes)


def _parts_of_some(mode: RecomputeMode, stack: StackSpec) -> bool:
    """Whether a mode keeps inputs in parts and may do so in some layers of a virtual stage, as full
    recomputation may (Megatron-Core's ``block``): priced where a layout says it, and not searched,
    since one layer more in whole inputs takes next to no longer."""
    return stack.recompute_layer_count and in_parts(mode) and group_of(mode) == 1


def _number(total: int, sizes: Sequence[int]) -> int:
    """Layers at the front of each virtual stage that make ``total`` in all."""
    for count in range(1, max(sizes, default=0) + 1):
        if sum(min(count, size) for size in sizes) == total:
            return count
    raise InputError(
        f"{total} recomputed layers cannot be the same number of layers at the front of "
        f"chunks of {list(sizes)} layers"
    )
