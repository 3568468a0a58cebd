"""The fits: constants of one kernel on one device from the measured tables in ``data/``.

Constants minimise the mean absolute log error over two thirds of the shapes, training-size shapes
counting three times; errors are on the other third. Which column is used, and why, is in
``data/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forms import fit_forms, rounded, rounded_matmul, smoothed
from tables import BoolArray, FloatArray, Table, read

from cost_models.compute import OPERAND_BYTES
from cost_models.laws import matmul_law
from hardware_profiles.schema import MatmulConstants
from hardware_profiles.units import to_si

DEVICES = Path(__file__).parents[2] / "hardware_profiles" / "devices"
TRAINING_DIM, TRAINING_WEIGHT = 1024, 3.0


@dataclass(frozen=True)
class Machine:
    """What the laws need of a device."""

    peak_flops: dict[str, float]
    bandwidth_bytes_per_s: float
    compute_units: float
    cache_bytes: float = 0.0


@dataclass(frozen=True)
class Errors:
    """Relative errors on left-out shapes, as (median, 90th percentile, shapes)."""

    label: str
    groups: dict[str, tuple[float, float, int]]
    with_table: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    """What a smooth table of the fit's residuals over the shapes would make of them."""


def machine(name: str) -> Machine:
    """The datasheet part of a device file."""
    document = yaml.safe_load((DEVICES / f"{name}.yaml").read_text(encoding="utf-8"))
    bandwidth, cache = document["memory_bandwidth"], document.get("l2_capacity")
    return Machine(
        {name: to_si(p["value"], p["unit"]) for name, p in document["peak_flops"].items()},
        to_si(bandwidth["value"], bandwidth["unit"]),
        document["compute_units"]["value"],
        to_si(cache["value"], cache["unit"]) if cache else 0.0,
    )


def quantiles(error: FloatArray, where: BoolArray) -> tuple[float, float, int]:
    """Median, 90th percentile and count of ``error`` over ``where``."""
    chosen = error[where]
    return (float(np.median(chosen)), float(np.quantile(chosen, 0.9)), len(chosen))


def matmul_times(
    constants: MatmulConstants,
    box: Machine,
    dtype: str,
    rows: Table,
    output_bytes: Any = 2.0,
    *,
    alone: bool = False,
) -> FloatArray:
    """Predicted seconds of the products in ``rows``; ``alone``: each timed by itself."""
    accumulates = "stage" in rows.rows[0] and rows.rows[0]["stage"] == "wgrad"
    return matmul_law(
        constants,
        rows.number("m"),
        rows.number("n"),
        rows.number("k"),
        batch=1,
        peak_flops=box.peak_flops[dtype],
        bandwidth_bytes_per_s=box.bandwidth_bytes_per_s,
        compute_units=box.compute_units,
        operand_bytes=OPERAND_BYTES[dtype],
        output_bytes=output_bytes,
        apart=constants.accumulate_share if accumulates else 0.0,
        benchmark_cache_bytes=box.cache_bytes if alone else None,
    )


def training_times(constants: MatmulConstants, box: Machine, rows: Table) -> FloatArray:
    """Predicted seconds of the training products in ``rows``, stage by stage."""
    predicted_s = np.empty(len(rows))
    stages = rows.text("stage")
    for stage in np.unique(stages):
        own = rows.where(stage=str(stage))
        predicted_s[stages == stage] = matmul_times(
            constants, box, "bf16", own, train_output_bytes(own)
        )
    return predicted_s


def timed_quantisation_s(name: str, rows: Table) -> FloatArray:
    """Seconds that serving tables of 8-bit products include for quantising activations: finding the
    scale and casting, as timed apart on the same device, by octaves of the elements."""
    timed = read("quantisation.csv").where(device=name)
    place = np.log2(timed.number("m") * timed.number("k"))
    taken_s = (timed.number("us_scale") + timed.number("us_cast")) * 1e-6
    octave = np.round(place)
    known = np.unique(octave)
    middle = [np.median(place[octave == each]) for each in known]
    value = [np.median(np.log(taken_s[octave == each])) for each in known]
    wanted = np.log2(rows.number("m") * rows.number("k"))
    # Beyond the largest timed tensor, time grows with the elements.
    beyond = np.maximum(wanted - middle[-1], 0.0) * np.log(2.0)
    return np.asarray(np.exp(np.interp(wanted, middle, value) + beyond))


def streamed_quantisation_s(name: str, dtype: str, rows: Table, streaming: float) -> FloatArray:
    """The same where nobody timed it: 16 bits read and the operand written, at ``streaming``, the
    share of the bandwidth that elementwise kernels reach."""
    bytes_each = 2.0 + OPERAND_BYTES[dtype]
    elements = rows.number("m") * rows.number("k")
    return np.asarray(bytes_each * elements / (streaming * machine(name).bandwidth_bytes_per_s))


def fit_matmul(
    name: str,
    dtype: str,
    column: str,
    *,
    beside: Callable[[Table], FloatArray] | None = None,
) -> tuple[MatmulConstants, Errors]:
    """The constants of one dtype on one device, from ``column`` of the inference tables.

    ``beside``: seconds in the table's times that are not the product's (quantisation).
    """
    box = machine(name)
    rows = read("gemm.csv.gz").where(device=name, dtype=dtype).present(column)
    measured_s = rows.number(column) * 1e-6
    beside_s = 0.0 if beside is None else beside(rows)
    out = rows.left_out("m", "n", "k")
    m, n, k = rows.number("m"), rows.number("n"), rows.number("k")
    training = np.minimum(np.minimum(m, n), k) >= TRAINING_DIM
    weight = np.where(training, TRAINING_WEIGHT, 1.0)
    source = f"aiconfigurator-core 0.12.0 (Apache-2.0), gemm tables of {name}, {column[3:]} column"

    def times(constants: MatmulConstants) -> FloatArray:
        return matmul_times(constants, box, dtype, rows, alone=True) + beside_s

    def loss(constants: MatmulConstants) -> float:
        error = np.abs(np.log(times(constants) / measured_s))
        return float(np.average(error[~out], weights=weight[~out]))

    best = rounded_matmul(fit_forms(loss).model_copy(update={"source": source}))
    ratio = times(best) / measured_s
    tabled = np.exp(smoothed(-np.log(ratio), np.log2(np.stack([m, n, k], axis=1)), ~out))
    traffic = OPERAND_BYTES[dtype] * k * (m + n) + 2.0 * m * n
    ridge = box.peak_flops[dtype] / box.bandwidth_bytes_per_s
    groups = {
        "compute-bound": out & (2.0 * m * n * k / traffic > 2.0 * ridge),
        "m,n,k>=1024": out & training,
        "all sizes": out,
    }
    error = np.abs(ratio - 1.0)
    found = {group: quantiles(error, where) for group, where in groups.items()}
    with_table = np.abs(ratio * tabled - 1.0)
    tables = {group: quantiles(with_table, where) for group, where in groups.items()}
    median, p90, _ = found["m,n,k>=1024"]
    best = best.model_copy(update={"error_median": round(median, 4), "error_p90": round(p90, 4)})
    return best, Errors(f"{name} {dtype} gemm", found, tables)


def train_output_bytes(rows: Table) -> FloatArray:
    """Bytes per output element: a weight gradient is read and written in its own dtype."""
    passes = np.where(rows.text("stage") == "wgrad", 2.0, 1.0)
    return np.asarray(passes * np.where(rows.text("out_dtype") == "fp32", 4.0, 2.0))


def fit_sustained(name: str, base: MatmulConstants) -> tuple[MatmulConstants, list[Errors]]:
    """``base`` with the compute rate of the training kernels measured on ``name`` itself, and the
    part of an accumulation that they do not hide."""
    box = machine(name)
    rows = read("gemm_train.csv").where(device=name)
    out = rows.left_out("m", "n", "k")
    measured_s = rows.number("us") * 1e-6
    best, least = base, np.inf
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = base.model_copy(update={"accumulate_share": share})
        for _ in range(8):
            ratio = float(np.median((training_times(found, box, rows) / measured_s)[~out]))
            found = found.model_copy(update={"e_compute": rounded(found.e_compute * ratio)})
        error = np.abs(np.log(training_times(found, box, rows) / measured_s))[~out].mean()
        if error < least:
            best, least = found, error
    ratios = training_times(best, box, rows) / measured_s
    error = np.abs(ratios - 1.0)
    groups = {"all stages": quantiles(error, out)}
    for stage in ("fprop", "dgrad", "wgrad"):
        groups[stage] = quantiles(error, out & (rows.text("stage") == stage))
    median, p90, _ = groups["all stages"]
    best = best.model_copy(
        update={
            "error_median": round(median, 4),
            "error_p90": round(p90, 4),
            "source": f"MooreThreads/SimuMax (Apache-2.0), training GEMM table of {name} "
            f"(e_compute); other constants: {base.source}",
        }
    )
    return best, [Errors(f"{name} bf16 training gemm", groups), judge_grouped(name, best)]


def same_training_rate(
    name: str, dtype: str, shipped: MatmulConstants, new: MatmulConstants
) -> float:
    """The ``sustained`` with which ``new`` gives products of training size the times of ``shipped``
    at the median."""
    box = machine(name)
    rows = read("gemm.csv.gz").where(device=name, dtype=dtype)
    least = np.min([rows.number(axis) for axis in ("m", "n", "k")], axis=0)
    rows = Table([row for row, size in zip(rows.rows, least, strict=True) if size >= TRAINING_DIM])
    wanted_s = matmul_times(shipped, box, dtype, rows)
    share = shipped.sustained
    for _ in range(8):
        found_s = matmul_times(new.model_copy(update={"sustained": share}), box, dtype, rows)
        share = min(1.0, share * float(np.median(found_s / wanted_s)))
    return share


def judge_training(name: str, constants: MatmulConstants) -> Errors:
    """Errors of constants from the inference tables on the training kernels of ``name``."""
    rows = read("gemm_train.csv").where(device=name)
    predicted_s = training_times(constants, machine(name), rows)
    ratio = predicted_s / (rows.number("us") * 1e-6)
    short = rows.number("us") < 100.0
    error = np.abs(ratio - 1.0)
    groups = {"< 100 us": quantiles(error, short), "longer": quantiles(error, ~short)}
    return Errors(f"{name} bf16 training gemm, burst constants", groups)


def judge_grouped(name: str, constants: MatmulConstants) -> Errors:
    """Errors on grouped products, group after group; nothing is fitted on them."""
    box = machine(name)
    rows = read("grouped_gemm_train.csv").where(device=name)
    count, tokens = rows.number("groups"), rows.number("rows_per_group")
    wide, deep = rows.number("out_features"), rows.number("in_features")
    stage = rows.text("stage")
    dims = {"fprop": (tokens, wide, deep), "dgrad": (tokens, deep, wide)}
    groups = {}
    for which, (m, n, k) in (*dims.items(), ("wgrad", (wide, deep, tokens))):
        one_s = matmul_law(
            constants,
            m,
            n,
            k,
            batch=1,
            peak_flops=box.peak_flops["bf16"],
            bandwidth_bytes_per_s=box.bandwidth_bytes_per_s,
            compute_units=box.compute_units,
            operand_bytes=2.0,
            output_bytes=8.0 if which == "wgrad" else 2.0,
            apart=constants.accumulate_share if which == "wgrad" else 0.0,
        )
        error = np.abs(count * one_s / (rows.number("us") * 1e-6) - 1.0)
        groups[which] = quantiles(error, stage == which)
    return Errors(f"{name} bf16 grouped training gemm (not fitted)", groups)
