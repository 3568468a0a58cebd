"""Look for a completion that beats a claimed lower bound.

Every layout of the space whose relaxed bound is below the claimed one is taken apart, partition by
partition, until its own bound or its simulated time is not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from cost_models.configs import Configs, cp_kind_code, price_configs
from cost_models.layout import SCHEDULES
from cost_models.leaf import (
    ChunkCosts,
    Completion,
    Leaf,
    Recompute,
    chunk_costs,
    fits,
    peak_bytes,
    rank_costs,
    simulate_step,
    stage_costs,
)
from cost_models.partitions import interleaved_bounds
from cost_models.relaxation import Relaxation
from cost_models.step import Field
from cost_models.surrogate import EMPTY_LABEL, Label, extend_label, surrogate_ns
from planner.recount import every_layout, every_mesh, recompute_modes, wanted
from planner.request import Request

BATCH = 20_000
"""Layouts priced at once."""
LARGEST_LEAF = 2_000_000
"""Partial completions that one leaf may take; beyond it the bound counts as unchecked."""


def better_layout(request: Request, least_ns: int) -> str | None:
    """A layout of the space that simulates below ``least_ns``, in words, or None."""
    batch: list[tuple[int, ...]] = []
    for mesh in every_mesh(request):
        degrees = (
            mesh.tp, int(mesh.sp), mesh.cp, cp_kind_code(mesh.cp_kind), mesh.pp, mesh.ep, mesh.etp,
            mesh.mbs,
        )  # fmt: skip
        layouts = every_layout(mesh, request)
        batch += [(*degrees, *entry) for entry in layouts if wanted(mesh, entry, request)]
        if len(batch) >= BATCH:
            finding = _refute(np.array(batch, dtype=np.int64), least_ns, request)
            batch.clear()
            if finding:
                return finding
    return _refute(np.array(batch, dtype=np.int64), least_ns, request) if batch else None


def _refute(rows: np.ndarray[Any, np.dtype[np.int64]], least: int, request: Request) -> str | None:
    """A layout among ``rows`` that beats the claimed bound, in words."""
    tp, sp, cp, kind, pp, ep, etp, mbs, replicate, shard, zero, schedule, vpp = rows.T
    tables = price_configs(
        request.workload, request.machine,
        Configs(mbs, tp, cp, kind, ep, etp, sp.astype(bool), replicate, shard, pp, zero),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
    )  # fmt: skip
    m = request.global_batch // (replicate * shard * mbs)
    bounds = Relaxation(
        tables,
        config=np.arange(len(rows)),
        schedule=schedule,
        vpp=vpp,
        microbatches=m,
        modes=recompute_modes(request),
        counted=request.stack.recompute_layer_count,
        per_stage=request.stack.recompute_per_stage,
    ).bounds(float(least))
    for index in np.flatnonzero(bounds < least).tolist():
        leaf = tables.leaf(
            index,
            schedule=SCHEDULES[int(schedule[index])],
            vpp=int(vpp[index]),
            microbatches=int(m[index]),
            uneven=request.stack.uneven_stages,
        )
        better = _better_completion(leaf, least, request)
        if better is not None:
            return (
                f"tp {tp[index]} cp {cp[index]} pp {pp[index]} ep "
                f"{ep[index]} vpp {vpp[index]} microbatch {mbs[index]} {better}"
            )
    return None


def _better_completion(leaf: Leaf, least: int, request: Request) -> str | None:
    """A completion that fits and simulates below ``least`` ns, in words, or None."""
    options: list[Recompute] = []
    for mode in recompute_modes(request):
        if mode == "full":
            counts = range(1, len(leaf.sequence) + 1)
            if not request.stack.recompute_layer_count:
                counts = range(len(leaf.sequence), len(leaf.sequence) + 1)
            options += [("full", count) for count in counts]
        else:
            options.append((mode, 0))
    if leaf.vpp > 1:
        return _better_interleaved(leaf, least, options)
    groups = [options] if request.stack.recompute_per_stage else [[option] for option in options]
    budget = [LARGEST_LEAF]
    for group in groups:
        found = _descend(
            leaf, least, group, leaf.pp - 1, len(leaf.sequence), EMPTY_LABEL, [], budget
        )
        if found is not None:
            return found
        if budget[0] <= 0:
            return "takes too long to check"
        if group[0][0] == "full" and _time_only(leaf, group[0]) >= least:
            break
    return None


def _time_only(leaf: Leaf, option: Recompute) -> int:
    """Work of the widest rank, at least the average, with at least ``option`` layers recomputed on
    every stage that has as many: none is counted where a stage may have fewer."""
    work = sum(
        leaf.kinds[kind][Field.FORWARD] + leaf.kinds[kind][Field.BACKWARD] for kind in leaf.sequence
    )
    if option[1] >= len(leaf.sequence):
        work += sum(leaf.kinds[kind][leaf.modes["full"].extra] for kind in leaf.sequence)
    return leaf.microbatches * work // leaf.pp


def _better_interleaved(leaf: Leaf, least: int, options: list[Recompute]) -> str | None:
    for bounds in interleaved_bounds(leaf):
        tallest = max(b - a for a, b in pairwise(bounds))
        for option in options:
            if option[0] == "full" and option[1] > tallest and option != options[-1]:
                continue
            completion = Completion(bounds, (option,) * leaf.stages)
            ranks = stage_costs(leaf, completion)
            if surrogate_ns(leaf, ranks) >= least:
                if option[0] == "full":
                    break
                continue
            if fits(leaf, ranks) and simulate_step(leaf, ranks).total_ns < least:
                return f"with {option} takes {simulate_step(leaf, ranks).total_ns / 1e9:.6g} s"
    return None


def _descend(
    leaf: Leaf, least: int, options: list[Recompute], rank: int, last: int, label: Label,
    chosen: list[tuple[int, Recompute, ChunkCosts]], budget: list[int],
) -> str | None:  # fmt: skip
    """Depth first over partitions, last rank first, while the surrogate stays below ``least``."""
    budget[0] -= 1
    if budget[0] <= 0:
        return None
    if rank < 0:
        ranks = tuple(rank_costs(leaf, (chunk,)) for _, _, chunk in reversed(chosen))
        if last == 0 and simulate_step(leaf, ranks).total_ns < least:
            return f"takes {simulate_step(leaf, ranks).total_ns / 1e9:.6g} s"
        return None
    layers = len(leaf.sequence)
    fewest = 0 if leaf.pp > 1 and rank in (0, leaf.pp - 1) else 1
    if leaf.uneven:
        firsts = range(last - fewest, -1, -1) if rank else range(0, -1, -1)
    else:
        firsts = range(rank * layers // leaf.pp, rank * layers // leaf.pp - 1, -1)
    for first in firsts:
        if first > last - fewest:
            continue
        slow = True
        for option in options:
            chunk = chunk_costs(leaf, rank, first, last, option)
            costs = rank_costs(leaf, (chunk,))
            if leaf.microbatches * costs.work_ns >= least:
                continue
            slow = False
            if peak_bytes(leaf, rank, (chunk,)) > leaf.capacity_bytes:
                continue
            extended = extend_label(leaf, label, rank, costs)
            if _least_total(leaf, extended, rank, first) >= least:
                continue
            chosen.append((first, option, chunk))
            found = _descend(leaf, least, options, rank - 1, first, extended, chosen, budget)
            chosen.pop()
            if found is not None:
                return found
        if slow:
            break
    return None


def _least_total(leaf: Leaf, label: Label, rank: int, left: int) -> int:
    """A bound on all ways to place the first ``left`` layers on the ranks before ``rank``."""
    counts = leaf.counts[left]
    work = sum(
        count * (kind[Field.FORWARD] + kind[Field.BACKWARD])
        for kind, count in zip(leaf.kinds, counts, strict=True)
    )
    total = max(label.ends, label.nested + work)
    if rank:
        total = max(total, -(-leaf.microbatches * work // rank))
    if leaf.schedule == "1f1b":
        trips = 1 + (leaf.microbatches - 1) // leaf.pp
        total = max(total, trips * (label.work + work) + label.tail)
    elif leaf.schedule == "gpipe":
        # One trip of all layers, and the widest rank, at least the average of those left, for
        # every other microbatch.
        widest = max(label.widest, -(-work // rank) if rank else 0)
        total = max(total, label.work + work + (leaf.microbatches - 1) * widest)
    return total + label.update + leaf.sync_ns
