"""JSON Schemas of the documents, generated from their classes.

``python -m planner.cli.schemas`` writes ``schemas/*.json``; with ``--check`` it only compares.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from planner.errors import InputError, did_you_mean

_CLASSES = {
    "plan": ("planner.plan", "Plan"),
    "infeasibility": ("planner.plan", "Infeasibility"),
    "layout": ("planner.plan", "Layout"),
    "prediction": ("planner.plan", "Prediction"),
    "job": ("planner.specs", "JobSpec"),
    "model": ("planner.models.spec", "ModelSpec"),
    "network": ("planner.models.sequence", "LayerSequenceSpec"),
    "cluster": ("hardware_profiles.cluster_documents", "ClusterRequest"),
    "cluster-resolved": ("hardware_profiles.schema", "ClusterSpec"),
    "node": ("hardware_profiles.schema", "NodeSpec"),
    "device": ("hardware_profiles.schema", "DeviceSpec"),
    "link": ("hardware_profiles.schema", "LinkSpec"),
    "stack": ("hardware_profiles.schema", "StackSpec"),
}
NAMES = tuple(_CLASSES)
"""Documents that have a schema."""


def schema_text(name: str) -> str:
    """JSON Schema (2020-12) of document ``name``, ending in a newline; raises InputError."""
    if name not in _CLASSES:
        raise InputError(f"no schema for {name!r}", hint=did_you_mean(name, list(NAMES)))
    module, cls = _CLASSES[name]
    model = getattr(importlib.import_module(module), cls)
    body = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(mode="validation"),
    }
    return json.dumps(body, indent=2) + "\n"


def files() -> dict[str, str]:
    """Generated files by path relative to the repository."""
    return {f"schemas/{name}.json": schema_text(name) for name in NAMES}


if __name__ == "__main__":
    from planner.cli.generated import write_or_check

    sys.exit(write_or_check(files(), root=Path.cwd(), check="--check" in sys.argv[1:]))
