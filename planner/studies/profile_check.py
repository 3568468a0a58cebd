"""Check one profile: does it read, is it plausible, and how are its efficiencies known?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hardware_profiles import loader, plausibility, provenance
from hardware_profiles.documents import DocumentError, did_you_mean, read_document
from hardware_profiles.provenance import Efficiency
from hardware_profiles.schema import ClusterSpec, DeviceSpec, LinkSpec, NodeSpec, StackSpec

Kind = Literal["cluster", "node", "device", "link", "stack"]
Profile = ClusterSpec | NodeSpec | DeviceSpec | LinkSpec | StackSpec

KINDS: tuple[Kind, ...] = ("cluster", "node", "device", "link", "stack")
_TELLTALES: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("cluster", frozenset({"nodes", "groups", "network", "tiers", "link_matrix"})),
    ("device", frozenset({"peak_flops", "kernels", "memory_capacity", "memory_bandwidth"})),
    ("node", frozenset({"device", "devices_per_node", "scale_up", "scale_out", "nics"})),
    ("stack", frozenset({"schedules", "recompute", "zero_stages", "cp_kinds", "fused"})),
    ("link", frozenset({"bandwidth", "latency", "efficiency", "collectives"})),
)
"""Keys that tell what a document describes, the most telling kind first."""


@dataclass(frozen=True)
class ProfileReport:
    """What a check found."""

    reference: str
    kind: Kind
    name: str
    problems: tuple[str, ...]
    """Implausible numbers, each a sentence."""
    efficiencies: tuple[Efficiency, ...]

    def counts(self) -> dict[str, int]:
        """Efficiencies by basis."""
        bases = [each.basis for each in self.efficiencies]
        return {basis: bases.count(basis) for basis in ("measured", "borrowed", "assumed")}

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "reference": self.reference,
            "kind": self.kind,
            "name": self.name,
            "problems": list(self.problems),
            "counts": self.counts(),
            "efficiencies": [asdict(each) for each in self.efficiencies],
        }


def check_profile(reference: str) -> ProfileReport:
    """Load and check the profile that ``reference`` (a file or a catalogue name) holds.

    Raises :class:`DocumentError` where it cannot be read or breaks its schema.
    """
    kind = kind_of(reference)
    profile = _load(kind, reference)
    return ProfileReport(
        reference,
        kind,
        profile.name,
        tuple(dict.fromkeys(_findings(profile))),
        tuple(dict.fromkeys(_efficiencies(profile))),
    )


def kind_of(reference: str) -> Kind:
    """What ``reference`` describes; raises :class:`DocumentError` where nothing says so."""
    path = Path(reference)
    if not path.is_file():
        return _catalogue_kind(reference)
    data = read_document(path)
    if not isinstance(data, Mapping):
        raise DocumentError(f"{reference}: expected a mapping of keys to values")
    keys = {str(key) for key in data}
    parent = data.get("extends")
    if isinstance(parent, str):
        for kind in KINDS:
            known = (*loader.catalog_names(kind), *loader.catalog_aliases(kind))
            if parent in known:
                return kind
        if (path.parent / parent).is_file():
            return kind_of(str(path.parent / parent))
    for kind, telltales in _TELLTALES:
        if keys & telltales:
            return kind
    if isinstance(parent, str):
        every = [name for kind in KINDS for name in loader.catalog_names(kind)]
        raise DocumentError(
            f"{reference}: extends {parent!r}, which is neither shipped nor a file beside it",
            hint=did_you_mean(parent, every),
        )
    raise DocumentError(
        f"{reference}: nothing in it says what it describes (keys: {', '.join(sorted(keys)[:6])})",
        hint="a cluster has 'node' and 'nodes', a node 'device', a device 'peak_flops', "
        "a link 'bandwidth', a stack 'schedules'; planner catalog model FILE reads a model",
    )


def _catalogue_kind(reference: str) -> Kind:
    name = reference.rpartition(":")[0] or reference
    for kind in KINDS[1:]:
        if name in loader.catalog_names(kind) or name in loader.catalog_aliases(kind):
            return "cluster" if ":" in reference else kind
    return "cluster"


def _load(kind: Kind, reference: str) -> Profile:
    match kind:
        case "cluster":
            return loader.load_cluster(reference)
        case "node":
            return loader.load_node(reference)
        case "device":
            return loader.load_device(reference)
        case "link":
            return loader.load_link(reference)
        case "stack":
            return loader.load_stack(reference)


def _findings(profile: Profile) -> Iterator[str]:
    match profile:
        case ClusterSpec():
            yield from plausibility.cluster_findings(profile)
        case NodeSpec():
            yield from plausibility.node_findings(profile)
        case DeviceSpec():
            yield from plausibility.device_findings(profile)
        case LinkSpec():
            yield from plausibility.link_findings(profile)
        case StackSpec():
            return


def _efficiencies(profile: Profile) -> Iterator[Efficiency]:
    match profile:
        case ClusterSpec():
            for group in profile.groups:
                yield from provenance.node_efficiencies(group.node)
        case NodeSpec():
            yield from provenance.node_efficiencies(profile)
        case DeviceSpec():
            yield from provenance.device_efficiencies(profile)
        case LinkSpec():
            yield from provenance.link_efficiencies(profile)
        case StackSpec():
            return
