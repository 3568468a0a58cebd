"""Recomputation that a job may use, as the recheck reads it from stack and job."""

from __future__ import annotations

from cost_models.layout import RecomputeMode
from planner.recompute import named_policy
from planner.request import Request


def recompute_modes(request: Request) -> tuple[RecomputeMode, ...]:
    """Modes that the stack has and the user allows."""
    job = request.job
    refused = {*request.stack.recompute_refused.get(job.precision, ())}
    able = (p.name for p in request.workload.policies if refused.isdisjoint(p.modules))
    return tuple(
        mode
        for mode in ("none", *able)
        if (mode != "none" or "none" in request.stack.recompute)
        and (job.allow_recompute or mode == "none")
        and _asked(request) in (None, mode)
    )


def mixed_modes(request: Request) -> list[RecomputeMode]:
    """Pairs of modes that may share a virtual stage, as ``first layers / rest``."""
    stack, offered = request.stack, recompute_modes(request)
    if not stack.recompute_mixed:
        return []
    again = {p.name: set(p.modules) for p in request.workload.policies if p.keeps is None}
    again["none"] = set()
    mixed = []
    for front in offered:
        for rest in set(offered) & set(again):
            if front in again and again[front] - again[rest] and not again[rest] - again[front]:
                mixed.append(f"{front}/{rest}")
            if front == "full" and rest != "none" and stack.recompute_layer_count:
                mixed.append(f"{front}/{rest}")
    return sorted(mixed)


def _asked(request: Request) -> RecomputeMode | None:
    name = request.job.constraints.recompute
    return None if name is None else named_policy(name, request.stack).name
