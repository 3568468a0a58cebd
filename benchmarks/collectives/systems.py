"""The measured systems as the cost model sees them."""

from __future__ import annotations

from functools import lru_cache

from cost_models.fabric import Fabric, link_numbers
from hardware_profiles.loader import load_link

PORTS = {
    "infiniband-ndr": (8, 8),
    "ndr-sharp": (8, 8),
    "infiniband-hdr": (8, 8),
    "efa-v3": (8, 16),
    "efa-v4": (8, 8),
    "slingshot-11": (4, 2),
    "nvl72": (72, 72),
}
"""Devices and ports per node of the systems measured across nodes."""
UP = {
    "a100_sxm": "nvlink3",
    "h100_sxm": "nvlink4",
    "h200_sxm": "nvlink4",
    "b200_sxm": "nvlink5",
    "gb200": "nvlink5-nvl72",
}
OUT = {"ndr-sharp": "infiniband-ndr-sharp", "nvl72": "infiniband-ndr"}


@lru_cache
def fabric(device: str, network: str, nodes: int) -> Fabric:
    """The measured system as the cost model sees it."""
    devices, ports = PORTS.get(network, (8, 1))
    up = "pcie4-x16" if device == "l40s" else UP[device]
    out = OUT.get(network, network) if nodes > 1 else "infiniband-ndr"
    return Fabric(
        nodes=nodes,
        devices_per_node=devices,
        ports_per_node=ports,
        nics=ports,
        scale_up=link_numbers(load_link(up)),
        scale_out=link_numbers(load_link(out)),
        tiers=(),
    )
