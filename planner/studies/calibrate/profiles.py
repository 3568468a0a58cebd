"""Fitted constants as profiles that a user can keep: YAML documents that extend what ships."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from hardware_profiles.schema import (
    ClusterSpec,
    DeviceSpec,
    Kind,
    LinkSpec,
    NodeSpec,
    Sourced,
    StackSpec,
)
from planner.studies.calibrate.parameters import Overlay, Parameter

SUFFIX = "-calibrated"
_Spec = DeviceSpec | LinkSpec | StackSpec | NodeSpec


def profiles_of(
    parameters: Sequence[Parameter],
    values: Mapping[str, float],
    machines: Iterable[tuple[ClusterSpec, StackSpec | None]],
    source: str,
) -> dict[str, str]:
    """File name to YAML text of every profile that the fit changed, and of the nodes that hold a
    changed device or link. ``source`` says what the constants were fitted to."""
    overlay = Overlay(parameters, values)
    texts: dict[str, str] = {}
    for cluster, stack in machines:
        pairs: list[tuple[_Spec, _Spec]] = [(stack, overlay.stack(stack))] if stack else []
        changed = overlay.cluster(cluster)
        for before, after in zip(cluster.groups, changed.groups, strict=True):
            pairs += [
                (before.node.device, after.node.device),
                (before.node.scale_up, after.node.scale_up),
                (before.node.scale_out, after.node.scale_out),
            ]
        for old, new in pairs:
            if old != new:
                name, text = profile(old, new, source)
                texts[name] = text
        for before, after in zip(cluster.groups, changed.groups, strict=True):
            node = node_text(before.node, after.node)
            if node:
                texts[f"{before.node.name}{SUFFIX}.yaml"] = node
    return texts


def profile(old: _Spec, new: _Spec, source: str) -> tuple[str, str]:
    """File name and text of ``new`` as an extension of the shipped ``old``."""
    name = f"{old.name}{SUFFIX}"
    document: dict[str, Any] = {"extends": old.name, "name": name, "title": f"{old.title}, fitted"}
    for field in type(new).model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            document[field] = _plain(_told(before, after, source))
    return f"{name}.yaml", as_yaml(document)


def node_text(old: NodeSpec, new: NodeSpec) -> str | None:
    """A node that refers to its changed parts by file, or None if none changed."""
    parts = {
        field: f"./{getattr(old, field).name}{SUFFIX}.yaml"
        for field in ("device", "scale_up", "scale_out")
        if getattr(old, field) != getattr(new, field)
    }
    if not parts:
        return None
    name = f"{old.name}{SUFFIX}"
    return as_yaml({"extends": old.name, "name": name, "title": f"{old.title}, fitted", **parts})


def as_yaml(document: Mapping[str, Any]) -> str:
    """YAML in the order of the keys."""
    return yaml.safe_dump(dict(document), sort_keys=False, width=100, allow_unicode=True)


def _told(before: Any, after: Any, source: str) -> Any:
    """``after`` with the provenance of the fit wherever a number changed."""
    if before == after:
        return after
    if isinstance(after, Sourced):
        return after.model_copy(
            update={"kind": Kind.FITTED, "source": source, "value": _short(after.value)}
        )
    if isinstance(after, BaseModel):
        update = {
            name: _told(getattr(before, name), getattr(after, name), source)
            for name in type(after).model_fields
        }
        if "source" in update and before.source == update["source"]:
            update |= {"kind": Kind.FITTED, "source": f"{update['source']}; {source}"}
        return after.model_copy(update=update)
    if isinstance(after, dict):
        return {key: _told(before.get(key), value, source) for key, value in after.items()}
    return _short(after) if isinstance(after, float) else after


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return value
