"""What tools say of one node and of the nodes around it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Port:
    """An active network port."""

    name: str
    gbits: float
    infiniband: bool


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """A node as the scheduler knows it."""

    name: str
    device: str | None
    """Type of its devices as the gres names it; None where it does not say."""
    devices: int
    memory_mib: int | None
    down: bool


@dataclass
class Facts:
    """Everything found so far; ``notes`` are sentences for the reader."""

    product: str | None = None
    devices: int | None = None
    memory_mib: float | None = None
    """Of one device."""
    nvlinks: int | None = None
    """NVLink lanes between the first device and its nearest other; 0 where there are none."""
    pcie_generation: int | None = None
    nics: int | None = None
    ports: list[Port] = field(default_factory=list)
    nodes: list[SlurmNode] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
