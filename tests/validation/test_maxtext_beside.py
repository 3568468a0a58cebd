"""Calls that XLA places around MaxText's layers on ``tensor_transpose`` ranks beside an fsdp axis
and in pipelines (``benchmarks/collectives/maxtext_tensor_transpose.py``)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.cp_kinds import cp_kind_code
from cost_models.data_parallel import price_kind
from cost_models.data_traffic import DataParallel
from cost_models.graph import Shard
from cost_models.memory import activation_bytes
from cost_models.recompute import mode_rows
from cost_models.step import Field, price_layer
from cost_models.traffic import data_calls, layer_calls, recomputed_calls
from planner.recompute import named_policy
from tests.validation.test_maxtext_tensor_transpose import request_of, ways

FOUND: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "maxtext_tensor_transpose_beside.json").read_text("utf-8")
)["counted"]
PRICED = [row for row in FOUND if not {"data", "context"} & {*row["degrees"]}]
BESIDE_CONTEXT = [
    row
    for row in FOUND
    if "context" in row["degrees"]
    and "data" not in row["degrees"]
    and not {"fsdp", "tensor"} <= {*row["degrees"]}
]
WITH_DATA = [
    row
    for row in FOUND
    if {"data", "fsdp"} <= {*row["degrees"]}
    and "tensor" not in row["degrees"]
    and row["degrees"]["data"] != row["degrees"]["tensor_transpose"]
]
IN_SUMS = [row for row in PRICED if math.prod(row["degrees"].values()) == 64]
"""Where XLA brings all samples to each rank in sums that it names after no layer."""
Key = tuple[str, str, int]


def named(row: dict[str, Any]) -> str:
    degrees = "x".join(f"{name}{number}" for name, number in row["degrees"].items())
    return f"{degrees}-{row['samples']}-{row['hidden']}-{row['policy']}"


def place(row: dict[str, Any]) -> tuple[Shard, DataParallel]:
    one, (tp, transposed) = np.ones(1, dtype=np.int64), ways(row)
    degree = row["degrees"].get
    fsdp, stages, samples = degree("fsdp", 1), degree("pipeline", 1), row["samples"]
    shard = Shard(
        row["tokens"], one * (samples // row.get("microbatches", samples if stages > 1 else 1)),
        tp * one, degree("context", 1) * one, one, one, one > 0,
        cp_kind_code("all_gather") * one, transposed=transposed, fsdp=fsdp * one,
        piped=stages * one > 1,
    )  # fmt: skip
    return shard, DataParallel(degree("data", 1) * one, fsdp * one, stages * one, 3 * one, 0 * one)


def counted(row: dict[str, Any]) -> Counter[Key]:
    """Bytes by pass, kind and ranks of a group, of layers alone; permutations together. Beside
    context calls have lost the names of their places."""
    found = Counter[Key]()
    for phase, part, kind, axes, size, number in row["calls"]:
        unnamed = part == "rest" and "context" in row["degrees"]
        if part in ("self_attention", "mlp") or unnamed:
            ranks = math.prod(row["degrees"][axis] for axis in axes.split())
            key = _key(
                "forward" if phase == "forward" else "backward", kind.replace("-", "_"), ranks
            )
            found[key] += size * number
    return found


def priced(row: dict[str, Any]) -> Counter[Key]:
    request = request_of(row)
    (kind,) = request.workload.kinds.values()
    shard, data = place(row)
    policy = named_policy(row["policy"], request.stack)
    calls = layer_calls(kind, shard, request.machine)
    calls += recomputed_calls(kind, shard, request.machine, policy)
    if int(data.shard[0] * shard.cp[0]) > 1:
        calls += data_calls(kind, shard, data, request.machine, vocab_divisor=1)
    found = Counter[Key]()
    for call in calls:
        phase = "forward" if call.phase == "forward" else "backward"
        found[_key(phase, call.kind, call.ranks)] += call.bytes
    return found


def _key(phase: str, kind: str, ranks: int) -> Key:
    moved = kind in ("send_recv", "collective_permute")
    return phase, "permute" if moved else kind, 0 if moved else ranks


def _reductions(found: Counter[Key]) -> Counter[Key]:
    """Sums, which XLA sometimes makes whole before a rank takes its part."""
    joined = Counter[Key]()
    for (phase, kind, ranks), size in found.items():
        summed = kind in ("all_reduce", "reduce_scatter")
        joined[phase, "sums" if summed else kind, ranks] += size
    return joined


@pytest.mark.parametrize(
    "row",
    [row for row in PRICED if row["policy"] != "full" and row not in IN_SUMS],
    ids=named,
)
def test_layers_send_what_xla_sends(row: dict[str, Any]) -> None:
    """To 1 %, which is norms' weights and what XLA pads."""
    mine, seen = _reductions(priced(row)), _reductions(counted(row))
    for key in {*mine, *seen}:
        assert mine[key] == pytest.approx(seen[key], rel=0.01, abs=0.002 * seen.total()), key
    assert mine.total() == pytest.approx(seen.total(), rel=0.002)


@pytest.mark.parametrize("row", [row for row in PRICED if row["policy"] == "full"], ids=named)
def test_layers_that_run_again_send_little_less_than_xla(row: dict[str, Any]) -> None:
    """XLA gathers some of attention's weights once more."""
    assert 0.96 < priced(row).total() / counted(row).total() <= 1


@pytest.mark.parametrize("row", IN_SUMS, ids=named)
def test_all_samples_may_come_in_sums(row: dict[str, Any]) -> None:
    """On 64 ranks the bytes are as many; in calls twice as long."""
    sums = sum(
        size * number
        for _, part, kind, axes, size, number in row["calls"]
        if part == "rest" and kind == "all-reduce" and axes == "fsdp tensor tensor_transpose"
    )
    assert sums > 0.15 * counted(row).total()
    assert priced(row).total() == pytest.approx(counted(row).total() + sums, rel=0.01)


@pytest.mark.parametrize(
    "row", [row for row in PRICED if "temporaries" in row and "fsdp" in row["degrees"]
            and "pipeline" not in row["degrees"]], ids=named,
)  # fmt: skip
def test_temporaries_are_within_reach(row: dict[str, Any]) -> None:
    """Two layers' activations, what works, and gradients on their way, against what XLA lays out;
    most where tokens are few, as XLA has activations and weights' gradients one after the other."""
    request = request_of(row)
    (kind,) = request.workload.kinds.values()
    shard, data = place(row)
    policies = request.workload.policies
    times = price_layer(kind, shard, request.machine)
    rows, _ = price_kind(
        kind, times, shard, data, request.machine, vocab_divisor=1, policies=policies
    )
    modes = mode_rows(tuple(policy.name for policy in policies))[row["policy"]]
    kept, _ = activation_bytes(kind, shard, named_policy(row["policy"], request.stack))
    assert int(rows[modes.kept][0]) == int(kept[0])
    total = 2 * int(kept[0]) + int((rows[modes.working] + rows[Field.IN_FLIGHT])[0])
    assert 0.8 < total / row["temporaries"] < 3.5


@pytest.mark.parametrize("row", BESIDE_CONTEXT, ids=named)
def test_beside_context_most_bytes_are_priced(row: dict[str, Any]) -> None:
    """Of calls around attention XLA makes more than are priced, with the axis and without."""
    share = priced(row).total() / counted(row).total()
    if "fsdp" in row["degrees"]:
        assert 0.9 < share < 1.1
    elif "tensor_transpose" in row["degrees"]:
        assert 0.55 < share < 0.85
    else:
        assert 0.7 < share < 0.8


@pytest.mark.parametrize("row", WITH_DATA, ids=named)
def test_data_beside_fsdp_sums_over_both(row: dict[str, Any]) -> None:
    """Feed-forwards' gradients in one call, which are priced as one over fsdp, then one of a part
    over data."""
    mine, seen = priced(row), counted(row)
    assert mine.total() == pytest.approx(seen.total(), rel=0.06)
