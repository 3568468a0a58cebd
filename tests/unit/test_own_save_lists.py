"""Lists of ops of one's own whose outputs stay (torchtitan's ``SelectiveAC.get_save_ops``)."""

from __future__ import annotations

import pytest

from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.recompute import searched_policies
from planner.request import Request
from planner.studies.verify import verify

SELECTIVE = "custom:all_to_all+attention+odd_matmul+reduce_scatter"


def request(model: str = "mixtral-8x7b", **more: object) -> Request:
    asked = {"stack": "torchtitan", "sequence_length": 4096, "global_batch": 64}
    return read_request(model, "dgx-h100:4", None, asked | more)


def priced(mode: str) -> tuple[float, int]:
    """Seconds of a step and bytes kept for a microbatch."""
    layout = {"dp_shard": 32, "ep": 8, "zero_stage": 3, "recompute": mode}
    found = evaluate(request(), layout).prediction
    return found.step_time_s, sum(
        term.bytes or 0 for term in found.stages[0].memory if term.name == "activations"
    )


def test_each_op_adds_its_outputs_and_spares_its_time_whatever_else_stays() -> None:
    lists = {
        name: priced(f"custom:{name}")
        for name in (
            "attention", "attention+odd_matmul", "attention+grouped_matmul",
            "attention+grouped_matmul+odd_matmul",
        )
    }  # fmt: skip
    alone, odd, grouped, both = lists.values()
    assert both[1] - grouped[1] == odd[1] - alone[1] > 0
    # Three products of 14,336 and one of 4,096 features: 8,192 tokens arrive per rank at least.
    assert grouped[1] - alone[1] >= 32 * 2 * 8192 * (2 * 14_336 + 4096)
    assert both[0] < grouped[0] < odd[0] < alone[0] < priced("full")[0]
    assert priced("none")[0] < both[0]


def test_the_stack_s_own_list_is_its_selective_mode() -> None:
    assert priced(SELECTIVE) == priced("selective")


def test_lists_run_where_a_job_asks_for_one() -> None:
    asked = request("llama-3.2-1b", constraints={"recompute": "custom:attention"})
    best = plan(asked)
    assert {part.mode for s in best.layout.stages for part in s.recompute} <= {"custom:attention"}
    assert verify(best) == []
    free = request("llama-3.2-1b")
    found = searched_policies(free.stack, free.job, free.workload.kinds.values())
    assert [policy.name for policy in found] == ["selective", "full"]
    with pytest.raises(InputError, match="torchtitan keeps any of attention, reduce_scatter"):
        evaluate(free, {"dp_shard": 32, "recompute": "custom:attention+softmax"})
