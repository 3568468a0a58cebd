"""Which rules alone stand between a request and a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.graph import Bools, Int64
from planner.meshes import Meshes
from planner.request import Request
from planner.space import enumerate_meshes, expand, layout_rules, mesh_rules
from planner.specs import JobSpec

CHUNK = 4096
"""Meshes whose layouts are tried at once."""

WISHES = (
    "constraints", "optimizer", "optimizer_offload", "parameter_offload",
    "optimizer_offload_share", "activation_offload", "tensor_transpose", "cp_kinds",
)  # fmt: skip
"""What a job may ask for that others of its model and stack do without."""


def decisive_rules(request: Request) -> Counter[str]:
    """Layouts that break one rule and no other, by that rule: of the rules that come with the
    job's wishes, where there are such, for the others hold whatever is asked.

    Each layout would be possible, for all that rules can tell, without the rule. The count of what
    a rule removes (``Space.removed``) depends on the order of the rules; this does not.
    """
    reasons, rules = _reasons(request), [broken for _, broken in mesh_rules(request)]
    found: Counter[str] = Counter()
    for meshes in enumerate_meshes(request):
        count, last = _broken([broken(meshes) for broken in rules], 0)
        near = np.flatnonzero(count < 2)
        for start in range(0, len(near), CHUNK):
            part = near[start : start + CHUNK]
            which = _broken_alone(request, meshes.take(part), count[part], last[part], len(rules))
            for index, number in zip(*np.unique(which, return_counts=True), strict=True):
                found[reasons[index]] += int(number)
    plain = {
        name: JobSpec.model_fields[name].get_default(call_default_factory=True) for name in WISHES
    }
    known = {*_reasons(replace(request, job=request.job.model_copy(update=plain)))}
    return Counter({why: n for why, n in found.items() if why not in known}) or found


def _reasons(request: Request) -> list[str]:
    """All rules of a request, in their order."""
    return [why for why, _ in (*mesh_rules(request), *layout_rules(request))]


def _broken_alone(request: Request, meshes: Meshes, count: Int64, last: Int64, first: int) -> Int64:
    """The one rule of each layout that breaks no other, by its index. The meshes break ``count``
    themselves, the last of which is ``last``; rules on layouts are counted from ``first``."""
    layouts = expand(request, meshes)
    gathered = meshes.take(layouts.mesh)
    masks = [broken(gathered, layouts) for _, broken in layout_rules(request)]
    more, which = _broken(masks, first)
    alone: Int64 = np.where(more > 0, which, last[layouts.mesh])[more + count[layouts.mesh] == 1]
    return alone


def _broken(masks: Sequence[Bools], first: int) -> tuple[Int64, Int64]:
    """How many masks are set for each row, and the index of the last that is."""
    table = np.array(masks)
    count: Int64 = table.sum(axis=0, dtype=np.int64)
    last: Int64 = first + len(masks) - 1 - np.argmax(table[::-1], axis=0)
    return count, last
