"""Read the documents that commands take: a plan, or lines of layouts, from a file or ``-``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import InputError, RefutedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.plan import Plan

_PLAN_KEYS = {"layout", "prediction", "certificate"}


def read_plan(reference: str) -> Plan:
    """The plan in file ``reference``, or on standard input for ``-``.

    Raises :class:`RefutedError` for a document with the keys of a plan whose values no plan can
    have, and :class:`InputError` or ``DocumentError`` for anything else.
    """
    from hardware_profiles.documents import DocumentError, parse_document, read_document, validate
    from planner.plan import Plan

    where = "standard input" if reference == "-" else reference
    if reference == "-":
        data = parse_document(read_stdin(), where=where)
    else:
        data = read_document(Path(reference))
    if isinstance(data, dict) and "ways_out" in data:
        raise InputError(
            f"{where}: says that the request is infeasible, so it holds no plan",
            hint="its 'ways_out' lists changes that make it feasible",
        )
    try:
        return validate(Plan, data, where=where)
    except DocumentError as error:
        if isinstance(data, dict) and data.keys() >= _PLAN_KEYS and not error.other_keys:
            raise RefutedError(f"not a valid plan: {error.message}", hint=error.hint) from None
        raise InputError(
            error.message, hint=error.hint or "a plan is what 'planner plan --format json' prints"
        ) from None


def read_stdin() -> str:
    """Standard input as text; raises ``DocumentError`` past the size limit of documents."""
    from hardware_profiles.documents import MAX_BYTES, decode

    if sys.stdin is None:
        raise InputError("standard input is closed")
    return decode(sys.stdin.buffer.read(MAX_BYTES + 1), where="standard input")


def lines_of(reference: str) -> Iterator[str]:
    """Lines of a file, or of standard input for ``-``, as they come."""
    if reference == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed")
        yield from _decoded(sys.stdin.buffer)
        return
    try:
        with Path(reference).open("rb") as file:
            yield from _decoded(file)
    except OSError as error:
        raise InputError(f"{reference}: cannot be read: {error.strerror}") from None


def _decoded(stream: Any) -> Iterator[str]:
    first = True
    for raw in stream:
        text = raw.decode("utf-8", errors="replace")
        yield text.removeprefix("\ufeff") if first else text
        first = False
