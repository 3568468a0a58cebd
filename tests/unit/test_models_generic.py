"""Unseen decoders: read by their usual keys, refused where a count would be a guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.blocks.weights import parameter_counts
from planner.errors import InputError, UnknownModelError
from planner.models.reader import model_from_document
from planner.models.spec import AttentionSpec, MlpSpec, ModelSpec

DATA = json.loads(
    (Path(__file__).parents[1] / "validation" / "data" / "parameter_counts.json").read_text()
)["models"]

PLAIN: dict[str, Any] = {
    "model_type": "newcomer",
    "architectures": ["NewcomerForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def read(**changes: Any) -> ModelSpec:
    config = {key: value for key, value in {**PLAIN, **changes}.items() if value != "absent"}
    model = model_from_document(config, where="config.json")
    assert isinstance(model, ModelSpec)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama--Meta-Llama-3.1-8B", "meta-llama--Meta-Llama-3.1-405B", "Qwen--Qwen3-235B-A22B",
        "mistralai--Mixtral-8x7B-v0.1", "zai-org--GLM-4.5-Air",
    ],
)  # fmt: skip
def test_a_known_model_under_an_unknown_name_has_its_size(name: str) -> None:
    config = dict(DATA[name]["config"]) | {"model_type": "newcomer", "architectures": ["New"]}
    config.setdefault("hidden_act", "silu")
    model = model_from_document(config, where=name)
    assert isinstance(model, ModelSpec)
    # What no key states is a vector: qwen3's norms on q and k, glm's missing bias on out.
    assert parameter_counts(model).total == pytest.approx(DATA[name]["total"], rel=1e-4)
    assert parameter_counts(model).routed_experts == DATA[name]["routed_experts"]


def test_what_was_read_and_what_was_not_is_said() -> None:
    model = read()
    assert model.family == "newcomer"
    assert {"hidden_size", "num_key_value_heads", "hidden_act"} <= set(model.keys_used)
    assert set(model.keys_ignored) == {"bos_token_id", "rope_theta", "torch_dtype"}
    assert "unknown architecture, read by its usual keys" in model.notes[0]


def test_other_names_of_the_usual_keys() -> None:
    renamed = {
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_hidden_size",
    }  # fmt: skip
    changes = {new: PLAIN[old] for old, new in renamed.items()} | dict.fromkeys(renamed, "absent")
    assert parameter_counts(read(**changes)) == parameter_counts(read())


def test_biases_norms_and_windows_that_keys_state() -> None:
    model = read(attention_bias=True, use_qk_norm=True, mlp_bias=True, sliding_window=32)
    (block,) = model.blocks.values()
    assert isinstance(block.mixer, AttentionSpec)
    assert isinstance(block.feed_forward, MlpSpec)
    assert (block.mixer.qkv_bias, block.mixer.qk_norm, block.mixer.window) == (True, "per_head", 32)
    assert block.feed_forward.bias
    assert any("every layer" in note for note in model.notes)
    kinds = ["sliding_attention", "full_attention"] * 2
    mixed = read(sliding_window=32, layer_types=kinds)
    assert [run.block for run in mixed.layers] == ["dense_sliding", "dense_full"] * 2
    assert read(sliding_window=32, use_sliding_window=False) == read().model_copy(
        update={"keys_used": read(sliding_window=32, use_sliding_window=False).keys_used}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "absent"}, "missing here: 'tie_word_embeddings'"),
        ({"hidden_act": "absent"}, "missing here: 'hidden_act'"),
        ({"vocab_size": "absent"}, "missing here: 'vocab_size'"),
        ({"hidden_act": "gelu"}, "two or three matrices"),
        (
            {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "what these keys do to the parameter count: 'intermediate_size'",
        ),
        ({"shared_layers": 2}, "what these keys do to the parameter count: 'shared_layers'"),
        ({"mup_width": 3, "cross_every": 4}, "'cross_every', 'mup_width'"),
        ({"vision_config": {"depth": 2}}, "a vision tower (vision_config)"),
        ({"ssm_state_size": 16}, "state-space (Mamba) layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layers of type linear_attention"),
    ],
)
def test_doubt_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        read(**changes)
    assert message in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "config has no 'num_experts_per_tok'"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "more than the 8 experts"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2}, "every 2. layer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 65}, "not a multiple of num_attention_heads"),
        ({"hidden_size": -1}, "must be at least 1"),
    ],
)
def test_values_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert message in caught.value.message


def test_keys_that_are_off_raise_no_doubt() -> None:
    assert parameter_counts(read(shared_layers=0, cross_every=None, extra=False)).total == (
        parameter_counts(read()).total
    )


def test_gated_or_not_may_be_stated() -> None:
    three, two = read(hidden_act="gelu", mlp_gated=True), read(hidden_act="gelu", mlp_gated=False)
    difference = parameter_counts(three).total - parameter_counts(two).total
    assert difference == 4 * 64 * 160


UNSEEN = json.loads(
    (Path(__file__).parents[1] / "validation" / "data" / "unseen_architectures.json").read_text()
)["models"]


@pytest.mark.parametrize("name", sorted(UNSEEN))
def test_an_architecture_without_a_reader_has_the_size_of_the_built_model(name: str) -> None:
    model = model_from_document(UNSEEN[name]["config"], where=name)
    assert isinstance(model, ModelSpec)
    assert "unknown architecture" in model.notes[0]
    assert parameter_counts(model).total == pytest.approx(UNSEEN[name]["total"], rel=1e-4)


def test_a_squared_relu_says_nothing_about_the_number_of_matrices() -> None:
    # BitNet gates it, Nemotron does not.
    with pytest.raises(UnknownModelError, match="two or three matrices"):
        read(hidden_act="relu2")


def test_layer_types_must_fit_the_layers_and_the_window() -> None:
    with pytest.raises(InputError, match="layer_types has 3 entries for 4 layers"):
        read(layer_types=["full_attention"] * 3)
    with pytest.raises(InputError, match="nothing says how wide its window is"):
        read(layer_types=["sliding_attention"] * 4)
    off = read(layer_types=["sliding_attention"] * 4, use_sliding_window=False)
    mixers = [block.mixer for block in off.blocks.values()]
    assert all(isinstance(mixer, AttentionSpec) and mixer.window is None for mixer in mixers)


def test_the_nearest_family_reads_what_the_config_has() -> None:
    """llama has all of its keys here too, and would not read the experts'."""
    with pytest.raises(UnknownModelError) as caught:
        read(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, routing="odd")
    assert "nearest known family: llama" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"architectures": ["NuForMaskedLM"]}, "architecture NuForMaskedLM"),
        ({"architectures": ["NuEncoderModel"]}, "architecture NuEncoderModel"),
        ({"causal": False}, "causal: false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"architectures": "absent", "is_decoder": False}, "is_decoder: false"),
    ],
)
def test_attention_that_looks_ahead_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownModelError, match=f"attention that looks ahead .{words}"):
        read(**said)


def test_a_full_dump_of_a_decoder_is_no_encoder() -> None:
    assert read(is_decoder=False, causal=True).hidden == 64


@pytest.mark.parametrize("key", ["hidden_dropout_prob", "attention_dropout", "resid_pdrop"])
def test_dropout_keeps_masks(key: str) -> None:
    assert read(**{key: 0.1}).dropout
    assert not read(**{key: 0.0}).dropout
    assert key in read(**{key: 0.1}).keys_used
