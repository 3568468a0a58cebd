"""Matrix-product constants of a device from timed products.

A CSV file with columns ``m``, ``n``, ``k`` and a time (``time_us``, ``time_ms`` or ``time_s``), and
optionally ``dtype`` (default ``bf16``), ``batch`` (1) and ``stage`` (``fprop``, ``dgrad``,
``wgrad``).
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cost_models.compute import MatmulStage, matmul_constants, matmul_time_s
from hardware_profiles.schema import DeviceSpec, Kind, MatmulConstants
from planner.errors import InputError, did_you_mean
from planner.studies.calibrate.parameters import Constant

FOLDS = 5
TIMES = {"time_us": 1e-6, "time_ms": 1e-3, "time_s": 1.0}
STAGES: dict[str, MatmulStage] = {"fprop": "fprop", "dgrad": "dgrad", "wgrad": "wgrad"}
_BOUNDS = {
    "e_compute": (0.05, 1.0, 0.3),
    "e_memory": (0.05, 1.0, 0.3),
    "t0_s": (2e-7, 1e-3, 1.0),
    "k0": (1.0, 2000.0, 0.7),
    "p": (1.0, 8.0, 0.4),
    "wave_share": (0.01, 1.0, 0.7),
}
"""Low, high and prior spread of each constant; the device's own are the priors."""


@dataclass(frozen=True, slots=True)
class Product:
    """One timed product."""

    m: int
    n: int
    k: int
    batch: int
    stage: MatmulStage
    dtype: str
    time_s: float


def read_products(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Product]:
    """The products of a file's rows. Raises :class:`InputError` with the line."""
    header = set(rows[0])
    column = next((name for name in TIMES if name in header), None)
    if column is None or not {"m", "n", "k"} <= header:
        raise InputError(
            f"{path}: not a table of products: needs m, n, k and one of {', '.join(TIMES)}"
        )
    products = []
    for line, row in enumerate(rows, start=2):
        stage = row.get("stage") or "fprop"
        if stage not in STAGES:
            raise InputError(
                f"{path}: line {line}: stage {stage!r}", hint=did_you_mean(stage, list(STAGES))
            )
        where = f"{path}: line {line}"
        m, n, k = (_whole(row[name], name, where) for name in ("m", "n", "k"))
        batch = _whole(row.get("batch") or "1", "batch", where)
        time_s = _seconds(row[column], column, where)
        if min(m, n, k, batch) < 1 or not time_s > 0:
            raise InputError(f"{where}: sizes and times must be above zero")
        products.append(Product(m, n, k, batch, STAGES[stage], row.get("dtype") or "bf16", time_s))
    return products


def _whole(text: str, column: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: {column} = {text!r} is not a whole number") from None


def _seconds(text: str, column: str, where: str) -> float:
    try:
        return float(text) * TIMES[column]
    except ValueError:
        raise InputError(f"{where}: {column} = {text!r} is not a number") from None


class GemmPricer:
    """Timed products of one dtype against the law of ``cost_models.compute``."""

    def __init__(self, device: DeviceSpec, dtype: str, products: Sequence[Product]) -> None:
        self._device, self._dtype = device, dtype
        self.start = matmul_constants(device, dtype)
        self.parameters = tuple(_constant(name, self.start) for name in _BOUNDS)
        self._groups = [
            (stage, np.array([i for i, each in enumerate(products) if each.stage == stage]))
            for stage in STAGES.values()
        ]
        self._sizes = np.array([(p.m, p.n, p.k, p.batch) for p in products], dtype=float)
        self._log_time = np.log([p.time_s for p in products])
        # A shape stays in one fold, whatever its stage.
        self.families = tuple(
            f"shapes {zlib.crc32(f'{sorted((p.m, p.n, p.k))}'.encode()) % FOLDS + 1}"
            for p in products
        )

    def constants(self, values: Mapping[str, float], **update: object) -> MatmulConstants:
        """The constants of a fit; ``sustained`` is 1: what was measured is what is said."""
        return self.start.model_copy(update={**values, "sustained": 1.0, **update})

    def moved_by(self, index: int) -> np.ndarray:
        """Every constant reaches every product."""
        return np.full(len(self._log_time), index >= 0)

    def residuals(self, values: Mapping[str, float], only: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of each product; NaN where ``only`` is False."""
        kernels = self._device.kernels
        matmul = {**kernels.matmul, self._dtype: self.constants(values)}
        device = self._device.model_copy(
            update={"kernels": kernels.model_copy(update={"matmul": matmul})}
        )
        result = np.empty(len(self._log_time))
        for stage, members in self._groups:
            if len(members):
                m, n, k, batch = self._sizes[members].T
                time = matmul_time_s(device, self._dtype, m, n, k, stage=stage, batch=batch)
                result[members] = np.log(time) - self._log_time[members]
        return result if only is None else np.where(only, result, np.nan)


def fitted_constants(
    pricer: GemmPricer, values: Mapping[str, float], errors: np.ndarray, source: str
) -> MatmulConstants:
    """The constants with their left-out errors; ``errors`` are relative."""
    sizes = np.abs(errors)
    rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
    return pricer.constants(
        rounded,
        kind=Kind.FITTED,
        source=source,
        error_median=float(f"{np.median(sizes):.3g}"),
        error_p90=float(f"{np.quantile(sizes, 0.9):.3g}"),
        borrowed_from=None,
        note=None,
    )


def _constant(name: str, start: MatmulConstants) -> Constant:
    low, high, spread = _BOUNDS[name]
    prior = min(max(getattr(start, name), low), high)
    return Constant(
        name=name, low=low, high=high, prior=prior, spread=spread, source="the device's profile"
    )


def csv_rows(path: Path, text: str) -> list[dict[str, str]]:
    """Rows by column name, in lower case. Raises :class:`InputError` for an empty table."""
    rows = [
        {str(key).strip().lower(): (value or "").strip() for key, value in row.items() if key}
        for row in csv.DictReader(text.splitlines())
    ]
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows
