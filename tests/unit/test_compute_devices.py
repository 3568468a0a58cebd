"""The devices that ship: valid, plausible, and as accurate on the measured tables as they say."""

from __future__ import annotations

import csv
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models import compute
from hardware_profiles.loader import catalog_names, load_device
from hardware_profiles.schema import DeviceSpec, Kind

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "kernels" / "data"
EXPECTED = {
    "a100-pcie-80gb",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "b200-sxm-180gb",
    "h100-sxm-80gb",
    "h200-sxm-141gb",
    "h800-sxm-80gb",
    "rtx-4090",
}


DEVICES = {name: load_device(name) for name in catalog_names("device")}


def test_the_promised_devices_ship() -> None:
    assert set(DEVICES) >= EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_rates_are_below_what_was_measured_and_that_below_the_peak(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    for dtype, best in device.best_matmul_flops.items():
        peak = device.peak_flops[dtype].si
        assert best.si <= peak
        # Training cannot sustain more than the best shape ever published for the device.
        constants = device.kernels.matmul[dtype]
        assert constants.e_compute * constants.sustained * peak <= best.si
    for dtype, constants in device.kernels.matmul.items():
        assert dtype in device.peak_flops
        assert constants.e_compute <= 1.0
        assert constants.t0_s > 0.0
        assert constants.kind is Kind.ASSUMED or constants.error_median is not None
    assert device.kernels.attention
    assert 2**30 < device.memory_capacity.si < 2**38


def test_borrowed_constants_equal_their_lender() -> None:
    for name, lender in (("h800-sxm-80gb", "h100-sxm-80gb"), ("a100-sxm-40gb", "a100-sxm-80gb")):
        for dtype, constants in DEVICES[name].kernels.matmul.items():
            assert constants.borrowed_from == lender
            own = DEVICES[lender].kernels.matmul[dtype]
            unlike = {"borrowed_from": None, "heating": 0.0, "heating_s": 1e-3, "cache_share": 0.0}
            assert constants.model_copy(update=unlike) == own.model_copy(update=unlike)
            assert constants.heating == constants.cache_share == 0.0


def test_an_a100_has_no_fp8() -> None:
    with pytest.raises(ValueError, match="a100-sxm-80gb has no fp8 matrix products"):
        compute.matmul_time_s(DEVICES["a100-sxm-80gb"], "fp8", 4096, 4096, 4096)


def _rows(name: str, **wanted: str) -> list[dict[str, str]]:
    opener: Any = gzip.open if name.endswith(".gz") else open
    with opener(DATA / name, "rt", encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _column(rows: list[dict[str, str]], name: str) -> Any:
    return np.array([float(row[name]) for row in rows])


@pytest.mark.parametrize(
    ("name", "dtype", "column", "median", "p90"),
    [
        ("a100-sxm-80gb", "bf16", "us_sglang", 0.03, 0.10),
        ("h100-sxm-80gb", "bf16", "us_sglang", 0.05, 0.11),
        ("h200-sxm-141gb", "bf16", "us_trtllm", 0.05, 0.14),
        ("b200-sxm-180gb", "bf16", "us_sglang", 0.05, 0.10),
        ("gb200", "bf16", "us_sglang", 0.05, 0.11),
        ("h100-sxm-80gb", "fp8", "us_trtllm", 0.04, 0.12),
        ("h200-sxm-141gb", "fp8", "us_trtllm", 0.04, 0.12),
        ("b200-sxm-180gb", "fp8", "us_trtllm", 0.07, 0.17),
        ("b200-sxm-180gb", "nvfp4", "us_trtllm", 0.06, 0.25),
        ("gb200", "fp8", "us_trtllm", 0.07, 0.17),
        ("l40s", "fp8", "us_trtllm", 0.09, 0.22),
    ],
)
def test_training_size_products_agree_with_the_tables(
    name: str, dtype: str, column: str, median: float, p90: float
) -> None:
    rows = [row for row in _rows("gemm.csv.gz", device=name, dtype=dtype) if row[column]]
    rows = [row for row in rows if min(int(row["m"]), int(row["n"]), int(row["k"])) >= 1024]
    assert len(rows) > 100
    m, n, k, us = (_column(rows, c) for c in ("m", "n", "k", column))
    device = DEVICES[name]
    found = compute.matmul_time_s(device, dtype, m, n, k, alone=True)
    # The tables include the quantisation of the activations, in one layout.
    if dtype == "nvfp4":
        moved = (2.0 + compute.OPERAND_BYTES[dtype]) * m * k
        found += moved / compute.memory_bound_bandwidth_bytes_per_s(device)
    elif dtype == "fp8":
        found += _timed_quantisation_s(name, m * k)
    error = np.abs(found / (us * 1e-6) - 1)
    assert np.median(error) < median
    assert np.quantile(error, 0.9) < p90


def _timed_quantisation_s(name: str, elements: Any) -> Any:
    """A fixed time and a time per element through the median of tensors of over 2^24 elements."""
    rows = _rows("quantisation.csv", device=name)
    timed = _column(rows, "m") * _column(rows, "k")
    taken_s = (_column(rows, "us_scale") + _column(rows, "us_cast")) * 1e-6
    fixed_s = np.median(taken_s[timed < 2**17])
    large = timed > 2**24
    return fixed_s + elements * np.median((taken_s[large] - fixed_s) / timed[large])


def _sustaining(device: DeviceSpec, dtype: str, sustained: float) -> DeviceSpec:
    """The device with another share of its rate that lasts."""
    constants = device.kernels.matmul[dtype].model_copy(update={"sustained": sustained})
    matmul = {**device.kernels.matmul, dtype: constants}
    return device.model_copy(
        update={"kernels": device.kernels.model_copy(update={"matmul": matmul})}
    )


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm-80gb"])
def test_large_products_run_at_the_sustained_rate(name: str) -> None:
    short, half = (_sustaining(DEVICES[name], "bf16", share) for share in (1.0, 0.5))
    times = [compute.matmul_time_s(d, "bf16", 16384, 16384, 16384) for d in (short, half)]
    assert float(times[0] / times[1]) == pytest.approx(0.5, rel=0.01)
    assert 0.7 < DEVICES[name].kernels.matmul["bf16"].sustained < 1.0


@pytest.mark.parametrize(("name", "loop"), [("a100-pcie-80gb", 1.0), ("b200-sxm-180gb", 0.754)])
@pytest.mark.parametrize("stage", ["fprop", "dgrad", "wgrad"])
def test_training_kernels_agree_with_the_training_table(name: str, loop: float, stage: Any) -> None:
    # The table's kernels ran in loops of their own; whole training runs are slower still on B200.
    rows = _rows("gemm_train.csv", device=name, stage=stage)
    rows = [row for row in rows if stage != "wgrad" or row["out_dtype"] == "fp32"]
    assert len(rows) > 20
    m, n, k, us = (_column(rows, c) for c in ("m", "n", "k", "us"))
    device = _sustaining(DEVICES[name], "bf16", loop)
    found = compute.matmul_time_s(device, "bf16", m, n, k, stage=stage)
    assert np.median(np.abs(found / (us * 1e-6) - 1)) < 0.09


@pytest.mark.parametrize("name", ["a100-pcie-80gb", "b200-sxm-180gb"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_training_attention_agrees_with_the_training_table(name: str, stage: Any) -> None:
    rows = _rows("attention_train.csv", device=name, stage=stage)
    # Below 150 us halving the heads does not shorten the kernel: the host was timed.
    rows = [row for row in rows if float(row["us"]) >= 150]
    assert len(rows) > 5
    kernel = "cudnn" if name.startswith("b200") else "flash2"
    length = _column(rows, "seq_len")
    found = compute.attention_time_s(
        DEVICES[name],
        "bf16",
        kernel,
        batch=1,
        q_len=length,
        kv_len=length,
        heads=_column(rows, "heads"),
        kv_heads=_column(rows, "kv_heads"),
        qk_head_dim=_column(rows, "qk_head_dim"),
        v_head_dim=_column(rows, "v_head_dim"),
        causal=True,
        stage=stage,
    )
    assert np.median(np.abs(found / (_column(rows, "us") * 1e-6) - 1)) < 0.13


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_more_work_never_costs_less_and_nothing_is_free(name: str) -> None:
    device = DEVICES[name]
    # Aligned: padding a dimension up to 16 bytes is more work and less time.
    sizes = np.unique(8 * np.geomspace(1, 8192, 120).astype(int)).astype(float)
    for order in ((sizes, 4096, 4096), (4096, sizes, 4096), (4096, 4096, sizes)):
        found = compute.matmul_time_s(device, "bf16", *order)
        assert np.all(found > 0.0)
        assert np.all(np.diff(found) >= 0.0)
    assert np.all(compute.memory_bound_time_s(device, sizes) > 0.0)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_one_configuration_costs_the_same_alone_and_among_many(name: str) -> None:
    device = DEVICES[name]
    kernel = sorted(device.kernels.attention)[-1]
    sizes = np.random.default_rng(7).integers(1, 20000, (3, 257))
    many = compute.matmul_time_s(device, "bf16", *sizes)
    alone = [float(compute.matmul_time_s(device, "bf16", *(int(v) for v in s))) for s in sizes.T]
    assert many.tolist() == alone

    def attention(length: Any) -> Any:
        return compute.attention_time_s(
            device,
            "bf16",
            kernel,
            batch=2,
            q_len=length,
            kv_len=length,
            heads=8,
            kv_heads=2,
            qk_head_dim=128,
            v_head_dim=128,
            causal=True,
            stage="backward",
        )

    assert attention(sizes[0]).tolist() == [float(attention(int(v))) for v in sizes[0]]


def test_a_million_products_are_priced_in_less_than_a_second() -> None:
    sizes = np.random.default_rng(3).integers(1, 65536, (3, 1_000_000)).astype(float)
    start = time.process_time()
    found = compute.matmul_time_s(DEVICES["h100-sxm-80gb"], "bf16", *sizes)
    assert time.process_time() - start < 1.0
    assert found.shape == (1_000_000,)
