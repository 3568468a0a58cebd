"""Multi-token prediction: where software runs it, and what its projection leaves."""

from __future__ import annotations

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.request import Request
from planner.rules import mesh_rules
from planner.specs import JobSpec
from planner.stacks import fault


def request(stack: str, **job: object) -> Request:
    spec = JobSpec.model_validate(
        {"sequence_length": 4096, "global_batch": 256, "stack": stack} | job
    )
    return Request(read_model("deepseek-v3"), load_cluster("dgx-h100:16"), spec, load_stack(stack))


def broken(given: Request) -> list[str]:
    return [reason for reason, _ in mesh_rules(given) if "prediction" in reason]


def test_torchtitan_predicts_without_pipeline_and_context() -> None:
    assert len(broken(request("torchtitan"))) == 2
    assert broken(request("torchtitan", mtp=False)) == []
    assert broken(request("megatron-core")) == []


@pytest.mark.parametrize("degree", ["pp", "cp"])
def test_a_layout_that_torchtitan_refuses_is_refused(degree: str) -> None:
    zero = 2 if degree == "pp" else 3
    layout = {"tp": 8, degree: 2, "ep": 8, "microbatch_size": 1, "zero_stage": zero}
    with pytest.raises(InputError, match="no multi-token prediction"):
        evaluate(request("torchtitan"), layout)
    evaluate(request("torchtitan", mtp=False), layout)


def test_its_loss_is_not_in_chunks() -> None:
    found = fault(request("torchtitan", loss="chunked"))
    assert found is not None
    assert "multi-token prediction" in found.message
    assert fault(request("torchtitan", loss="chunked", mtp=False)) is None


def test_a_job_without_prediction_does_not_lack_it() -> None:
    old = "megatron-core-0.8"
    assert "multi-token prediction" in request(old).lacking
    assert "multi-token prediction" not in request(old, mtp=False).lacking
