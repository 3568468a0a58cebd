"""Weights of one block of each kind, derived by hand."""

from __future__ import annotations

from cost_models.graph import Weight
from planner.blocks.weights import (
    block_weights,
    elements,
    embedding_weights,
    head_weights,
    mtp_weights,
    parameter_counts,
)
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

MLP = MlpSpec(intermediate=20, gated=True)


def model(block: BlockSpec, **changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": "tiny", "family": "test", "source": "test", "hidden": 8, "vocab": 100,
        "tied_embeddings": False, "norm": "rms", "norm_bias": False, "blocks": {"b": block},
        "layers": (LayerRun(block="b", count=3),),
    }  # fmt: skip
    return ModelSpec.model_validate({**fields, **changes})


def by_name(weights: tuple[Weight, ...]) -> dict[str, Weight]:
    named = {weight.name: weight for weight in weights}
    assert len(named) == len(weights)
    return named


def test_grouped_attention_and_gated_mlp() -> None:
    # hidden 8, 4 heads of 2, 2 KV heads: q 8x8, k and v (2*2)x8, out 8x8; MLP 20: 3 matrices 20*8;
    # two norms of 8. 64 + 2*32 + 64 + 3*160 + 16 = 688.
    attention = AttentionSpec(heads=4, kv_heads=2, head_dim=2)
    block = BlockSpec(mixer=attention, feed_forward=MLP)
    weights = by_name(block_weights(model(block), block))
    assert elements(weights.values()) == 688
    assert weights["attention.q"] == Weight("attention.q", 8, 8, "column")
    assert weights["attention.k"] == Weight("attention.k", 4, 8, "column", 1, kv_heads=2)
    assert weights["attention.out"] == Weight("attention.out", 8, 8, "row")
    assert weights["mlp.gate"] == Weight("mlp.gate", 20, 8, "column")
    assert weights["mlp.down"] == Weight("mlp.down", 8, 20, "row")
    assert weights["norm"] == Weight("norm", 8, 1, "replicated", 2)


def test_biases_follow_the_sharding_of_their_layer() -> None:
    # Bias: q 8, k and v 8 each, out 8, up 32, down 8 = 72; LayerNorm 2 x (8 + 8) = 32;
    # matrices 4*64 + 2*32*8 = 768. Together 872 = 12 h^2 + 13 h with h = 8.
    attention = AttentionSpec(heads=4, kv_heads=4, head_dim=2, qkv_bias=True, out_bias=True)
    mlp = MlpSpec(intermediate=32, gated=False, bias=True)
    block = BlockSpec(mixer=attention, feed_forward=mlp)
    weights = by_name(block_weights(model(block, norm="layer", norm_bias=True), block))
    assert elements(weights.values()) == 12 * 64 + 13 * 8
    assert weights["attention.q.bias"] == Weight("attention.q.bias", 8, 1, "column")
    assert weights["attention.v.bias"].kv_heads == 4
    assert weights["attention.out.bias"] == Weight("attention.out.bias", 8, 1, "replicated")
    assert weights["mlp.up.bias"] == Weight("mlp.up.bias", 32, 1, "column")
    assert weights["mlp.down.bias"].sharding == "replicated"
    assert weights["norm.bias"].sharding == "replicated"
    assert "mlp.gate" not in weights


def test_q_and_k_norms() -> None:
    # per_head: 2 for q and 2 for k; full: 8 for q and 4 for k; sinks: one per head.
    def extra(**fields: object) -> int:
        plain = AttentionSpec(heads=4, kv_heads=2, head_dim=2)
        block = BlockSpec(mixer=plain.model_copy(update=fields), feed_forward=None, norms=0)
        base = BlockSpec(mixer=plain, feed_forward=None, norms=0)
        whole = model(block)
        return elements(block_weights(whole, block)) - elements(block_weights(whole, base))

    assert extra(qk_norm="per_head") == 4
    assert extra(qk_norm="full") == 12
    assert extra(sinks=True) == 4


def test_latent_attention() -> None:
    # 2 heads, nope 3, rope 2, v 4, q rank 6, kv rank 5, hidden 8.
    # q_down 6*8, its norm 6, q_up 2*(3+2)*6; kv_down (5+2)*8, norm 5, kv_up 2*(3+4)*5; out 8*8.
    # 48 + 6 + 60 + 56 + 5 + 70 + 64 = 309.
    mixer = LatentAttentionSpec(
        heads=2, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4
    )
    block = BlockSpec(mixer=mixer, feed_forward=None, norms=0)
    weights = by_name(block_weights(model(block), block))
    assert elements(weights.values()) == 309
    shardings = {name: weight.sharding for name, weight in weights.items()}
    assert shardings == {
        "attention.q_down": "replicated",
        "attention.q_norm": "replicated",
        "attention.q_up": "column",
        "attention.kv_down": "replicated",
        "attention.kv_norm": "replicated",
        "attention.kv_up": "column",
        "attention.out": "row",
    }
    # Without a rank for q: one matrix 10*8 in place of 48 + 6 + 60.
    direct = block.model_copy(update={"mixer": mixer.model_copy(update={"q_lora_rank": None})})
    assert elements(block_weights(model(direct), direct)) == 309 - 114 + 80
    # Bias: q_down 6, kv_down 7, out 8.
    biased = mixer.model_copy(update={"qkv_bias": True, "out_bias": True})
    block = block.model_copy(update={"mixer": biased})
    assert elements(block_weights(model(block), block)) == 309 + 21


def test_mixture_of_experts() -> None:
    # 6 experts of 5: 6 * 3*5*8 = 720; router 6*8 = 48; shared 7: 3*7*8 = 168; its gate 8.
    moe = MoeSpec(experts=6, top_k=2, intermediate=5, shared_intermediate=7, shared_gate=True)
    block = BlockSpec(mixer=None, feed_forward=moe, norms=1)
    whole = model(block)
    weights = by_name(block_weights(whole, block))
    assert elements(weights.values()) == 720 + 48 + 168 + 8 + 8
    assert weights["moe.experts.up"] == Weight("moe.experts.up", 5, 8, "expert_column", 6)
    assert weights["moe.experts.down"] == Weight("moe.experts.down", 8, 5, "expert_row", 6)
    assert weights["moe.router"].sharding == "replicated"
    assert weights["moe.shared.gate"].sharding == "column"
    assert weights["moe.shared.down"].sharding == "row"
    # Three layers: 2160 routed, of which a token sees a third.
    counts = parameter_counts(whole)
    assert counts.routed_experts == 2160
    assert counts.active == counts.total - 1440
    # Biases: router 6, and per expert 5 + 5 + 8.
    biased = moe.model_copy(update={"expert_bias": True, "router_bias": True})
    block = block.model_copy(update={"feed_forward": biased})
    assert elements(block_weights(model(block), block)) == 952 + 6 + 6 * 18


def test_embedding_and_head() -> None:
    block = BlockSpec(mixer=None, feed_forward=MLP)
    untied = model(block, position_embeddings=16, embedding_norm=True, head_bias=True)
    # 100*8 tokens, 16*8 positions, norm 8; final norm 8, head 100*8, head bias 100.
    assert elements(embedding_weights(untied)) == 800 + 128 + 8
    assert elements(head_weights(untied)) == 8 + 800 + 100
    assert by_name(embedding_weights(untied))["embedding"].sharding == "vocab"
    assert by_name(head_weights(untied))["head"] == Weight("head", 100, 8, "vocab")


def test_tied_head_is_counted_once_and_held_twice_on_request() -> None:
    tied = model(BlockSpec(mixer=None, feed_forward=MLP), tied_embeddings=True)
    assert elements(head_weights(tied)) == 8
    assert by_name(head_weights(tied, include_tied=True))["head.tied"].elements == 800
    counts = parameter_counts(tied)
    # Three blocks of 3*160 + 2*8, the embedding, the final norm.
    assert counts.total == 3 * 496 + 800 + 8
    assert (counts.embedding, counts.head) == (800, 0)


def test_narrow_embedding_is_projected_in_and_out() -> None:
    narrow = model(BlockSpec(mixer=None, feed_forward=MLP), embedding_dim=4, final_norm=False)
    assert elements(embedding_weights(narrow)) == 100 * 4 + 8 * 4
    assert elements(head_weights(narrow)) == 4 * 8 + 100 * 4


def test_mtp_modules_are_outside_the_total() -> None:
    # Each module: two input norms and a final one 3*8, projection 8*16, one block 3*160 + 2*8.
    block = BlockSpec(mixer=None, feed_forward=MLP)
    plain = model(block)
    with_mtp = model(block, mtp=(LayerRun(block="b", count=2),))
    assert elements(mtp_weights(with_mtp)) == 2 * (24 + 128 + 496)
    assert parameter_counts(with_mtp).mtp == 1296
    assert parameter_counts(with_mtp).total == parameter_counts(plain).total
    assert mtp_weights(plain) == ()


def test_own_schema_round_trips() -> None:
    whole = model(BlockSpec(mixer=AttentionSpec(heads=2, kv_heads=1, head_dim=4), feed_forward=MLP))
    assert model_from_document(whole.model_dump(mode="json"), where="tiny") == whole
