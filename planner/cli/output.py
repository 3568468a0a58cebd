"""Where results go: standard output or a file, as JSON or as a table."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType


class Format(StrEnum):
    """How a result is written."""

    TABLE = "table"
    JSON = "json"


def chosen(wanted: Format | None, output: Path | None = None) -> Format:
    """``wanted``, else a table on a terminal and JSON in a pipe or a file."""
    if wanted is not None:
        return wanted
    on_terminal = output is None and sys.stdout is not None and sys.stdout.isatty()
    return Format.TABLE if on_terminal else Format.JSON


def write(text: str, output: Path | None = None) -> None:
    """Write ``text`` to standard output, or to a file that appears whole or not at all."""
    if output is None:
        _write_stdout(text)
        return
    try:
        _write_atomic(text, output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None


def _write_stdout(text: str) -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"standard output: cannot be written: {error.strerror}") from None


def _write_atomic(text: str, output: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(table: Callable[[], RenderableType], output: Path | None = None) -> None:
    """Write a rich renderable as text, in colour on a terminal."""
    from planner.report.console import to_text

    write(to_text(table(), stream=None if output is not None else sys.stdout), output)


def remark(text: str) -> None:
    """A note on standard error; nothing where there is nothing to say."""
    if text and sys.stderr is not None:
        sys.stderr.write(f"note: {text}\n")
        sys.stderr.flush()


class Progress:
    """Lines on stderr for work that takes longer than a second; one line on a terminal."""

    QUIET_S = 1.0
    EVERY_S = 2.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or sys.stderr is None
        self._start = time.monotonic()
        self._last = 0.0
        self._open_line = False

    def __call__(self, message: str) -> None:
        """Show ``message`` if enough time has passed."""
        now = time.monotonic() - self._start
        terminal = not self._quiet and sys.stderr.isatty()
        if self._quiet or now < self.QUIET_S or (not terminal and now - self._last < self.EVERY_S):
            return
        self._last = now
        if terminal:
            sys.stderr.write(f"\r\x1b[2K{now:5.1f} s  {message}")
            self._open_line = True
        else:
            sys.stderr.write(f"{now:.1f} s: {message}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Clear the progress line."""
        if self._open_line:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
