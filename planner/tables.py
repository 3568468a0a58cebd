"""Candidates priced to integers, and lower bounds on what they can reach.

Two tiers. A *mesh* is priced without its data-parallel side (:func:`mesh_bounds`); only meshes
that may still win are expanded into layouts and priced in full (:func:`price_layouts`), where a
relaxed memory check also finds the least recomputation that could fit. The quantum of time is one
nanosecond per layer and category, so a sum over ``n`` terms is within ``n / 2`` ns of the real
number it stands for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models import bounds
from cost_models.configs import Configs, PricedConfigs, price_configs, shard_of
from cost_models.graph import Int64
from cost_models.layout import SCHEDULES, SPLIT_BACKWARD, RecomputePolicy
from cost_models.leaf import Leaf, Recompute
from cost_models.model_sums import divided, layer_counts, model_sum
from cost_models.named_outputs import LAYER_INPUT
from cost_models.outside import outside_configs
from cost_models.outside_bounds import OutsideLayouts, outside_step_bounds
from cost_models.recompute import mode_rows
from cost_models.relaxation import (
    Relaxation,
)
from cost_models.step import Field
from cost_models.transfers import hop_ns
from cost_models.unique import unique_rows
from planner.meshes import Layouts, Meshes
from planner.request import Request
from planner.space import mixed_modes, recompute_modes

QUANTUM = "1 ns per layer and category, 1 byte"

SHARDS = 16_384
"""Shards priced at once: what a processor's cache holds."""

Real = NDArray[np.float64]


def configs_of_meshes(
    meshes: Meshes, dp_replicate: Int64, dp_shard: Int64, zero_stage: Int64, reshard: Int64
) -> Configs:
    """Configurations of meshes with their data-parallel side."""
    return Configs(
        microbatch=meshes.microbatch,
        tp=meshes.tp,
        cp=meshes.cp,
        cp_kind=meshes.cp_kind,
        ep=meshes.ep,
        etp=meshes.etp,
        sequence_parallel=meshes.sp.astype(bool),
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        pp=meshes.pp,
        zero_stage=zero_stage,
        reshard=reshard,
    )


def mesh_bounds(request: Request, meshes: Meshes) -> Real:
    """Lower bound in ns on every layout of each mesh; infinity where none can fit.

    Compute and in-layer communication only, without recomputation; the least of 1F1B and what the
    stack's other schedules reach, with as many virtual stages as there are layers. Memory: what no
    sharding removes, averaged over stages, with one microbatch's boundaries alive.
    """
    # Meshes are many and their shards few: price the shards, on one data-parallel rank each. A
    # layer may cost less in a pipeline, of any length: what is summed per step, or merged.
    columns, where = unique_rows(
        [
            meshes.microbatch, meshes.tp, meshes.cp, meshes.cp_kind, meshes.ep, meshes.etp,
            meshes.sp, np.minimum(meshes.pp, 2),
        ]
    )  # fmt: skip
    parts = [
        _shard_costs(request, [column[start : start + SHARDS] for column in columns])
        for start in range(0, len(columns[0]), SHARDS)
    ]
    work, layer, parameters, kept, fixed = (
        np.concatenate(column)[where] for column in zip(*parts, strict=True)
    )
    configs = configs_of_meshes(
        meshes,
        meshes.dp,
        np.ones_like(meshes.dp),
        np.zeros_like(meshes.dp),
        np.zeros_like(meshes.dp),
    )
    shard = shard_of(request.workload, configs)
    hop = hop_ns(request.workload, request.machine, shard, configs).astype(np.float64)
    m = request.global_batch // (meshes.dp * meshes.microbatch)
    ones, zero = np.ones_like(m), np.zeros(len(meshes))
    shape = bounds.Shape(meshes.pp, ones, m, ones, ones)
    send = zero
    if set(request.schedules) <= set(request.stack.blocking_transfers):
        hop, send = zero, hop
    totals = bounds.Totals(
        work, zero, zero, zero, zero, zero, zero, zero, hop, zero, zero, send, zero
    )
    least = bounds.step_bound(ones, shape, totals)
    if set(request.schedules) - {"1f1b"}:
        # No schedule beats a rank's share of the work after the least fill (virtual stages of one
        # layer: cost_models.bounds.interleaved), nor one microbatch's latency; of both, only the
        # share holds where gradients of weights fill the gaps.
        busy = work + 2 * (meshes.pp - 1) * send
        relaxed = m * busy / meshes.pp
        if set(request.schedules).isdisjoint(SPLIT_BACKWARD):
            fill = layer * (meshes.pp - 1) * (meshes.pp - 2) / 2 / meshes.pp
            latency = work + 2 * (meshes.pp - 1) * (hop + send)
            relaxed = np.maximum(relaxed + fill, latency)
        relaxed = relaxed * bounds.SAFETY
        least = np.where(meshes.pp > 1, np.minimum(least, relaxed), least)
    if request.stack.outside_layers:
        apart = _outside_bounds(request, meshes, m)
        least = np.where(meshes.pp > 1, np.minimum(least, apart), least)
    held = _least_state(request, parameters, meshes, m) + kept
    room = meshes.pp.astype(np.float64) * (request.usable_bytes - fixed)
    return np.where(held > room, np.inf, least)


def _shard_costs(request: Request, columns: list[Int64]) -> tuple[Real | Int64, ...]:
    """Of shards (a row each) on one data-parallel rank: work of the model and of its cheapest
    layer in ns, trained parameters, bytes kept at least, fixed bytes."""
    microbatch, tp, cp, cp_kind, ep, etp, sp, stages = columns
    one = np.ones_like(tp)
    waits = _may_wait(request, stages)
    # Of policies, those that leave least on the device; whatever the hosts hold of a step.
    policies = thriftiest(request.workload.policies)
    priced = price_configs(
        replace(request.workload, policies=policies, global_batch=None), request.machine,
        Configs(microbatch, tp, cp, cp_kind, ep, etp, sp.astype(bool), one, one, stages, one * 0,
                one * 0, waits=waits),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
    )  # fmt: skip
    layer = np.min([t[Field.FORWARD] + t[Field.BACKWARD] for t in priced.kinds], axis=0)
    work = _sum_for_any_pipeline(priced, (Field.FORWARD, Field.BACKWARD))
    if priced.put_off is not None:
        work = work - priced.put_off.each_ns
    return work, layer, _trained(priced), least_kept(priced), priced.fixed_bytes


def _may_wait(request: Request, stages: Int64) -> Int64:
    """Where gradients may wait for a step's last microbatch: what is summed over tp until then is
    summed once per step, and so in no microbatch of a bound."""
    result: Int64 = ((stages == 1) & request.machine.rules.reduces_last_backward).astype(np.int64)
    return result


def _outside_bounds(request: Request, meshes: Meshes, microbatches: Int64) -> Real:
    """Lower bound in ns on the layouts of meshes with layers outside the pipeline: the average
    rank's share of each layer, inside or outside, whichever takes less."""
    configs = configs_of_meshes(
        meshes, meshes.dp, np.ones_like(meshes.dp), *(np.zeros_like(meshes.dp),) * 2
    )
    shares = outside_configs(configs, request.global_batch)
    inside, outside = (_kind_work(request, each) for each in (configs, shares))
    each = microbatches / meshes.pp
    total = each * inside[-1]
    for count, one, other in zip(
        Counter(request.workload.layers).values(), inside, outside, strict=False
    ):
        total = total + count * np.minimum(each * one, other)
    return total * bounds.SAFETY


def _kind_work(request: Request, configs: Configs) -> list[Real]:
    """Forward and backward without recomputation in ns on one data-parallel rank: of each kind of
    layer, and of the ends together."""
    columns, where = unique_rows([*configs.shard_columns(), np.minimum(configs.pp, 2)])
    found = []
    for start in range(0, len(columns[0]), SHARDS):
        part = [column[start : start + SHARDS] for column in columns]
        microbatch, tp, cp, cp_kind, ep, etp, sp, stages = part
        one = np.ones_like(tp)
        shard = Configs(
            microbatch, tp, cp, cp_kind, ep, etp, sp.astype(bool), one, one, stages, one * 0,
            one * 0, waits=_may_wait(request, stages),
        )  # fmt: skip
        priced = price_configs(
            replace(request.workload, policies=(), global_batch=None), request.machine, shard,
            reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
        )  # fmt: skip
        work = [t[Field.FORWARD] + t[Field.BACKWARD] for t in priced.kinds]
        ends = sum(t[Field.FORWARD] + t[Field.BACKWARD] for t in (priced.embedding, priced.head))
        found.append(np.array([*work, ends], dtype=np.float64))
    return list(np.concatenate(found, axis=1)[:, where])


def thriftiest(policies: tuple[RecomputePolicy, ...]) -> tuple[RecomputePolicy, ...]:
    """Of lists of what each layer keeps, those than which no other leaves less on the device."""
    held = [
        None
        if policy.keeps is None or policy.group > 1
        else (policy.keeps | {LAYER_INPUT}) - policy.offloads
        for policy in policies
    ]
    first = {
        names: policy for policy, names in zip(reversed(policies), reversed(held), strict=True)
    }
    return tuple(
        policy
        for policy, names in zip(policies, held, strict=True)
        if names is None
        or (first[names] is policy and not any(o is not None and o < names for o in first))
    )


def least_kept(priced: PricedConfigs) -> Real:
    """Bytes that all layers keep for one microbatch under the thriftiest mode of each kind."""
    kept = [rows.kept for rows in mode_rows(priced.policies).values()]
    total = np.zeros(len(priced.configs))
    for count, table in zip(layer_counts(priced), priced.kinds, strict=True):
        total += count * np.min(table[kept], axis=0).astype(np.float64)
    return total


def _trained(priced: PricedConfigs) -> Real:
    """Trained parameters of the whole model on one rank; all of them where none is frozen. Where
    some are, none are counted: what is left out of a bound on memory only widens it."""
    workload = priced.workload
    kinds = (*workload.kinds.values(), workload.embedding, workload.head)
    if any(weight.frozen for kind in kinds for weight in kind.weights):
        return np.zeros(len(priced.configs))
    return _sum_for_any_pipeline(priced, (Field.PARAMETERS,))


def _sum_for_any_pipeline(priced: PricedConfigs, fields: tuple[Field, ...]) -> Real:
    """Fields of the model that hold for any number of ranks where these are priced for two: without
    the ends where the ranks share them."""
    whole, layers = model_sum(priced, fields), model_sum(priced, fields, ends=False)
    return np.where(divided(priced), layers, whole)


def _least_state(request: Request, parameters: Real, meshes: Meshes, microbatches: Int64) -> Real:
    """Persistent bytes of a whole pipeline that no allowed sharding removes, without gradients
    that are only made while the activations of the step's one microbatch go."""
    rules, most = request.machine.rules, max(request.zero_stages)
    ranks = (meshes.dp * meshes.cp * meshes.tp).astype(np.float64)
    least = min(rules.held_gradient_bytes, rules.whole_gradient_bytes)
    gradients = np.where(request.stack.new_gradients & (microbatches == 1), 0, least)
    state = parameters * 0.0
    for bytes_each, sharded_from in (
        (rules.weight_bytes, rules.weights_split_from),
        (gradients, 2),
        (rules.optimizer_bytes, 1),
    ):
        state += parameters * bytes_each / (ranks if most >= sharded_from else 1.0)
    return state


@dataclass(frozen=True)
class PricedLayouts:
    """Layouts with their tables and bounds; ``leaf`` takes one of them out."""

    meshes: Meshes
    layouts: Layouts
    tables: PricedConfigs
    config: Int64
    """Column of each layout in the tables."""
    bound_ns: Real
    """Lower bound on the step; infinity where no partition can fit."""
    request: Request

    def leaf(self, index: int) -> Leaf:
        """The leaf of layout ``index``."""
        mesh = int(self.layouts.mesh[index])
        per_step = int(self.meshes.dp[mesh] * self.meshes.microbatch[mesh])
        return self.tables.leaf(
            int(self.config[index]),
            schedule=SCHEDULES[int(self.layouts.schedule[index])],
            vpp=int(self.layouts.vpp[index]),
            microbatches=self.request.global_batch // per_step,
            uneven=self.request.stack.uneven_stages,
            order=self.request.order,
            outside=int(self.layouts.outside[index]),
        )


def recompute_options(request: Request, layers: int) -> tuple[Recompute, ...]:
    """What a stage may recompute: nothing, some modules of its layers, a number of layers in one
    way and the rest in another, or a number of whole layers. The numbers ascend, those of ``full``
    last, wherever the stack lists it."""
    options: list[Recompute] = []
    for mode in sorted(recompute_modes(request), key=lambda mode: mode == "full"):
        if mode != "full":
            options.append((mode, 0))
        elif request.stack.recompute_layer_count:
            options += (("full", count) for count in range(1, layers + 1))
        else:
            options.append(("full", layers))
    mixed = [(mode, count) for mode in mixed_modes(request) for count in range(1, layers)]
    place = next((i for i, (mode, _) in enumerate(options) if mode == "full"), len(options))
    return (*options[:place], *mixed, *options[place:])


def price_layouts(
    request: Request, meshes: Meshes, layouts: Layouts, *, cutoff_ns: float = np.inf
) -> PricedLayouts:
    """Price layouts and bound them; memory is only looked at where time stays below the cutoff."""
    key = np.stack(
        [layouts.mesh, layouts.dp_replicate, layouts.dp_shard, layouts.zero_stage, layouts.reshard]
    )
    changed = np.any(np.diff(key, axis=1) != 0, axis=0) if key.shape[1] else np.zeros(0, bool)
    config = np.concatenate([[0], np.cumsum(changed)]).astype(np.int64)[: len(layouts)]
    first = np.concatenate([[True], changed])[: len(layouts)]
    tables = price_configs(
        request.workload, request.machine,
        configs_of_meshes(
            meshes.take(layouts.mesh[first]), layouts.dp_replicate[first],
            layouts.dp_shard[first], layouts.zero_stage[first], layouts.reshard[first],
        ),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
    )  # fmt: skip
    microbatches = request.global_batch // (meshes.dp * meshes.microbatch)[layouts.mesh]
    bound_ns = np.full(len(layouts), np.inf)
    inside = layouts.outside == 0
    if inside.any():
        relaxation = Relaxation(
            tables,
            config=config[inside],
            schedule=layouts.schedule[inside],
            vpp=layouts.vpp[inside],
            microbatches=microbatches[inside],
            modes=recompute_modes(request),
            counted=request.stack.recompute_layer_count,
            per_stage=request.stack.recompute_per_stage,
            free=request.free_stages,
            order=request.order,
        )
        bound_ns[inside] = relaxation.bounds(cutoff_ns)
    if not inside.all():
        beside = OutsideLayouts(
            config, layouts.schedule, layouts.vpp, microbatches, layouts.outside
        ).take(np.flatnonzero(~inside))
        modes = recompute_modes(request)
        bound_ns[~inside] = outside_step_bounds(tables, beside, modes, cutoff_ns)
    return PricedLayouts(meshes, layouts, tables, config, bound_ns, request)
