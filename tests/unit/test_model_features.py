"""Features below the kinds of sub-block: what models need, and what a stack's version lacks."""

from __future__ import annotations

from typing import get_args

import pytest

from hardware_profiles.loader import catalog_names, load_stack
from hardware_profiles.stack_words import ModelFeature
from planner.errors import InputError
from planner.models import catalog
from planner.models.features import FEATURES, model_features
from planner.models.reader import model_from_document, read_model
from planner.models.spec import ModelSpec
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.stacks import fault
from planner.studies.policy import reading_of
from planner.studies.runs import SkippedError, read_runs

COMMON = {"RMS norms", "grouped queries", "sliding windows", "shared experts"}
"""Features of so many models that they are left out below."""


@pytest.mark.parametrize(
    ("model", "features"),
    [
        ("llama-3.1-8b", set()),
        ("mistral-7b", set()),
        ("bloom-7b1", {"ALiBi", "normed embeddings"}),
        ("falcon-7b", {"parallel blocks"}),
        ("pythia-1b", {"parallel blocks"}),
        ("phi-2", {"parallel blocks", "biases of the head"}),
        ("opt-350m", {"projected embeddings"}),
        ("gpt-oss-20b", {"attention sinks", "windows by layer", "biases of experts"}),
        ("gemma-2-2b", {"softcapped scores", "softcapped logits", "windows by layer",
                        "norms behind sub-blocks"}),
        ("gemma-3-1b", {"windows by layer", "norms behind sub-blocks"}),
        ("gemma-4-26b-a4b", {"softcapped logits", "windows by layer", "values that are keys",
                             "norms behind sub-blocks"}),
        ("llama-4-scout", {"chunked attention", "layers without positions"}),
        ("minimax-m2", {"norms over all heads"}),
        ("nemotron-3-nano-30b-a3b", {"experts in state-space hybrids"}),
        ("nemotron-3-super-120b-a12b", {"experts in state-space hybrids", "latent experts",
                                        "multi-token prediction"}),
        ("qwen3.5-27b", {"gated attention outputs", "multi-token prediction"}),
        ("unet-2015", set()),
    ],
)  # fmt: skip
def test_what_a_model_needs(model: str, features: set[str]) -> None:
    assert set(model_features(read_model(model))) - COMMON == features


def test_every_feature_has_a_test_of_a_model() -> None:
    assert set(FEATURES) == set(get_args(ModelFeature))


def test_caps_and_alibi_are_read_from_a_config() -> None:
    def read(**keys: object) -> ModelSpec:
        base = {"model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
        model = model_from_document({**base, **keys}, where="test")
        assert isinstance(model, ModelSpec)
        return model

    capped = {"softcapped scores", "softcapped logits"}
    assert capped <= set(model_features(read()))
    none = read(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert not capped & set(model_features(none))
    falcon = read(model_type="falcon", alibi=True)
    assert "ALiBi" in model_features(falcon)
    assert "ALiBi" not in model_features(read(model_type="falcon"))


@pytest.mark.parametrize(
    ("model", "stack", "says"),
    [
        ("gpt-oss-20b", "megatron-core", "attention sinks, windows by layer, biases of experts"),
        ("gemma-2-2b", "megatron-core", "softcapped scores"),
        ("gemma-3-1b", "megatron-core", "windows by layer"),
        ("falcon-7b", "megatron-core", "parallel blocks"),
        ("bloom-7b1", "megatron-core", "ALiBi"),
        ("llama-4-scout", "megatron-core", "chunked attention"),
        ("nemotron-3-nano-30b-a3b", "megatron-core", "experts in state-space hybrids"),
        ("gpt-oss-20b", "megatron-core-0.8", "attention sinks"),
        ("nemotron-3-nano-30b-a3b", "megatron-fsdp", "experts in state-space hybrids"),
        ("falcon-7b", "megatron-bridge", "parallel blocks"),
        ("bloom-7b1", "torchtitan", "ALiBi"),
        ("llama-2-70b", "megatron-lm-2022", "RMS norms, grouped queries"),
    ],
)
def test_a_version_refuses_what_it_lacks(model: str, stack: str, says: str) -> None:
    with pytest.raises(InputError, match=rf"{stack} .* has no .*{says}") as caught:
        read_request(model, "dgx-h100:8", None, {"stack": stack})
    assert "--stack " in (caught.value.hint or "")
    assert f"--stack {stack} " not in (caught.value.hint or "") + " "


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        ("gpt-oss-20b", "megatron-core-muon"),
        ("gpt-oss-20b", "megatron-fsdp"),
        ("gpt-oss-20b", "megatron-bridge"),
        ("gpt-oss-20b", "torchtitan"),
        ("nemotron-3-nano-30b-a3b", "megatron-core-muon"),
        ("gemma-2-2b", "nemo"),
        ("llama-4-scout", "megatron-bridge"),
        ("bloom-7b1", "megatron-deepspeed"),
        ("bloom-7b1", "deepspeed-hf"),
        ("falcon-7b", "pytorch-fsdp2"),
        ("gemma-3-1b", "maxtext-gpu"),
        ("mistral-7b", "megatron-core"),
    ],
)
def test_a_version_runs_what_it_has(model: str, stack: str) -> None:
    assert fault(read_request(model, "dgx-h100:8", None, {"stack": stack})) is None


@pytest.mark.parametrize(
    ("model", "cluster", "stack"),
    [
        ("gpt-oss-20b", "dgx-h100:4", "megatron-bridge"),
        ("nemotron-3-nano-30b-a3b", "dgx-h100:4", "megatron-bridge"),
        ("gemma-2-9b", "dgx-h100:4", "megatron-bridge"),
        ("bloom-176b", "dgx-a100:4", "nemo-automodel"),
        ("falcon-40b", "mi300x-8:4", "deepspeed-hf"),
    ],
)
def test_the_default_skips_stacks_that_lack_a_feature(model: str, cluster: str, stack: str) -> None:
    request = read_request(model, cluster)
    assert request.job.stack == stack
    assert "megatron-core 0.13 has no " in request.remark


def test_what_changes_scores_is_told_as_not_priced() -> None:
    job = {"global_batch": 64}
    bloom = plan(read_request("bloom-560m", "dgx-a100", None, job))
    assert any(note.startswith("ALiBi: ") for note in bloom.prediction.assumptions)
    gemma = evaluate(read_request("gemma-2-2b", "dgx-a100", None, job), {"tp": 1})
    for what in ("softcapped scores: ", "softcapped logits: "):
        assert any(note.startswith(what) for note in gemma.prediction.assumptions)


@pytest.mark.parametrize("name", catalog_names("stack"))
def test_what_a_stack_lacks_says_where_that_is_seen(name: str) -> None:
    assert all(len(why.split()) > 3 for why in load_stack(name).lacks.values())


RECOMPUTED = {
    "megatron-core-0.6": {"core_attn"},
    "megatron-core-0.8": {"core_attn"},
    "megatron-core": {"core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act"},
    "megatron-core-muon": {"core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act",
                           "shared_experts"},
}  # fmt: skip
"""Modules that the assertions of these versions allow to run again."""


@pytest.mark.parametrize("stack", RECOMPUTED)
def test_a_version_runs_again_what_its_assertion_allows(stack: str) -> None:
    spec = load_stack(stack)
    assert set(spec.recompute_modules) == RECOMPUTED[stack]
    searched = {part for mode in spec.recompute for part in mode.split("+")}
    assert searched <= {*RECOMPUTED[stack], "none", "selective", "full", "partitioned"}


def test_shared_experts_run_again_from_core_0_14_on() -> None:
    def request(stack: str) -> Request:
        limits = {"recompute": "shared_experts"}
        job = {"stack": stack, "constraints": limits}
        return read_request("deepseek-v2-lite", "dgx-h100:4", None, job)

    with pytest.raises(InputError, match="recompute is 'shared_experts'; megatron-core knows"):
        request("megatron-core")
    kept = {
        mode: evaluate(
            read_request("deepseek-v2-lite", "dgx-h100:4", None, {"stack": "megatron-core-muon"}),
            {"tp": 1, "pp": 4, "ep": 8, "recompute": mode},
        )
        for mode in ("none", "shared_experts")
    }
    assert kept["shared_experts"].prediction.step_time_s > kept["none"].prediction.step_time_s


def test_latents_of_sparse_attention_have_no_product_that_reads_them_up() -> None:
    workload = read_request("deepseek-v3.2", "dgx-h100:64").workload
    assert "selective" in {policy.name for policy in workload.policies}


def test_0_13_has_no_layout_beside_the_space() -> None:
    named = plan(read_request("llama-3.2-1b", "dgx-h100", None, {"stack": "megatron-core"}))
    assert named.target.not_priced == ()
    assert tuple(load_stack("megatron-core").not_described) == ("CUDA graphs",)


def test_published_runs_ran_on_software_that_lacks_nothing_of_their_models() -> None:
    checked = 0
    for run in read_runs("benchmarks/accuracy/data/runs.csv"):
        path = catalog.find((run.text("model") or "").lower())
        if path is None:
            continue
        try:
            stack = load_stack(reading_of(run).stack)
        except SkippedError:
            continue
        features = model_features(read_model(path.stem))
        assert stack.lacks.keys().isdisjoint(features), (path.stem, stack.name)
        checked += 1
    assert checked > 100
