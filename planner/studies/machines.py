"""The cluster that a run's accelerator and link columns describe, from catalogue parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from hardware_profiles.loader import catalog_aliases, catalog_names, load_link, load_node
from hardware_profiles.schema import ClusterSpec, LinkSpec, NodeGroup, NodeSpec
from planner.studies.policy import table
from planner.studies.runs import Run, SkippedError

_COUNT_X_PORT = re.compile(r"(\d+)\s*x\D{0,12}?(\d+)\s*g")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*g(?:b|bps)\b")


@dataclass(frozen=True, slots=True)
class MachineColumns:
    """The columns that a run's cluster depends on."""

    accelerator: str
    devices: int
    per_node: int | None
    link: str


def machine_columns(run: Run, link: str | None = None) -> MachineColumns:
    """What ``run`` says of its machine; ``link`` stands in for its link column. Raises
    :class:`SkippedError` without a device count."""
    return MachineColumns(
        run.text("accelerator"),
        run.required("gpus"),
        run.size("gpus_per_node"),
        run.text("inter_link").lower() if link is None else link,
    )


@lru_cache(maxsize=1024)
def cluster_of(columns: MachineColumns) -> ClusterSpec:
    """The cluster. Raises :class:`SkippedError` for a device that does not ship, or devices that do
    not fill their nodes."""
    devices, per_node, link = columns.devices, columns.per_node, columns.link
    node = _node(columns.accelerator, per_node)
    per_node = per_node or node.devices_per_node
    if devices <= per_node:
        node = node.model_copy(update={"devices_per_node": devices})
        return _homogeneous(node, 1)
    if devices % per_node:
        raise SkippedError(f"{devices} devices do not fill nodes of {per_node}")
    node = _with_link(node, per_node, link)
    return _homogeneous(node, devices // per_node)


def _homogeneous(node: NodeSpec, count: int) -> ClusterSpec:
    return ClusterSpec(name=f"{node.name}:{count}", groups=(NodeGroup(node=node, count=count),))


@lru_cache(maxsize=64)
def _node(accelerator: str, per_node: int | None) -> NodeSpec:
    name = accelerator.lower()
    if not name:
        raise SkippedError("no accelerator")
    for entry in table("machines")["accelerators"]:
        if name in entry["names"] and entry.get("per_node", per_node) == per_node:
            return load_node(entry["node"])
    if name in catalog_names("node") or name in catalog_aliases("node"):
        return load_node(name)
    raise SkippedError(f"accelerator not in the catalogue: {accelerator}")


def _with_link(node: NodeSpec, per_node: int, link: str) -> NodeSpec:
    """The node with ``per_node`` devices and the ports that the text of the link column names."""
    scaled = {"devices_per_node": per_node}
    if not link:
        # The catalogue's ports belong to its own number of devices.
        nics = max(1, node.nics * per_node // node.devices_per_node)
        return node.model_copy(update={**scaled, "nics": nics})
    entry = next(each for each in table("machines")["links"] if re.search(each["match"], link))
    if "nodes" in entry:
        if node.device.name not in entry["nodes"]:
            raise SkippedError(f"no {node.device.name} node on this link: {link}")
        return load_node(entry["nodes"][node.device.name]).model_copy(update=scaled)
    ports, speed = _ports(node, per_node, link)
    found = _link(entry["ports"], ports * speed, speed)
    if found is None:
        raise SkippedError(f"link not understood: {link}")
    nics, spec = found
    return node.model_copy(update={**scaled, "nics": nics, "scale_out": spec})


def _ports(node: NodeSpec, per_node: int, link: str) -> tuple[float, float]:
    """Ports per node and Gb/s per port; a total is split into ports of the node's own speed."""
    own = node.scale_out.bandwidth.si * 8 / 1e9
    stated = _COUNT_X_PORT.search(link)
    if stated:
        return float(stated[1]), float(stated[2])
    rate = _RATE.search(link)
    if rate is None:
        return float(node.nics), own
    speed = float(rate[1])
    if "per gpu" in link:
        return float(per_node), speed
    return (speed / own, own) if speed % own == 0 else (1.0, speed)


def _link(by_speed: dict[int, str], total: float, wanted: float) -> tuple[int, LinkSpec] | None:
    """Ports and link that carry ``total`` Gb/s: ports of ``wanted`` speed, else the fastest."""
    for speed in sorted(by_speed, key=lambda each: (each != wanted, -each)):
        if total % speed == 0:
            return int(total / speed), load_link(by_speed[speed])
    return None
