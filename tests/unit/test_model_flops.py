"""FLOPs per token of each kind of layer, derived by hand: what MFU is measured in.

Each model has one layer of the kind and nothing else that multiplies but the LM head: with hidden
h and vocabulary v a forward pass is the layer plus ``2 v h``, and training is three forwards.
"""

from __future__ import annotations

from typing import Any

import pytest

from planner.blocks.flops import model_flops_per_token
from planner.blocks.vision import Images
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    GatedDeltaNetSpec,
    LatentAttentionSpec,
    LayerRun,
    Mamba2Spec,
    MambaSpec,
    Mixer,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    ProjectorSpec,
    SparseLatentAttentionSpec,
    VisionSpec,
)

HIDDEN, VOCAB, SEQUENCE = 8, 100, 64
HEAD = 2 * VOCAB * HIDDEN


def model(mixer: Mixer | None, feed_forward: Any = None, **changes: Any) -> ModelSpec:
    block = BlockSpec(mixer=mixer, feed_forward=feed_forward, norms=1)
    return ModelSpec(
        name="tiny", family="test", source="test", hidden=HIDDEN, vocab=VOCAB,
        tied_embeddings=False, norm="rms", norm_bias=False, blocks={"b": block},
        layers=(LayerRun(block="b", count=1),), **changes,
    )  # fmt: skip


def layer(mixer: Mixer | None, feed_forward: Any = None, **job: Any) -> float:
    """Forward FLOPs per token of the one layer."""
    return model_flops_per_token(model(mixer, feed_forward), SEQUENCE, **job) / 3 - HEAD


ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=6)
PROJECTIONS = 2 * (24 * 8 + 12 * 8 + 12 * 8 + 8 * 24)
PER_KEY = 2 * 4 * (6 + 6)
"""Of one key: 4 heads, a score and a weighted value of 6 each, 2 FLOPs per multiply-add."""


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 32),  # causal: half of 64
        ({"window": 16}, 16),
        ({"window": 64}, 32),
        ({"chunk": 16}, 8),  # half of a chunk
        ({"chunk": 100}, 32),
        ({"causal": False}, 64),
    ],
)
def test_attention(changes: dict[str, Any], keys: int) -> None:
    assert layer(ATTENTION.model_copy(update=changes)) == PROJECTIONS + PER_KEY * keys


def test_output_gate_doubles_q_and_tied_values_have_no_matrix() -> None:
    gated = ATTENTION.model_copy(update={"output_gate": True})
    assert layer(gated) - layer(ATTENTION) == 2 * 24 * 8
    tied = ATTENTION.model_copy(update={"tied_kv": True})
    assert layer(ATTENTION) - layer(tied) == 2 * 12 * 8


def test_packed_documents_see_themselves() -> None:
    # Documents of 16 in samples of 64: 8 keys on average instead of 32.
    assert layer(ATTENTION, document=16) == PROJECTIONS + PER_KEY * 8
    assert layer(ATTENTION, document=1000) == layer(ATTENTION)


LATENT = LatentAttentionSpec(
    heads=4, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4
)
LATENT_MATRICES = 6 * 8 + 20 * 6 + 7 * 8 + 28 * 5 + 8 * 16


def test_latent_attention() -> None:
    assert layer(LATENT) == 2 * LATENT_MATRICES + 2 * 4 * (5 + 4) * 32


@pytest.mark.parametrize(("top_k", "keys"), [(16, 16), (64, 32), (100, 32)])
def test_sparse_attention_reads_the_keys_picked_and_scores_all(top_k: int, keys: int) -> None:
    sparse = SparseLatentAttentionSpec(latent=LATENT, index_heads=3, index_head_dim=2, top_k=top_k)
    indexer = 3 * 2 * 6 + 2 * 8 + 3 * 8
    # Multi-query form: keys of 5 + 2, values of 5, shared by 4 heads. Index: 3 heads of 2.
    attention = 2 * 4 * (7 + 5) * keys + 2 * 3 * 2 * 32
    assert layer(sparse) == 2 * (LATENT_MATRICES + indexer) + attention


def test_mamba() -> None:
    # in 32 x 8, conv 16 x 4, select (2 + 2*3) x 16, dt 16 x 2, out 8 x 16; the scan has 16 x 3
    # states of 5 FLOPs: decay 1, in 2, out 2.
    mamba = MambaSpec(inner=16, state=3, conv=4, dt_rank=2)
    matrices = 32 * 8 + 16 * 4 + 8 * 16 + 16 * 2 + 8 * 16
    assert layer(mamba) == 2 * matrices + 5 * 16 * 3
    # The recurrence costs the same however long the sample is.
    assert layer(mamba) == model_flops_per_token(model(mamba), 2 * SEQUENCE) / 3 - HEAD


def test_mamba2() -> None:
    # 4 heads of 6: inner 24; 2 groups of state 5: 24 + 2*2*5 = 44 channels; in 24 + 44 + 4 = 72.
    mamba = Mamba2Spec(heads=4, head_dim=6, state=5, groups=2, conv=4, chunk=16)
    assert layer(mamba) == 2 * (72 * 8 + 44 * 4 + 8 * 24) + 5 * 24 * 5
    other_chunk = mamba.model_copy(update={"chunk": 32})
    assert layer(mamba) == layer(other_chunk)


def test_gated_delta_net() -> None:
    # Keys 2 x 3 = 6, values 4 x 5 = 20: 32 channels, in 32 + 20 + 2*4 = 60; 4 states of 3 x 5, 7
    # FLOPs each: decay 1, recall, write and read 2.
    delta = GatedDeltaNetSpec(key_heads=2, value_heads=4, key_dim=3, value_dim=5, conv=4)
    assert layer(delta) == 2 * (60 * 8 + 32 * 4 + 8 * 20) + 7 * 4 * 3 * 5


def test_experts_count_as_often_as_a_token_meets_them() -> None:
    moe = MoeSpec(experts=6, top_k=2, intermediate=5, shared_intermediate=7, router_scales=True)
    assert layer(None, moe) == 2 * (6 * 8 + 2 * 3 * 5 * 8 + 3 * 7 * 8)
    assert layer(None, MlpSpec(intermediate=20, gated=True)) == 2 * 3 * 20 * 8


def test_experts_in_a_latent_width() -> None:
    # Down and up 4 x 8 each, router on the full width, two experts of 2 * 3*5*4.
    moe = MoeSpec(experts=6, top_k=2, intermediate=5, latent=4)
    assert layer(None, moe) == 2 * (2 * 4 * 8 + 6 * 8 + 2 * 3 * 5 * 4)


TOWER = VisionSpec(
    hidden=4,
    layers=3,
    block=BlockSpec(
        mixer=AttentionSpec(heads=2, kv_heads=2, head_dim=2, causal=False),
        feed_forward=MlpSpec(intermediate=10, gated=False),
    ),
    norm="layer",
    norm_bias=True,
    patch_inputs=12,
    patch_bias=True,
    positions=16,
    patches_per_token=4,
    projectors=(ProjectorSpec(inputs=16, widths=(16, HIDDEN), norm=4, count=2),),
)


def test_vision_tower_is_spread_over_the_tokens_of_a_sample() -> None:
    # 2 images of 5 tokens = 20 patches. A block: q, k, v, out 4*4*4, MLP 2*10*4, and 20 keys of
    # 2 heads x (2 + 2); patch embedding 4 x 12; two projectors of 16*16 + 16*8 per token.
    block = 2 * (4 * 16 + 80) + 2 * 2 * 4 * 20
    image = 20 * (3 * block + 2 * 4 * 12) + 5 * 2 * 2 * (16 * 16 + 16 * 8)
    with_tower = model(ATTENTION, vision=TOWER)
    plain = model_flops_per_token(model(ATTENTION), SEQUENCE)
    assert model_flops_per_token(with_tower, SEQUENCE) == plain
    shown = model_flops_per_token(with_tower, SEQUENCE, images=Images(2, 5))
    assert shown - plain == pytest.approx(3 * 2 * image / SEQUENCE)
