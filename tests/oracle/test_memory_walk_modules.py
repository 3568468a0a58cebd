"""Every category of a device's memory against a naive walk over the modules on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hardware_profiles.loader import load_cluster
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    LayerRun,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.pipeline import evaluate
from planner.request import Request
from planner.specs import JobSpec
from tests.oracle.memory_walk import Case
from tests.oracle.memory_walk_peak import on_rank


def model(name: str, layers: dict[str, tuple[BlockSpec, int]], **more: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "hidden": 1024, "vocab": 32_000, "tied_embeddings": False, "norm": "rms",
        "norm_bias": False, "family": "llama",
    }  # fmt: skip
    return ModelSpec(
        name=name, source="test", **(fields | more),
        blocks={name: block for name, (block, _) in layers.items()},
        layers=tuple(LayerRun(block=name, count=n) for name, (_, n) in layers.items()),
    )  # fmt: skip


GQA = AttentionSpec(heads=16, kv_heads=4, head_dim=64)
SWIGLU = MlpSpec(intermediate=2816, gated=True)
LATENT = LatentAttentionSpec(
    heads=8, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64,
)  # fmt: skip
GPT = model(
    "gpt",
    {"dense": (BlockSpec(
        mixer=AttentionSpec(heads=16, kv_heads=16, head_dim=64, qkv_bias=True, out_bias=True),
        feed_forward=MlpSpec(intermediate=4096, gated=False, bias=True, activation="gelu"),
    ), 8)},
    norm="layer", norm_bias=True, position_embeddings=1024, vocab=50_257, family="gpt2",
)  # fmt: skip
LLAMA = model("llama", {"dense": (BlockSpec(mixer=GQA, feed_forward=SWIGLU), 8)})
MIXTRAL = model(
    "mixtral",
    {"sparse": (BlockSpec(
        mixer=GQA, feed_forward=MoeSpec(experts=8, top_k=2, intermediate=1408)
    ), 8)},
    family="mixtral", vocab=2048,
)  # fmt: skip
DEEPSEEK = model(
    "deepseek",
    {
        "dense": (BlockSpec(mixer=LATENT, feed_forward=SWIGLU), 1),
        "sparse": (BlockSpec(mixer=LATENT, feed_forward=MoeSpec(
            experts=16, top_k=4, intermediate=512, shared_intermediate=1024
        )), 7),
    },
    family="deepseek_v3", vocab=2048,
)  # fmt: skip
PREDICTING = DEEPSEEK.model_copy(update={"mtp": (LayerRun(block="sparse", count=1),)})
TWICE = LLAMA.model_copy(update={"mtp": (LayerRun(block="dense", count=2),)})
BOTH = TWICE.model_copy(update={"tied_embeddings": True})
TIED = LLAMA.model_copy(update={"tied_embeddings": True, "hidden": 1000})
WIDE = model("wide", {"dense": (BlockSpec(
    mixer=GQA, feed_forward=MlpSpec(intermediate=16_384, gated=True)
), 4)}, vocab=500)  # fmt: skip

MEGATRON, TITAN, EAGER = "megatron-core", "torchtitan", "torchtitan-decomposed"
TP = {"tp": 2, "sp": True, "dp": 4, "zero": 1}
PIPE = {"pp": 2, "dp": 4, "zero": 1}
CHUNKS = {"pp": 2, "vpp": 2, "dp": 4, "zero": 1}
EP = {"ep": 4, "dp": 8, "zero": 1}


def megatron(name: ModelSpec, *modes: str, **layout: Any) -> list[Case]:
    base = Case(name, MEGATRON, **{"sequence": 1024, **layout})
    return [replace(base, recompute=mode) for mode in modes]


def titan(name: ModelSpec, stack: str = TITAN, **layout: Any) -> list[Case]:
    base = Case(name, stack, **{"sequence": 1024, **layout})
    return [replace(base, recompute=mode) for mode in ("none", "selective", "full")]


DENSE = ("none", "selective", "mlp", "core_attn+mlp", "full")
SPARSE = ("none", "selective", "moe_act", "layernorm", "moe", "core_attn+layernorm+moe_act", "full")
LATENTS = (
    "none", "mla_up_proj", "layernorm+mla_up_proj+moe_act", "layernorm+mla_up_proj+mlp+moe_act",
    "mlp+moe", "full",
)  # fmt: skip
CASES = [
    *megatron(GPT, *DENSE, dp=8, dropout=True),
    *megatron(GPT, *DENSE, **TP, dropout=True),
    *megatron(GPT, "none", "full", **PIPE, dropout=True, samples=2),
    *megatron(GPT.model_copy(update={"tied_embeddings": True}), "none", dp=8,
              zero=1),
    *megatron(LLAMA, *DENSE, dp=8, zero=1),
    *megatron(LLAMA, *DENSE, **TP, samples=2),
    *megatron(LLAMA, "none", "selective", tp=4, sp=True, dp=2),
    *megatron(LLAMA, "none", "selective", tp=2, dp=4),
    *megatron(LLAMA, "none", "full", dp=24, zero=1),
    *megatron(WIDE, "none", "core_attn+mlp", dp=24, zero=1),
    *megatron(LLAMA, "none", "full", tp=2, sp=True, pp=4, dp=3, zero=1),
    *megatron(LLAMA, "none", "selective", "full", **PIPE),
    *megatron(LLAMA, "none", "mlp", "full", **CHUNKS),
    *megatron(LLAMA, "none", "full", pp=4, dp=2, microbatches=8),
    *megatron(LLAMA, "none", cp=2, dp=4, zero=1),
    *megatron(GPT, "none", "full", cp=16, dp=1, sequence=4096),
    *megatron(DEEPSEEK, "none", "moe", "full", cp=16, dp=1, sequence=8192),
    *megatron(LLAMA, "none", "selective", cp=4, dp=2, zero=1, cp_kind="all_gather"),
    *megatron(LLAMA, "none", cp=4, dp=2, zero=1, cp_kind="all_gather", precision="fp8"),
    *megatron(LLAMA, "none", cp=2, dp=4, zero=1, cp_kind="a2a"),
    *megatron(LLAMA, "none", "mlp", "full", dp=8, zero=1, precision="fp8"),
    *megatron(MIXTRAL, *SPARSE, **EP),
    *megatron(MIXTRAL, *SPARSE, **TP, ep=2),
    *megatron(MIXTRAL, *SPARSE, **TP, ep=4, etp=2),
    *megatron(MIXTRAL, *SPARSE, **TP, ep=2, etp=4),
    *megatron(MIXTRAL, "none", "moe", "full", **CHUNKS, ep=2),
    *megatron(MIXTRAL, "none", "moe", **EP, precision="fp8"),
    *megatron(DEEPSEEK, *LATENTS, **EP),
    *megatron(DEEPSEEK, *LATENTS, **TP, ep=8),
    *megatron(DEEPSEEK, "none", "mlp+moe", "full", **PIPE, ep=4),
    *megatron(DEEPSEEK, "none", "full", cp=2, dp=4, zero=1, ep=2),
    *(case for stack in (TITAN, EAGER) for case in titan(LLAMA, stack, dp=8, zero=3)),
    *(case for stack in (TITAN, EAGER) for case in titan(LLAMA, stack, dp=8, zero=2)),
    *(case for stack in (TITAN, EAGER)
      for case in titan(LLAMA, stack, dp=4, tp=2, sp=True, zero=3)),
    *megatron(PREDICTING, "none", "mlp+moe", "full", **PIPE, ep=4),
    *megatron(PREDICTING, "none", **EP),
    *megatron(PREDICTING, "none", **EP, precision="fp8"),
    *megatron(TWICE, "none", "full", tp=2, sp=True, pp=2, dp=6, zero=1),
    *megatron(TWICE, "none", **CHUNKS),
    *megatron(PREDICTING, "none", **TP, ep=8),
    *megatron(TWICE, "none", dp=8, zero=1, sequence=128),
    *megatron(TWICE, "none", pp=4, dp=2),
    *megatron(BOTH, "none", **PIPE),
    *megatron(BOTH, "none", **TP),
    *megatron(TIED, "none", pp=2, dp=12, zero=1),
    *titan(LLAMA, dp=8, zero=3, loss="chunked"),
    *titan(LLAMA, dp=8, zero=0),
    *titan(LLAMA, dp=24, zero=3),
    *titan(LLAMA, dp=4, cp=2, cp_kind="all_gather", zero=3),
    *titan(LLAMA, dp=4, pp=2, zero=2),
    *titan(LLAMA, dp=4, pp=2, zero=2, loss="chunked"),
    *titan(LLAMA, dp=4, pp=2, vpp=2, zero=2),
    *titan(MIXTRAL, dp=8, ep=4, zero=3),
    *titan(MIXTRAL, dp=8, ep=2, zero=2),
    *titan(MIXTRAL, dp=4, pp=2, ep=4, zero=2),
    *titan(MIXTRAL, dp=4, tp=2, sp=True, ep=2, zero=3),
    *titan(MIXTRAL, dp=24, ep=2, zero=3),
    *titan(WIDE, dp=8, zero=3),
    *titan(WIDE, dp=8, zero=0, sequence=256),
    *(case for zero in (0, 2, 3) for case in titan(LLAMA, dp=8, zero=zero, microbatches=1)),
    *titan(WIDE, dp=8, zero=3, microbatches=1, loss="chunked"),
    *titan(LLAMA, dp=8, zero=0, microbatches=1, sequence=64),
    *megatron(LLAMA, "none", "full", dp=8, zero=1, microbatches=1),
    *megatron(DEEPSEEK, "none", "mla_up_proj", **EP, precision="fp8"),
    *titan(DEEPSEEK, dp=8, ep=8, zero=3),
    *titan(DEEPSEEK, dp=4, tp=2, sp=True, ep=8, zero=3),
    *titan(DEEPSEEK, EAGER, dp=8, ep=8, zero=3),
]  # fmt: skip


PREDICTED = [
    *titan(TWICE, dp=8, zero=3),
    *titan(TWICE, dp=4, tp=2, sp=True, zero=3),
    *titan(TWICE, dp=4, tp=2, zero=3),
]  # fmt: skip


def name_of(case: Case) -> str:
    plain = Case(case.model, case.stack_name, case.sequence)
    told = [
        f"{key}{getattr(case, key)}" for key in Case.__dataclass_fields__
        if key != "model" and getattr(case, key) != getattr(plain, key)
    ]  # fmt: skip
    return "-".join([case.model.name, case.stack_name, *told])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_category_is_what_a_walk_over_the_modules_gives(case: Case) -> None:
    for terms, expected in stages_of(case):
        assert {name: terms.get(name, 0) for name in expected} == expected
        assert terms.get("kept_outputs", 0) == 0


@pytest.mark.parametrize("case", PREDICTED, ids=name_of)
def test_torchtitan_holds_what_its_prediction_modules_do(case: Case) -> None:
    """A module is an FSDP unit of its own there; prices and walk gather it with the head, and
    prices count the wait of the lookup's gradient at more moments: no less is short-lived."""
    for terms, expected in stages_of(case):
        assert terms["working"] >= expected.pop("working")
        assert {name: terms.get(name, 0) for name in expected} == expected


def stages_of(case: Case) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Categories of each rank, as ``evaluate`` and as the walk have them."""
    job = JobSpec(
        sequence_length=case.sequence, global_batch=case.dp * case.samples * case.microbatches,
        stack=case.stack_name, precision=case.precision, dropout=case.dropout, loss=case.loss,
    )  # fmt: skip
    nodes = -(-case.dp * case.cp * case.tp * case.pp // 8)
    request = Request(case.model, load_cluster(f"dgx-h100:{nodes}"), job, case.stack)
    layout = {
        "tp": case.tp, "sequence_parallel": case.sp, "cp": case.cp, "cp_kind": case.cp_kind,
        "pp": case.pp, "vpp": case.vpp, "ep": case.ep, "etp": case.etp,
        "microbatch_size": case.samples,
        "zero_stage": case.zero,
        "recompute": case.recompute,
        "schedule": "interleaved" if case.vpp > 1 else "1f1b",
    }  # fmt: skip
    if case.cp == 1:
        del layout["cp_kind"]
    plan = evaluate(request, layout)
    for rank, stage in enumerate(plan.prediction.stages):
        chunks = [chunk.layers for chunk in plan.layout.stages[rank].chunks]
        expected = on_rank(case, rank, chunks)
        terms = {term.name: term.bytes or 0 for term in stage.memory}
        terms["parameters"] = stage.parameters
        yield terms, expected


def test_the_walk_shares_no_code_with_what_it_checks() -> None:
    for path in Path(__file__).parent.glob("memory_walk*.py"):
        found = re.findall(r"^(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
        assert found
        for name in found:
            assert not name.startswith(("cost_models", "planner.blocks")), path.name
