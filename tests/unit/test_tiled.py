"""MLPs that run piece by piece of the sequence under full recomputation, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.memory import activation_bytes
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.recompute import named_policy
from planner.request import Request
from planner.studies.verify import verify

LENGTH, WIDTH, INNER, LAYERS = 131_072, 4096, 14_336, 32


def request(**more: object) -> Request:
    asked = {"stack": "deepspeed-hf", "sequence_length": LENGTH, "global_batch": 8}
    return read_request("llama-3.1-8b", "dgx-h100:8", None, asked | more)


def evaluated(mode: str) -> EvaluatedLayout:
    layout = {"cp": 8, "dp_shard": 8, "zero_stage": 3, "recompute": mode}
    return evaluate(request(), layout)


@pytest.mark.parametrize("cp", [8, 2, 32])
def test_one_piece_of_the_inner_tensors_is_there_at_a_time(cp: int) -> None:
    """A rank's tokens in pieces of at most 4,096, of what the MLP's module saves."""
    one = np.ones(1, dtype=np.int64)
    place = Shard(LENGTH, one, one, cp * one, one, one, np.zeros(1, dtype=bool), one)
    asked = request()
    (kind,) = asked.workload.kinds.values()
    inner = sum(int(t.bytes[0]) for t in kind.saved(place) if "mlp" in t.modules)
    tokens = LENGTH // cp
    assert inner >= 2 * tokens * INNER * 2
    pieces = -(-tokens // WIDTH)
    sizes = [activation_bytes(kind, place, named_policy(m, asked.stack)) for m in ("full", "tiled")]
    (kept, working), (kept_tiled, working_tiled) = sizes
    assert int(kept[0]) == int(kept_tiled[0]) == tokens * WIDTH * 2
    assert int(working[0] - working_tiled[0]) == inner - -(-inner // pieces)


def test_the_mlp_runs_forward_three_times() -> None:
    """Once in the forward, once when the layer runs again, once for the backward of its pieces."""
    more = evaluated("tiled").prediction.step_time_s - evaluated("full").prediction.step_time_s
    flops = LAYERS * 3 * 2 * (LENGTH // 8) * WIDTH * INNER
    assert flops / 989e12 < more < 2 * flops / 989e12


def test_the_search_takes_pieces_where_nothing_else_fits() -> None:
    asked = request(sequence_length=2**20, constraints={"fix": {"cp": 8}})
    found = plan(asked)
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {"tiled"}
    assert verify(found) == []


def test_models_without_dense_mlps_have_no_pieces() -> None:
    asked = {"stack": "deepspeed-hf", "sequence_length": 4096, "global_batch": 64}
    found = read_request("mixtral-8x7b", "dgx-h100:8", None, asked)
    assert "tiled" not in {policy.name for policy in found.workload.policies}
