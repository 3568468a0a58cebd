"""Every way to describe a model, as one type, and how a document becomes one of them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from hardware_profiles.documents import validate
from planner.models.sequence import LayerSequenceSpec
from planner.models.spec import ModelSpec

Model: TypeAlias = ModelSpec | LayerSequenceSpec


def model_of(document: Mapping[str, object], *, where: str) -> Model:
    """The model that a plan's document holds; raises ``DocumentError``."""
    if document.get("format") == "layers":
        return validate(LayerSequenceSpec, document, where=where)
    return validate(ModelSpec, document, where=where)
