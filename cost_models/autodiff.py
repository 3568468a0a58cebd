"""Layers of a compiled program that have no recomputation policy: all that autodiff saves stays.

Kernels of a framework that runs op by op keep their inputs; JAX keeps what each primitive's
derivative needs, copies in fp32 and products of the activation's derivative among it
(``planner.blocks.autodiff`` counts them). XLA for TPUs leaves it at that: what it allocates is what
the loop over a pipeline's iterations hands to the backward (``benchmarks/memory/
maxtext_pipeline.py``). So nothing runs again, and what is kept beyond the tensors that kernels read
and write anyway is written once by the forward and read once by the backward.

Where a rank has several virtual stages, weights depend on the iteration, and each keeps what
products read of them: a copy in 16 bits, or in 8 in fp8, in fp32 the repeat's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layout import RecomputePolicy
from cost_models.leaf import Leaf
from cost_models.memory import Activations
from cost_models.recompute import mode_rows


def refuse_without_pipeline(
    tables: Sequence[Int64], workload: WorkloadGraph, pp: Int64, capacity_bytes: int
) -> None:
    """Let a layer keep as much as the device has where there is no pipeline, so that nothing fits.
    Not without a batch: what a bound asks about stands for any pipeline."""
    rows = mode_rows(tuple(policy.name for policy in workload.policies))
    for policy in workload.policies:
        if policy.everything is None or workload.global_batch is None:
            continue
        for table in tables:
            table[rows[policy.name].kept, pp == 1] = capacity_bytes


def outside_policy(policy: RecomputePolicy) -> RecomputePolicy:
    """What a policy is of layers outside the pipeline, which have one in any case."""
    if policy.everything is None:
        return policy
    return replace(policy, everything=None, keeps=policy.everything)


def outside(workload: WorkloadGraph) -> WorkloadGraph:
    """The workload of layers outside the pipeline; without a batch, as they run in none."""
    policies = tuple(outside_policy(policy) for policy in workload.policies)
    return replace(workload, global_batch=None, policies=policies)


def cast_bytes(workload: WorkloadGraph, shard: Shard) -> tuple[Int64, ...]:
    """What an iteration keeps of a layer's weights, of each kind; empty where no mode does."""
    if all(policy.everything is None for policy in workload.policies):
        return ()
    kinds = (workload.kinds[name] for name in dict.fromkeys(workload.layers))
    return tuple(_weights(kind, shard) for kind in kinds)


def _weights(kind: LayerKind, shard: Shard) -> Int64:
    total = sum(Activations(kind, shard).weights, np.zeros_like(shard.tp))
    result: Int64 = total // kind.element_bytes * kind.pass_weight_bytes
    return result


def with_casts(leaf: Leaf, workload: WorkloadGraph, casts: Sequence[Int64], index: int) -> Leaf:
    """The leaf of configuration ``index``, whose layers keep copies of their weights in each pass
    where ranks have several virtual stages."""
    if leaf.vpp == 1 or not casts:
        return leaf
    kinds = [list(kind) for kind in leaf.kinds]
    for policy in workload.policies:
        if policy.everything is not None:
            for kind, sizes in zip(kinds, casts, strict=True):
                kind[leaf.modes[policy.name].kept] += int(sizes[index])
    return replace(leaf, kinds=tuple(tuple(kind) for kind in kinds))
