"""Every device, link and node that ships: loadable, sourced, plausible, and good for a plan."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from cost_models import compute
from cost_models.interconnect import CollectiveKind, collective_time_s
from hardware_profiles import loader
from hardware_profiles.schema import (
    AttentionConstants,
    DeviceSpec,
    Kind,
    MatmulConstants,
    NodeSpec,
    Sourced,
)
from planner.pipeline import plan, read_request

DATA = Path(__file__).parents[2] / "benchmarks" / "kernels" / "data"
DATASHEETS = yaml.safe_load((Path(__file__).parents[1] / "data" / "datasheets.yaml").read_text())

NEW_DEVICES = [
    "a100-pcie-40gb",
    "a10g",
    "a800-sxm-80gb",
    "ascend-910b",
    "ascend-910c",
    "b300-sxm-288gb",
    "gaudi2",
    "gaudi3",
    "gb200",
    "gb300",
    "gh200",
    "h100-96gb-hbm2e",
    "h100-pcie-80gb",
    "h20-96gb",
    "l4",
    "l40s",
    "mi250x-gcd",
    "mi300x",
    "mi325x",
    "mi355x",
    "rtx-a6000",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "tpu-v7",
    "trainium1",
    "trainium2",
    "v100-sxm-16gb",
    "v100-sxm-32gb",
]
VENDORS = {"amd", "aws", "google", "huawei", "intel", "nvidia"}


def numbers(value: object) -> Iterator[Sourced]:
    """Every number with provenance in a profile."""
    if isinstance(value, Sourced):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from numbers(getattr(value, name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from numbers(inner)


@pytest.fixture(scope="module")
def devices() -> dict[str, DeviceSpec]:
    return {name: loader.load_device(name) for name in loader.catalog_names("device")}


def test_the_breadth_ships(devices: dict[str, DeviceSpec]) -> None:
    assert set(devices) >= set(NEW_DEVICES)
    assert {device.vendor for device in devices.values()} >= VENDORS
    used = {loader.load_node(name).device.name for name in loader.catalog_names("node")}
    # A device that no node carries cannot be named on the command line.
    assert set(NEW_DEVICES) <= used


@pytest.mark.parametrize("name", loader.catalog_names("device"))
def test_device_is_sourced_and_plausible(name: str) -> None:
    device = loader.load_device(name)
    assert device.name == name
    assert all(number.source.strip() for number in numbers(device))
    if name in NEW_DEVICES:
        assert all(number.unit for number in numbers(device))
    peaks = {dtype: peak.si for dtype, peak in device.peak_flops.items()}
    half = peaks["bf16" if "bf16" in peaks else "fp16"]
    assert 5e13 < half < 3e15
    assert peaks.get("fp16", half) == half
    assert peaks.get("fp8", half) >= half
    assert peaks.get("fp32", 0.0) <= peaks.get("tf32", half) <= half
    # FLOPs per byte at the ridge: 37 on H20, built for its memory, to 560 on TPU v6e.
    assert 30 < half / device.memory_bandwidth.si < 600
    # Seconds to read the whole memory once: from 17 ms (V100 16 GB) to 85 ms (L4).
    assert 0.015 < device.memory_capacity.si / device.memory_bandwidth.si < 0.1
    assert 0.5 < device.kernels.memory_bound_efficiency.si <= 1
    assert 0 < device.kernels.memory_bound_latency.si < 1e-4


@pytest.mark.parametrize("name", loader.catalog_names("device"))
def test_kernels_stay_below_what_was_measured_and_that_below_the_peak(name: str) -> None:
    device = loader.load_device(name)
    for dtype, best in device.best_matmul_flops.items():
        peak = device.peak_flops[dtype].si
        assert best.si <= peak
        constants = device.kernels.matmul[dtype]
        assert constants.e_compute * constants.sustained * peak <= best.si
    for dtype, constants in device.kernels.matmul.items():
        assert dtype in device.peak_flops
        assert constants.e_compute < 1
    assert device.kernels.attention
    for by_dtype in device.kernels.attention.values():
        for dtype, attention in by_dtype.items():
            assert dtype in device.peak_flops
            assert attention.e_forward <= 1
            assert attention.e_backward <= attention.e_forward


@pytest.mark.parametrize("name", NEW_DEVICES)
def test_what_was_not_measured_names_its_lender_and_says_why(
    name: str, devices: dict[str, DeviceSpec]
) -> None:
    kernels = devices[name].kernels
    attention = [each for by_dtype in kernels.attention.values() for each in by_dtype.values()]
    every: list[MatmulConstants | AttentionConstants] = [*kernels.matmul.values(), *attention]
    for constants in every:
        if constants.borrowed_from is None:
            assert name in {"l40s", "gb200"}
            continue
        assert constants.borrowed_from in devices
        assert constants.borrowed_from != name
        assert constants.note
        # A rate of the device's own, from a published maximum, may be measured; never fitted.
        assert constants.kind in (Kind.ASSUMED, Kind.MEASURED)
        assert constants.error_median is None


@pytest.mark.parametrize("name", NEW_DEVICES)
def test_every_stack_finds_its_attention_kernel(name: str, devices: dict[str, DeviceSpec]) -> None:
    for stack in map(loader.load_stack, loader.catalog_names("stack")):
        kernel = stack.attention_kernel(name)
        assert kernel == "unfused" or kernel in devices[name].kernels.attention, stack.name


@pytest.mark.parametrize(
    ("name", "dtype", "best", "peak"),
    [
        ("mi300x", "bf16", 668.4, 1307),
        ("mi325x", "bf16", 784.9, 1307),
        ("mi355x", "bf16", 1565, 2500),
        ("gaudi2", "bf16", 418.7, 432),
        ("gaudi2", "fp8", 826.5, 865),
        ("gaudi3", "bf16", 1243, 1677),
        ("gaudi3", "fp8", 1289.5, 1677),
    ],
)
def test_published_maximum_over_peak(
    name: str, dtype: str, best: float, peak: float, devices: dict[str, DeviceSpec]
) -> None:
    constants = devices[name].kernels.matmul[dtype]
    assert constants.e_compute == pytest.approx(best / peak, abs=1e-4)
    assert constants.kind is Kind.MEASURED


def test_same_die_same_fractions(devices: dict[str, DeviceSpec]) -> None:
    for name, lender in (("a800-sxm-80gb", "a100-sxm-80gb"), ("gh200", "h100-sxm-80gb")):
        m = np.array([1024.0, 4096.0, 16384.0])
        own = compute.matmul_time_s(devices[name], "bf16", m, 8192, 65536)
        theirs = compute.matmul_time_s(devices[lender], "bf16", m, 8192, 65536)
        # Same peak; GH200 has faster memory, which these shapes hardly feel.
        np.testing.assert_allclose(own, theirs, rtol=0.01)


@pytest.mark.parametrize("name", ["v100-sxm-16gb", "v100-sxm-32gb"])
def test_a_v100_has_fp16_and_no_bf16(name: str, devices: dict[str, DeviceSpec]) -> None:
    device = devices[name]
    assert "bf16" not in device.peak_flops
    with pytest.raises(ValueError, match="no bf16 matrix products"):
        compute.matmul_time_s(device, "bf16", 4096, 4096, 4096)
    # 2 * 8192^3 FLOPs at 0.8061 of 125 TFLOP/s are 10.91 ms; k0 adds 119/8192, memory 2 %. The
    # share of that rate that long runs sustain is fitted.
    found = compute.matmul_time_s(device, "fp16", 8192, 8192, 8192)
    sustained = device.kernels.matmul["fp16"].sustained
    assert 0.7 < sustained < 1
    assert float(found) * sustained == pytest.approx(10.91e-3 * (1 + 119.2 / 8192), rel=0.02)


def _rows(dtype: str, column: str) -> list[dict[str, str]]:
    with gzip.open(DATA / "gemm.csv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["device"] == "l40s"]
    rows = [row for row in rows if row["dtype"] == dtype and row[column]]
    return [row for row in rows if min(int(row[side]) for side in "mnk") >= 1024]


def test_l40s_products_agree_with_its_table(devices: dict[str, DeviceSpec]) -> None:
    dtype, column, median, p90 = "bf16", "us_sglang", 0.06, 0.25
    rows = _rows(dtype, column)
    assert len(rows) > 200
    m, n, k, us = (np.array([float(row[c]) for row in rows]) for c in ("m", "n", "k", column))
    found = compute.matmul_time_s(devices["l40s"], dtype, m, n, k, alone=True)
    error = np.abs(found / (us * 1e-6) - 1)
    assert np.median(error) < median
    assert np.quantile(error, 0.9) < p90


@pytest.mark.parametrize("name", loader.catalog_names("link"))
def test_link_is_sourced_and_its_collectives_stay_on_the_wire(name: str) -> None:
    link = loader.load_link(name)
    assert all(number.source.strip() for number in numbers(link))
    for row in link.collectives:
        assert row.source.strip()
        # In-switch reduction beats the wire by 7 % on NVLink 4.
        assert row.bandwidth <= 1.08 * link.bandwidth.si
        assert row.ll_bandwidth <= 1.08 * link.bandwidth.si
        assert row.latency_s <= row.simple_latency_s


@pytest.mark.parametrize("name", loader.catalog_names("node"))
def test_node_sums(name: str) -> None:
    node = loader.load_node(name)
    assert node.title
    assert all(number.source.strip() for number in numbers(node))
    share = node.nics * node.scale_out.bandwidth.si / node.devices_per_node
    assert share <= node.scale_up.bandwidth.si
    assert 1e9 < node.host_link.si <= 450e9
    measured = [row.devices for row in node.scale_up.collectives]
    assert not measured or min(measured) == 2


@pytest.mark.parametrize("name", loader.catalog_names("node"))
def test_network_adapters_of_a_node_are_those_of_its_data_sheet(name: str) -> None:
    node = loader.load_node(name)
    total = 8e-9 * node.nics * node.scale_out.bandwidth.si
    assert total == pytest.approx(DATASHEETS["nodes"][name], rel=1e-3)


@pytest.mark.parametrize("name", loader.catalog_names("device"))
def test_memory_and_peak_of_a_device_are_those_of_its_data_sheet(name: str) -> None:
    device = loader.load_device(name)
    peak = device.peak_flops.get("bf16") or device.peak_flops["fp16"]
    found = [1e-9 * device.memory_bandwidth.si, 1e-12 * peak.si]
    assert found == pytest.approx(DATASHEETS["devices"][name], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("hgx-v100-32gb-x4", 4), ("dgx-h100", 8), ("frontier", 8), ("aws-trn2", 16),
        ("gb200-nvl72", 72), ("tpu-v5p-cube", 64), ("tpu-v5e-pod", 256), ("cloudmatrix384", 384),
    ],
)  # fmt: skip
def test_devices_of_a_node(name: str, devices: int) -> None:
    assert loader.load_node(name).devices_per_node == devices


def _in_node(node: NodeSpec, what: CollectiveKind, payload: float, size: int) -> float:
    cluster = loader.load_cluster(f"{node.name}:2")
    return float(collective_time_s(cluster, what, payload, size=size, stride=1))


def test_a_pair_on_a_full_mesh_has_one_link_of_seven() -> None:
    node = loader.load_node("mi300x-8")
    # All-reduce of 8 GB: wire bytes are the payload for a pair and 7/4 of it for eight; measured
    # bus bandwidths are 47.67 and 312.9 GB/s; latencies are below 0.1 ms.
    assert _in_node(node, "all_reduce", 8e9, 2) == pytest.approx(8e9 / 47.67e9, abs=1e-4)
    assert _in_node(node, "all_reduce", 8e9, 8) == pytest.approx(14e9 / 312.9e9, abs=1e-4)


def test_the_dies_of_a_package_are_closer_than_packages() -> None:
    node = loader.load_node("frontier")
    pair, eight = (_in_node(node, "all_gather", 8e9, size) for size in (2, 8))
    # Wire bytes 4 and 7 GB; 150 GB/s in a package, 56.25 GB/s between packages.
    assert pair == pytest.approx(4 / 150, rel=1e-2)
    assert eight == pytest.approx(7 / 56.25, rel=1e-2)


def test_a_rack_of_72_is_one_domain() -> None:
    rack, tray = loader.load_node("gb200-nvl64"), loader.load_node("dgx-b200")
    # All-to-all of 1 GB in 64: in the rack 63/64 GB at some 550 GB/s, 2 ms; from servers of eight
    # 56/64 GB leave through 400 Gb/s a device, 0.92 of it: 19 ms.
    inside = _in_node(rack, "all_to_all", 1e9, 64)
    cluster = loader.load_cluster(f"{tray.name}:8")
    across = float(collective_time_s(cluster, "all_to_all", 1e9, size=64, stride=1))
    assert inside < 2.5e-3
    assert across > 18e-3
    # Published: 10.094 ms for 4 GiB over 72 GPUs; a line through five sizes is within 3 %.
    whole = loader.load_node("gb200-nvl72")
    assert _in_node(whole, "all_reduce", 2**32, 72) == pytest.approx(10.094e-3, rel=0.03)


def test_a800_link_is_the_a100_link_at_200_of_300() -> None:
    full, cut = loader.load_link("nvlink3"), loader.load_link("nvlink-a800")
    assert cut.bandwidth.si == 200e9
    for a, b in zip(full.collectives, cut.collectives, strict=True):
        assert (a.collective, a.devices, a.latency_s) == (b.collective, b.devices, b.latency_s)
        assert b.bandwidth / a.bandwidth == pytest.approx(2 / 3, rel=1e-3)
        assert b.borrowed_from is not None


@pytest.mark.parametrize(
    ("node", "vendor", "lender"),
    [
        ("gb300-nvl72", "nvidia", "gb200"),
        ("hgx-h20", "nvidia", "h100-sxm-80gb"),
        ("mi300x-8", "amd", "h100-sxm-80gb"),
        ("frontier", "amd", "mi300x"),
        ("gaudi3-hls", "intel", "a100-sxm-80gb"),
        ("tpu-v5p-cube", "google", "a100-sxm-80gb"),
        ("aws-trn2", "aws", "a100-sxm-80gb"),
        ("cloudmatrix384", "huawei", "a100-sxm-80gb"),
    ],
)
def test_a_plan_without_kernel_measurements_says_so(node: str, vendor: str, lender: str) -> None:
    request = read_request("llama-3.2-1b", node)
    device = request.machine.device
    assert device.vendor == vendor
    found = plan(request)
    assert found.prediction.fits
    # Nothing computes faster than its matrix products.
    assert 0 < found.prediction.mfu < device.kernels.matmul["bf16"].e_compute
    assert any(device.name in note and lender in note for note in found.prediction.assumptions)
