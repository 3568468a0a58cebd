"""The fits of attention: constants of one kernel on one device from the tables in ``data/``.

As in ``fits.py``: two thirds of the shapes are fitted, errors are on the other third.
"""

from __future__ import annotations

import numpy as np
from fits import (
    TRAINING_WEIGHT,
    Errors,
    Machine,
    machine,
    quantiles,
)
from forms import rounded, sigmoid
from nelder_mead import Vector, minimise
from tables import FloatArray, Table, read

from cost_models.laws import attention_law
from hardware_profiles.schema import AttentionConstants, Kind

LONG_S, LAUNCH_BOUND_US = 200e-6, 150.0


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
