"""MaxText's experts have buffers for every token of their group, whatever the routing."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import Shard
from cost_models.memory import Activations
from cost_models.ops import Elementwise, GroupedMatMul
from planner.pipeline import evaluate, read_request
from planner.recompute import named_policy
from planner.request import Request


def request(stack: str, **job: object) -> Request:
    asked = {"stack": stack, "sequence_length": 1024, "global_batch": 16, **job}
    return read_request("mixtral-8x7b", "dgx-h100:1", None, asked)


def shard_of(ep: int, sequence: int = 1024) -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(
        sequence=sequence, microbatch=one, tp=one, cp=one, ep=ep * one, etp=one,
        sequence_parallel=one.astype(bool), cp_kind=0 * one,
    )  # fmt: skip


@pytest.mark.parametrize(("ep", "times"), [(1, 1), (2, 2), (4, 4), (8, 4)])
def test_room_is_what_all_ranks_of_the_group_might_send(ep: int, times: int) -> None:
    """Two experts per token; with one expert on a rank no token comes twice."""
    asked = request("maxtext-gpu")
    (kind,) = asked.workload.kinds.values()
    shard = shard_of(ep)
    products = [op for op in kind.ops(shard) if isinstance(op, GroupedMatMul)]
    for op in products:
        assert np.asarray(op.groups) * op.rows == 2 * 1024  # what is computed stays balanced
        assert op.room == times
    # configs/types.py: mlpwi_0 and mlpwi_1 kept, 14336 wide, in 16 bits.
    kept = Activations(kind, shard).listed(
        named_policy("custom:mlp_in", asked.stack), frozenset({"mlp_gate", "mlp_up"})
    )
    assert kept == times * 2 * 1024 * 2 * 14336 * 2


def test_activations_run_over_all_of_the_room() -> None:
    (kind,) = request("maxtext-gpu").workload.kinds.values()
    one, eight = (
        next(
            op
            for op in kind.ops(shard_of(ep))
            if isinstance(op, Elementwise) and op.name == "expert_activation"
        )
        for ep in (1, 8)
    )
    assert eight.forward_bytes == 4 * np.asarray(one.forward_bytes)


def test_gathered_tokens_have_room_for_every_choice() -> None:
    (kind,) = request("maxtext-gpu-ring-of-experts").workload.kinds.values()
    op = next(op for op in kind.ops(shard_of(8)) if isinstance(op, GroupedMatMul))
    assert op.room == 8


def test_peaks_follow_and_the_ring_sends_tokens_once() -> None:
    layout = {"ep": 8, "microbatch_size": 2}
    plain = evaluate(request("maxtext-gpu"), layout)
    ring = evaluate(request("maxtext-gpu-ring-of-experts"), layout)
    assert ring.prediction.max_peak_bytes > plain.prediction.max_peak_bytes
    # Two copies leave a rank in an all-to-all, one comes from each other rank in a gather.
    before, after = (
        next(term.seconds or 0.0 for term in found.prediction.time if term.name == "ep_comm")
        for found in (plain, ring)
    )
    assert 0 < before < after
