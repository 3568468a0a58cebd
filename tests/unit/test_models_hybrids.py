"""Readers of recurrent, interleaved and multimodal families: what their keys and absences mean."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import InputError, UnsupportedError
from planner.models.reader import model_from_document
from planner.models.spec import (
    AttentionSpec,
    GatedDeltaNetSpec,
    LayerRun,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    MoeSpec,
    SparseLatentAttentionSpec,
)

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


def read(model_type: str, **keys: Any) -> ModelSpec:
    config = {"model_type": model_type, **SIZES, **keys}
    config = {key: value for key, value in config.items() if value != "absent"}
    model = model_from_document(config, where="config.json")
    assert isinstance(model, ModelSpec)
    return model


def names(model: ModelSpec) -> list[str]:
    return [run.block for run in model.layers for _ in range(run.count)]


def test_qwen3_5_has_full_attention_every_fourth_layer_unless_told_otherwise() -> None:
    model = read("qwen3_5_text", mtp_num_hidden_layers=1)
    assert names(model) == ["linear", "linear", "linear", "full"] * 2
    assert names(read("qwen3_5_text", full_attention_interval=2)) == ["linear", "full"] * 4
    listed = ["full_attention"] + ["linear_attention"] * 7
    assert names(read("qwen3_5_text", layer_types=listed))[:2] == ["full", "linear"]
    full, linear = model.blocks["full"].mixer, model.blocks["linear"].mixer
    assert isinstance(full, AttentionSpec)
    assert (full.head_dim, full.output_gate, full.qk_norm) == (256, True, "per_head")
    assert isinstance(linear, GatedDeltaNetSpec)
    assert (linear.key_heads, linear.value_heads, linear.conv) == (16, 32, 4)
    assert model.mtp == (LayerRun(block="full", count=1),)


def test_jamba_places_attention_and_experts_by_period_and_offset() -> None:
    model = read("jamba", num_experts=4, **{k: EXPERTS[k] for k in ("num_experts_per_tok",)})
    kinds = names(model)
    assert [kind.startswith("attention") for kind in kinds] == [i == 4 for i in range(8)]
    assert [kind.endswith("moe") for kind in kinds] == [i % 2 == 1 for i in range(8)]
    mixer = model.blocks["mamba_dense"].mixer
    assert isinstance(mixer, MambaSpec)
    # 256 / 16 where the rank of the time step is "auto" or absent.
    assert (mixer.inner, mixer.dt_rank, mixer.inner_norms) == (512, 16, True)
    assert read("jamba", num_experts=4, mamba_dt_rank="auto") == model.model_copy(
        update={"keys_used": read("jamba", num_experts=4, mamba_dt_rank="auto").keys_used}
    )


HYBRID = {"hybrid_override_pattern": "M-M*E-ME", "moe_intermediate_size": 64,
          "moe_shared_expert_intermediate_size": 96}  # fmt: skip


def test_nemotron_h_has_one_sub_block_per_letter() -> None:
    model = read("nemotron_h", mamba_num_heads=8, mamba_head_dim=64, **HYBRID)
    assert names(model) == ["mamba", "mlp", "mamba", "attention", "moe", "mlp", "mamba", "moe"]
    assert all(block.norms == 1 for block in model.blocks.values())
    mixer, moe = model.blocks["mamba"].mixer, model.blocks["moe"].feed_forward
    assert isinstance(mixer, Mamba2Spec)
    assert (mixer.heads, mixer.groups, mixer.state, mixer.chunk) == (8, 8, 128, 128)
    assert isinstance(moe, MoeSpec)
    assert (moe.gated, moe.activation, moe.shared_intermediate) == (False, "relu2", 96)
    listed = ["mamba", "mlp", "mamba", "attention", "moe", "mlp", "mamba", "moe"]
    by_list = {**HYBRID, "hybrid_override_pattern": "absent", "layers_block_type": listed}
    assert names(read("nemotron_h", **by_list)) == names(model)


def test_nemotron_h_mtp_modules_are_an_attention_and_a_routed_layer() -> None:
    model = read("nemotron_h", num_nextn_predict_layers=2, **HYBRID)
    assert model.mtp == (LayerRun(block="mtp", count=2),)
    assert (model.blocks["mtp"].norms, model.blocks["mtp"].parallel) == (2, False)
    assert model.blocks["mtp"].mixer == model.blocks["attention"].mixer
    assert model.blocks["mtp"].feed_forward == model.blocks["moe"].feed_forward


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hybrid_override_pattern": "MMX"}, "layer 'X' is none of M, E, *, -"),
        ({"hybrid_override_pattern": "MM"}, "the pattern has 2 layers, num_hidden_layers = 8"),
        ({"hybrid_override_pattern": "absent"}, "neither 'hybrid_override_pattern' nor"),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "M"}, "MTP modules of"),
    ],
)
def test_nemotron_patterns_that_make_no_model(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read("nemotron_h", **{**HYBRID, **keys})
    assert message in caught.value.message


def test_mamba2_heads_must_fill_the_width() -> None:
    keys = {"num_attention_heads": "absent", "head_dim": 64, "n_groups": 1}
    model = read("mamba2", **keys)
    mixer = model.blocks["decoder"].mixer
    assert isinstance(mixer, Mamba2Spec)
    assert (mixer.heads, mixer.head_dim) == (8, 64)
    with pytest.raises(InputError, match="expand x hidden_size = 512 is not num_heads x head_dim"):
        read("mamba2", num_heads=9, **keys)


LLAMA4 = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 1024}


def test_llama4_chunks_three_layers_of_four_and_routes_every_second() -> None:
    model = read("llama4_text", **LLAMA4)
    assert names(model)[:4] == ["dense_chunked", "moe_chunked", "dense_chunked", "moe_full"]
    chunked, full = model.blocks["moe_chunked"].mixer, model.blocks["moe_full"].mixer
    assert isinstance(chunked, AttentionSpec)
    assert isinstance(full, AttentionSpec)
    assert (chunked.chunk, chunked.rotary) == (8192, True)
    assert (full.chunk, full.rotary) == (None, False)


def test_gemma4_full_layers_have_wider_heads_and_tied_values() -> None:
    keys = {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "sliding_window": 64}
    model = read("gemma4_text", hidden_size_per_layer_input=0, **keys)
    # Five slide, one does not, and the last sees everything whatever the pattern says.
    assert names(model) == ["dense_sliding"] * 5 + ["dense_full", "dense_sliding", "dense_full"]
    full = model.blocks["dense_full"].mixer
    assert isinstance(full, AttentionSpec)
    assert (full.head_dim, full.kv_heads, full.tied_kv, full.window) == (512, 2, True, None)
    with pytest.raises(UnsupportedError, match="hidden_size_per_layer_input"):
        read("gemma4_text", hidden_size_per_layer_input=256)


def test_indexed_attention_needs_a_compressed_query() -> None:
    keys = {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "index_n_heads": 4, "index_head_dim": 16, "index_topk": 128,
    }  # fmt: skip
    mixer = read("deepseek_v32", **keys).blocks["moe"].mixer
    assert isinstance(mixer, SparseLatentAttentionSpec)
    assert (mixer.index_heads, mixer.top_k, mixer.latent.q_lora_rank) == (4, 128, 1536)
    with pytest.raises(InputError, match="q_lora_rank is null"):
        read("deepseek_v32", q_lora_rank=None, **keys)
    with pytest.raises(InputError, match="share an indexer"):
        read("glm_moe_dsa", indexer_types=["full", "shared"], **keys)


def nested(vision: Any, **outer: Any) -> ModelSpec:
    document = {
        "model_type": "qwen3_vl", "text_config": {**SIZES, "bos_token_id": 1}, "image_token_id": 7,
        **({} if vision == "absent" else {"vision_config": vision}), **outer,
    }  # fmt: skip
    model = model_from_document(document, where="config.json")
    assert isinstance(model, ModelSpec)
    return model


def test_a_tower_is_read_beside_its_decoder_with_all_keys_on_record() -> None:
    model = nested({"depth": 3, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 256,
                    "intermediate_size": 64, "initializer_range": 0.02})  # fmt: skip
    assert model.vision is not None
    assert (model.vision.layers, model.vision.patches_per_token) == (3, 4)
    assert model.family == "qwen3_vl"
    assert {"text_config.hidden_size", "vision_config.depth"} <= set(model.keys_used)
    assert set(model.keys_ignored) == {
        "image_token_id", "text_config.bos_token_id", "vision_config.initializer_range",
    }  # fmt: skip


def test_a_tower_may_be_absent_null_or_wrong() -> None:
    assert nested(None).vision is None
    default = nested({"out_hidden_size": 256})
    assert default.vision is not None
    assert default.vision.layers == 27
    assert any("vision_config is absent" in note for note in nested("absent").notes)
    with pytest.raises(InputError, match="out_hidden_size = 99, and the decoder's hidden_size"):
        nested({"out_hidden_size": 99})
    with pytest.raises(InputError, match="vision_config must be a mapping"):
        nested([1])
    with pytest.raises(UnsupportedError, match="audio tower"):
        nested(None, audio_config={"depth": 2})
