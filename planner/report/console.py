"""The one place that meets the terminal: width, colour, and characters it can print."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

FALLBACK_COLUMNS = 100
"""Width of a table that goes to a file or a pipe, unless COLUMNS says otherwise."""
WIDEST = 160

_ASCII = str.maketrans(
    {
        "█": "#", "░": ".", "─": "-", "━": "=", "·": "|", "–": "-", "—": "-", "…": "~",
        "×": "x", "≤": "<=", "≥": ">=", "±": "+/-", "µ": "u", "→": "->", "•": "*", "“": '"',
        "”": '"', "’": "'", "│": "|",
    }
)  # fmt: skip


def to_text(renderable: RenderableType, *, stream: TextIO | None) -> str:
    """``renderable`` as text for ``stream`` (``None``: a file): its width, colour and encoding.

    Colour only on a terminal, and never with ``NO_COLOR`` set. Where the stream cannot print a
    character of the table, its ASCII stand-in is used.
    """
    terminal = stream is not None and stream.isatty()
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=columns(terminal=terminal),
        force_terminal=terminal,
        no_color=bool(os.environ.get("NO_COLOR")) or not terminal,
        highlight=False,
        legacy_windows=False,
    )
    console.print(renderable)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    text = "\n".join(lines) + "\n"
    encoding = "utf-8" if stream is None else (stream.encoding or "ascii")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII)
    return text


def columns(*, terminal: bool) -> int:
    """Columns to use: COLUMNS, else the terminal's width, else ``FALLBACK_COLUMNS``."""
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdigit() and int(wanted) > 0:
        width = int(wanted)
    elif terminal:
        width = os.get_terminal_size(1).columns if os.isatty(1) else FALLBACK_COLUMNS
    else:
        width = FALLBACK_COLUMNS
    return max(40, min(width, WIDEST))
