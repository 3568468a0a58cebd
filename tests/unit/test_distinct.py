"""Layers without experts are priced once for all meshes of experts: their prices are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.configs import Configs, price_configs
from cost_models.data_parallel import price_kind
from cost_models.distinct import distinct_of, has_experts
from cost_models.graph import LayerKind
from cost_models.step import price_layer
from cost_models.unique import distinct_values, unique_rows
from planner.pipeline import read_request
from planner.request import Request

STACKS = (
    "megatron-core", "megatron-core-muon", "torchtitan", "maxtext-gpu", "deepspeed-autoep",
    "nemo-automodel",
)  # fmt: skip


def request_of(stack: str) -> Request:
    return read_request("deepseek-v3", "dgx-h100:16", None, {"stack": stack})


def configs() -> Configs:
    """Every mesh of experts of four kinds of dense mesh, with and without a pipeline."""
    rows = [
        (1, tp, cp, 0, ep, etp, tp > 1, replicate, 8 // replicate, pp, zero, 0)
        for tp, cp in ((1, 1), (2, 1), (1, 2), (4, 2))
        for ep in (1, 2, 8)
        for etp in (1, 4)
        for replicate, zero in ((1, 3), (2, 1), (8, 0))
        for pp in (1, 2)
    ]
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    columns[6] = columns[6].astype(bool)
    return Configs(*columns)


@pytest.mark.parametrize("stack", STACKS)
def test_tables_are_those_of_each_configuration_alone(stack: str) -> None:
    request = request_of(stack)
    # With a batch, modes whose outputs have no room on the hosts would be refused afterwards.
    workload, machine, each = (
        replace(request.workload, global_batch=None),
        request.machine,
        configs(),
    )
    full = distinct_of(workload, each, experts=True)
    found = price_configs(workload, machine, each)
    kinds = [workload.kinds[name] for name in found.kind_names]
    assert {has_experts(kind) for kind in kinds} == {False, True}
    assert not has_experts(workload.embedding)

    def alone(kind: LayerKind) -> np.ndarray:
        times = full.times(lambda shards: price_layer(kind, shards, machine))
        rows, _ = price_kind(
            kind, times, full.expanded, full.data, machine, policies=workload.policies,
            vocab_divisor=workload.vocab_divisor,
        )  # fmt: skip
        return rows[:, full.pair_of]

    for kind, table in zip(kinds, found.kinds, strict=True):
        np.testing.assert_array_equal(table, alone(kind))


@pytest.mark.parametrize("limit", [7, 10_000])
def test_distinct_values_are_those_of_a_sort(limit: int) -> None:
    values = np.random.default_rng(1).integers(1, limit, size=(3, 100))
    distinct, where = distinct_values(values)
    np.testing.assert_array_equal(distinct, np.unique(values))
    np.testing.assert_array_equal(distinct[where], values)


def test_distinct_rows_give_back_their_columns() -> None:
    columns = [np.array([3, 1, 3, 2]), np.array([0, 5, 0, 5])]
    distinct, where = unique_rows(columns)
    assert len(distinct[0]) == 3
    for column, values in zip(columns, distinct, strict=True):
        np.testing.assert_array_equal(values[where], column)
