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
from cost_models.ops import MatMul, Op
from cost_models.recompute import mode_rows
from cost_models.step import Field, price_layer
from cost_models.traffic import data_calls, layer_calls, recomputed_calls
from planner.recompute import named_policy
from tests.validation.test_maxtext_tensor_transpose import request_of, ways

FOUND: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "maxtext_tensor_transpose_beside.json").read_text("utf-8")
)["counted"]


def _has(row: dict[str, Any], *axes: str) -> bool:
    return {*axes} <= {*row["degrees"]}


def _kind(row: dict[str, Any]) -> str:
    """How near the price of a program's calls is: which test it is in."""
    if row.get("model", "once") != "once":
        return str(row["model"]).removesuffix("s")
    if _has(row, "sequence"):
        return "sequence"
    if not {"data", "context"} & {*row["degrees"]}:
        return "exact"
    if _has(row, "fsdp", "tensor"):
        return "shared"
    if _has(row, "fsdp", "data") and not _has(row, "context"):
        return "data"
    return "context" if _has(row, "context") else "replicated"


PRICED, SHARED, BESIDE_CONTEXT, WITH_DATA, MIXTURES = (
    [row for row in FOUND if _kind(row) == kind]
    for kind in ("exact", "shared", "context", "data", "mixture")
)
IN_SUMS = [row for row in PRICED if math.prod(row["degrees"].values()) == 64]
"""Where XLA brings all samples to each rank in sums that it names after no layer."""
Key = tuple[str, str, int]


def named(row: dict[str, Any]) -> str:
    degrees = "x".join(f"{name}{number}" for name, number in row["degrees"].items())
    model = row.get("model", "llama")
    return f"{model}-{degrees}-{row['samples']}-{row['hidden']}-{row['tokens']}-{row['policy']}"


def place(row: dict[str, Any]) -> tuple[Shard, DataParallel]:
    one, (tp, transposed) = np.ones(1, dtype=np.int64), ways(row)
    degree = row["degrees"].get
    stages, samples = degree("pipeline", 1), row["samples"]
    # Gathered ahead of the loop, weights are whole inside (pipeline_fsdp_ag_once).
    fsdp = 1 if row.get("model") == "once" else degree("fsdp", 1)
    exchanged = degree("sequence", 1)
    kind = "a2a" if exchanged > 1 else "all_gather"
    shard = Shard(
        row["tokens"], one * (samples // row.get("microbatches", samples if stages > 1 else 1)),
        tp * one, degree("context", 1) * exchanged * one, one, tp * one, one > 0,
        cp_kind_code(kind) * one, transposed=transposed, fsdp=fsdp * one,
        piped=stages * one > 1, replicas=degree("data", 1) * one,
    )  # fmt: skip
    return shard, DataParallel(degree("data", 1) * one, fsdp * one, stages * one, 3 * one, 0 * one)


def counted(row: dict[str, Any]) -> Counter[Key]:
    """Bytes by pass, kind and ranks of a group, of layers alone; permutations together. Beside
    context calls have lost the names of their places."""
    found = Counter[Key]()
    for phase, part, kind, axes, size, number in row["calls"]:
        unnamed = part == "rest" and ({"context", "sequence"} & {*row["degrees"]} or _gathers(row))
        if part in ("self_attention", "mlp", "Moe") or unnamed:
            ranks = math.prod(row["degrees"][axis] for axis in axes.split())
            key = _key(
                "forward" if phase == "forward" else "backward", kind.replace("-", "_"), ranks
            )
            found[key] += size * number
    return found


def _gathers(row: dict[str, Any]) -> bool:
    """Whether the weights of experts come from other ranks: calls that are named after no layer."""
    return row.get("model") == "mixture" and "fsdp" in row["degrees"]


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
            and "pipeline" not in row["degrees"]] + SHARED
    + [row for row in MIXTURES if _has(row, "fsdp")], ids=named,
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
    assert 0.8 < total / row["temporaries"] < 4


@pytest.mark.parametrize("row", BESIDE_CONTEXT, ids=named)
def test_beside_context_most_bytes_are_priced(row: dict[str, Any]) -> None:
    """Of calls around attention XLA makes more than are priced, with the axis and without."""
    share = priced(row).total() / counted(row).total()
    if {"fsdp", "data", "pipeline"} & {*row["degrees"]}:
        assert 0.75 < share < 1.0
    elif "tensor_transpose" in row["degrees"]:
        assert 0.55 < share < 0.85
    else:
        assert 0.7 < share < 0.8


@pytest.mark.parametrize("row", WITH_DATA, ids=named)
def test_data_beside_fsdp_sums_over_both(row: dict[str, Any]) -> None:
    """Feed-forwards' gradients in one call, which are priced as one over fsdp, then one of a part
    over data. Where data is as large as the axis, weights come whole to each rank."""
    mine, seen = priced(row), counted(row)
    assert 0.75 < mine.total() / seen.total() < 1.06


@pytest.mark.parametrize("row", SHARED, ids=named)
def test_calls_over_several_axes_are_priced_as_the_dearer_ways(row: dict[str, Any]) -> None:
    """With 4 x 2 x 2 x 8 ranks XLA finds the cheaper one, which none of the smaller programs
    shows."""
    share = priced(row).total() / counted(row).total()
    assert 0.75 < share < (1.8 if row["degrees"].get("data") == 8 else 1.32)


@pytest.mark.parametrize("row", [row for row in FOUND if _kind(row) == "sequence"], ids=named)
def test_exchanged_heads_are_priced_dear(row: dict[str, Any]) -> None:
    """The sequence axis splits ``embed`` as fsdp does, and XLA sums feed-forwards' products over
    it too instead of gathering their weights."""
    assert 0.8 < priced(row).total() / counted(row).total() < 2.3


@pytest.mark.parametrize("row", MIXTURES, ids=named)
def test_experts_send_what_xla_sends(row: dict[str, Any]) -> None:
    """Their calls are the software's own; beside fsdp weights are ordered in fp32."""
    mine, seen = priced(row), counted(row)
    if row["policy"] == "full":
        assert 0.9 < mine.total() / seen.total() < 1.1
    else:
        assert mine.total() == pytest.approx(seen.total(), rel=0.02)


@pytest.mark.parametrize("row", [row for row in FOUND if _kind(row) == "latent"], ids=named)
def test_latents_send_most_of_what_xla_sends(row: dict[str, Any]) -> None:
    """It sums what is projected down over parts of the width, and gathers it in parts."""
    assert 0.8 < priced(row).total() / counted(row).total() < 1


@pytest.mark.parametrize(
    "row", [row for row in FOUND if "flops" in row and not _has(row, "pipeline")
            and _kind(row) not in ("sequence", "latent", "mixture")], ids=named,
)  # fmt: skip
def test_what_ranks_compute_alike_is_counted(row: dict[str, Any]) -> None:
    """FLOPs of a rank by the compiler's count, which has none of the experts' kernels; where the
    priced way is the dearer one, more."""
    (kind,) = request_of(row).workload.kinds.values()
    shard, _ = place(row)
    head = 3 * 2.0 * float(shard.tokens[0]) * row["hidden"] * 1024 / float(shard.tp[0])
    share = (_flops(kind.ops(shard)) + head) / row["flops"]
    if _kind(row) == "shared":
        assert 0.98 < share < (2.1 if row["degrees"]["tensor_transpose"] == 4 else 1.16)
    else:
        assert 0.98 < share < 1.01


def _flops(ops: tuple[Op, ...]) -> float:
    """Of all three products of each."""
    total = 0.0
    for op in ops:
        if isinstance(op, MatMul):
            times = sum(float(np.ravel(ways)[0]) for ways in op.alike)
            total += times * 2.0 * float(np.prod([np.ravel(d)[0] for d in (op.m, op.n, op.k)]))
    return total
