"""Best-first branch and bound over layouts; every leaf is solved, simulated, and accounted for.

Meshes wait in the order of their bounds. The most promising are expanded into layouts, which wait
in the order of theirs; the first layout in the queue is opened as a leaf (``planner.leaves``).

The search ends when nothing left has a bound below ``(1 - tolerance) * best``; then the least
bound of everything, opened or not, is the proved lower bound.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cost_models.cp_kinds import cp_kind_of
from cost_models.layout import LISTED, SCHEDULES
from cost_models.leaf import Leaf
from planner.free_stages import free_partitions, improve, is_listed
from planner.leaves import Candidate, Degrees, Incumbent, Opening
from planner.meshes import Meshes
from planner.options import runnable
from planner.outside import close_outside
from planner.program import UNLIMITED
from planner.request import Request
from planner.rounds import open_rounds
from planner.space import build_space, expand, layout_rules
from planner.tables import (
    PricedLayouts,
    mesh_bounds,
    price_layouts,
    recompute_options,
)

FIRST_BATCH = 48
"""Meshes expanded at first; each following batch is larger, up to :data:`LARGEST_BATCH`."""
LARGEST_BATCH = 4096
OUT_OF_MEMORY = "does not fit in memory, whatever is recomputed"
IMPROVED = 3
"""Plans that are improved where virtual stages are free."""
SPARES = 256
"""Layouts per batch looked at for alternatives."""
ALTERNATIVE_TOLERANCE = 0.1


@dataclass
class SearchResult:
    """What the search found and proved."""

    best: Candidate | None
    bound_ns: int | None
    complete: bool
    """Whether the search ended by itself: nothing left could win."""
    size: int
    removed: Counter[str]
    pruned: int
    leaves: int
    simulated: int
    kept: list[Candidate] = field(default_factory=list)


class Search:
    """One search; :meth:`run` returns the result, also after an interruption."""

    def __init__(
        self,
        request: Request,
        *,
        time_limit_s: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.request = request
        self.incumbent = Incumbent(request.job.tolerance)
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.progress = progress
        self.proved = UNLIMITED
        """Least bound of everything that was closed without being the best."""
        self.leaves = self.pruned = 0
        self.queue: list[tuple[float, int, int, PricedLayouts]] = []
        self.spares: dict[tuple[int, ...], tuple[float, int, PricedLayouts]] = {}
        """Best bound of each kind of mesh, hopeless ones too: where alternatives come from."""
        self.batches = 0

    def run(self) -> SearchResult:
        """Search to the end, the limit, or an interruption."""
        space = build_space(self.request)
        complete, meshes = False, space.meshes
        order: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)
        bounds = np.zeros(0)
        position = 0
        try:
            if len(meshes):
                bounds = mesh_bounds(self.request, meshes)
                self._count_memory(space.removed, meshes, np.isinf(bounds))
                meshes = meshes.take(np.isfinite(bounds))
                bounds = bounds[np.isfinite(bounds)]
                order = np.argsort(bounds, kind="stable")
            size = FIRST_BATCH
            while True:
                next_mesh = bounds[order[position]] if position < len(order) else np.inf
                next_leaf = self.queue[0][0] if self.queue else np.inf
                least = min(next_mesh, next_leaf)
                if least >= self.incumbent.cutoff or np.isinf(least):
                    break
                self._check_deadline()
                if next_mesh <= next_leaf:
                    chunk = order[position : position + size]
                    chunk = chunk[bounds[chunk] < self.incumbent.cutoff]
                    self._expand(meshes.take(chunk), space.removed)
                    position += len(chunk)
                    size = min(size * 2, LARGEST_BATCH)
                else:
                    bound, _, index, layouts = heapq.heappop(self.queue)
                    self._open(layouts, index, int(bound), space.removed)
            self._improve()
            # Without a plan, what was closed with a bound alone is open still.
            complete = self.incumbent.best is not None or self.proved == UNLIMITED
        except (_DeadlineError, KeyboardInterrupt) as stop:
            if isinstance(stop, KeyboardInterrupt) and self.incumbent.best is None:
                raise
        waiting = order[position:]
        self.pruned += len(self.queue) + int(meshes.weight[waiting].sum())
        left = [int(entry[0]) for entry in self.queue[:1]]
        left += [int(bounds[waiting[0]])] if len(waiting) else []
        bound_ns = None
        if self.incumbent.best is not None:
            bound_ns = min([self.proved, self.incumbent.best.time_ns, *left])
        return SearchResult(
            best=self.incumbent.best,
            bound_ns=bound_ns,
            complete=complete,
            size=space.size,
            removed=space.removed,
            pruned=self.pruned,
            leaves=self.leaves,
            simulated=self.incumbent.simulated,
            kept=sorted(self.incumbent.kept, key=Candidate.key),
        )

    def _improve(self) -> None:
        """Where virtual stages are free, move single layers of the best plans."""
        if not self.request.free_stages:
            return
        for candidate in sorted(self.incumbent.kept, key=Candidate.key)[:IMPROVED]:
            if candidate.leaf.schedule in LISTED:
                improve(self.incumbent, candidate, self._check_deadline)

    def _count_memory(
        self, removed: Counter[str], meshes: Meshes,
        bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    ) -> None:  # fmt: skip
        if bad.any():
            removed[OUT_OF_MEMORY] += int(meshes.weight[bad].sum())

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _DeadlineError

    def _expand(self, meshes: Meshes, removed: Counter[str]) -> None:
        """Turn meshes into layouts, apply the layout rules, price, and queue what may win."""
        layouts = expand(self.request, meshes)
        for reason, broken in layout_rules(self.request):
            bad = broken(meshes.take(layouts.mesh), layouts)
            if bad.any():
                removed[reason] += int(bad.sum())
                layouts = layouts.take(~bad)
        if not len(layouts):
            return
        cutoff = self.incumbent.cutoff
        priced = price_layouts(self.request, meshes, layouts, cutoff_ns=float(cutoff))
        infinite = np.isinf(priced.bound_ns)
        if infinite.any():
            removed[OUT_OF_MEMORY] += int(infinite.sum())
        self.batches += 1
        hopeless = ~infinite & (priced.bound_ns >= cutoff)
        if hopeless.any():
            self.pruned += int(hopeless.sum())
            self._close(int(priced.bound_ns[hopeless].min()))
        self._remember_spares(priced)
        for index in np.flatnonzero(~infinite & ~hopeless).tolist():
            entry = (float(priced.bound_ns[index]), self.batches * (1 << 40) + index, index, priced)
            heapq.heappush(self.queue, entry)
        self._say(f"{self.batches} batches, {len(self.queue):,} layouts waiting")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            best = self.incumbent.best
            found = f"best {best.time_ns / 1e9:.4g} s, " if best else ""
            self.progress(f"{found}{self.leaves:,} leaves opened, {text}")

    def _remember_spares(self, priced: PricedLayouts) -> None:
        meshes, own = priced.meshes, priced.layouts.mesh
        order = np.argsort(priced.bound_ns, kind="stable")[:SPARES]
        for index in order.tolist():
            bound = float(priced.bound_ns[index])
            if np.isinf(bound):
                break
            mesh = int(own[index])
            key = tuple(int(getattr(meshes, name)[mesh]) for name in ("tp", "cp", "pp", "ep"))
            if key not in self.spares or bound < self.spares[key][0]:
                self.spares[key] = (bound, index, priced)

    def alternatives(self, count: int) -> list[Candidate]:
        """The best layouts with other (tp, cp, pp, ep) than the winner, about by time.

        Some were simulated on the way; for the rest the kinds of mesh with the least bounds are
        opened, whatever the cutoff.
        """
        if self.incumbent.best is None:
            return []
        by_preference = sorted(self.incumbent.kept, key=Candidate.key, reverse=True)
        chosen = {_mesh_key(c.degrees): c for c in by_preference}
        chosen.pop(_mesh_key(self.incumbent.best.degrees), None)
        winner, tolerance = self.incumbent.best, self.incumbent.tolerance
        # A fair completion of each will do: what is within this of it is not listed.
        self.incumbent.tolerance = ALTERNATIVE_TOLERANCE
        spares = sorted(self.spares.items(), key=lambda item: (item[1][0], item[0]))
        for key, (bound, index, priced) in spares[: 4 * count]:
            if key in chosen or key == _mesh_key(winner.degrees):
                continue
            listed = sorted(chosen.values(), key=Candidate.key)[:count]
            if len(listed) == count and bound >= listed[-1].time_ns:
                break
            self.incumbent.best, before = None, len(self.incumbent.kept)
            try:
                self._open(priced, index, 0, Counter(), thorough=False)
            except _DeadlineError:
                break
            found = sorted(self.incumbent.kept[before:], key=Candidate.key)
            if self.incumbent.best is not None and found:
                chosen[key] = found[0]
        self.incumbent.best, self.incumbent.tolerance = winner, tolerance
        return sorted(chosen.values(), key=Candidate.key)[:count]

    def _close(self, bound_ns: int) -> None:
        self.proved = min(self.proved, bound_ns)

    def _open(
        self, layouts: PricedLayouts, index: int, bound_ns: int, removed: Counter[str], *,
        thorough: bool = True,
    ) -> None:  # fmt: skip
        """Solve a leaf: raise its bound to the cutoff, or find out that nothing of it fits."""
        if bound_ns >= self.incumbent.cutoff:
            self.pruned += 1
            self._close(bound_ns)
            return
        self.leaves += 1
        if self.leaves % 64 == 0:
            self._say(f"{len(self.queue):,} layouts waiting")
        leaf = layouts.leaf(index)
        degrees = _degrees(layouts, index, leaf, self.request)
        options = runnable(
            recompute_options(self.request, len(leaf.sequence)),
            tp=int(degrees["tp"]), sequence_parallel=bool(degrees["sequence_parallel"]),
        )  # fmt: skip
        if leaf.outside is not None:
            reached = close_outside(leaf, degrees, options, self.incumbent, self._check_deadline)
            self._settle(reached, removed)
            return
        free = self.request.free_stages and leaf.schedule in LISTED
        partitions = free_partitions(leaf) if free else None
        opening = Opening(
            leaf, degrees, self.incumbent, self._check_deadline, thorough=thorough,
            sizes=open_rounds(self.request, layouts.meshes, layouts.layouts, index),
            partitions=partitions,
        )  # fmt: skip
        reached = opening.close(options, per_stage=self.request.stack.recompute_per_stage)
        if partitions is not None and not is_listed(leaf):
            reached = bound_ns if reached is None else min(reached, bound_ns)
        self._settle(reached, removed)

    def _settle(self, reached: int | None, removed: Counter[str]) -> None:
        """Count a leaf by what its bound came to; None: nothing of it fits."""
        if reached is None:
            removed[OUT_OF_MEMORY] += 1
        else:
            self._close(reached)


class _DeadlineError(Exception):
    """The time limit was reached."""


def _mesh_key(degrees: Degrees) -> tuple[int, ...]:
    return tuple(int(degrees[name]) for name in ("tp", "cp", "pp", "ep"))


def _degrees(layouts: PricedLayouts, index: int, leaf: Leaf, request: Request) -> Degrees:
    meshes, own = layouts.meshes, layouts.layouts
    mesh = int(own.mesh[index])
    zero = int(own.zero_stage[index])
    cp_kind, cp_inner = cp_kind_of(int(meshes.cp_kind[mesh]))
    ranks = int(meshes.dp[mesh] * meshes.cp[mesh] * meshes.tp[mesh])
    return {
        "dp_replicate": int(own.dp_replicate[index]),
        "dp_shard": int(own.dp_shard[index]),
        "cp": int(meshes.cp[mesh]),
        "cp_kind": cp_kind,
        "cp_inner": cp_inner,
        "tp": int(meshes.tp[mesh]),
        "sequence_parallel": bool(meshes.sp[mesh]),
        "pp": int(meshes.pp[mesh]),
        "vpp": int(own.vpp[index]),
        "ep": int(meshes.ep[mesh]),
        "etp": int(meshes.etp[mesh]),
        "expert_dp": ranks // int(meshes.ep[mesh] * meshes.etp[mesh]),
        "microbatch_size": int(meshes.microbatch[mesh]),
        "num_microbatches": leaf.microbatches,
        "zero_stage": zero,
        "reshard_after_forward": request.resharding(zero, int(own.reshard[index])),
        "schedule": SCHEDULES[int(own.schedule[index])],
        "round_size": 0,
        "layers_outside": int(own.outside[index]),
    }
