"""Layers, generated files and public names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from planner.cli import reference, schemas
from planner.cli.main import COMMANDS
from planner.errors import InputError
from planner.plan import Layout, Plan
from tests.cli import sample

ROOT = Path(__file__).parents[2]
TIERS = ("planner", "cost_models", "hardware_profiles")
MODULES = [path for tier in TIERS for path in sorted((ROOT / tier).rglob("*.py"))]


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


GENERATED = {**schemas.files(), **reference.files()}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files_are_current(name: str) -> None:
    if (ROOT / name).read_text() != GENERATED[name]:
        pytest.fail(f"{name} is stale: run python -m planner.cli.schemas and planner.cli.reference")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_documented(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    tree = ast.parse(text)
    assert not tree.body or ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_command_has_a_module_and_every_module_a_command() -> None:
    folder = ROOT / "planner" / "cli" / "commands"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert names == set(COMMANDS)


def test_what_scripts_rely_on_keeps_its_name() -> None:
    """The names of the plan document that its contract promises to external scripts."""
    assert {
        "schema_version", "inputs", "target", "cost_model_digest", "layout", "prediction",
        "certificate", "alternatives", "warnings",
    } <= Plan.model_fields.keys()  # fmt: skip
    assert {
        "dp_replicate", "dp_shard", "cp", "cp_kind", "cp_inner", "tp", "sequence_parallel",
        "pp", "vpp", "ep", "etp", "expert_dp", "microbatch_size", "num_microbatches", "zero_stage",
        "reshard_after_forward", "schedule", "round_size", "layers_outside", "rank_order",
        "optimizer_offload", "parameter_offload", "stages",
    } == Layout.model_fields.keys()  # fmt: skip


def test_documents_satisfy_their_schemas() -> None:
    for name, document in (("plan", sample.moe_plan()), ("infeasibility", sample.infeasibility())):
        schema = json.loads(schemas.schema_text(name))
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(document.model_dump(mode="json"))
    broken = sample.dense_plan().model_dump(mode="json")
    broken["layout"]["tpp"] = broken["layout"].pop("tp")
    schema = json.loads(schemas.schema_text("plan"))
    assert not Draft202012Validator(schema).is_valid(broken)


def test_an_unknown_schema_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no schema for 'plane'"):
        schemas.schema_text("plane")


def test_the_package_ships_its_data_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"planner": "planner.cli.main:main"}
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
