"""Keys of a config that are nearly those that its reader asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.errors import InputError
from planner.models.catalog import catalog_models
from planner.models.reader import model_from_document, read_model
from planner.models.spec import ModelSpec

COUNTS = Path(__file__).parents[1] / "validation" / "data" / "parameter_counts.json"
MODELS = json.loads(COUNTS.read_text())["models"]


def slips(model: ModelSpec) -> list[str]:
    return [note for note in model.notes if note.endswith("a slip?")]


def test_a_key_that_is_nearly_another_is_told() -> None:
    config = dict(MODELS["Qwen--Qwen3-30B-A3B"]["config"])
    config["num_expert"] = config.pop("num_experts")
    assert slips(model_from_document(config, where="config.json")) == [
        "'num_expert' is not read and 'num_experts' took its default: a slip?"
    ]


def test_a_slip_inside_a_tower_is_told() -> None:
    config = json.loads(json.dumps(MODELS["Qwen--Qwen3-VL-8B-Instruct"]["config"]))
    tower = config["vision_config"]
    tower["patch_sizes"] = tower.pop("patch_size")
    found = slips(model_from_document(config, where="config.json"))
    assert found == ["'patch_sizes' is not read and 'patch_size' took its default: a slip?"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_public_config_has_one(name: str) -> None:
    assert slips(model_from_document(MODELS[name]["config"], where=name)) == []


def test_no_model_of_the_catalogue_has_one() -> None:
    models = [read_model(entry.name) for entry in catalog_models()]
    assert not any(slips(model) for model in models if isinstance(model, ModelSpec))


@pytest.mark.parametrize("value", [[], [1], {"a": 1}])
def test_a_model_type_is_text(value: object) -> None:
    with pytest.raises(InputError, match=r"model_type = .*must be a string"):
        model_from_document({"model_type": value, "hidden_size": 8}, where="config.json")
