"""Lists of named outputs beside what JAX keeps and runs again (``benchmarks/memory/remat.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.layout import RecomputePolicy
from cost_models.memory import Activations, activation_bytes
from cost_models.named_outputs import spared, unneeded
from cost_models.ops import MatMul
from planner.pipeline import read_request

COUNTED = json.loads(
    (Path(__file__).parent / "data" / "remat_residuals.json").read_text(encoding="utf-8")
)
SHAPE = COUNTED["layer"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> LayerKind:
    """The layer that was counted."""
    config = {
        "model_type": "llama", "num_hidden_layers": 3, "vocab_size": 1024, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False,
        **{key: value for key, value in SHAPE.items() if key != "tokens"},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    asked = {"stack": "maxtext-gpu", "sequence_length": SHAPE["tokens"], "global_batch": 8}
    (kind,) = read_request(str(path), "dgx-h100:1", None, asked).workload.kinds.values()
    return kind


def shard() -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(SHAPE["tokens"], one, one, one, one, one, np.zeros(1, dtype=bool), one)


def _name(row: dict[str, Any]) -> str:
    return "+".join((*row["kept"], *(f"{name}@host" for name in row["hosted"]))) or "full"


@pytest.mark.parametrize("row", COUNTED["lists"], ids=_name)
def test_a_list_keeps_and_runs_again_what_jax_does(layer: LayerKind, row: dict[str, Any]) -> None:
    hosted = frozenset(row["hosted"])
    keeps = frozenset(row["kept"]) | hosted
    policy = RecomputePolicy("counted", keeps=keeps, offloads=hosted, needed_only=True)
    kept, _ = activation_bytes(layer, shard(), policy)
    assert int(kept[0]) == row["bytes"]
    assert int(Activations(layer, shard()).listed(policy, hosted)[0]) == row["host_bytes"]
    ops, flops = layer.ops(shard()), 0.0
    for op in ops:
        if isinstance(op, MatMul) and op.name not in unneeded(ops):
            stays = sum(
                float(np.asarray(share).ravel()[0])
                for names, share in spared(op, ops)
                if names <= keeps
            )
            flops += float(np.asarray(2 * op.m * op.n * op.k).ravel()[0]) * (1 - stays)
    assert round(flops) == row["product_flops_again"]
