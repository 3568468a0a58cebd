"""Facts as a cluster file: the nearest node that ships, and what differs from it."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from hardware_profiles.documents import read_document
from hardware_profiles.loader import catalog_names, load_device, load_link, load_node
from hardware_profiles.schema import DeviceSpec, NodeSpec
from planner.errors import InputError
from planner.studies.discovery.facts import Facts, Port, SlurmNode

_INFINIBAND = {100: "edr", 200: "hdr", 400: "ndr", 800: "xdr"}
_PCIE_SHARE = 0.8
_PCIE_GBYTES = {3: 15.75, 4: 31.0, 5: 63.0, 6: 121.0}
"""GB/s of sixteen lanes per direction (vendor rates); large copies reach about 80 % of them."""
_SAME_MEMORY = 0.02
"""Relative difference of device memory that is another product and not another driver."""


def cluster_file(facts: Facts, *, nodes: int | None, name: str | None, sources: list[str]) -> str:
    """The YAML of the cluster that ``facts`` describe; raises :class:`InputError`."""
    group, count = _nodes(facts, nodes)
    device = _device(facts, group)
    devices = facts.devices or (group[0].devices if group else 0)
    if not devices:
        raise InputError(
            "nothing says how many devices a node has",
            hint="pass the output of nvidia-smi -q, nvidia-smi topo -m, rocm-smi or scontrol",
        )
    base = _nearest(device, devices)
    node = _node(facts, group, device, devices, base)
    body: dict[str, Any] = {"name": name or f"{device.name}-{count * devices}", "nodes": count}
    body["node"] = node
    head = [f"# Written by planner discover from {', '.join(sources)}."]
    head += [f"# {note}" for note in facts.notes]
    return "\n".join(head) + "\n" + yaml.safe_dump(body, sort_keys=False, width=100)


def _nodes(facts: Facts, asked: int | None) -> tuple[list[SlurmNode], int]:
    """The scheduler's nodes of one kind, and how many nodes the cluster has."""
    with_devices = [node for node in facts.nodes if node.devices]
    kinds = Counter((node.device, node.devices) for node in with_devices)
    group = with_devices
    if kinds:
        kind, _ = max(kinds.items(), key=lambda item: (item[1], str(item[0])))
        group = [node for node in with_devices if (node.device, node.devices) == kind]
        if facts.devices is not None and kind[1] != facts.devices:
            raise InputError(
                f"the scheduler's nodes have {kind[1]} devices, the node that was read has "
                f"{facts.devices}",
                hint="pass the files of a node of that partition",
            )
        if len(kinds) > 1:
            others = sum(count for other, count in kinds.items() if other != kind)
            facts.notes.append(f"nodes of other kinds are left out: {others}")
    up = [node for node in group if not node.down]
    if len(up) < len(group):
        facts.notes.append(f"nodes that are down or drained are left out: {len(group) - len(up)}")
    listed = [node for node in facts.nodes if not node.devices]
    if asked is not None:
        found = len(up) or len(listed)
        if found not in (0, asked):
            facts.notes.append(f"{asked} nodes as asked; the scheduler lists {found}")
        return group, asked
    if group and not up:
        raise InputError("all nodes are down or drained", hint="say how many: --nodes N")
    if up or listed:
        return group, len(up) or len(listed)
    facts.notes.append("one node: no scheduler output was given (or say --nodes N)")
    return group, 1


@lru_cache(maxsize=1)
def _products() -> tuple[tuple[str, str], ...]:
    rows = read_document(Path(__file__).with_name("products.yaml"))
    assert isinstance(rows, list)
    return tuple((str(pattern), str(name)) for pattern, name in rows)


def _device(facts: Facts, group: list[SlurmNode]) -> DeviceSpec:
    """The catalogue's device of the product's name, told apart by its memory where names do not."""
    name = facts.product or (group[0].device if group else None)
    if name is None:
        raise InputError(
            "nothing says what the devices are",
            hint="pass the output of nvidia-smi -q, nvidia-smi -L or rocm-smi --showproductname",
        )
    text = name.lower().replace("_", " ").replace("-", " ")
    matches = [device for pattern, device in _products() if re.search(pattern, text)]
    if not matches:
        raise InputError(
            f"no device of the catalogue is called {name!r}",
            hint="planner catalog device; describe it in a file of your own (extends: ...)",
        )
    found = load_device(matches[0])
    if facts.memory_mib is None:
        return found
    family = found.name.split("-")[0]
    size = facts.memory_mib * 2**20
    siblings = [load_device(n) for n in catalog_names("device") if n.split("-")[0] == family]
    nearest = min(siblings, key=lambda d: (abs(d.memory_capacity.si / size - 1), d != found))
    off = abs(found.memory_capacity.si / size - 1)
    if off > _SAME_MEMORY and abs(nearest.memory_capacity.si / size - 1) < off:
        facts.notes.append(f"{name} with {facts.memory_mib:.0f} MiB is taken for {nearest.name}")
        return nearest
    return found


def _nearest(device: DeviceSpec, devices: int) -> NodeSpec | None:
    """The node that ships with this device and number of devices; plain servers before clouds."""
    nodes = [load_node(name) for name in catalog_names("node")]
    fit = [node for node in nodes if node.device.name == device.name]
    same = [node for node in fit if node.devices_per_node == devices] or fit
    clouds = ("aws-", "azure-", "gcp-", "oci-", "tpu-")
    order = sorted(same, key=lambda n: (n.name.startswith(clouds), n.source is not None, n.name))
    return order[0] if order else None


def _node(
    facts: Facts, group: list[SlurmNode], device: DeviceSpec, devices: int, base: NodeSpec | None
) -> dict[str, Any]:
    node: dict[str, Any] = {} if base is None else {"extends": base.name}
    node["name"] = f"{device.name}-x{devices}"
    if base is None or facts.memory_mib is None:
        node["device"] = device.name
    else:
        node["device"] = _own_memory(device, facts)
    node["devices_per_node"] = devices
    _scale_up(node, facts, base, devices)
    _scale_out(node, facts, base, devices)
    if facts.pcie_generation in _PCIE_GBYTES and (base is None or _is_pcie(base)):
        rate = _PCIE_SHARE * _PCIE_GBYTES[facts.pcie_generation]
        node["host_link"] = f"{rate:.4g} GB/s"
        facts.notes.append(
            f"host_link: 80 % of 16 lanes of PCIe {facts.pcie_generation}, as the devices report it"
        )
    memory = next((each.memory_mib for each in group if each.memory_mib), None)
    if memory is not None:
        node["host_memory"] = f"{memory} MiB"
    return node


def _is_pcie(base: NodeSpec) -> bool:
    """Whether the base's host link is an assumed one over PCIe, which a device's report betters."""
    return base.host_link.kind != "measured" and "PCIe" in (base.host_link.note or "")


def _own_memory(device: DeviceSpec, facts: Facts) -> str | dict[str, Any]:
    """The device, with the memory that its driver reports where that differs."""
    assert facts.memory_mib is not None
    size = facts.memory_mib * 2**20
    if abs(size / device.memory_capacity.si - 1) < 1e-3:
        return device.name
    capacity = {
        "value": round(facts.memory_mib), "unit": "MiB", "kind": "measured",
        "source": "reported by the driver",
    }  # fmt: skip
    return {"extends": device.name, "name": device.name, "memory_capacity": capacity}


def _scale_up(node: dict[str, Any], facts: Facts, base: NodeSpec | None, devices: int) -> None:
    if facts.nvlinks == 0 and devices > 1:
        node["scale_up"] = f"pcie{facts.pcie_generation or 4}-x16"
        facts.notes.append("not all pairs of devices have NVLink: joined by PCIe here")
    elif base is not None:
        node["scale_up"] = base.scale_up.name
        note = base.scale_up.bandwidth.note or base.scale_up.title
        lanes = re.search(r"(\d+) (?:of \d+ )?links", note)
        if facts.nvlinks and lanes and int(lanes.group(1)) != facts.nvlinks:
            facts.notes.append(
                f"{facts.nvlinks} NVLink lanes per device, {base.scale_up.name} has "
                f"{lanes.group(1)}"
            )
    else:
        raise InputError(
            "no node that ships has this device: nothing says how devices are joined",
            hint="write a node file of your own and check it with planner catalog check",
        )


def _scale_out(node: dict[str, Any], facts: Facts, base: NodeSpec | None, devices: int) -> None:
    assert base is not None, "a node without a base was refused"
    if facts.ports:
        ports = _fastest(facts)
        node["scale_out"] = _link(ports[0], facts)
        node["nics"] = len(ports)
        return
    link, nics = base.scale_out.name, base.nics * devices // base.devices_per_node
    # More adapters than the node has for its devices are for storage and management.
    nics = max(1, min(nics, facts.nics) if facts.nics else nics)
    node["scale_out"], node["nics"] = link, nics
    if facts.nics:
        facts.notes.append(
            f"{facts.nics} network adapters found, of a rate that no file says; {nics} x {link}, "
            f"the rate of {base.name}'s {base.nics} (pass ibstat's output)"
        )
    else:
        facts.notes.append(f"network: {node['nics']} x {link}, what {base.name} has; not read")


def _fastest(facts: Facts) -> list[Port]:
    """Ports of the fastest kind; slower ones are for storage and management."""
    rate, infiniband = max((port.gbits, port.infiniband) for port in facts.ports)
    ports = [p for p in facts.ports if (p.gbits, p.infiniband) == (rate, infiniband)]
    if len(ports) < len(facts.ports):
        slower = len(facts.ports) - len(ports)
        facts.notes.append(f"ports of other rates (storage, management) are left out: {slower}")
    return ports


def _link(port: Port, facts: Facts) -> str:
    rate = round(port.gbits)
    if port.infiniband and rate in _INFINIBAND:
        return f"infiniband-{_INFINIBAND[rate]}"
    names = catalog_names("link")
    for name in (f"roce-{rate}g", f"ethernet-{rate}g"):
        if not port.infiniband and name in names:
            tuned = f"; a tuned fabric reaches more (ethernet-{rate}g)"
            more = tuned if name.startswith("roce") else ""
            facts.notes.append(f"{port.name}: {load_link(name).title}{more}")
            return name
    kind = "InfiniBand" if port.infiniband else "Ethernet"
    raise InputError(
        f"no link of the catalogue is {kind} of {port.gbits:g} Gb/s",
        hint="planner catalog link; write the node by hand with a link of your own",
    )
