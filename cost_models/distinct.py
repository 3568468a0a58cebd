"""What differs between configurations: a layer is priced once per distinct shard and data-parallel
side, and a layer without experts once for all meshes that experts may have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cost_models.data_traffic import DataParallel
from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layer_times import LayerTimes
from cost_models.unique import unique_rows

if TYPE_CHECKING:
    from cost_models.configs import Configs


@dataclass(frozen=True)
class Distinct:
    """The distinct ways in which configurations run a layer."""

    shards: Shard
    """Distinct shards, those of compute."""
    shard_of: Int64
    """Shard of each configuration."""
    data: DataParallel
    """Data-parallel side of each distinct pair of shard and data-parallel side."""
    expanded: Shard
    """Shard of each pair."""
    pair_of: Int64
    """Pair of each configuration."""
    used: Int64
    """Shard of each distinct pair of shard and whether there is a pipeline."""
    pipelined: Int64
    """2 where there is one, else 1."""
    timed: Int64
    """The latter pair of each of the former."""

    def times(self, price: Callable[[Shard], LayerTimes]) -> LayerTimes:
        """Times of a layer for ``expanded``, priced once for each shard."""
        return price(self.shards).take(self.used).in_pipeline(self.pipelined).take(self.timed)


def distinct_of(workload: WorkloadGraph, configs: Configs, *, experts: bool) -> Distinct:
    """How ``configs`` run a layer; one without ``experts`` does not depend on their mesh."""
    shared = configs.pp if workload.vocabulary_over_pipeline else np.ones_like(configs.pp)
    columns = configs.shard_columns()
    if not experts:
        columns[4] = columns[5] = np.ones_like(configs.pp)
    keys, shard_of = unique_rows([*columns, *beside_columns(workload, configs), shared])
    shards = shard_from(workload, keys)
    pairs, pair_of = unique_rows([shard_of, *configs.data_columns()])
    data = DataParallel(*pairs[1:])
    (used, pipelined), timed = unique_rows([pairs[0], np.minimum(data.pp, 2)])
    expanded = take_shard(shards, pairs[0])
    return Distinct(shards, shard_of, data, expanded, pair_of, used, pipelined, timed)


def has_experts(kind: LayerKind) -> bool:
    """Whether a layer of ``kind`` depends on the mesh of the experts."""
    return any(weight.sharding.startswith("expert_") for weight in kind.weights)


def vocabulary_ranks(workload: WorkloadGraph, tp: Int64, pp: Int64) -> Int64 | None:
    """Ranks that share the rows of the vocabulary, where it is not tp."""
    return tp * pp if workload.vocabulary_over_pipeline else None


def beside_columns(workload: WorkloadGraph, configs: Configs) -> list[Int64]:
    """What a layer depends on beside its mesh where it decides calls: the ranks that split its
    weights while it runs, whether there is a pipeline, and the other data-parallel ranks."""
    if workload.transposed == 1:
        return []
    fsdp = np.where(configs.zero_stage == 3, configs.dp_shard, 1)
    replicas = configs.dp_replicate * configs.dp_shard // fsdp
    return [fsdp, (configs.pp > 1).astype(np.int64), replicas]


def shard_from(workload: WorkloadGraph, columns: list[Int64]) -> Shard:
    """Shards from their columns, the last one the stages that share the vocabulary."""
    microbatch, tp, cp, cp_kind, ep, etp, sp, *beside, stages = columns
    return Shard(
        sequence=workload.sequence, microbatch=microbatch, tp=tp, cp=cp, ep=ep, etp=etp,
        sequence_parallel=sp.astype(bool), cp_kind=cp_kind,
        vocabulary=vocabulary_ranks(workload, tp, stages), transposed=workload.transposed,
        fsdp=beside[0] if beside else None, piped=beside[1] > 0 if beside else None,
        replicas=beside[2] if beside else None,
    )  # fmt: skip


def take_shard(shard: Shard, index: Int64) -> Shard:
    """Some of the configurations of a shard."""
    return Shard(
        sequence=shard.sequence,
        microbatch=shard.microbatch[index],
        tp=shard.tp[index],
        cp=shard.cp[index],
        ep=shard.ep[index],
        etp=shard.etp[index],
        sequence_parallel=shard.sequence_parallel[index],
        cp_kind=shard.cp_kind[index],
        vocabulary=None if shard.vocabulary is None else shard.vocabulary[index],
        transposed=shard.transposed,
        fsdp=None if shard.fsdp is None else shard.fsdp[index],
        piped=None if shard.piped is None else shard.piped[index],
        replicas=None if shard.replicas is None else shard.replicas[index],
    )
