"""What the fields of a stack need of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from hardware_profiles.layers_spec import require_shared_vocabulary
from hardware_profiles.stack_words import (
    EVERYTHING,
    OFFLOAD,
    PARTITIONED,
    TILED,
    TILED_MLP,
    RankDimension,
)

if TYPE_CHECKING:
    from hardware_profiles.stack import StackSpec

_MODES = ("none", "selective", "full", PARTITIONED, TILED, TILED_MLP, OFFLOAD)


def require_consistent(stack: StackSpec) -> None:
    """Raise ``ValueError`` where fields contradict each other."""
    for mode in stack.recompute:
        parts = set(mode.split("+")) - {*stack.recompute_modules}
        lists = stack.save_lists
        listed = () if lists is None else (*lists.policies, *lists.offloaded, "custom")
        if lists is not None and lists.outside_pipeline in lists.policies:
            listed = (*listed, EVERYTHING)
        if parts and mode not in (*_MODES, *listed):
            known = ", ".join(stack.recompute_modules) or "none"
            raise ValueError(
                f"recompute names {sorted(parts)[0]!r}: none, selective, full, or "
                f"recompute_modules joined by + ({known})"
                + (f", or a save list ({', '.join(listed)})" if listed else "")
            )
    if OFFLOAD in stack.recompute and stack.layer_offload is None:
        raise ValueError(f"recompute: {OFFLOAD} needs layer_offload")
    if PARTITIONED in stack.recompute and "full" not in stack.recompute:
        raise ValueError(f"recompute: {PARTITIONED} needs full, which it is where tp is 1")
    drives = None if stack.offload is None else stack.offload.drives
    if drives is not None and drives.momentum_bytes and not stack.state.reduction_elements:
        raise ValueError(
            "offload.drives.momentum_bytes needs state.reduction_elements: buckets of gradients "
            "swap the groups"
        )
    one_stage = {"no_tied_embeddings_in_pipeline", "no_pipeline"} & {*stack.rules}
    if stack.layers.tied_ends == "one_unit" and not one_stage:
        raise ValueError(
            "layers.tied_ends one_unit puts both ends on one stage: it needs the rule "
            "no_tied_embeddings_in_pipeline or no_pipeline"
        )
    require_shared_vocabulary(stack.layers, stack.schedules, new_gradients=stack.new_gradients)
    freedom = stack.uneven_stages or stack.recompute_per_stage or stack.recompute_layer_count
    if stack.outside_layers and (
        freedom or "pipeline_needs_multiple_of_pp" not in stack.rules or stack.idle_forward
    ):
        raise ValueError(
            "outside_layers needs equal stages that all recompute alike, and the rule "
            "pipeline_needs_multiple_of_pp: the stages share the batch"
        )
    kept = stack.state.keeps_after_backward and "no_zero_3_with_pipeline" not in stack.rules
    if kept and (stack.recompute_layer_count or stack.recompute_mixed):
        raise ValueError("state.keeps_after_backward needs layers of a stage that recompute alike")
    if stack.recompute_mixed and not stack.recompute_per_stage:
        raise ValueError("recompute_mixed needs recompute_per_stage: bounds know no other way")
    needed = [d for d in get_args(RankDimension) if d != "cp" or stack.cp_kinds]
    if sorted({*stack.rank_order} | {*needed}) != sorted(stack.rank_order):
        raise ValueError(f"rank_order must hold each of {', '.join(needed)} once")
