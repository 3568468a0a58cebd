"""Kernel times against figures derived by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cost_models import compute, laws
from hardware_profiles.schema import DeviceSpec


def _number(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "kind": "assumed", "source": "test"}


def _device(**matmul: float) -> DeviceSpec:
    """100 TFLOP/s, 1 TB/s, 100 units; half of each reached, no fixed time unless given."""
    constants = {
        "e_compute": 0.5,
        "e_memory": 0.5,
        "t0_s": 0.0,
        "k0": 0.0,
        "p": 4.0,
        "wave_share": 1.0,
        "kind": "assumed",
        "source": "test",
    }
    attention = {
        "e_forward": 0.5,
        "e_backward": 0.4,
        "half_length": 0.0,
        "t0_s": 0.0,
        "kind": "assumed",
        "source": "test",
    }
    return DeviceSpec.model_validate(
        {
            "name": "toy",
            "title": "Toy",
            "vendor": "test",
            "peak_flops": {
                "bf16": _number(100, "TFLOP/s"),
                "fp16": _number(100, "TFLOP/s"),
                "fp32": _number(10, "TFLOP/s"),
            },
            "memory_capacity": _number(80, "GiB"),
            "memory_bandwidth": _number(1000, "GB/s"),
            "compute_units": _number(100, "count"),
            "kernels": {
                "matmul": {"bf16": constants | matmul},
                "attention": {"flash2": {"bf16": attention}},
                "memory_bound_efficiency": _number(0.5, "1"),
                "memory_bound_latency": _number(2, "us"),
            },
        }
    )


def test_full_waves_run_at_the_compute_rate() -> None:
    # 1280 x 1280 has 10 x 10 = 100 tiles: one full wave of 100 units, no idle time.
    # FLOPs 2 * 1280^2 * 65536 = 2.147e11 at 50 TFLOP/s = 4294.97 us.
    # Bytes 2 * (2 * 1280 * 65536 + 1280^2) = 3.388e8 at 0.5 TB/s = 677.6 us;
    # (1 + (677.6 / 4294.97)^4)^(1/4) = 1.000155.
    found = compute.matmul_time_s(_device(), "bf16", 1280, 1280, 65536)
    assert found == pytest.approx(4294.967e-6 * 1.0001549, rel=1e-6)


def test_a_last_wave_with_one_tile_costs_a_whole_wave_or_its_share() -> None:
    # 1281 rows: 11 x 10 = 110 tiles = 1.1 waves; ceil gives 2 waves, a share of 0.25 gives
    # 1.1 + 0.25 * 0.9 = 1.325 waves. One wave is 2 * 128^2 * 100 * k / 50e12 s.
    k = 10**9
    wave_s = 2 * 128 * 128 * 100 * k / 50e12
    memory_s = 2 * (k * (1281 + 1280) + 1281 * 1280) / 0.5e12
    for share, waves in ((1.0, 2.0), (0.25, 1.325), (0.0, 1.1)):
        expected = ((waves * wave_s) ** 4 + memory_s**4) ** 0.25
        found = compute.matmul_time_s(_device(wave_share=share), "bf16", 1281, 1280, k)
        assert found == pytest.approx(expected, rel=1e-9)


def test_short_reductions_run_at_half_rate_at_k0() -> None:
    fast = compute.matmul_time_s(_device(p=2.0, e_memory=1.2), "bf16", 12800, 12800, 512)
    slow = compute.matmul_time_s(_device(p=2.0, e_memory=1.2, k0=512.0), "bf16", 12800, 12800, 512)
    # Compute 2 * 12800^2 * 512 / 50e12 = 3355.4 us, doubled by k0 = k; memory
    # 2 * (2 * 12800 * 512 + 12800^2) / 1.2e12 = 294.9 us; root of the sum of squares.
    assert fast == pytest.approx(np.hypot(3355.443e-6, 294.912e-6), rel=1e-6)
    assert slow == pytest.approx(np.hypot(6710.886e-6, 294.912e-6), rel=1e-6)


def test_a_vector_times_a_matrix_reads_the_matrix() -> None:
    # 1 x 12800 x 12800: 100 tiles of 128 columns are one wave, 128 times the useful FLOPs:
    # 2 * 128^2 * 100 * 12800 / 50e12 = 838.9 us against 2 * 12800^2 B at 0.5 TB/s = 655.4 us.
    found = compute.matmul_time_s(_device(t0_s=3e-6), "bf16", 1, 12800, 12800)
    memory_s = 2 * (12800 * 12801 + 12800) / 0.5e12
    assert found == pytest.approx(3e-6 + (838.8608e-6**4 + memory_s**4) ** 0.25, rel=1e-6)


def test_wgrad_reads_and_writes_the_fp32_gradient() -> None:
    # Memory bound: k = 1 and a 12800 x 12800 output, 8 bytes per element against 2.
    device = _device(p=1.0, e_compute=1.2)
    compute_s = 2 * 12800**2 / 120e12
    operands = 2 * 25600 / 0.5e12
    for stage, size in (("fprop", 2), ("dgrad", 2), ("wgrad", 8)):
        found = compute.matmul_time_s(device, "bf16", 12800, 12800, 1, stage=stage)
        assert found == pytest.approx(compute_s + operands + size * 12800**2 / 0.5e12, rel=1e-9)


def test_a_batch_counts_waves_over_all_its_tiles() -> None:
    # 50 products of 2 tiles fill the 100 units as one product of 100 tiles does.
    device = _device(p=8.0, e_memory=1.2)
    k = 12800
    one_wave_s = 2 * 128 * 128 * 100 * k / 50e12
    found = compute.matmul_time_s(device, "bf16", 128, 256, k, batch=50)
    memory_s = 2 * 50 * (k * 384 + 128 * 256) / 1.2e12
    assert found == pytest.approx((one_wave_s**8 + memory_s**8) ** 0.125, rel=1e-9)
    alone = compute.matmul_time_s(device, "bf16", 128, 256, k)
    assert alone == pytest.approx(one_wave_s, rel=1e-3)
    assert found < 50 * alone / 40


def test_groups_follow_each_other_or_share_one_launch() -> None:
    device = _device(t0_s=5e-6)
    one = compute.matmul_time_s(device, "bf16", 300, 4096, 1024)
    in_turn = compute.grouped_matmul_time_s(device, "bf16", 8, 300, 4096, 1024)
    assert in_turn == pytest.approx(8 * one, rel=1e-12)
    together = compute.grouped_matmul_time_s(device, "bf16", 8, 300, 4096, 1024, single_launch=True)
    batched = compute.matmul_time_s(device, "bf16", 300, 4096, 1024, batch=8)
    assert together == pytest.approx(batched, rel=1e-12)
    assert together < in_turn


def test_the_weight_gradient_of_a_group_reduces_over_its_rows() -> None:
    device = _device(k0=64.0)
    found = compute.grouped_matmul_time_s(device, "bf16", 4, 300, 4096, 1024, stage="wgrad")
    one = compute.matmul_time_s(device, "bf16", 4096, 1024, 300, stage="wgrad")
    assert found == pytest.approx(4 * one, rel=1e-12)


def _attention(device: DeviceSpec, **change: Any) -> float:
    shape: dict[str, Any] = {
        "batch": 1,
        "q_len": 4096,
        "kv_len": 4096,
        "heads": 100,
        "kv_heads": 100,
        "qk_head_dim": 128,
        "v_head_dim": 128,
        "causal": False,
    }
    return float(compute.attention_time_s(device, "bf16", "flash2", **(shape | change)))


def test_a_lone_tile_takes_the_latency_of_its_reduction() -> None:
    # One of 100 units works: a full wave takes 2 * 128^2 * 100 / 50e12 = 65.536 ns for each element
    # of the reduction. A tile by itself takes half of that for 4096 elements, of which splitting
    # the reduction saves two thirds, and 1 / 1.01 is the share of the units that are idle.
    def time_s(**matmul: float) -> float:
        return float(compute.matmul_time_s(_device(**matmul), "bf16", 128, 128, 4096))

    added_s = time_s(tile_latency=0.5, split_k=2048.0) - time_s()
    assert added_s == pytest.approx(0.5 * 65.536e-9 * 4096 / 3 / 1.01, rel=1e-6)


def test_longer_reductions_never_cost_less_for_their_latency() -> None:
    device = _device(tile_latency=0.9, split_k=300.0)
    k = np.array([64, 256, 1024, 4096, 16384, 65536])
    assert np.all(np.diff(compute.matmul_time_s(device, "bf16", 64, 64, k)) > 0.0)


def test_only_benchmarks_run_cool_and_find_operands_in_the_cache() -> None:
    own = {"sustained": 0.8, "heating": 0.25, "heating_s": 1e-3, "cache_share": 0.5, "p": 1024.0}
    own["e_memory"] = 0.1
    constants = _device(**own).kernels.matmul["bf16"]

    def time_s(m: int, n: int, k: int, cache_bytes: float | None) -> float:
        return float(
            laws.matmul_law(
                constants, m, n, k, batch=1, peak_flops=100e12, bandwidth_bytes_per_s=1e12,
                compute_units=100, operand_bytes=2.0, output_bytes=2.0,
                benchmark_cache_bytes=cache_bytes,
            )
        )  # fmt: skip

    # 12800^2 outputs are 100 full waves: 2.1475 s at 50 TFLOP/s, so long that heating is paid in
    # full; a step computes at 0.8 of that rate.
    burst_s = 2.0 * 12800 * 12800 * 327680 / 50e12
    assert time_s(12800, 12800, 327680, 0.0) == pytest.approx(1.25 * burst_s, rel=1e-3)
    assert time_s(12800, 12800, 327680, None) == pytest.approx(burst_s / 0.8, rel=1e-3)
    # A product of 1 row moves its 12800 x 12800 weights: half of the traffic hits where it fills
    # half of the cache.
    cold_s = time_s(1, 12800, 12800, None)
    traffic = 2.0 * (12800 * 12801 + 12800)
    assert time_s(1, 12800, 12800, 2.0 * traffic) == pytest.approx(cold_s / 2, rel=1e-2)


def test_attention_counts_visited_pairs() -> None:
    # Full: 4 * 100 heads * 4096^2 * 128 = 8.590e11 FLOP at 50 TFLOP/s = 17.18 ms.
    # Causal: 4096 * 4097 / 2 pairs, which is 0.500122 of all.
    # Memory (419 MB at 0.5 TB/s = 0.84 ms) adds less than 1e-4.
    full = _attention(_device())
    assert full == pytest.approx(17.1799e-3, rel=1e-4)
    assert _attention(_device(), causal=True) == pytest.approx(17.1799e-3 * 0.500122, rel=1e-4)
    # A chunk of the last 1024 queries sees 1024 * 4096 - 1024 * 1023 / 2 pairs = 0.21878 of all.
    chunk = _attention(_device(), causal=True, q_len=1024)
    assert chunk == pytest.approx(17.1799e-3 * 0.218781, rel=1e-3)


def test_attention_backward_has_five_products_and_its_own_rate() -> None:
    # 2.5 times the FLOPs at 0.4 instead of 0.5 of the peak.
    ratio = _attention(_device(), stage="backward") / _attention(_device())
    assert ratio == pytest.approx(2.5 * 0.5 / 0.4, rel=1e-3)


def test_attention_pads_the_narrower_head_dimension() -> None:
    narrow = _attention(_device(), qk_head_dim=192, v_head_dim=128)
    assert narrow == pytest.approx(_attention(_device()) * 192 / 128, rel=1e-3)


def test_memory_bound_time_is_latency_and_traffic() -> None:
    # 1 GB at half of 1 TB/s is 2 ms, after 2 us.
    assert compute.memory_bound_time_s(_device(), 1e9) == pytest.approx(2.002e-3, rel=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, 8.0, 3.0, 2.5])
def test_smooth_maximum_is_the_p_norm(p: float) -> None:
    a, b = np.array([3.0, 1.0, 0.0, 2.0]), np.array([4.0, 1.0, 5.0, 0.0])
    expected = (a**p + b**p) ** (1 / p)
    assert laws.smooth_maximum(a, b, p) == pytest.approx(expected, rel=1e-12)
    assert np.all(laws.smooth_maximum(0 * a, 0 * b, p) == 0.0)


def test_features_off_the_alignment_run_at_the_narrower_rate() -> None:
    device = _device(misaligned=0.5, wave_share=0.0)
    # 2 * 4096^3 FLOPs at 50 TFLOP/s are 2.749 ms, memory is 200 us.
    aligned = float(compute.matmul_time_s(device, "bf16", 4096, 4096, 4096))
    assert aligned == pytest.approx(2.749e-3, rel=1e-3)
    tokens = float(compute.matmul_time_s(device, "bf16", 4095, 4096, 4096))
    assert tokens == pytest.approx(aligned, rel=1e-3)  # rows of 4096 elements start on 16 bytes
    for stage, dims in (
        ("fprop", (4096, 4092, 4096)),
        ("dgrad", (4096, 4096, 4092)),
        ("wgrad", (4092, 4096, 4096)),
    ):
        found = compute.matmul_time_s(device, "bf16", *dims, stage=stage)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(2 * aligned, rel=3e-3)
    reduced = compute.matmul_time_s(device, "bf16", 4096, 4096, 4092, stage="wgrad")
    assert float(reduced) == pytest.approx(aligned, rel=3e-3)


def test_misaligned_heads_leave_the_tensor_cores() -> None:
    device = _device(misaligned=0.5)

    def time(q: int, n: Any, k: int, stage: compute.MatmulStage, *, sliced: bool) -> Any:
        return compute.matmul_time_s(
            device, "bf16", q, n, k, stage=stage, batch=16, accumulated_bytes=0.0, sliced=sliced
        )

    # 16 heads of 140 elements, 1024 tokens: at 0.626 of the 10 TFLOP/s of the vector units.
    expected = 2 * 16 * 1024**2 * 140 / 6.26e12
    assert float(time(1024, 140, 1024, "fprop", sliced=True)) == pytest.approx(expected)
    assert float(time(1024, 1024, 140, "dgrad", sliced=True)) == pytest.approx(expected)
    assert float(time(140, 1024, 1024, "wgrad", sliced=True)) == pytest.approx(expected)
    assert float(time(1024, 140, 1024, "fprop", sliced=False)) < 0.6 * expected
    mixed = time(1024, np.array([140, 144]), 1024, "fprop", sliced=True)
    assert mixed[0] == pytest.approx(expected)
    assert mixed[1] == time(1024, 144, 1024, "fprop", sliced=False)


def test_a_share_of_the_accumulation_comes_after_the_product() -> None:
    # 4096^2 fp32 gradients read and written at 500 GB/s are 268 us, a quarter of them 67 us; with
    # 2.749 ms of compute the rest (201 us, and 134 us of operands) is hidden.
    plain, apart = _device(wave_share=0.0), _device(wave_share=0.0, accumulate_share=0.25)
    times = [
        float(compute.matmul_time_s(device, "bf16", 4096, 4096, 4096, stage="wgrad"))
        for device in (plain, apart)
    ]
    assert times[1] - times[0] == pytest.approx(67.1e-6, rel=0.02)
    assert compute.matmul_time_s(plain, "bf16", 512, 512, 512) == compute.matmul_time_s(
        apart, "bf16", 512, 512, 512
    )


def test_gradients_kept_in_16_bits_move_half_the_bytes() -> None:
    # 4096^2 16-bit gradients read and written at 500 GB/s are 134 us, a quarter of them 34 us.
    plain, apart = _device(wave_share=0.0), _device(wave_share=0.0, accumulate_share=0.25)
    times = [
        float(
            compute.matmul_time_s(
                device, "bf16", 4096, 4096, 4096, stage="wgrad", accumulated_bytes=4.0
            )
        )
        for device in (plain, apart)
    ]
    assert times[1] - times[0] == pytest.approx(33.6e-6, rel=0.02)


def test_quantisation_moves_each_operand_once_and_writes_it_twice() -> None:
    # 1e9 elements of 4 bytes at 500 GB/s, and three kernels of 2 us.
    found = compute.quantisation_time_s(_device(), "fp8", 1e9, 3)
    assert float(found) == pytest.approx(8e-3 + 6e-6)
    # nvfp4 reads 16 bits twice and writes 4 bits and a sixteenth of a byte twice.
    found = compute.quantisation_time_s(_device(), "nvfp4", 1e9)
    assert float(found) == pytest.approx(5.125 * 2e-3 + 2e-6)


def test_missing_dtypes_and_kernels_are_named() -> None:
    device = _device()
    with pytest.raises(ValueError, match="toy has no fp8 matrix products; it has bf16"):
        compute.matmul_time_s(device, "fp8", 1, 1, 1)
    with pytest.raises(ValueError, match="no fp32 matrix products"):
        compute.matmul_time_s(device, "fp32", 1, 1, 1)
    with pytest.raises(ValueError, match="no attention kernel 'flash9'; it has flash2"):
        compute.attention_constants(device, "bf16", "flash9")
    with pytest.raises(ValueError, match="no fp32 kernel; it has bf16"):
        compute.attention_constants(device, "fp32", "flash2")
    with pytest.raises(ValueError, match="unknown stage 'forward'; known: fprop, dgrad, wgrad"):
        compute.matmul_time_s(device, "bf16", 1, 1, 1, stage="forward")  # type: ignore[arg-type]


def test_fp16_borrows_bf16_only_at_an_equal_peak() -> None:
    device = _device()
    same = compute.matmul_time_s(device, "fp16", 512, 512, 512)
    assert same == compute.matmul_time_s(device, "bf16", 512, 512, 512)
    faster = device.model_copy(
        update={
            "peak_flops": device.peak_flops
            | {"fp16": device.peak_flops["fp16"].model_copy(update={"value": 200.0})}
        }
    )
    with pytest.raises(ValueError, match="no fp16"):
        compute.matmul_time_s(faster, "fp16", 512, 512, 512)
