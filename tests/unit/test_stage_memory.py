"""What the prediction says that each rank holds."""

from __future__ import annotations

import pytest

from planner.pipeline import evaluate, read_request
from planner.predict import run_class


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_ranks_hold_what_lies_on_them(schedule: str) -> None:
    """Llama 3.1 8B's embedding and head have as many parameters, on both ends of the model: on one
    rank of a V and on two of a pipeline that goes round."""
    job = {"stack": "torchtitan", "sequence_length": 4096, "global_batch": 32}
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    lighter = [(0, 3), (3, 8), (8, 13), (13, 17), (17, 21), (21, 26), (26, 30), (30, 32)]
    homes = [0, 1, 2, 3, 3, 2, 1, 0] if schedule == "zbv" else [0, 1, 2, 3] * 2
    spans = list(zip(lighter, homes, strict=True))
    stages = [{"chunks": [{"layers": span} for span, home in spans if home == r]} for r in range(4)]
    asked = {"pp": 4, "vpp": 2, "schedule": schedule, "recompute": "none", "stages": stages}
    result = evaluate(request, asked)
    found = result.prediction.stages
    held = [sum(last - first for (first, last), home in spans if home == r) for r in range(4)]
    end, norm, layer = 128_256 * 4096, 4096, 218_112_000
    ends = {0: 2 * end + norm} if schedule == "zbv" else {0: end, 3: end + norm}
    assert [stage.layers for stage in found] == held
    assert [stage.parameters for stage in found] == [
        layers * layer + ends.get(rank, 0) for rank, layers in enumerate(held)
    ]
    for stage in found:
        assert sum(term.bytes for term in stage.memory) == stage.peak_bytes
    per_layer = [
        rank.work_ns / layers for rank, layers in zip(result.priced.ranks, held, strict=True)
    ]
    assert run_class(result.priced, request).layer_s == pytest.approx(max(per_layer) / 1e9)
