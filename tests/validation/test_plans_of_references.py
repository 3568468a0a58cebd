"""Every reference architecture can be planned: read, priced, searched and certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import Shard
from hardware_profiles.loader import load_cluster, load_stack
from planner.blocks.registry import model_kinds
from planner.blocks.weights import parameter_counts
from planner.certify import verify
from planner.errors import InputError
from planner.models.features import model_features
from planner.models.reader import model_from_document
from planner.models.spec import ModelSpec
from planner.pipeline import plan, read_request
from planner.recount import every_mesh
from planner.request import Request, fill_defaults
from planner.space import build_space
from planner.specs import JobSpec

DATA = json.loads((Path(__file__).parent / "data" / "parameter_counts.json").read_text())["models"]

LIMITS = {"fix": {"microbatch_size": 1, "cp": 1}, "max": {"tp": 8}, "schedule": "1f1b"}
"""A small space: what is tested is that each kind of layer goes all the way."""


def one_shard(sequence: int) -> Shard:
    """A whole sample on one device."""
    one = np.ones(1, dtype=np.int64)
    flag = np.array([False])
    return Shard(sequence, one, one, one, one, one, flag, one * 0)


def stack_of(model: ModelSpec) -> str:
    """The first of three stacks that trains all of the model's layers and lacks none of its
    features."""
    for name in ("megatron-core", "megatron-bridge", "nemo-automodel"):
        stack = load_stack(name)
        if set(model_kinds(model)) <= set(stack.layer_kinds) and stack.lacks.keys().isdisjoint(
            model_features(model)
        ):
            return name
    raise AssertionError(model_kinds(model))


def request_of(model: ModelSpec, **job: Any) -> Request:
    """A request on as many nodes as hold the state of the model three times over."""
    stack = load_stack(stack_of(model))
    nodes = 1
    while nodes * 8 * 80e9 < 3 * 18 * parameter_counts(model).total:
        nodes *= 2
    cluster = load_cluster("dgx-h100" if nodes == 1 else f"dgx-h100:{nodes}")
    spec = JobSpec.model_validate(
        {
            "sequence_length": 2048, "global_batch": 8 * nodes, "stack": stack.name,
            "constraints": LIMITS, "tolerance": 0.05, **job,
        }
    )  # fmt: skip
    return Request(model, cluster, fill_defaults(spec, model, cluster.devices), stack)


@pytest.mark.parametrize("name", sorted(DATA))
def test_a_reference_model_can_be_planned(name: str) -> None:
    model = model_from_document(DATA[name]["config"], where=name, name=name)
    request = request_of(model)
    result = plan(request, time_limit_s=60)
    assert result.certificate.status == "optimal"
    assert result.prediction.fits
    assert 0 < result.prediction.mfu < 0.75
    layers = sum(
        chunk.layers[1] - chunk.layers[0]
        for stage in result.layout.stages
        for chunk in stage.chunks
    )
    assert layers == model.layer_count


NEW_KINDS = (
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Qwen--Qwen3.5-35B-A3B",
    "state-spaces--mamba-2.8b-hf",
    "ai21labs--Jamba-v0.1",
    "deepseek-ai--DeepSeek-V3.2",
    "google--gemma-4-26B-A4B",
    "Qwen--Qwen2-VL-7B",
)


@pytest.mark.parametrize("name", NEW_KINDS)
def test_the_recheck_allows_the_meshes_that_the_rules_allow(name: str) -> None:
    model = model_from_document(DATA[name]["config"], where=name, name=name)
    job = JobSpec(sequence_length=4096, global_batch=16, stack=stack_of(model))
    cluster = load_cluster("dgx-h100:2")
    request = Request(model, cluster, job, load_stack(job.stack))
    left = build_space(request).meshes
    columns = zip(
        left.tp.tolist(), left.sp.tolist(), left.cp.tolist(), left.cp_kind.tolist(),
        left.pp.tolist(), left.ep.tolist(), left.etp.tolist(), left.microbatch.tolist(),
        strict=True,
    )  # fmt: skip
    own = {
        (m.tp, int(m.sp), m.cp, cp_kind_code(m.cp_kind, m.cp_inner), m.pp, m.ep, m.etp, m.mbs)
        for m in every_mesh(request)
    }
    assert own == set(columns)
    assert any(mesh[0] > 1 or mesh[5] > 1 for mesh in own)
    assert any(mesh[2] > 1 for mesh in own)


@pytest.mark.parametrize("name", [NEW_KINDS[0], NEW_KINDS[2], "Qwen--Qwen3-VL-8B-Instruct"])
def test_a_plan_over_new_kinds_of_layer_passes_the_recheck(name: str) -> None:
    model = model_from_document(DATA[name]["config"], where=name, name=name)
    limits = {"fix": {"microbatch_size": 1}, "max": {"tp": 4, "cp": 2, "pp": 4}, "schedule": "1f1b"}
    assert verify(plan(request_of(model, constraints=limits))) == []


def test_a_stack_without_a_kind_of_layer_refuses_it_and_names_those_that_have_it() -> None:
    with pytest.raises(InputError) as caught:
        read_request("mamba-2.8b", "dgx-h100", None, {"stack": "megatron-lm-2022"})
    assert "megatron-lm-2022 3.0 has no Mamba layers" in caught.value.message
    assert "--stack nemo-automodel" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("model", "job", "message"),
    [
        ("llama-3.1-8b", {"images_per_sample": 1, "image_tokens": 9}, "has no vision tower"),
        ("qwen3-vl-8b", {"images_per_sample": 1}, "needs image_tokens"),
        (
            "qwen3-vl-8b",
            {"images_per_sample": 9, "image_tokens": 1000, "sequence_length": 4096},
            "9 images of 1000 tokens are 9000 tokens, more than a sample of 4096",
        ),
    ],
)
def test_images_that_a_job_cannot_show(model: str, job: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_request(model, "dgx-h100", None, job)


def test_what_is_approximated_is_stated() -> None:
    for name, word in (
        (NEW_KINDS[0], "Mamba-2 scans"),
        (NEW_KINDS[1], "gated delta rule"),
        (NEW_KINDS[3], "Mamba scans"),
        (NEW_KINDS[4], "sparse attention"),
        (NEW_KINDS[5], "sliding windows"),
        (NEW_KINDS[6], "vision tower"),
    ):
        model = model_from_document(DATA[name]["config"], where=name, name=name)
        notes = request_of(model).workload.assumptions
        assert any(note.startswith(word) for note in notes), name


def test_padding_and_packing_change_what_they_should() -> None:
    def predicted(**job: Any) -> Any:
        limits = {"fix": {"tp": 1, "pp": 1, "microbatch_size": 1, "cp": 1}}
        fields = {"sequence_length": 8192, "global_batch": 16, "constraints": limits, **job}
        return plan(read_request("llama-3.2-1b", "dgx-h100", None, fields)).prediction

    plain, padded = predicted(), predicted(padding_share=0.25)
    packed, varied = (
        predicted(document_length=1024),
        predicted(document_length=1024, document_length_cv=1.0),
    )
    assert padded.step_time_s == plain.step_time_s
    assert padded.tokens_per_s_per_device == pytest.approx(0.75 * plain.tokens_per_s_per_device)
    assert padded.mfu == pytest.approx(0.75 * plain.mfu)
    # Documents of unequal length have more pairs than equal ones, and fewer than one document.
    assert packed.step_time_s < varied.step_time_s < plain.step_time_s
    assert any("packed samples" in note for note in packed.assumptions)


def test_dropout_is_a_switch() -> None:
    def workload(dropout: bool | None) -> Any:
        job = {"sequence_length": 1024, "global_batch": 8, "dropout": dropout}
        return read_request("gpt2-xl", "dgx-h100", None, job).workload

    default, off, on = workload(None), workload(False), workload(True)
    masks = [
        any("mask" in tensor.name for tensor in each.embedding.saved(one_shard(1024)))
        for each in (default, off, on)
    ]
    assert masks == [False, False, True]
