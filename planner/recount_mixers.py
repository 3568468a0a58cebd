"""Whether a mixer of a layer can be split as a mesh says, as the recheck reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.models.spec import (
    AttentionSpec,
    GatedDeltaNetSpec,
    LatentAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    Mixer,
    SparseLatentAttentionSpec,
)

if TYPE_CHECKING:
    from planner.recount import Mesh
    from planner.request import Request


def impossible_mixer(mixer: Mixer | None, mesh: Mesh, request: Request, tower: bool) -> str | None:
    """Why this mixer cannot be split as the mesh says, or None."""
    stack = request.stack
    over_tp: list[int] = []
    over_cp: list[int] = []
    ways, runs = mesh.cp, stack.cp_kinds
    exchanges = mesh.cp_kind in ("a2a", "a2a_p2p", "a2a_all_gather")
    match mixer:
        case AttentionSpec():
            over_tp = [mixer.heads]
            over_cp = [mixer.kv_heads] if exchanges else []
            ways = mesh.cp_inner if mesh.cp_kind.startswith("a2a_") else mesh.cp
            if mixer.window is not None:
                runs = stack.cp_kinds_of.get("sliding windows", runs)
            if mixer.sinks:
                able = stack.cp_kinds_of.get("attention sinks", runs)
                runs = tuple(kind for kind in runs if kind in able)
            apart = mixer.sinks and "no_sinks_in_16_bit_pipelines" in stack.rules
            if apart and mesh.pp > 1 and request.job.precision != "fp32":
                return "the stack has no attention sinks in pipelines of 16 bits"
            if mixer.kv_heads % mesh.tp and (
                mesh.tp % mixer.kv_heads or not stack.kv_head_replication or mixer.output_gate
            ):
                return f"{mixer.kv_heads} KV heads do not split over tp {mesh.tp}"
        case LatentAttentionSpec():
            over_tp = [mixer.heads]
            over_cp = [mixer.heads] if exchanges else []
            ways = mesh.cp_inner if mesh.cp_kind.startswith("a2a_") else mesh.cp
            runs = stack.cp_kinds_of.get("latent attention", runs)
        case SparseLatentAttentionSpec():
            over_tp = [mixer.latent.heads]
        case MambaSpec():
            over_tp = over_cp = [mixer.inner]
        case Mamba2Spec():
            over_tp, over_cp = [mixer.heads, mixer.groups], [mixer.heads]
        case GatedDeltaNetSpec():
            over_tp = over_cp = [mixer.key_heads]
    for count in over_tp:
        if count % mesh.tp:
            return f"{count} heads do not split over tp {mesh.tp}"
    for count in over_cp if mesh.cp > 1 and not tower else []:
        if count % (mesh.tp * ways):
            return f"{count} heads do not split over tp x cp"
    if mesh.cp > 1 and not tower and mesh.cp_kind not in runs:
        return f"the stack has no {mesh.cp_kind} context parallelism for this attention"
    return None
