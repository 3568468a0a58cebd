"""Write fitted constants into the YAML profiles that ship, leaving everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from planner.studies.calibrate.parameters import Parameter, matches

ROOT = Path(__file__).parents[2] / "hardware_profiles"
FOLDERS = {"device": "devices", "node": "nodes", "link": "links", "stack": "stacks"}


def write(parameter: Parameter, value: float, source: str) -> list[Path]:
    """Set the parameter's places in every shipped profile that states them; the files changed.

    A profile that inherits the place from the one it extends is left alone. The provenance beside a
    number changes with it: ``kind`` to fitted and ``source`` to ``source``.
    """
    changed = []
    for target in parameter.targets:
        for path in sorted((ROOT / FOLDERS[target.kind]).glob("*.yaml")):
            if matches(target, path.stem):
                text = path.read_text()
                new = set_places(text, target.path.split("."), value, source)
                if new != text:
                    path.write_text(new)
                    changed.append(path)
    return changed


def set_places(text: str, path: Sequence[str], value: float, source: str) -> str:
    """``text`` with the scalar at ``path`` (``*``: every key) replaced; provenance follows."""
    edits: list[tuple[int, int, str]] = []
    _collect(yaml.compose(text), list(path), value, source, edits)
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _collect(
    node: yaml.Node | None, path: list[str], value: float, source: str,
    edits: list[tuple[int, int, str]],
) -> None:  # fmt: skip
    if not isinstance(node, yaml.MappingNode):
        return
    entries = {key.value: inner for key, inner in node.value}
    if not path:
        unit = entries["unit"].value if "unit" in entries else ""
        shown = {"value": shown_in(value, unit), "kind": "fitted", "source": f'"{source}"'}
        for name, new in shown.items():
            _replace(entries[name], new, edits)
        return
    for name in entries if path[0] == "*" else [path[0]] if path[0] in entries else []:
        inner = entries[name]
        if isinstance(inner, yaml.ScalarNode):
            if len(path) == 1:
                _replace(inner, f"{value:.4g}", edits)
        else:
            _collect(inner, path[1:], value, source, edits)


def shown_in(value: float, unit: str) -> str:
    """An SI value in the unit that a file uses."""
    from hardware_profiles.units import to_si

    return f"{value / to_si(1.0, unit):.4g}"


def _replace(node: yaml.Node, new: str, edits: list[tuple[int, int, str]]) -> None:
    edits.append((node.start_mark.index, node.end_mark.index, new))
