"""MLPs that run piece by piece of the sequence under full recomputation, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.interconnect import collective_time_s
from cost_models.memory import activation_bytes
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.recompute import named_policy
from planner.request import Request
from planner.studies.communication import communication
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


def test_pieces_without_recomputation_free_the_inner_tensors_alone() -> None:
    """All else stays; one piece of them works at a time, and the MLP runs forward once more."""
    one = np.ones(1, dtype=np.int64)
    place = Shard(LENGTH, one, one, 8 * one, one, one, np.zeros(1, dtype=bool), one)
    asked = request()
    (kind,) = asked.workload.kinds.values()
    inner = sum(int(t.bytes[0]) for t in kind.saved(place) if "mlp" in t.modules)
    kept, working = activation_bytes(kind, place, None)
    kept_tiled, working_tiled = activation_bytes(
        kind, place, named_policy("tiled_mlp", asked.stack)
    )
    assert int(kept[0] - kept_tiled[0]) == inner
    assert int(working_tiled[0] - working[0]) == -(-inner // (LENGTH // 8 // WIDTH))
    more = evaluated("tiled_mlp").prediction.step_time_s - evaluated("none").prediction.step_time_s
    again = evaluated("tiled").prediction.step_time_s - evaluated("full").prediction.step_time_s
    assert more == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize(
    ("mode", "other", "runs"), [("tiled", "full", 2), ("tiled_mlp", "none", 1)]
)
def test_each_piece_is_reduced_by_itself_under_tensor_parallelism(
    mode: str, other: str, runs: int
) -> None:
    """32,768 tokens of 4,096 are 8 pieces: a reduction of the output of each whenever they run
    forward, and one for gate and one for up of each in the backward."""
    job = {"stack": "deepspeed-autotp", "sequence_length": 32_768, "global_batch": 8}
    asked = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    found, plain = (
        evaluate(asked, {"tp": 8, "zero_stage": 0, "recompute": m}) for m in (mode, other)
    )
    calls, less = (
        {
            str(call.phase): (call.count, call.bytes)
            for call in communication(asked, each).stages[0]
            if (call.group, call.kind) == ("tp", "all_reduce")
        }
        for each in (found, plain)
    )
    size, passes = 32_768 * WIDTH * 2, LAYERS * 8
    assert calls["forward"] == (less["forward"][0] + 7 * passes, less["forward"][1])
    assert calls["backward"] == (less["backward"][0] + 2 * 7 * passes, less["backward"][1])
    before = less.get("recompute", (0, 0))
    # Where the layer runs again one of its reductions was the whole MLP's.
    added = 8 * runs - (mode == "tiled")
    assert calls["recompute"] == (before[0] + added * passes, before[1] + size * passes)
    cut = collective_time_s(
        asked.machine.fabric, "all_reduce", np.array([size / 8, float(size)]),
        size=np.array([8, 8]), stride=np.array([1, 1]),
    )  # fmt: skip
    longer = float(8 * cut[0] - cut[1])
    assert longer > 0
    forwards = passes * float(cut[1])
    more = found.prediction.step_time_s - plain.prediction.step_time_s
    assert more > forwards + passes * (runs + 3) * longer


@pytest.mark.parametrize(
    ("stack", "model", "cluster"),
    [
        ("deepspeed-autotp", "llama-3.1-8b", "dgx-h100:1"),
        ("deepspeed-autoep", "deepseek-v2-lite", "dgx-h100:1"),
    ],
)
def test_plans_with_mlps_in_pieces_verify(stack: str, model: str, cluster: str) -> None:
    job = {"stack": stack, "sequence_length": 16_384, "global_batch": 8,
           "constraints": {"recompute": "tiled_mlp"}}  # fmt: skip
    found = plan(read_request(model, cluster, None, job))
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {"tiled_mlp"}
    assert verify(found) == []
