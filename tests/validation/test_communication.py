"""Counted collectives against the ops that are priced: real software, and counts by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from planner import pipeline
from planner.studies.communication import Communication, communication

DATA = Path(__file__).parent / "data"
COUNTED = json.loads((DATA / "comm_counts.json").read_text())["cases"]
BLOCKS = 2
KINDS = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}
Totals = dict[tuple[str, int, str], tuple[int, int]]
"""Count and bytes by kind, ranks and pass."""


def of_layout(
    model: str, devices: int, job: dict[str, Any], layout: dict[str, Any]
) -> Communication:
    """The communication of a layout on nodes of 8 devices, or on one of 4."""
    cluster = f"dgx-h100:{devices // 8}" if devices >= 8 else "polaris:1"
    request = pipeline.read_request(model, cluster, None, job)
    return communication(request, pipeline.evaluate(request, layout))


def summed(calls: Any, factor: int = 1) -> Totals:
    """Calls of a layer by kind, ranks and pass."""
    count: Counter[tuple[str, int, str]] = Counter()
    size: Counter[tuple[str, int, str]] = Counter()
    for call in calls:
        key = (call.kind, call.ranks, call.phase)
        count[key] += factor * call.count
        size[key] += factor * call.bytes
    return {key: (count[key], size[key]) for key in count}


def counted(case: dict[str, Any]) -> Totals:
    """The same of a counted case."""
    result: Counter[tuple[tuple[str, int, str], int]] = Counter()
    for name, row in case["collectives"].items():
        kind, group, _ = name.split("|")
        ranks = int(group.removeprefix("group="))
        for phase, part in (("forward", "_fwd"), ("backward", "")):
            key = (KINDS[kind], ranks, phase)
            for index, field in enumerate(("count", "bytes")):
                value = row[field + part] - (row[field + "_fwd"] if phase == "backward" else 0)
                result[key, index] += value
    keys = {key for key, _ in result}
    return {key: (result[key, 0], result[key, 1]) for key in keys if result[key, 0]}


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: "-".join(
    f"{key}{value}" for key, value in case.items() if key != "collectives"
))  # fmt: skip
def test_equal_to_counted_collectives_of_fsdp2_and_dtensor(case: dict[str, Any]) -> None:
    """Exactly: FSDP2 with tensor parallelism, with and without sequence parallelism."""
    world = case["world"]
    stack = "pytorch-fsdp2" if case["fsdp"] else "pytorch-tp"
    zero = {"zero_stage": 3 if case["reshard"] else 2} if world // case["tp"] > 1 else {}
    layout = {"tp": case["tp"], "sequence_parallel": case["sequence_parallel"], **zero}
    job = {"stack": stack, "sequence_length": 2048, "global_batch": world // case["tp"]}
    found = of_layout("llama-3.1-8b", world, job, layout)
    block = [call for call in found.layers["decoder"] if call.phase != "step"]
    assert summed(block, BLOCKS) == counted(case)


def test_korthikanti_counts_of_megatron_layers() -> None:
    """arXiv 2205.05198, section 4.2.2, by hand for GPT-3 on tp 8, one sample of 2,048 tokens.

    The full activation is 2048 x 12288 x 2 bytes. Tensor parallelism alone: two all-reduces forward
    and two backward. With sequence parallelism each is a reduce-scatter and an all-gather, and the
    backward gathers the two inputs once more.
    """
    size = 2048 * 12288 * 2
    job = {"stack": "megatron-core", "sequence_length": 2048, "global_batch": 1}
    plain = of_layout("gpt3-175b", 8, job, {"tp": 8, "sequence_parallel": False})
    assert summed(plain.layers["decoder"]) == {
        ("all_reduce", 8, "forward"): (2, 2 * size),
        ("all_reduce", 8, "backward"): (2, 2 * size),
    }
    split = of_layout("gpt3-175b", 8, job, {"tp": 8, "sequence_parallel": True})
    assert summed(split.layers["decoder"]) == {
        ("all_gather", 8, "forward"): (2, 2 * size),
        ("reduce_scatter", 8, "forward"): (2, 2 * size),
        ("all_gather", 8, "backward"): (4, 4 * size),
        ("reduce_scatter", 8, "backward"): (2, 2 * size),
    }


def test_distributed_optimizer_counts_once_per_step() -> None:
    """Megatron's distributed optimizer on dp 8: per layer one fp32 reduce-scatter and one bf16
    all-gather in a step, whatever the number of microbatches. A Llama-3-8B block has 218,112,000
    parameters."""
    job = {"stack": "megatron-core", "sequence_length": 2048, "global_batch": 64}
    found = of_layout("llama-3.1-8b", 8, job, {"zero_stage": 1})
    assert summed(found.layers["decoder"]) == {
        ("reduce_scatter", 8, "step"): (1, 218_112_000 * 4),
        ("all_gather", 8, "step"): (1, 218_112_000 * 2),
    }


def test_expert_exchange_counts() -> None:
    """Qwen3-30B-A3B on ep 8: dispatch and combine, forward and backward; 4,096 tokens of 2,048
    hidden in bf16, 8 copies each."""
    job = {"stack": "megatron-core", "sequence_length": 4096, "global_batch": 8}
    found = of_layout("qwen3-30b-a3b", 8, job, {"ep": 8})
    size = 4096 * 8 * 2048 * 2
    exchanges = [call for call in found.layers["moe"] if call.group == "ep"]
    assert summed(exchanges) == {
        ("all_to_all", 8, "forward"): (2, 2 * size),
        ("all_to_all", 8, "backward"): (2, 2 * size),
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 8 KV heads of 128 in bf16, 2,048 tokens on a rank: K and V of 4 MiB each.
        ("p2p", {("send_recv", 4, "forward"): (3, 3 * 2 * 4 * 2**20),
                 ("send_recv", 4, "backward"): (3, 3 * 4 * 4 * 2**20)}),
        ("all_gather", {("all_gather", 4, "forward"): (2, 2 * 4 * 4 * 2**20),
                        ("reduce_scatter", 4, "backward"): (2, 2 * 4 * 4 * 2**20)}),
        # Q and the output have 32 heads: 16 MiB each.
        ("a2a", {("all_to_all", 4, "forward"): (4, 40 * 2**20),
                 ("all_to_all", 4, "backward"): (4, 40 * 2**20)}),
    ],
)  # fmt: skip
def test_context_parallel_counts(kind: str, expected: Totals) -> None:
    """Llama-3-8B, 8,192 tokens over cp 4, by hand."""
    job = {"stack": "megatron-core", "sequence_length": 8192, "global_batch": 2}
    found = of_layout("llama-3.1-8b", 8, job, {"cp": 4, "cp_kind": kind})
    assert summed(call for call in found.layers["decoder"] if call.group == "cp") == expected


def test_two_levels_of_context_parallelism() -> None:
    """The same with two ranks that exchange heads and two on a ring, which carries as much. The
    backward exchanges the output as well as its gradient, at the four tensors' mean size."""
    job = {"stack": "megatron-core", "sequence_length": 8192, "global_batch": 2}
    layout = {"cp": 4, "cp_kind": "a2a_p2p", "cp_inner": 2}
    calls = of_layout("llama-3.1-8b", 8, job, layout).layers["decoder"]
    assert summed(call for call in calls if call.group == "cp_exchange") == {
        ("all_to_all", 2, "forward"): (4, 40 * 2**20),
        ("all_to_all", 2, "backward"): (5, 50 * 2**20),
    }
    assert summed(call for call in calls if call.group == "cp_ring") == {
        ("send_recv", 2, "forward"): (1, 2 * 4 * 2**20),
        ("send_recv", 2, "backward"): (1, 4 * 4 * 2**20),
    }


def test_pipeline_traffic_of_interleaved_stages() -> None:
    """Four ranks of two virtual stages, 8 microbatches: the first rank sends both chunks' outputs
    and receives one chunk's input; sequence parallelism sends 1/tp of 2,048 x 4,096 x 2 bytes."""
    job = {"stack": "megatron-core", "sequence_length": 2048, "global_batch": 8}
    found = of_layout("llama-3.1-8b", 8, job, {"tp": 2, "pp": 4, "vpp": 2})
    boundary = 2048 * 4096 * 2 // 2
    for rank, (out_of, into) in enumerate([(2, 1), (2, 2), (2, 2), (1, 2)]):
        moved = [call for call in found.stages[rank] if call.group == "pp"]
        assert summed(moved) == {
            ("send", 4, "forward"): (8 * out_of, 8 * out_of * boundary),
            ("recv", 4, "forward"): (8 * into, 8 * into * boundary),
            ("send", 4, "backward"): (8 * into, 8 * into * boundary),
            ("recv", 4, "backward"): (8 * out_of, 8 * out_of * boundary),
        }
