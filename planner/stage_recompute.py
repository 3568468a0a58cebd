"""What a stage recomputes: as a user asks for it, as a plan states it, and read back from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from cost_models.layout import RecomputeMode
from cost_models.leaf import Recompute
from cost_models.recompute import MIXED, TIMES, cuts_of, group_of, in_parts, names_of
from hardware_profiles.schema import StackSpec
from planner.errors import InputError
from planner.plan import RecomputeLayers, Stage
from planner.recompute import named_policy
from planner.request import Request


def asked_recompute(name: str, layers: int | None, request: Request) -> Recompute:
    """What ``recompute`` and ``recompute_layers`` of a layout mean for every virtual stage.

    ``A/B`` is A in so many first layers and B in the rest, where the stack mixes modes, ``A/3*B/C``
    has three layers in B between them; a mode of modules with a number of layers is then that mode
    there and none in the rest, and so are inputs in parts where full recomputation has a number.
    """
    stack, count = request.stack, request.model.layer_count if layers is None else layers
    front, *more = name.split(MIXED)
    first = named_policy(front, stack)
    if more:
        asked = [_times(part, name) for part in more[:-1]]
        names = [first.name, *(named_policy(part, stack).name for _, part in asked)]
        names.append(named_policy(more[-1], stack).name)
        if not stack.recompute_mixed:
            raise InputError(
                f"recompute is {name!r}; {stack.name} runs all layers of a stage again in one way",
                hint=" or ".join(names),
            )
        _require_less_and_less(names, request)
        if names == ["full", "none"]:
            return "full", count
        between = [f"{n}{TIMES}{part}" for (n, _), part in zip(asked, names[1:-1], strict=True)]
        return MIXED.join([first.name, *between, names[-1]]), count
    if first.name == "full":
        return "full", count
    if layers is not None and (
        (stack.recompute_mixed and first.modules) or _parts_of_some(first.name, stack)
    ):
        return f"{first.name}{MIXED}none", count
    return first.name, 0


def _times(part: str, name: str) -> tuple[int, str]:
    """The number and the mode of layers between the first and the last ones."""
    number, times, mode = part.partition(TIMES)
    if not times or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise InputError(
            f"recompute is {name!r}: modes between the first and the last need a number of layers",
            hint=f"2{TIMES}{part}",
        )
    return int(number), mode


def modes_of(recompute: Recompute, first: int, last: int) -> Iterator[tuple[int, RecomputeMode]]:
    """Layers ``first .. last - 1`` of a virtual stage with the mode of each."""
    cuts = (*cuts_of(recompute, first, last), last)
    start = first
    for mode, cut in zip(names_of(recompute[0]), cuts, strict=True):
        for place in range(start, cut):
            yield place, mode
        start = cut


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
    order: dict[RecomputeMode, int] = {}
    for (mode, _), _, _ in chunks:
        for place, name in enumerate(names_of(mode)):
            order[name] = max(order.get(name, 0), place if mode != name else 0)
    ordered = sorted(counts.items(), key=lambda item: order[item[0][1]])
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
    _require_less_and_less(list(totals), request)
    ends = [_number(total, sizes) for total in accumulate(totals.values())]
    between = [f"{ends[n] - ends[n - 1]}{TIMES}{name}" for n, name in enumerate(rest, 1)]
    if between and ends[-1] == max(sizes):
        last = rest[-1]
        return MIXED.join([front, *between[:-1], last]), ends[0]
    return MIXED.join([front, *between, "none"]), ends[0]


def _require_less_and_less(names: list[RecomputeMode], request: Request) -> None:
    """Raise :class:`InputError` where some mode does not run again all that the one behind it in a
    stage does, and more."""
    for name, behind in pairwise(named_policy(name, request.stack) for name in names):
        able = behind.keeps is None and (name.keeps is None or name.name == "full")
        if not able or not (name.name == "full" or name.modules > behind.modules):
            raise InputError(
                f"a stage recomputes {', '.join(names)}: layers run again all that those behind "
                "them run again, and more",
                hint=f"{behind.name}{MIXED}{name.name}, or either alone",
            )


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
