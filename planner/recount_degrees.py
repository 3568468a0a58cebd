"""Degrees that a mesh may have, as the recheck reads them from stack and job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.models.spec import AttentionSpec, BlockSpec, Mixer, ModelSpec
from planner.request import Request

if TYPE_CHECKING:
    from planner.recount import Mesh


def divisors(number: int) -> list[int]:
    """Divisors of a number, one by one."""
    return [d for d in range(1, number + 1) if number % d == 0]


def expert_degrees(request: Request, tp: int, most: int) -> list[int]:
    """Ranks that share an expert: a part of tp's, or where experts have a mesh of their own of
    the ``most`` that ep leaves."""
    if not request.workload.expert_count or not request.stack.expert_tensor_parallel:
        return [1]
    own_mesh = request.stack.expert_tensor_parallel == "any"
    return divisors(most if own_mesh else tp)


def context_levels(request: Request, cp: int) -> Iterator[tuple[str, int]]:
    """Kinds of context parallelism and their inner groups; of a job's list the kind that has them,
    or else the first."""
    kinds: tuple[str, ...] = request.stack.cp_kinds
    if cp == 1:
        yield (kinds or ("p2p",))[0], 1
        return
    if request.job.cp_kinds:
        kinds = (max(request.job.cp_kinds, key=lambda kind: kind.startswith("a2a_")),)
    for kind in kinds:
        if kind not in ("a2a_p2p", "a2a_all_gather"):
            yield kind, 1
        else:
            yield from ((kind, inner) for inner in divisors(cp)[1:-1])


def meshes_of_layers(mesh: Mesh, block: BlockSpec, request: Request) -> list[Mesh]:
    """The mesh as the layers of a block see it: in each kind of context parallelism that the job
    lists for them, or as it is."""
    listed, model = request.job.cp_kinds, request.model
    if not listed or not isinstance(model, ModelSpec):
        return [mesh]
    places = [model.blocks[run.block] for run in model.layers for _ in range(run.count)]
    kinds = {listed[n % len(listed)] for n, own in enumerate(places) if own == block}
    return [replace(mesh, cp_kind=kind) for kind in sorted(kinds)] or [mesh]


def parts_of_groups(mixer: Mixer | None, tp: int, request: Request) -> bool:
    """Whether ranks hold parts of query groups under an optimizer that needs them whole."""
    if request.job.optimizer != "muon" or not isinstance(mixer, AttentionSpec):
        return False
    return "muon_takes_whole_query_groups" in request.stack.rules and mixer.kv_heads % tp > 0
