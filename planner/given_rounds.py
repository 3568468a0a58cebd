"""Rounds of microbatches that a user names, or leaves to the stack."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.rounds import round_sizes, runs_in_rounds, usual_round
from planner.errors import InputError
from planner.request import Request


def settled_round(asked: object, request: Request, degree: Mapping[str, int]) -> int:
    """The size of rounds of a layout: what was asked, or the least that there is.

    Raises :class:`InputError` for what has no order of work, or was asked and the stack cannot run.
    """
    pp, microbatches, stack = degree["pp"], degree["num_microbatches"], request.stack
    sizes = round_sizes(stack.rounds, pp, microbatches)
    if isinstance(asked, str):
        raise InputError(f"layout: round_size = {asked!r} is not a whole number")
    if asked and asked not in sizes:
        shown = ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")
        raise InputError(
            f"layout: round_size = {asked}, but {stack.name} takes {microbatches} microbatches "
            f"over pp = {pp} in {f'rounds of {shown}' if sizes else 'no rounds'}",
            hint="leave it out for the shortest rounds",
        )
    size = int(str(asked)) if asked else (*sizes, usual_round(pp, microbatches))[0]
    if not runs_in_rounds(pp, microbatches, size):
        rounds = max(1, microbatches // pp)
        raise InputError(
            f"interleaving takes equal rounds of at least pp = {pp} microbatches; {microbatches} = "
            f"{rounds} x {microbatches // rounds} + {microbatches % rounds}",
            hint="vpp 1, another microbatch_size, or another dp",
        )
    return size


def no_rounds(asked: object, schedule: str, pp: int) -> InputError:
    """Why a layout whose schedule takes no rounds cannot have any of the size asked."""
    over = f"schedule {schedule}" if pp > 1 else "pp = 1"
    return InputError(
        f"layout: round_size = {asked}, but {over} has no rounds: interleaving has",
        hint="leave round_size out, or vpp 2 or more over pp 2 or more",
    )
