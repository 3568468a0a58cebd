"""The measured kernel times, as columns, and the split into fitted and left-out shapes."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data"
LEFT_OUT_ONE_IN = 3

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Table:
    """Rows of a CSV file, read by column; an empty cell is NaN in ``number``."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **wanted: str) -> Table:
        """The rows whose columns equal ``wanted``."""
        return Table([r for r in self.rows if all(r[c] == v for c, v in wanted.items())])

    def present(self, column: str) -> Table:
        """The rows with a value in ``column``."""
        return Table([row for row in self.rows if row[column]])

    def number(self, column: str) -> FloatArray:
        """``column`` as floats."""
        return np.array([float(row[column] or "nan") for row in self.rows])

    def text(self, column: str) -> npt.NDArray[np.str_]:
        """``column`` as it is written."""
        return np.array([row[column] for row in self.rows])

    def left_out(self, *columns: str) -> BoolArray:
        """Which rows the fit must not see: a hash of the shape in ``columns``, one in three.

        The hash knows nothing of device or dtype, so a shape is left out everywhere.
        """
        mixed = np.zeros(len(self), dtype=np.uint64)
        for column in columns:
            values = self.number(column).astype(np.uint64)
            mixed = (mixed ^ values) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return np.asarray(mixed % np.uint64(LEFT_OUT_ONE_IN) == 0)


def read(name: str) -> Table:
    """The table in ``data/name``, gzipped or not."""
    path = DATA / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as stream:
        return Table(list(csv.DictReader(stream)))
