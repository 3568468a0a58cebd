"""What a user writes to describe a cluster: the short form and the ten-line file."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hardware_profiles.documents import DocumentError
from hardware_profiles.schema import NetworkTier

MAX_NODES = 1_000_000
"""Largest cluster accepted; above it a count is taken for a slip."""

Count = Annotated[int, Field(ge=1, le=MAX_NODES, strict=True)]
_INTEGER = re.compile(r"^[+-]?[0-9][0-9_]*$")


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class NetworkRequest(_Request):
    """A two-level network: leaf switches of ``leaf_nodes`` nodes below a spine."""

    leaf_nodes: Count
    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    """Bandwidth of a leaf's nodes over its up-links."""
    leaf_latency_s: Annotated[float, Field(ge=0)] = 0.0
    spine_latency_s: Annotated[float, Field(ge=0)] = 0.5e-6
    """Added once to each message that crosses the spine; the default is half of the round-trip
    cost of a leaf-spine hop pair (about 1 us, public InfiniBand latency dissection)."""

    def tiers(self) -> tuple[NetworkTier, ...]:
        """The tiers that this stands for, innermost first."""
        return (
            NetworkTier(
                name="leaf",
                nodes=self.leaf_nodes,
                oversubscription=self.oversubscription,
                latency_s=self.leaf_latency_s,
            ),
            NetworkTier(name="spine", latency_s=self.spine_latency_s),
        )


class GroupRequest(_Request):
    """``count`` nodes of one type: a reference, or a mapping as in a node file."""

    node: str | dict[str, Any]
    count: Count


class ClusterRequest(_Request):
    """A cluster file: ``node`` and ``nodes``, or ``groups``; ``network``, or ``tiers``."""

    name: str | None = None
    node: str | dict[str, Any] | None = None
    nodes: Count | None = None
    groups: Annotated[tuple[GroupRequest, ...], Field(min_length=1)] | None = None
    network: NetworkRequest | None = None
    tiers: tuple[NetworkTier, ...] = ()
    link_matrix: tuple[tuple[float, ...], ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> ClusterRequest:
        if self.groups is not None and (self.node is not None or self.nodes is not None):
            raise ValueError("give either 'groups' or 'node' and 'nodes', not both")
        if self.groups is None and (self.node is None or self.nodes is None):
            lacking = "node" if self.node is None else "nodes"
            raise ValueError(f"{lacking!r} is missing (or give 'groups')")
        if self.network is not None and self.tiers:
            raise ValueError("give either 'network' or 'tiers', not both")
        return self

    def members(self) -> tuple[GroupRequest, ...]:
        """The groups, also of a file that wrote ``node`` and ``nodes``."""
        if self.groups is not None:
            return self.groups
        return (GroupRequest.model_validate({"node": self.node, "count": self.nodes}),)

    def network_tiers(self) -> tuple[NetworkTier, ...]:
        """The tiers, also of a file that wrote ``network``."""
        return self.network.tiers() if self.network is not None else self.tiers


def split_short_form(reference: str) -> tuple[str, int]:
    """``"dgx-h100:128"`` as (node reference, nodes); raises :class:`DocumentError`.

    A count is a whole number of at least 1.
    """
    node, _, count = reference.rpartition(":")
    hint = f"write NODE_TYPE:NODES with NODES at least 1, e.g. {node or 'dgx-h100'}:16"
    if not node or _INTEGER.match(count) is None:
        what = f"{count!r} is not a number of nodes" if count else "the number of nodes is missing"
        if not node:
            what = "the node type is missing"
        raise DocumentError(f"cluster {reference!r}: {what}", hint=hint)
    nodes = int(count.replace("_", ""))
    if nodes < 1:
        raise DocumentError(f"cluster {reference!r}: {nodes} nodes; at least 1", hint=hint)
    if nodes > MAX_NODES:
        raise DocumentError(f"cluster {reference!r}: {nodes} nodes; at most {MAX_NODES}", hint=hint)
    return node, nodes
