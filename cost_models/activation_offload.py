"""Inputs of modules that wait on the host between forward and backward, in every layer.

After the forward of a module its input leaves over the device's link, beside the modules that
follow; in the backward a module's input is fetched while the module behind it works. What of the
way is longer than the layer's own pass is waited for. The layer whose backward comes next keeps its
inputs on the device, so that much is there all along
(NVIDIA/Megatron-LM, megatron/core/pipeline_parallel/fine_grained_activation_offload.py:
``bulk_offload``, ``bulk_reload``, ``post_warmup_callback``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard
from cost_models.layout import RecomputePolicy
from cost_models.recompute import mode_rows
from cost_models.step import Field

if TYPE_CHECKING:
    from cost_models.step import Machine


ENDS = ("embedding", "head")
"""Kinds that are no layers of the decoder; their inputs stay."""


def moved_bytes(
    kind: LayerKind, shard: Shard, policy: RecomputePolicy | None, modules: frozenset[str]
) -> dict[str, Int64]:
    """Bytes that one layer sends to the host per microbatch, by module.

    ``policy`` is what is run again instead of kept (None: nothing): such tensors have nothing to
    send, nor has a layer that is run again as a whole.
    """
    if policy is not None and policy.keeps is not None:
        return {}
    again = frozenset() if policy is None else policy.modules
    moved: dict[str, Int64] = {}
    for tensor in kind.saved(shard):
        if tensor.input_of in modules and not again.intersection(tensor.modules):
            name = str(tensor.input_of)
            moved[name] = moved.get(name, np.zeros_like(shard.tp)) + tensor.bytes
    return moved


def move_inputs(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...],
    machine: Machine,
) -> None:  # fmt: skip
    """Move them in a priced table: kept bytes go, the largest module's come back one ahead.

    The layer's forward and backward hold the waits of a layer that runs nothing again. A policy
    that keeps less sends less; what that shortens of a wait is taken off its extra time, down to
    nothing.
    """
    rows[Field.HOST_WAIT] = 0
    if not machine.offload.inputs or kind.name in ENDS:
        return
    forward, backward = rows[Field.FORWARD].copy(), rows[Field.BACKWARD].copy()
    plain = _waits(rows, rows[Field.EXTRA_NONE] * 0, kind, shard, None, machine)
    rows[Field.FORWARD] += plain[0]
    rows[Field.BACKWARD] += plain[1]
    rows[Field.HOST_WAIT] = plain[0] + plain[1]
    places = mode_rows(tuple(policy.name for policy in policies))
    before = np.stack([forward, backward])
    for policy in policies:
        extra = places[policy.name].extra
        waits = _waits(before, rows[extra], kind, shard, policy, machine)
        rows[extra] = np.maximum(rows[extra] + sum(waits) - rows[Field.HOST_WAIT], 0)
    for again in (None, *policies):
        modes = places["none" if again is None else again.name]
        moved = moved_bytes(kind, shard, again, machine.offload.inputs)
        nothing = np.zeros_like(shard.tp)
        rows[modes.kept] -= np.sum([nothing, *moved.values()], axis=0, dtype=np.int64)
        rows[modes.working] += np.max([nothing, *moved.values()], axis=0)


def _waits(
    passes: Int64, extra: Int64, kind: LayerKind, shard: Shard, policy: RecomputePolicy | None,
    machine: Machine,
) -> tuple[Int64, Int64]:  # fmt: skip
    """ns that forward and backward (the first two of ``passes``) wait under a policy."""
    moved = moved_bytes(kind, shard, policy, machine.offload.inputs)
    size = np.sum([extra * 0, *moved.values()], axis=0, dtype=np.int64)
    way = np.ceil(size / machine.cluster.groups[0].node.host_link.si * 1e9).astype(np.int64)
    return np.maximum(way - passes[0], 0), np.maximum(way - passes[1] - extra, 0)


def staying_bytes(kinds: Iterable[LayerKind], shard: Shard, machine: Machine) -> Int64:
    """What one layer, of the kind with most, keeps on the device although it could send it."""
    most = np.zeros_like(shard.tp)
    for kind in kinds if machine.offload.inputs else ():
        moved = moved_bytes(kind, shard, None, machine.offload.inputs)
        most = np.maximum(most, np.sum([most * 0, *moved.values()], axis=0, dtype=np.int64))
    return most
