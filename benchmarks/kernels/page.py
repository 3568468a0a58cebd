"""The left-out errors of the fits, as text and as the committed page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fits import Errors

PAGE = Path(__file__).parents[1] / "results" / "kernels.md"

HEAD = """# Kernel times against measured ones

Made by `python benchmarks/kernels/fit.py --write`; the sources are in
[`benchmarks/kernels/data`](../kernels/data/README.md). Errors are relative, on shapes that were
left out of the fit: one in three, by a hash of the shape that knows nothing of the device. Lines
marked "not fitted" judge constants that were made from other kernels. Products are judged as they
were timed, by themselves (`cost_models/laws.py`): short ones at a clock that does not last, small
operands in the cache; training kernels at the rate that lasts.

Aims, median / P90: bf16 products bound by compute 5 / 14 %, of all sizes 9 / 35 %; attention above
200 us 9 % at the median. A line that misses its aim says so.

Errors are of the law with its constants. The column "with a table" has what they would be with a
table of the fitted shapes' residuals, smoothed over an octave of m, n and k. None ships: of 16- and
8-bit products of training size, what the law leaves at the median is that of single shapes, which
their neighbours do not share (on H200 a table would spread the slow ones of its column). It would
shorten the tail of 8-bit products, mend products too small for training, and nvfp4, whose 43
left-out shapes are few to tell by.

| kernels | shapes | median | P90 | with a table | left out | |
| --- | --- | ---: | ---: | ---: | ---: | --- |
"""

AIMS = {
    ("bf16 gemm", "compute-bound"): (0.05, 0.14),
    ("bf16 gemm", "all sizes"): (0.09, 0.35),
    ("attention forward", "> 200 us"): (0.09, None),
}
"""By the end of a label and the group of shapes."""


def as_text(report: Sequence[Errors]) -> str:
    """One line for each fit."""
    lines = ["relative error on left-out shapes, median / P90 (shapes)"]
    for errors in report:
        cells = (
            f"{what} {100 * median:.1f} / {100 * p90:.1f} % ({count})"
            for what, (median, p90, count) in errors.groups.items()
        )
        lines.append(f"{errors.label:45s} {';  '.join(cells)}")
    return "\n".join(lines)


def as_page(report: Sequence[Errors]) -> str:
    """The page, one row for each group of shapes."""
    rows = []
    for errors in report:
        for what, (median, p90, count) in errors.groups.items():
            verdict = _verdict(errors.label, what, median, p90)
            table = _pair(errors.with_table[what]) if what in errors.with_table else ""
            rows.append(
                f"| {errors.label} | {what} | {100 * median:.1f} % | {100 * p90:.1f} % | {table} "
                f"| {count} | {verdict} |\n"
            )
    return HEAD + "".join(rows)


def _pair(found: tuple[float, float, int]) -> str:
    return f"{100 * found[0]:.1f} / {100 * found[1]:.1f} %"


def _verdict(label: str, group: str, median: float, p90: float) -> str:
    for (ending, wanted), (most, most_p90) in AIMS.items():
        if label.endswith(ending) and group == wanted:
            missed = [
                name
                for name, found, limit in (("median", median, most), ("P90", p90, most_p90))
                if limit is not None and found > limit
            ]
            return f"misses its aim: {', '.join(missed)}" if missed else "meets its aim"
    return ""
