"""The models that ship: one YAML per model, its file name its name; other names in one index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "catalog"
INDEX = FOLDER / "_aliases.yaml"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model of the catalogue."""

    name: str
    aliases: tuple[str, ...]
    family: str
    source: str
    path: Path


def find(reference: str) -> Path | None:
    """The catalogue file of a name or alias, in any case; None when there is none."""
    name = reference.strip().lower()
    if name in _names():
        return FOLDER / f"{name}.yaml"
    for model, aliases in _aliases().items():
        if name in aliases:
            return FOLDER / f"{model}.yaml"
    return None


def known_names() -> list[str]:
    """Every name and alias, for suggestions."""
    return sorted({*_names(), *(alias for aliases in _aliases().values() for alias in aliases)})


def catalog_models() -> list[CatalogEntry]:
    """All models of the catalogue, by name. Reads each file's head, not the model."""
    aliases = _aliases()
    entries = []
    for name in sorted(_names()):
        path = FOLDER / f"{name}.yaml"
        data = _load(path)
        family = data.get("model_type") or data.get("format") or data.get("family", "")
        entries.append(
            CatalogEntry(name, aliases.get(name, ()), str(family), str(data["source"]), path)
        )
    return entries


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


@lru_cache(maxsize=1)
def _aliases() -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(alias.lower() for alias in aliases) for name, aliases in _load(INDEX).items()
    }


def _load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    return data
