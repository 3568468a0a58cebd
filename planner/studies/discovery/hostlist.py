"""SLURM's host lists: ``node[001-016,020],login1`` is eighteen names."""

from __future__ import annotations

import re
from itertools import product

from planner.errors import InputError

MOST = 100_000
"""Names that one list may stand for; above it a range is taken for a slip."""
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def expand_hostlist(text: str, *, where: str) -> list[str]:
    """The names that ``text`` stands for, in order; raises :class:`InputError`."""
    names: list[str] = []
    for item in _split(text.strip(), where):
        parts = re.split(r"\[([^\]]*)\]", item)
        if "[" in "".join(parts[::2]) or "]" in "".join(parts[::2]):
            raise InputError(f"{where}: brackets do not match in {item!r}")
        choices = [
            [part] if index % 2 == 0 else _numbers(part, where) for index, part in enumerate(parts)
        ]
        size = 1
        for choice in choices:
            size *= len(choice)
        if size + len(names) > MOST:
            raise InputError(f"{where}: {item!r} stands for more than {MOST:,} nodes")
        names += ["".join(pieces) for pieces in product(*choices)]
    return names


def _split(text: str, where: str) -> list[str]:
    """At commas outside brackets."""
    items, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth < 0 or depth > 1:
            raise InputError(f"{where}: brackets do not match in {text[:80]!r}")
        if letter == "," and depth == 0:
            items.append(text[start:index])
            start = index + 1
    if depth:
        raise InputError(f"{where}: brackets do not match in {text[:80]!r}")
    return [item for item in (*items, text[start:]) if item]


def _numbers(text: str, where: str) -> list[str]:
    result: list[str] = []
    for piece in text.split(","):
        match = _RANGE.match(piece.strip())
        if match is None:
            raise InputError(f"{where}: cannot read the range {piece!r}")
        first, last = match.group(1), match.group(2) or match.group(1)
        if int(last) < int(first) or int(last) - int(first) >= MOST:
            raise InputError(f"{where}: the range {piece!r} runs backwards or is too long")
        result += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return result
