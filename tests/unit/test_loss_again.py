"""MaxText's tiled loss: logits of one tile at a time, made a second time in the backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from cost_models.graph import Shard
from cost_models.ops import Roofline
from planner.pipeline import evaluate, read_request
from planner.request import Request

VOCABULARY, HIDDEN, TOKENS = 128_256, 4096, 2 * 2048


def request(stack: str = "maxtext-gpu", **job: Any) -> Request:
    asked = {"stack": stack, "sequence_length": 2048, "global_batch": 16, **job}
    return read_request("llama-3.1-8b", "dgx-h100:1", None, asked)


def shard() -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(
        sequence=2048, microbatch=2 * one, tp=one, cp=one, ep=one, etp=one,
        sequence_parallel=np.zeros(1, dtype=bool), cp_kind=0 * one,
    )  # fmt: skip


def test_the_head_s_product_runs_once_more() -> None:
    head = request(loss="chunked").workload.head
    again = [op for op in head.ops(shard()) if isinstance(op, Roofline)]
    assert [int(np.ravel(op.backward_flops)[0]) for op in again] == [
        2 * TOKENS * VOCABULARY * HIDDEN
    ]
    assert not any(isinstance(op, Roofline) for op in request().workload.head.ops(shard()))


def test_what_it_keeps_and_works_with() -> None:
    """Between its passes its input alone; in the backward a tile's logits, the fp32 gradient of the
    head with a tile's part of it, and the gradients of the input."""
    tiled, whole = (request(loss=loss).workload.head for loss in ("chunked", "whole"))
    logits = TOKENS * VOCABULARY
    boundary = TOKENS * HIDDEN * 2

    def kept(head: Any) -> int:
        return sum(int(np.ravel(tensor.bytes)[0]) for tensor in head.saved(shard()))

    assert kept(whole) - kept(tiled) == 4 * logits
    of_logits = int(whole.working_bytes(shard())[0]) - boundary
    assert int(tiled.working_bytes(shard())[0]) == (
        (of_logits + 4 * logits) // 8 + 8 * VOCABULARY * HIDDEN + boundary + boundary // 8
    )
    assert not tiled.whole_logits
    assert whole.whole_logits


def test_it_takes_longer_and_less_memory_where_logits_are_many() -> None:
    layout = {"microbatch_size": 2, "recompute": "full", "zero_stage": 3}
    tiled, whole = (
        evaluate(request(loss=loss), layout).prediction for loss in ("chunked", "whole")
    )
    more = tiled.step_time_s - whole.step_time_s
    # One more product at the peak rate, and the loss's 26 bytes per logit at the peak bandwidth.
    least = 2 * TOKENS * VOCABULARY * HIDDEN / 989e12 + 26 * TOKENS * VOCABULARY / 3.35e12
    assert least < more < 1.6 * least
    many = {"microbatch_size": 2, "recompute": "full", "zero_stage": 3}
    long: dict[str, Any] = {"sequence_length": 16384}
    tiled, whole = (
        evaluate(request(loss=loss, **long), many).prediction for loss in ("chunked", "whole")
    )
    assert tiled.max_peak_bytes < whole.max_peak_bytes
