"""What Composer's activation_cpu_offload sends to the host, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from planner.certify import verify
from planner.errors import InputError
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.request import Request

MODEL, LAYERS, HIDDEN, WIDTH = "gpt3-6.7b", 32, 4096, 16_384
TOKENS = 2 * 2048


def request(model: str = MODEL, **job: Any) -> Request:
    asked = {"stack": "llm-foundry", "sequence_length": 2048, "global_batch": 16}
    return read_request(model, "dgx-a100:1", None, asked | job)


def run(mode: str, **layout: Any) -> EvaluatedLayout:
    chosen = {"recompute": mode, "microbatch_size": 2, "zero_stage": 3} | layout
    return evaluate(request(global_batch=8 * chosen["microbatch_size"]), chosen)


def test_inputs_of_layers_leave_under_full_recomputation() -> None:
    """Of 32 layers, 2 x 2,048 tokens of 4,096 in 16 bits, kept by one device; out and back in turn
    with the passes, at the link's bandwidth."""
    full, sent = run("full").prediction, run("full_offloaded").prediction
    size = LAYERS * TOKENS * HIDDEN * 2
    assert sent.host is not None
    assert sent.host.bytes_per_node == 8 * size
    assert sent.host.link_bytes_per_step == 2 * size
    link = request().cluster.groups[0].node.host_link.si
    assert sent.step_time_s - full.step_time_s == pytest.approx(2 * size / link, rel=1e-3)
    # At 4 samples the peak of the first is a layer's backward, that of the second another moment.
    full, sent = (run(mode, microbatch_size=4).prediction for mode in ("full", "full_offloaded"))
    assert 0.8 * 2 * size < full.max_peak_bytes - sent.max_peak_bytes <= 2 * size


def test_weights_leave_with_all_that_autograd_saves() -> None:
    """A layer's 12 h^2 weights and biases and norms in 16 bits beside what it keeps; nothing runs
    again, so both ways are all that is added."""
    none, sent = run("none").prediction, run("offloaded").prediction
    weights = LAYERS * 2 * (12 * HIDDEN * HIDDEN + 13 * HIDDEN)
    assert sent.host is not None
    whole = sent.host.bytes_per_node // 8
    link = request().cluster.groups[0].node.host_link.si
    assert sent.step_time_s - none.step_time_s == pytest.approx(2 * whole / link, rel=1e-3)
    # A layer's norms, attention and two products keep 9 to 34 times a token's width, in 16 bits
    # (Korthikanti et al., arXiv 2205.05198, equation 2, less scores and dropout).
    kept = whole - weights
    assert 9 * 2 < kept / (LAYERS * TOKENS * HIDDEN) < 34
    assert sent.max_peak_bytes < none.max_peak_bytes


def test_hosts_without_room_refuse_it() -> None:
    with pytest.raises(InputError, match="have no room"):
        evaluate(request(global_batch=1024), {"recompute": "offloaded", "microbatch_size": 128})


def test_a_plan_that_names_it_verifies() -> None:
    best = plan(request(constraints={"recompute": "offloaded"}))
    assert {part.mode for part in best.layout.stages[0].recompute} == {"offloaded"}
    assert verify(best) == []
