"""``true`` is 1 to Python; in a document it is a slip wherever a number belongs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hardware_profiles import loader
from hardware_profiles.documents import DocumentError, read_document
from hardware_profiles.loader import load_cluster, load_device, load_link, load_node, load_stack
from planner.errors import InputError
from planner.jobs import read_job
from planner.layouts import complete_layout
from planner.models.reader import read_model
from planner.request import Request
from planner.specs import JobSpec
from planner.stacks import request_with_stack

SHIPPED = Path(loader.__file__).parent

JOB = {
    "sequence_length": 4096, "global_batch": 64, "memory_margin": 0.1, "images_per_sample": 0,
    "finetune": {"lora_rank": 8}, "constraints": {"fix": {"tp": 2}, "max": {"pp": 4}},
}  # fmt: skip
CLUSTER = {
    "groups": [{"node": "dgx-h100", "count": 2}],
    "network": {"leaf_nodes": 2, "oversubscription": 2, "leaf_latency_s": 1e-7},
}
BLOCK = {
    "mixer": {"kind": "attention", "heads": 8, "kv_heads": 8, "head_dim": 64},
    "feed_forward": {"kind": "mlp", "intermediate": 2048, "gated": True},
    "norms": 2,
}
MODEL = {
    "hidden": 512, "vocab": 32000, "tied_embeddings": False, "norm": "rms", "norm_bias": False,
    "blocks": {"dense": BLOCK}, "layers": [{"block": "dense", "count": 4}],
}  # fmt: skip
SEQUENCE = {
    "format": "layers", "input": 3072, "batch": 64,
    "kinds": {
        "conv": {
            "ops": [
                {"op": "conv", "positions": 1024, "channels": [3, 64], "kernel": 9},
                {"op": "memory", "moved": 131072, "parameters": 128, "launches": 2},
            ],
            "saved": 196608, "output": 65536,
        },
        "dense": {
            "ops": [{"op": "matmul", "m": 1, "n": 10, "k": 65536}], "saved": 10, "output": 10,
        },
    },
    "layers": [
        {"kind": "conv", "sends": {"skip": 65536}}, {"kind": "dense", "takes": ["skip"]},
    ],
}  # fmt: skip
DOCUMENTS: dict[str, tuple[Any, Callable[[str], object]]] = {
    "device": (read_document(SHIPPED / "devices/h100-sxm-80gb.yaml"), load_device),
    "link": (read_document(SHIPPED / "links/nvlink4-h800.yaml"), load_link),
    "node": (read_document(SHIPPED / "nodes/dgx-h100.yaml"), load_node),
    "stack": (read_document(SHIPPED / "stacks/megatron-core.yaml"), load_stack),
    "cluster": (CLUSTER, load_cluster),
    "job": (JOB, lambda path: read_job(path, {})),
    "model": (MODEL, read_model),
    "layers": (SEQUENCE, read_model),
}


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a document holds a number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def changed(document: Any, path: tuple[Any, ...], value: object) -> Any:
    copy = json.loads(json.dumps(document))
    here = copy
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return copy


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_no_number_of_a_document_may_be_true(kind: str, tmp_path: Path) -> None:
    document, load = DOCUMENTS[kind]
    file = tmp_path / f"{kind}.yaml"
    numbers = list(places(document))
    assert numbers
    file.write_text(yaml.safe_dump(document))
    assert load(str(file))
    for path in numbers:
        file.write_text(yaml.safe_dump(changed(document, path, True)))
        with pytest.raises((DocumentError, InputError)) as error:
            load(str(file))
        assert str(path[-1]) in str(error.value) or "true" in str(error.value).lower()


def request_() -> Request:
    return request_with_stack(
        read_model("llama-2-7b"), load_cluster("dgx-h100"), JobSpec(global_batch=64)
    )


@pytest.mark.parametrize("key", ["tp", "microbatch_size", "num_microbatches", "zero_stage"])
def test_no_degree_of_a_layout_may_be_true(key: str) -> None:
    with pytest.raises((DocumentError, InputError), match=key):
        complete_layout({"tp": 1, key: True}, request_())


def test_a_layout_that_says_no_stage_is_told_so() -> None:
    with pytest.raises(DocumentError, match="zero_stage"):
        complete_layout({"zero_stage": "x"}, request_())
