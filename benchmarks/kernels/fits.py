"""The fits: constants of one kernel on one device from the measured tables in ``data/``.

Constants minimise the mean absolute log error over two thirds of the shapes, training-size shapes
counting three times; errors are on the other third. Which column is used, and why, is in
``data/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from nelder_mead import Vector, minimise
from tables import BoolArray, FloatArray, Table, read

from cost_models.compute import attention_law, matmul_law
from hardware_profiles.schema import AttentionConstants, Kind, MatmulConstants
from hardware_profiles.units import to_si

DEVICES = Path(__file__).parents[2] / "hardware_profiles" / "devices"
TRAINING_DIM, TRAINING_WEIGHT = 1024, 3.0
LONG_S, LAUNCH_BOUND_US = 200e-6, 150.0


@dataclass(frozen=True)
class Machine:
    """What the laws need of a device."""

    peak_flops: dict[str, float]
    bandwidth_bytes_per_s: float
    compute_units: float


@dataclass(frozen=True)
class Errors:
    """Relative errors on left-out shapes, as (median, 90th percentile, shapes)."""

    label: str
    groups: dict[str, tuple[float, float, int]]


L40S = Machine({"bf16": 362e12, "fp8": 733e12}, 864e9, 142)
"""NVIDIA L40S datasheet: only measured here, to lend its Ada constants to the RTX 4090."""


def machine(name: str) -> Machine:
    """The datasheet part of a device file."""
    if name == "l40s":
        return L40S
    document = yaml.safe_load((DEVICES / f"{name}.yaml").read_text(encoding="utf-8"))
    bandwidth = document["memory_bandwidth"]
    return Machine(
        {name: to_si(p["value"], p["unit"]) for name, p in document["peak_flops"].items()},
        to_si(bandwidth["value"], bandwidth["unit"]),
        document["compute_units"]["value"],
    )


def quantiles(error: FloatArray, where: BoolArray) -> tuple[float, float, int]:
    """Median, 90th percentile and count of ``error`` over ``where``."""
    chosen = error[where]
    return (float(np.median(chosen)), float(np.quantile(chosen, 0.9)), len(chosen))


def sigmoid(value: float) -> float:
    """The open interval (0, 1), for the search."""
    return float(1.0 / (1.0 + np.exp(-value)))


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def matmul_times(
    constants: MatmulConstants, box: Machine, dtype: str, rows: Table, output_bytes: Any = 2.0
) -> FloatArray:
    """Predicted seconds of the products in ``rows``."""
    return matmul_law(
        constants,
        rows.number("m"),
        rows.number("n"),
        rows.number("k"),
        batch=1,
        peak_flops=box.peak_flops[dtype],
        bandwidth_bytes_per_s=box.bandwidth_bytes_per_s,
        compute_units=box.compute_units,
        operand_bytes=1.0 if dtype == "fp8" else 2.0,
        output_bytes=output_bytes,
    )


def fit_matmul(name: str, dtype: str, column: str) -> tuple[MatmulConstants, Errors]:
    """The constants of one dtype on one device, from ``column`` of the inference tables."""
    box = machine(name)
    rows = read("gemm.csv.gz").where(device=name, dtype=dtype).present(column)
    measured_s = rows.number(column) * 1e-6
    out = rows.left_out("m", "n", "k")
    m, n, k = rows.number("m"), rows.number("n"), rows.number("k")
    training = np.minimum(np.minimum(m, n), k) >= TRAINING_DIM
    weight = np.where(training, TRAINING_WEIGHT, 1.0)
    source = f"aiconfigurator-core 0.12.0 (Apache-2.0), gemm tables of {name}, {column[3:]} column"

    def constants(x: Vector, p: float) -> MatmulConstants:
        return MatmulConstants(
            e_compute=rounded(sigmoid(x[0])),
            e_memory=rounded(sigmoid(x[1])),
            t0_s=rounded(np.exp(x[2])),
            k0=round(float(np.exp(x[3])), 1),
            wave_share=round(sigmoid(x[4]), 4),
            p=p,
            kind=Kind.FITTED,
            source=source,
        )

    def loss(x: Vector, p: float) -> float:
        error = np.abs(np.log(matmul_times(constants(x, p), box, dtype, rows) / measured_s))
        return float(np.average(error[~out], weights=weight[~out]))

    candidates = []
    for p in (2.0, 4.0):
        start = [1.0, 1.5, np.log(2.5e-6), 4.0, -2.0]
        x, value = minimise(lambda x, p=p: loss(x, p), start)
        candidates.append((value, p, x))
    _, p, x = min(candidates, key=lambda item: item[0])
    best = constants(x, p)
    error = np.abs(matmul_times(best, box, dtype, rows) / measured_s - 1.0)
    traffic = (1.0 if dtype == "fp8" else 2.0) * k * (m + n) + 2.0 * m * n
    ridge = box.peak_flops[dtype] / box.bandwidth_bytes_per_s
    bound = 2.0 * m * n * k / traffic > 2.0 * ridge
    groups = {
        "compute-bound": quantiles(error, out & bound),
        "m,n,k>=1024": quantiles(error, out & training),
        "all sizes": quantiles(error, out),
    }
    median, p90, _ = groups["m,n,k>=1024"]
    best = best.model_copy(update={"error_median": round(median, 4), "error_p90": round(p90, 4)})
    return best, Errors(f"{name} {dtype} gemm", groups)


def train_output_bytes(rows: Table) -> FloatArray:
    """Bytes per output element: a weight gradient is read and written in its own dtype."""
    passes = np.where(rows.text("stage") == "wgrad", 2.0, 1.0)
    return np.asarray(passes * np.where(rows.text("out_dtype") == "fp32", 4.0, 2.0))


def fit_sustained(name: str, base: MatmulConstants) -> tuple[MatmulConstants, list[Errors]]:
    """``base`` with the compute rate of the training kernels measured on ``name`` itself."""
    box = machine(name)
    rows = read("gemm_train.csv").where(device=name)
    out = rows.left_out("m", "n", "k")
    measured_s = rows.number("us") * 1e-6
    best = base
    for _ in range(8):
        predicted_s = matmul_times(best, box, "bf16", rows, train_output_bytes(rows))
        ratio = float(np.median((predicted_s / measured_s)[~out]))
        best = best.model_copy(update={"e_compute": rounded(best.e_compute * ratio)})
    ratios = matmul_times(best, box, "bf16", rows, train_output_bytes(rows)) / measured_s
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


def judge_training(name: str, constants: MatmulConstants) -> Errors:
    """Errors of constants from the inference tables on the training kernels of ``name``."""
    rows = read("gemm_train.csv").where(device=name)
    predicted_s = matmul_times(constants, machine(name), "bf16", rows, train_output_bytes(rows))
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
        )
        error = np.abs(count * one_s / (rows.number("us") * 1e-6) - 1.0)
        groups[which] = quantiles(error, stage == which)
    return Errors(f"{name} bf16 grouped training gemm (not fitted)", groups)


def attention_times(
    constants: AttentionConstants,
    box: Machine,
    rows: Table,
    *,
    causal: bool = True,
    backward: bool = False,
) -> FloatArray:
    """Predicted seconds of the attention kernels in ``rows``."""
    one_dim = "head_dim" in rows.rows[0]
    return attention_law(
        constants,
        batch=rows.number("batch"),
        q_len=rows.number("seq_len"),
        kv_len=rows.number("seq_len"),
        heads=rows.number("heads"),
        kv_heads=rows.number("kv_heads" if "kv_heads" in rows.rows[0] else "heads"),
        qk_head_dim=rows.number("head_dim" if one_dim else "qk_head_dim"),
        v_head_dim=rows.number("head_dim" if one_dim else "v_head_dim"),
        causal=causal,
        backward=backward,
        peak_flops=box.peak_flops["bf16"],
        bandwidth_bytes_per_s=0.8 * box.bandwidth_bytes_per_s,
        compute_units=box.compute_units,
    )


def cache_write_s(rows: Table, box: Machine) -> FloatArray:
    """Seconds that the serving tables include for writing the new keys and values to the cache.

    One read and one write of keys and values; the evidence is in ``data/README.md``. Training
    writes no cache.
    """
    elements = rows.number("batch") * rows.number("seq_len") * rows.number("kv_heads")
    traffic = 2.0 * (2.0 * 2.0 * elements * rows.number("head_dim"))
    return np.asarray(traffic / (0.8 * box.bandwidth_bytes_per_s))


def fit_attention(
    name: str, column: str, *, half_head_dim: float | None = None
) -> tuple[AttentionConstants, Errors]:
    """Forward constants from the causal prefill tables; the backward ones are placeholders."""
    box = machine(name)
    rows = read("attention_prefill.csv.gz").where(device=name).present(column)
    measured_s = rows.number(column) * 1e-6
    written_s = cache_write_s(rows, box)
    out = rows.left_out("batch", "seq_len", "heads", "kv_heads", "head_dim")
    long = measured_s > LONG_S
    weight = np.where(long, TRAINING_WEIGHT, 1.0)

    def constants(x: Vector) -> AttentionConstants:
        return AttentionConstants(
            e_forward=rounded(sigmoid(x[0])),
            e_backward=rounded(sigmoid(x[0])),
            half_length=round(float(np.exp(x[1])), 1),
            half_head_dim=round(float(np.exp(x[4])), 1) if half_head_dim is None else half_head_dim,
            wave_share=round(sigmoid(x[3]), 4),
            t0_s=rounded(np.exp(x[2])),
            kind=Kind.FITTED,
            source=f"aiconfigurator-core 0.12.0 (Apache-2.0), prefill tables of {name}, "
            f"{column[3:]} column",
        )

    def loss(x: Vector) -> float:
        predicted_s = attention_times(constants(x), box, rows) + written_s
        error = np.abs(np.log(predicted_s / measured_s))
        return float(np.average(error[~out], weights=weight[~out]))

    start = [0.3, 5.0, np.log(1e-5), -1.0] + ([3.5] if half_head_dim is None else [])
    best = constants(minimise(loss, start, iterations=250)[0])
    error = np.abs((attention_times(best, box, rows) + written_s) / measured_s - 1.0)
    groups = {"> 200 us": quantiles(error, out & long), "all sizes": quantiles(error, out)}
    median, p90, _ = groups["> 200 us"]
    best = best.model_copy(update={"error_median": round(median, 4), "error_p90": round(p90, 4)})
    return best, Errors(f"{name} attention forward", groups)


def flash_table(kernel: str, stage: str, causal: str) -> Table:
    """Rows of the published FlashAttention figures on H100."""
    return read("attention_flash.csv").where(kernel=kernel, stage=stage, causal=causal)


def flash_seconds(rows: Table, *, causal: bool, backward: bool) -> FloatArray:
    """Seconds behind the published TFLOP/s, which count half of full attention when causal."""
    full = 4.0 * rows.number("seq_len") ** 2 * rows.number("batch") * 2048.0
    scale = (0.5 if causal else 1.0) * (2.5 if backward else 1.0)
    return np.asarray(full * scale / (rows.number("tflops") * 1e12))


def fit_flash(kernel: str, base: AttentionConstants | None) -> tuple[AttentionConstants, Errors]:
    """Backward constants of ``base`` from the figures; without ``base``, the forward ones too."""
    box = machine("h100-sxm-80gb")
    forward = [(flash_table(kernel, "forward", c), c == "1", False) for c in ("0", "1")]
    backward = [(flash_table(kernel, "backward", "0"), False, True)]
    series = backward if base else forward + backward

    def constants(x: Vector) -> AttentionConstants:
        if base:
            return base.model_copy(
                update={
                    "e_backward": rounded(sigmoid(x[0])),
                    "half_length_backward": round(float(np.exp(x[1])), 1),
                }
            )
        return AttentionConstants(
            e_backward=rounded(sigmoid(x[0])),
            half_length_backward=round(float(np.exp(x[1])), 1),
            e_forward=rounded(sigmoid(x[2])),
            half_length=round(float(np.exp(x[3])), 1),
            half_head_dim=round(float(np.exp(x[4])), 1),
            t0_s=1e-5,
            kind=Kind.FITTED,
            source="FlashAttention-3 paper, H100 figures (third-party transcription, +-1 %)",
        )

    def errors(found: AttentionConstants, left_out: bool) -> FloatArray:
        parts = []
        for rows, causal, back in series:
            predicted_s = attention_times(found, box, rows, causal=causal, backward=back)
            ratio = predicted_s / flash_seconds(rows, causal=causal, backward=back)
            parts.append(ratio[rows.left_out("seq_len", "head_dim") == left_out])
        return np.concatenate(parts)

    start = [0.3, 5.0] + ([] if base else [0.3, 5.0, 3.0])
    x, _ = minimise(lambda x: float(np.abs(np.log(errors(constants(x), False))).mean()), start)
    best = constants(x)
    error = np.abs(errors(best, True) - 1.0)
    found = quantiles(error, np.ones(len(error), dtype=bool))
    if not base:
        best = best.model_copy(
            update={"error_median": round(found[0], 4), "error_p90": round(found[1], 4)}
        )
    label = "backward" if base else "forward and backward"
    return best, Errors(f"h100-sxm-80gb {kernel} {label} (figures)", {"all": found})


def fit_attention_train(
    name: str, base: AttentionConstants, *, length: bool
) -> tuple[AttentionConstants, Errors]:
    """``base`` with the rates (and, with ``length``, the half lengths) of training kernels.

    Kernels below ``LAUNCH_BOUND_US`` are left away: halving their heads does not shorten them, so
    what was timed is the host.
    """
    box = machine(name)
    best, both = base, []
    groups = {}
    for stage, field in (("forward", "e_forward"), ("backward", "e_backward")):
        rows = read("attention_train.csv").where(device=name, stage=stage)
        rows = Table([row for row in rows.rows if float(row["us"]) >= LAUNCH_BOUND_US])
        measured_s = rows.number("us") * 1e-6
        out = rows.left_out("seq_len", "heads", "kv_heads", "qk_head_dim")

        def ratio(found: AttentionConstants) -> FloatArray:
            back = stage == "backward"  # noqa: B023
            return attention_times(found, box, rows, backward=back) / measured_s  # noqa: B023

        def constants(x: Vector) -> AttentionConstants:
            update = {field: rounded(sigmoid(x[0]))}  # noqa: B023
            if length:
                which = "half_length" + ("_backward" if stage == "backward" else "")  # noqa: B023
                update[which] = round(float(np.exp(x[1])), 1)
            return best.model_copy(update=update)  # noqa: B023

        x, _ = minimise(
            lambda x: float(np.abs(np.log(ratio(constants(x))[~out])).mean()),  # noqa: B023
            [0.3, 5.0],
        )
        best = constants(x)
        error = np.abs(ratio(best) - 1.0)
        groups[stage] = quantiles(error, out)
        both.append(error[out])
    pooled = np.concatenate(both)
    median, p90, count = quantiles(pooled, np.ones(len(pooled), dtype=bool))
    best = best.model_copy(
        update={
            "error_median": round(median, 4),
            "error_p90": round(p90, 4),
            "note": f"errors on only {count} left-out rows, forward and backward together",
            "source": f"MooreThreads/SimuMax (Apache-2.0), training attention table of {name} "
            f"(rates{' and half lengths' if length else ''}); other constants: {base.source}",
        }
    )
    return best, Errors(f"{name} training attention", groups)
