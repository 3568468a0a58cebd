"""Read a file of measured runs: one row a run, columns by name, blanks for what is not stated."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planner.errors import InputError, did_you_mean

REQUIRED = ("framework", "accelerator", "gpus", "seq", "layers", "hidden", "gbs")
"""Columns without which no row could be priced."""
METRICS = ("step_time_s", "iter_s", "tokens_per_s_per_gpu", "tflops_per_gpu_model", "mfu")
"""Columns that give a step time, in the order in which they are believed."""
MAX_BYTES = 256 * 1024 * 1024


class SkippedError(Exception):
    """This run cannot be priced or scored; the message is the named reason."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row; blank cells are absent from ``cells``."""

    row: int
    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        """The cell as written, ``""`` where it is blank or the column is absent."""
        return self.cells.get(column, "")

    def number(self, column: str) -> float | None:
        """A finite number above zero; blank, zero and what is not a number are None."""
        try:
            value = float(self.text(column).replace(",", ""))
        except ValueError:
            return None
        return value if math.isfinite(value) and value > 0 else None

    def size(self, column: str) -> int | None:
        """A whole number above zero, or None."""
        value = self.number(column)
        return int(value) if value is not None and value == int(value) else None

    def required(self, column: str) -> int:
        """A whole number above zero. Raises :class:`SkippedError` with the column's name."""
        value = self.size(column)
        if value is None:
            raise SkippedError(f"no {_TITLES.get(column, column)}")
        return value


_TITLES = {
    "gbs": "global batch", "seq": "sequence length", "layers": "layer count",
    "hidden": "hidden size", "gpus": "device count",
}  # fmt: skip


def read_runs(source: Path | str) -> list[Run]:
    """The runs of a CSV file, or of CSV text (a string that holds a line break).

    Raises :class:`InputError` for a file that cannot be read, is not CSV text, has no rows, has a
    column twice, or lacks one of :data:`REQUIRED`.
    """
    where, text = _text(source)
    try:
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise InputError(f"{where}: not a CSV file: {error}") from None
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if not lines:
        raise InputError(f"{where}: empty", hint="the first line names the columns")
    header = [name.strip() for name in lines[0]]
    _check_header(header, where)
    if len(lines) == 1:
        raise InputError(f"{where}: column names, but no runs")
    runs = []
    for index, line in enumerate(lines[1:]):
        if len(line) > len(header):
            raise InputError(
                f"{where}: row {index + 2} has {len(line)} cells for {len(header)} columns",
                hint="quote a cell that holds a comma",
            )
        cells = {name: cell.strip() for name, cell in zip(header, line, strict=False)}
        runs.append(Run(index, {name: cell for name, cell in cells.items() if cell}))
    return runs


def _check_header(header: list[str], where: str) -> None:
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise InputError(f"{where}: column {min(twice)!r} is there twice")
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        near = did_you_mean(missing[0], [name for name in header if name])
        raise InputError(
            f"{where}: missing column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            hint=near or "required: " + ", ".join(REQUIRED) + "; and one of " + ", ".join(METRICS),
        )


def _text(source: Path | str) -> tuple[str, str]:
    if isinstance(source, str) and "\n" in source:
        return "text", source
    path = Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES // 1024 // 1024} MiB")
    try:
        return str(path), data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
