"""Transfers between pipeline stages, against their parts."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.configs import Configs, shard_of
from cost_models.interconnect import collective_time_s, send_recv_time_s
from cost_models.transfers import hop_ns, scattered
from planner.pipeline import evaluate, read_request
from planner.request import Request

JOB = {"sequence_length": 2048, "global_batch": 64}


def request(stack: str) -> Request:
    return read_request("gpt3-175b", "dgx-a100:8", None, {**JOB, "stack": stack})


def one(value: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array([value], dtype=np.int64)


def configs(*, sequence_parallel: bool) -> Configs:
    """tp 8 in a node, 8 stages."""
    return Configs(one(1), one(8), one(1), one(0), one(1), one(8), one(sequence_parallel) > 0,
                   one(1), one(1), one(8), one(0), one(0))  # fmt: skip


@pytest.mark.parametrize(
    ("stack", "sequence_parallel", "parts"),
    [
        ("megatron-lm-2022", False, 8),
        ("megatron-lm-2022", True, 1),
        ("megatron-deepspeed", False, 8),
        ("megatron-core", False, 1),
    ],
)
def test_a_tensor_that_tp_replicates_is_sent_in_parts(
    stack: str, sequence_parallel: bool, parts: int
) -> None:
    """2,048 tokens of 12,288 elements of 2 bytes; an eighth of the tokens under sequence
    parallelism. In parts: an eighth of the bytes, then gathered in the node."""
    asked = request(stack)
    degrees = configs(sequence_parallel=sequence_parallel)
    shard = shard_of(asked.workload, degrees)
    assert scattered(asked.machine, shard).tolist() == [parts]
    size = 2048 * 12288 * 2 / (8 if sequence_parallel else 1)
    fabric = asked.machine.fabric
    seconds = send_recv_time_s(fabric, size / parts, stride=one(8), size=one(8))
    if parts > 1:
        seconds = seconds + collective_time_s(
            fabric, "all_gather", size, size=one(parts), stride=one(1)
        )
    hop = hop_ns(asked.workload, asked.machine, shard, degrees)
    assert hop.tolist() == [round(float(seconds[0]) * 1e9)]


def test_what_a_rank_waits_for_is_a_part_of_its_time() -> None:
    """The busiest of 8 ranks is the last, with the logits: it sends one gradient a microbatch."""
    asked = request("megatron-core")
    layout = {"tp": 8, "pp": 8, "microbatch_size": 1, "sequence_parallel": True}
    plain, chunked = (
        {part.name: part.seconds for part in evaluate(asked, {**layout, **more}).prediction.time}
        for more in ({}, {"vpp": 2, "schedule": "interleaved"})
    )
    degrees = configs(sequence_parallel=True)
    hop = hop_ns(asked.workload, asked.machine, shard_of(asked.workload, degrees), degrees)
    assert plain["pp_comm"] == pytest.approx(64 * hop[0] / 1e9)
    assert "pp_comm" not in chunked
