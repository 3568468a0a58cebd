"""How each efficiency of a profile is known: measured here, borrowed from a sibling, or assumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hardware_profiles.schema import (
    AttentionConstants,
    DeviceSpec,
    Kind,
    LinkSpec,
    MatmulConstants,
    NodeSpec,
    Sourced,
)

Basis = Literal["measured", "borrowed", "assumed"]
"""``measured``: on this part (fits of measurements included). ``borrowed``: measured on the part
named as lender. ``assumed``: nobody measured it."""

WORST_FIRST: tuple[Basis, ...] = ("assumed", "borrowed", "measured")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """One efficiency and how it is known."""

    part: str
    """Name of the device or link that it belongs to."""
    what: str
    value: float
    basis: Basis
    lender: str | None
    source: str


def device_efficiencies(device: DeviceSpec) -> Iterator[Efficiency]:
    """The kernel efficiencies of a device."""
    kernels = device.kernels
    for dtype, product in kernels.matmul.items():
        yield _kernel(device, f"{dtype} matrix products", product.e_compute, product)
    for kernel, by_dtype in kernels.attention.items():
        for dtype, attention in by_dtype.items():
            yield _kernel(device, f"{kernel} attention, {dtype}", attention.e_forward, attention)
    for what, number in (
        ("memory-bound kernels", kernels.memory_bound_efficiency),
        ("latency of short kernels", kernels.memory_bound_latency),
    ):
        yield _number(device.name, what, number)


def link_efficiencies(link: LinkSpec) -> Iterator[Efficiency]:
    """The achieved shares of a link, and its collectives where they were fitted."""
    yield _number(link.name, "large transfers", link.efficiency)
    for pattern, share in link.efficiencies.items():
        yield _number(link.name, pattern.replace("_", "-"), share)
    for row in link.collectives:
        yield Efficiency(
            link.name,
            f"{row.collective.replace('_', '-')} of {row.devices}",
            row.bandwidth / link.bandwidth.si,
            "borrowed" if row.borrowed_from is not None else _basis(row.kind, None),
            row.borrowed_from,
            row.source,
        )


def node_efficiencies(node: NodeSpec) -> Iterator[Efficiency]:
    """Everything that a node's prices rest on: its device and its two links."""
    yield from device_efficiencies(node.device)
    yield from link_efficiencies(node.scale_up)
    if node.scale_out.name != node.scale_up.name:
        yield from link_efficiencies(node.scale_out)


def kernel_basis(device: DeviceSpec, dtypes: tuple[str, ...], kernel: str) -> Basis:
    """The weakest basis of the kernels that a job uses: products of ``dtypes`` and attention.

    ``kernel`` is the attention generation, or ``unfused`` for matrix products alone. A dtype or
    kernel that the device does not have counts as assumed.
    """
    found: list[Basis] = []
    for dtype in dtypes:
        product = device.kernels.matmul.get(dtype)
        found.append("assumed" if product is None else _basis(product.kind, product.borrowed_from))
    attention = device.kernels.attention.get(kernel, {}).values()
    found += [_basis(constants.kind, constants.borrowed_from) for constants in attention]
    if not found or (kernel != "unfused" and kernel not in device.kernels.attention):
        found.append("assumed")
    return min(found, key=WORST_FIRST.index)


def _kernel(
    device: DeviceSpec, what: str, value: float, constants: MatmulConstants | AttentionConstants
) -> Efficiency:
    basis = _basis(constants.kind, constants.borrowed_from)
    return Efficiency(device.name, what, value, basis, constants.borrowed_from, constants.source)


def _number(part: str, what: str, number: Sourced) -> Efficiency:
    return Efficiency(part, what, number.si, _basis(number.kind, None), None, number.source)


def _basis(kind: Kind, borrowed_from: str | None) -> Basis:
    """A rate of the device's own may be measured although the rest of its law is borrowed."""
    if kind is not Kind.ASSUMED:
        return "measured"
    return "borrowed" if borrowed_from is not None else "assumed"
