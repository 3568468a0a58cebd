"""Pipelines of MaxText's own decoders (``benchmarks/memory/maxtext_pipeline.py``): what its remat
policies keep of a layer, and what is kept without any (``everything_saveable``)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.compute import memory_bound_bandwidth_bytes_per_s
from cost_models.configs import price_configs
from cost_models.cp_kinds import cp_kind_code
from cost_models.graph import LayerKind, Shard
from cost_models.memory import Activations, activation_bytes
from cost_models.recompute import mode_rows
from hardware_profiles.loader import load_stack
from hardware_profiles.stack_words import EVERYTHING
from planner.layouts import configs_of
from planner.pipeline import evaluate, read_request
from planner.recompute import named_policy

FOUND = json.loads(
    (Path(__file__).parent / "data" / "maxtext_pipelines.json").read_text(encoding="utf-8")
)
COUNTED: dict[tuple[str, str, int], dict[str, Any]] = {
    (row["model"], row["policy"], row["repeats"]): row for row in FOUND["counted"]
}
TOKENS = FOUND["tokens"]
STACKED: list[dict[str, Any]] = [
    row
    for part in ("stacked", "stacked_transposed", "stacked_fp32", "stacked_8_bits")
    for row in FOUND[part]
    if row["policy"] == "none"
]
CHANGES = {"tp", "cp", "ep", "fsdp", "transposed", "dropout"}
FIGURES = {"policy", "stacked", "temporaries", "flops", "bytes_accessed"}
SAME = {
    "llama3.1-8b": "llama-3.1-8b", "qwen3-8b": "qwen3-8b", "gpt3-175b": "gpt-3-175b",
    "mixtral-8x7b": "mixtral-8x7b", "qwen3-30b-a3b": "qwen3-30b-a3b",
}  # fmt: skip
"""Models whose layers MaxText 0.1.0 has one by one, with the names that the stack's version has."""


NARROW = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "head_dim": 128,
    "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 1024,
    "max_position_embeddings": 4096,
}  # fmt: skip
LATENT = {
    "hidden_size": 1024, "intermediate_size": 18432, "num_attention_heads": 128,
    "num_hidden_layers": 7, "first_k_dense_replace": 3, "vocab_size": 1024,
    "moe_intermediate_size": 2048, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {"model_type": "llama", **NARROW},
    "qwen3-8b": {"model_type": "qwen3", **NARROW},
    "mixtral-8x7b": {
        "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, **NARROW,
    },
    "deepseek3-671b": {"model_type": "deepseek_v3", **LATENT},
    "gemma3-12b": {"model_type": "gemma3_text", **NARROW, "head_dim": 256},
    "gpt3-6b": {
        "model_type": "gpt2", "n_embd": 3072, "n_head": 12, "n_layer": 4, "vocab_size": 1024,
        "n_positions": 2048, "activation_function": "gelu_new", "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip
"""The layers that were compiled, as ``maxtext_pipeline.py`` narrows them."""


WHOLE_HEADS = {**CONFIGS["gpt3-6b"], "n_embd": 1024, "n_head": 8}
"""GPT-3's layer where it is quantised."""
QUANTISED = {
    "int8": ("int8", "dgx-a100:1"), "fp8": ("fp8", "dgx-h100:1"),
    "nanoo_fp8": ("fp8", "mi300x-8:1"),
}  # fmt: skip
"""Of MaxText's quantizations, the precision of a job, and devices that have it."""


def narrow_layer(row: dict[str, Any], folder: Path) -> LayerKind:
    """The layer of a pipeline, on :data:`CONFIGS`: DeepSeek's dense ones are outside."""
    path, config = folder / f"{row['model']}.json", CONFIGS[row["model"]]
    precision, cluster = "fp32" if "dtype" in row else "bf16", "dgx-h100:1"
    if "quantization" in row:
        precision, cluster = QUANTISED[row["quantization"]]
        config = WHOLE_HEADS if row["model"] == "gpt3-6b" else config
    path.write_text(json.dumps(config), encoding="utf-8")
    asked = {
        "stack": "maxtext-gpu", "sequence_length": FOUND["stacked_tokens"], "global_batch": 8,
        "precision": precision, "dropout": "dropout" in row, "mtp": False,
    }  # fmt: skip
    return [*read_request(str(path), cluster, None, asked).workload.kinds.values()][-1]


def scores(row: dict[str, Any]) -> int:
    """Bytes in 16 bits that ``dot_product``, which quantised layers are compiled with for GPUs,
    keeps beyond a kernel: three matrices of eight heads and their mask, three numbers of a row, of
    which the kernel has one in fp32."""
    if not row.get("devices", "").startswith("h100"):
        return 0
    tokens: int = FOUND["stacked_tokens"]
    return 8 // row.get("tp", 1) * tokens * (7 * tokens + 3 * 2 - 4)


def split_over(row: dict[str, Any]) -> Shard:
    degree = {name: np.array([row.get(name, 1)]) for name in ("tp", "cp", "ep")}
    one, transposed = np.ones(1, dtype=np.int64), row.get("transposed", 1)
    gathers, tp = np.array([cp_kind_code("all_gather")]), degree["tp"] * transposed
    return Shard(
        FOUND["stacked_tokens"], one, tp, degree["cp"], degree["ep"], tp, one.astype(bool),
        gathers, transposed=transposed, piped=one > 0,
    )  # fmt: skip


def kept_without_a_policy(kind: LayerKind, shard: Shard) -> int:
    policy = named_policy(EVERYTHING, load_stack("maxtext-gpu"))
    return int(activation_bytes(kind, shard, policy)[0][0])


@pytest.mark.parametrize(
    "row", STACKED, ids=lambda row: "-".join(str(row[key]) for key in row if key not in FIGURES)
)
def test_everything_is_what_the_compiled_loop_stacks(row: dict[str, Any], tmp_path: Path) -> None:
    """But for segment ids and some numbers of a token's routing, and Llama 3.1's sines and cosines:
    kept in fp32, 512 bytes more of a token, by bf16's, and twice, 1,024 bytes more, in loops for
    processors, which fp32's with repeats are; a mixture's are shared out over tensor_transpose."""
    kind, shard = narrow_layer(row, tmp_path), split_over(row)
    kept = kept_without_a_policy(kind, shard)
    if row["repeats"] > 1:
        size = kind.pass_weight_bytes / kind.element_bytes
        kept += int(sum(Activations(kind, shard).weights)[0] * size)
        # Histories of seven weights and of the gradients of their products, by repeat too.
        kept += 2 * 7 * 4 * 1024 * (row.get("quantization") == "fp8")
    tokens = FOUND["stacked_tokens"] // row.get("cp", 1)
    rotary = 0
    if row["model"] == "llama3.1-8b":
        rotary = (1024 * (row["repeats"] - 1) if "dtype" in row else 512) * tokens
    elif "transposed" in row:
        rotary = -256 * tokens
    assert abs(row["stacked"] - scores(row) - kept - rotary) <= 16 * FOUND["stacked_tokens"]


@pytest.mark.parametrize("model", SAME)
def test_everything_of_whole_layers_is_what_they_hand_on(model: str) -> None:
    """The compiler keeps one copy of what queries and keys share, so the count is no less; release
    0.1.0 pads rows of experts besides where the compiler multiplies them without a kernel."""
    one = np.ones(1, dtype=np.int64)
    shard = Shard(TOKENS, one, one, one, one, one, np.zeros(1, dtype=bool), one)
    row = COUNTED[model, "none", 1]
    handed = row["bytes_per_token"] * TOKENS + row["other_bytes"]
    kept = kept_without_a_policy(layer(model), shard)
    assert kept == pytest.approx(handed, rel=0.13 if "mixtral" in model or "a3b" in model else 6e-3)


@cache
def layer(model: str) -> LayerKind:
    asked = {
        "stack": "maxtext-gpu", "sequence_length": TOKENS, "global_batch": 8, "dropout": False,
    }  # fmt: skip
    (kind,) = read_request(SAME[model], "dgx-h100:1", None, asked).workload.kinds.values()
    return kind


@pytest.mark.parametrize("model", SAME)
def test_policies_keep_what_maxtext_keeps(model: str) -> None:
    one, stack = np.ones(1, dtype=np.int64), load_stack("maxtext-gpu")
    shard = Shard(TOKENS, one, one, one, one, one, np.zeros(1, dtype=bool), one)
    for mode in ("full", "minimal"):
        kept, _ = activation_bytes(layer(model), shard, named_policy(mode, stack))
        assert int(kept[0]) == COUNTED[model, mode, 1]["bytes_per_token"] * TOKENS


@pytest.mark.parametrize("model", SAME)
def test_without_a_policy_repeats_keep_casts_of_the_weights(model: str) -> None:
    beyond = COUNTED[model, "none", 2]["other_bytes"] - COUNTED[model, "none", 1]["other_bytes"]
    weights = sum(2 * weight.elements for weight in layer(model).weights)
    assert beyond == pytest.approx(weights, rel=1e-3)


def test_without_a_policy_layers_keep_several_times_what_a_list_does() -> None:
    models = {model for model, _, _ in COUNTED}
    times = {
        model: COUNTED[model, "none", 1]["bytes_per_token"]
        / COUNTED[model, "minimal", 1]["bytes_per_token"]
        for model in models
    }
    assert 2.7 < min(times.values()) < 2.8
    assert 5.0 < max(times.values()) < 5.1


def test_the_compiler_keeps_it_and_spares_no_products() -> None:
    """Temporaries grow by what the loop hands on, seven iterations of it."""
    none, listed = FOUND["compiled"]["none"], FOUND["compiled"]["minimal_with_context"]
    tokens, iterations = FOUND["compiled_tokens"], FOUND["iterations"]
    handed = (none["bytes_per_token"] - listed["bytes_per_token"]) * tokens * iterations
    assert none["temporaries"] - listed["temporaries"] == pytest.approx(handed, rel=0.06)
    assert none["flops"] == pytest.approx(listed["flops"], rel=1e-3)
    assert none["bytes_accessed"] > 1.05 * listed["bytes_accessed"]


def test_without_a_policy_no_product_runs_again() -> None:
    """A list of outputs runs those products again whose results norms read: queries and keys."""
    rows = {(r["model"], r["policy"]): r for r in FOUND["stacked"] if not r.keys() & CHANGES}
    again = {
        model: rows[model, "minimal_with_context"]["flops"] - rows[model, "none"]["flops"]
        for model in ("llama3.1-8b", "qwen3-8b")
    }
    assert 0 < again["llama3.1-8b"] < 1e-3 * rows["llama3.1-8b", "none"]["flops"]
    heads = NARROW["num_attention_heads"] + NARROW["num_key_value_heads"]
    each = 2 * FOUND["stacked_tokens"] * NARROW["hidden_size"] * NARROW["head_dim"]
    assert again["qwen3-8b"] - again["llama3.1-8b"] == pytest.approx(heads * each, rel=0.05)


def test_bytes_that_move_are_priced_as_the_compiler_counts_them() -> None:
    """What is kept is written and read; a list reads the inputs of what it runs again. Release
    0.1.0's compiled loop moves more: twice the difference."""
    none, listed = (FOUND["compiled_0.2.0"][m] for m in ("none", "minimal_with_context"))
    tokens = FOUND["compiled_tokens"]
    counted = (none["bytes_accessed"] - listed["bytes_accessed"]) / tokens
    asked = {
        "stack": "maxtext-gpu",
        "sequence_length": tokens,
        "global_batch": 32,
    }
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, asked)
    layout = evaluate(request, {"pp": 4, "schedule": "gpipe", "recompute": "full"}).layout
    priced = price_configs(request.workload, request.machine, configs_of(layout))
    rows, table = mode_rows(priced.policies), priced.kinds[0][:, 0]
    longer = table[rows[EVERYTHING].extra] - table[rows["minimal_with_context"].extra]
    rate = memory_bound_bandwidth_bytes_per_s(request.machine.device)
    assert longer * 1e-9 * rate / tokens == pytest.approx(counted, rel=0.15)
