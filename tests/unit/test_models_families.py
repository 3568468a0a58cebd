"""What each family's reader makes of its keys and of their absence."""

from __future__ import annotations

from typing import Any

import pytest

from planner.blocks.weights import parameter_counts
from planner.errors import InputError, UnsupportedError
from planner.models.reader import model_from_document
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    LayerRun,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 1000,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def read(model_type: str, *, without: str = "", **keys: Any) -> ModelSpec:
    config = {"model_type": model_type, **SIZES, **keys}
    config.pop(without, None)
    return model_from_document(config, where="config.json")


def only(model: ModelSpec) -> BlockSpec:
    (block,) = model.blocks.values()
    return block


def attention(model: ModelSpec) -> AttentionSpec:
    mixer = only(model).mixer
    assert isinstance(mixer, AttentionSpec)
    return mixer


def mlp(model: ModelSpec) -> MlpSpec:
    feed_forward = only(model).feed_forward
    assert isinstance(feed_forward, MlpSpec)
    return feed_forward


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "tied"),
    [
        ("llama", 32, 8, False),
        ("mistral", 8, 8, False),
        ("qwen2", 32, 8, False),
        ("qwen3", 32, 128, False),
    ],
)
def test_absent_keys_take_the_default_of_the_config_class(
    model_type: str, kv_heads: int, head_dim: int, tied: bool
) -> None:
    model = read(model_type)
    assert attention(model).kv_heads == kv_heads
    assert attention(model).head_dim == head_dim
    assert model.tied_embeddings is tied


def test_llama_biases() -> None:
    assert not attention(read("llama")).qkv_bias
    both = attention(read("llama", attention_bias=True))
    assert (both.qkv_bias, both.out_bias) == (True, True)
    assert mlp(read("llama", mlp_bias=True)).bias


def test_qwen2_has_bias_on_q_k_and_v_only() -> None:
    mixer = attention(read("qwen2"))
    assert (mixer.qkv_bias, mixer.out_bias) == (True, False)


def test_mistral_window() -> None:
    assert attention(read("mistral")).window == 4096
    assert attention(read("mistral", sliding_window=None)).window is None
    assert attention(read("mistral", sliding_window=128)).window == 128


def test_qwen_window_is_off_unless_asked_for_and_starts_late() -> None:
    assert attention(read("qwen3", sliding_window=64)).window is None
    model = read("qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=3)
    assert model.layers == (
        LayerRun(block="dense_full", count=3),
        LayerRun(block="dense_sliding", count=1),
    )
    sliding = model.blocks["dense_sliding"].mixer
    assert isinstance(sliding, AttentionSpec)
    assert sliding.window == 64


def test_layer_types_are_checked() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    assert len(read("gemma2", layer_types=kinds).layers) == 4
    with pytest.raises(InputError, match="layer_types has 2 entries for 4 layers"):
        read("gemma2", layer_types=kinds[:2])
    with pytest.raises(InputError, match="'linear_attention'"):
        read("gemma2", layer_types=[*kinds[:3], "linear_attention"])


def test_qwen3_moe_mixes_dense_layers_in() -> None:
    # Layer 0 by mlp_only_layers; of the others only (index + 1) % 2 == 0: layers 1 and 3.
    model = read("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[0], **EXPERTS)
    assert [run.block for run in model.layers] == ["dense", "moe", "dense", "moe"]
    assert read("qwen3_moe", **EXPERTS).layers == (LayerRun(block="moe", count=4),)
    # Without dense layers their width is not asked for.
    assert read("qwen3_moe", without="intermediate_size", **EXPERTS).layer_count == 4


def test_qwen2_moe_has_a_gated_shared_expert() -> None:
    moe = only(read("qwen2_moe", shared_expert_intermediate_size=96, **EXPERTS)).feed_forward
    assert isinstance(moe, MoeSpec)
    assert (moe.shared_intermediate, moe.shared_gate) == (96, True)


def test_deepseek_dense_layers_shared_experts_and_mtp() -> None:
    model = read("deepseek_v3", first_k_dense_replace=1, n_shared_experts=3, **LATENT)
    assert model.layers == (LayerRun(block="dense", count=1), LayerRun(block="moe", count=3))
    assert model.mtp == (LayerRun(block="moe", count=1),)
    moe = model.blocks["moe"].feed_forward
    assert isinstance(moe, MoeSpec)
    assert moe.shared_intermediate == 3 * 64
    mixer = model.blocks["moe"].mixer
    assert isinstance(mixer, LatentAttentionSpec)
    assert mixer.q_lora_rank is None
    no_mtp = read("deepseek_v3", num_nextn_predict_layers=0, **LATENT)
    assert no_mtp.mtp == ()
    assert parameter_counts(no_mtp).mtp == 0


def test_deepseek_defaults_differ_by_version() -> None:
    assert read("deepseek_v3", **LATENT).layers[0] == LayerRun(block="dense", count=3)
    v2 = read("deepseek_v2", **LATENT)
    assert v2.layers == (LayerRun(block="moe", count=4),)
    assert v2.mtp == ()
    absent = {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    mixer = only(read("deepseek_v2", **absent)).mixer
    assert isinstance(mixer, LatentAttentionSpec)
    assert mixer.q_lora_rank == 1536


def test_deepseek_null_shared_experts_are_none_and_layer_frequency_counts() -> None:
    model = read("deepseek_v2", n_shared_experts=None, moe_layer_freq=2, **LATENT)
    # Every second layer from the first: 0 and 2 are routed.
    assert [run.block for run in model.layers] == ["moe", "dense", "moe", "dense"]
    moe = model.blocks["moe"].feed_forward
    assert isinstance(moe, MoeSpec)
    assert moe.shared_intermediate == 0


def gpt2(**keys: Any) -> ModelSpec:
    config = {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, **keys
    }  # fmt: skip
    return model_from_document(config, where="config.json")


def test_gpt2_defaults() -> None:
    model = gpt2()
    assert mlp(model).intermediate == 256
    assert model.tied_embeddings
    assert model.position_embeddings == 1024
    assert model.dropout
    assert mlp(gpt2(n_inner=100)).intermediate == 100
    assert not gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).dropout
    with pytest.raises(UnsupportedError, match="cross attention"):
        gpt2(add_cross_attention=True)


def test_gpt_neox_is_parallel_unless_told_otherwise() -> None:
    assert only(read("gpt_neox")).parallel
    assert not only(read("gpt_neox", use_parallel_residual=False)).parallel
    assert not attention(read("gpt_neox", attention_bias=False)).out_bias


def test_opt_positions_projection_and_final_norm() -> None:
    model = read("opt", ffn_dim=512, max_position_embeddings=128)
    assert (model.position_embeddings, model.max_sequence) == (130, 128)
    assert model.tied_embeddings
    assert model.embedding_dim is None
    narrow = read("opt", ffn_dim=512, word_embed_proj_dim=64, do_layer_norm_before=False)
    assert narrow.embedding_dim == 64
    assert not narrow.final_norm
    with pytest.raises(UnsupportedError, match="layer_norm_elementwise_affine"):
        read("opt", ffn_dim=512, layer_norm_elementwise_affine=False)


def test_falcon_norms_and_kv_heads() -> None:
    old = read("falcon")
    assert (only(old).norms, attention(old).kv_heads) == (1, 1)
    new = read("falcon", new_decoder_architecture=True, num_kv_heads=8)
    assert (only(new).norms, attention(new).kv_heads) == (2, 8)
    assert attention(read("falcon", multi_query=False)).kv_heads == 32


def test_megatron_gpt_defaults_are_megatrons() -> None:
    dims = {"format": "megatron_gpt", "layers": 2, "hidden": 64, "heads": 4, "vocab": 100}
    model = model_from_document(dims, where="gpt.yaml", name="gpt")
    assert mlp(model).intermediate == 256
    assert model.tied_embeddings
    assert (model.position_embeddings, model.max_sequence) == (2048, 2048)
    longer = model_from_document({**dims, "max_position_embeddings": 4096}, where="gpt.yaml")
    assert (longer.position_embeddings, longer.max_sequence) == (4096, 4096)
    # 2 layers of 12 h^2 + 13 h, (100 + 2048) rows of h, a final norm of 2 h.
    assert parameter_counts(model).total == 2 * (12 * 4096 + 13 * 64) + 2148 * 64 + 128
    changed = model_from_document(
        {**dims, "positions": 0, "bias": False, "norm": "rms", "tied": False, "kv_heads": 2,
         "ffn_hidden": 96, "gated": True},
        where="gpt.yaml",
    )  # fmt: skip
    # Per layer: q and out 2*64*64, k and v 2*32*64, three matrices 96*64, two norms 64.
    layer = 2 * 4096 + 2 * 2048 + 3 * 6144 + 128
    assert parameter_counts(changed).total == 2 * layer + 2 * 6400 + 64


def test_megatron_argument_names_are_accepted() -> None:
    ours = {"format": "megatron_gpt", "layers": 2, "hidden": 64, "heads": 4, "vocab": 100}
    theirs = {
        "format": "megatron_gpt", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "padded_vocab_size": 100,
    }  # fmt: skip
    a, b = (model_from_document(dims, where="gpt") for dims in (ours, theirs))
    assert a.model_copy(update={"keys_used": ()}) == b.model_copy(update={"keys_used": ()})
    with pytest.raises(InputError, match="'layers' is given twice, once as 'num_layers'"):
        model_from_document({**ours, "num_layers": 2}, where="gpt")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_a_missing_size_is_named(model_type: str, key: str) -> None:
    with pytest.raises(InputError, match=f"config has no '{key}'") as caught:
        read(model_type, without=key)
    assert caught.value.hint is not None
    assert key in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 257}, "hidden_size = 257 is not a multiple of num_attention_heads = 32"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads = 5"),
        ({"hidden_size": 0}, "hidden_size = 0, and must be at least 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers = -2"),
        ({"num_hidden_layers": 10**9}, "must be at most 10,000"),
        ({"vocab_size": 10**30}, "must be at most"),
        ({"vocab_size": "many"}, "vocab_size = 'many', and must be a whole number"),
        ({"vocab_size": 1.5}, "must be a whole number"),
        ({"vocab_size": True}, "must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"attention_dropout": 2}, "must be a number from 0 to 1"),
        ({"hidden_act": 3}, "must be a string"),
    ],
)
def test_values_that_make_no_model_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read("llama", **keys)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(InputError, match="num_experts_per_tok = 9 is more than the 8 experts"):
        read("mixtral", num_local_experts=8, num_experts_per_tok=9)


def test_keys_used_and_ignored_are_on_record() -> None:
    model = read("llama", rope_theta=1e4, bos_token_id=1)
    assert model.keys_ignored == ("bos_token_id", "rope_theta")
    assert set(SIZES) <= set(model.keys_used)


def test_a_default_that_adds_mtp_modules_is_noted() -> None:
    assert any("num_nextn_predict_layers" in note for note in read("deepseek_v3", **LATENT).notes)
    assert read("deepseek_v3", num_nextn_predict_layers=1, **LATENT).notes == ()


def test_glm4_moe_mtp_has_the_block_after_the_last_layer() -> None:
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = read("glm4_moe", first_k_dense_replace=4, **sizes)
    assert model.layers == (LayerRun(block="dense", count=4),)
    assert model.mtp == (LayerRun(block="moe", count=1),)
