"""Cross-checks between the numbers of a profile: what no real part can be.

A schema says that a number is a number; these say that a measured rate is below the peak, that a
node's ports fit behind its devices, that a tier is no larger than the cluster. Each finding is a
sentence with the numbers in it. Bounds that are not physics are the extremes of the parts that
ship, with room on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator

from hardware_profiles.schema import ClusterSpec, DeviceSpec, LinkSpec, NodeSpec

RIDGE = (20.0, 1000.0)
"""FLOPs per byte of memory traffic at which a device turns compute bound: 37 (H20) to 560."""
READ_ALL_S = (0.005, 0.3)
"""Seconds to read the whole memory once: 17 ms (V100 16 GB) to 85 ms (L4)."""
IN_SWITCH = 1.08
"""In-switch reduction beats the wire by 7 % on NVLink 4."""
OVERSUBSCRIPTION = 32.0
LATENCY_S = (1e-8, 1e-2)


def device_findings(device: DeviceSpec) -> Iterator[str]:
    """What contradicts itself, or physics, in a device."""
    peaks = {dtype: peak.si for dtype, peak in device.peak_flops.items()}
    if not peaks:
        yield f"{device.name}: no peak_flops"
        return
    yield from _peak_order(device.name, peaks)
    half = peaks.get("bf16") or peaks.get("fp16") or max(peaks.values())
    bandwidth, capacity = device.memory_bandwidth.si, device.memory_capacity.si
    if bandwidth <= 0 or capacity <= 0:
        yield f"{device.name}: memory of {capacity:g} bytes at {bandwidth:g} bytes/s"
        return
    if not RIDGE[0] < half / bandwidth < RIDGE[1]:
        yield (
            f"{device.name}: {half / 1e12:g} TFLOP/s over {bandwidth / 1e9:g} GB/s is "
            f"{half / bandwidth:.3g} FLOP per byte; devices lie between {RIDGE[0]:g} and "
            f"{RIDGE[1]:g}: is a unit wrong?"
        )
    if not READ_ALL_S[0] < capacity / bandwidth < READ_ALL_S[1]:
        yield (
            f"{device.name}: reading {capacity / 2**30:.3g} GiB at {bandwidth / 1e9:g} GB/s takes "
            f"{capacity / bandwidth * 1e3:.3g} ms; devices take {READ_ALL_S[0] * 1e3:g} to "
            f"{READ_ALL_S[1] * 1e3:g} ms: is a unit wrong?"
        )
    yield from _kernel_findings(device, peaks)


def _peak_order(name: str, peaks: dict[str, float]) -> Iterator[str]:
    for lower, higher in (("fp32", "tf32"), ("tf32", "bf16"), ("fp32", "bf16"), ("bf16", "fp8")):
        if lower in peaks and higher in peaks and peaks[lower] > peaks[higher]:
            yield (
                f"{name}: {lower} peak of {peaks[lower] / 1e12:g} TFLOP/s exceeds that of "
                f"{higher}, {peaks[higher] / 1e12:g}"
            )


def _kernel_findings(device: DeviceSpec, peaks: dict[str, float]) -> Iterator[str]:
    name = device.name
    for dtype, best in device.best_matmul_flops.items():
        if dtype in peaks and best.si > peaks[dtype]:
            yield (
                f"{name}: best measured {dtype} product of {best.value:g} {best.unit} exceeds the "
                f"peak of {peaks[dtype] / 1e12:g} TFLOP/s"
            )
    for dtype, product in device.kernels.matmul.items():
        if dtype not in peaks:
            yield f"{name}: kernels.matmul has {dtype}, peak_flops does not"
            continue
        limit = device.best_matmul_flops.get(dtype)
        rate = product.e_compute * product.sustained * peaks[dtype]
        if limit is not None and rate > limit.si * (1 + 1e-3):
            yield (
                f"{name}: {dtype} products priced at {rate / 1e12:.4g} TFLOP/s exceed the best "
                f"measured, {limit.si / 1e12:.4g}"
            )
        if product.e_compute > 1:
            yield f"{name}: {dtype} products at {product.e_compute:g} of peak"
    for kernel, by_dtype in device.kernels.attention.items():
        for dtype, attention in by_dtype.items():
            if dtype not in peaks:
                yield f"{name}: {kernel} attention has {dtype}, peak_flops does not"
            if max(attention.e_forward, attention.e_backward) > 1:
                yield f"{name}: {kernel} attention above the peak"
    if not 0.3 < device.kernels.memory_bound_efficiency.si <= 1:
        yield (
            f"{name}: memory-bound kernels reach "
            f"{device.kernels.memory_bound_efficiency.si:g} of the bandwidth"
        )
    for dtype, mfu in device.best_run_mfu.items():
        if not 0 < mfu.si < 1:
            yield f"{name}: best published {dtype} run at an MFU of {mfu.value:g}"


def link_findings(link: LinkSpec) -> Iterator[str]:
    """What contradicts itself in a link."""
    wire = link.bandwidth.si
    if not 1e8 <= wire <= 1e13:
        yield f"{link.name}: {wire / 1e9:g} GB/s per direction: is a unit wrong (Gb/s or GB/s)?"
    latency = link.latency.si
    if not LATENCY_S[0] <= latency <= LATENCY_S[1]:
        yield f"{link.name}: latency of {latency * 1e6:g} us: is a unit wrong?"
    if link.simple_latency is not None and link.simple_latency.si < latency:
        yield (
            f"{link.name}: the protocol for large messages is quicker to start "
            f"({link.simple_latency.si * 1e6:g} us) than that for small ones ({latency * 1e6:g} us)"
        )
    for row in link.collectives:
        label = f"{link.name}: {row.collective} of {row.devices}"
        for rate in (row.bandwidth, row.ll_bandwidth):
            if rate > IN_SWITCH * wire:
                yield f"{label} at {rate / 1e9:.4g} GB/s exceeds the wire, {wire / 1e9:.4g} GB/s"


def node_findings(node: NodeSpec) -> Iterator[str]:
    """What contradicts itself in a node, its device and its links."""
    yield from device_findings(node.device)
    yield from link_findings(node.scale_up)
    if node.scale_out.name != node.scale_up.name:
        yield from link_findings(node.scale_out)
    share = node.nics * node.scale_out.bandwidth.si / node.devices_per_node
    if node.devices_per_node > 1 and share > node.scale_up.bandwidth.si * (1 + 1e-9):
        yield (
            f"{node.name}: {node.nics} ports of {node.scale_out.bandwidth.si / 1e9:g} GB/s are "
            f"{share / 1e9:g} GB/s per device, more than the {node.scale_up.bandwidth.si / 1e9:g} "
            f"GB/s of {node.scale_up.name} inside the node"
        )
    if not 1e9 <= node.host_link.si <= 1e12:
        yield f"{node.name}: host link of {node.host_link.si / 1e9:g} GB/s per device"
    memory, rate = node.host_memory, node.host_memory_bandwidth
    if memory is not None and memory.si < 1e9 * node.devices_per_node:
        yield f"{node.name}: {memory.si / 1e9:g} GB of host memory: is a unit wrong?"
    drives = (node.drives, node.drives_read_bandwidth, node.drives_write_bandwidth)
    if any(drives) and not all(drives):
        yield f"{node.name}: drives need a capacity and both bandwidths"
    if rate is not None and rate.si < node.host_link.si:
        yield (
            f"{node.name}: host memory of {rate.si / 1e9:g} GB/s is slower than one device's link "
            f"to it, {node.host_link.si / 1e9:g} GB/s"
        )


def cluster_findings(cluster: ClusterSpec) -> Iterator[str]:
    """What contradicts itself in a cluster and its nodes."""
    seen: set[str] = set()
    for group in cluster.groups:
        if group.node.name not in seen:
            seen.add(group.node.name)
            yield from node_findings(group.node)
    for tier in cluster.tiers:
        if tier.nodes is not None and tier.nodes > cluster.nodes:
            yield (
                f"{cluster.name}: tier {tier.name} joins {tier.nodes} nodes, the cluster has "
                f"{cluster.nodes}"
            )
        if tier.oversubscription > OVERSUBSCRIPTION:
            yield f"{cluster.name}: tier {tier.name} is {tier.oversubscription:g} times too narrow"
