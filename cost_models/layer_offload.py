"""Activations of a model's first layers that wait on the host between forward and backward.

Megatron-Core (``--cpu-offloading-num-layers``) wraps the first ``n`` of ``L`` layers in Transformer
Engine's offload (1.13.0, transformer_engine/pytorch/cpu_offload.py; the same up to 2.9,
``AsyncDoubleBufferGroupOffloadHandler``): without a pipeline, and with nothing run again
(transformer_config.py). A copy to the host starts when that of the layer before is over; the model
waits for it, and frees the layer, behind a layer that ``layer_window_map`` names: the ``L`` layers
are dealt out evenly to the ``n`` copies. The backward fetches in the same windows. So what of a
copy is longer than the passes of its window is waited for, and one layer more than stay is on the
device: in the forward the one that is sent, in the backward the one that is fetched. Fetched
tensors may have two buffers of their own that stay for the run (``double_buffered``). Before 1.10
each copy had the pass of the next layer and no other (``spread``). From 2.10 on the last copy must
be over one layer sooner, and one layer less is on the device: nearly the same.

Tensors leave that Transformer Engine's modules mark: inputs of norms and products, heads, attention
outputs; and what a fused SwiGLU reads, where Megatron-Core marks it (from 0.13 on, not in experts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layout import RecomputePolicy
from cost_models.ops import SavedTensor
from cost_models.recompute import mode_rows
from cost_models.step import Field, Machine
from hardware_profiles.stack_words import LayerOffload

SWIGLU = "swiglu"
"""``SavedTensor.input_of`` of what a fused SwiGLU of a dense MLP reads."""
_INPUTS = (
    "softmax_statistics", "activation", "shared_activation", "expert_activation", "shared_input",
    "projection_input",
)  # fmt: skip
"""What Transformer Engine's modules keep, beside inputs that have a name of their own."""


def leaves(tensor: SavedTensor, spec: LayerOffload) -> bool:
    """Whether a tensor of an offloaded layer is sent."""
    if tensor.input_of is not None:
        return tensor.input_of != "moe_act" and (tensor.input_of != SWIGLU or spec.swiglu)
    ends = (".norm_input", ".norm_statistics", ".input")
    return tensor.name in _INPUTS or tensor.name.endswith(ends)


def sent_bytes(kind: LayerKind, shard: Shard, spec: LayerOffload) -> Int64:
    """What one layer sends per microbatch and device."""
    sent = [tensor.bytes for tensor in kind.saved(shard) if leaves(tensor, spec)]
    return np.zeros_like(shard.tp) + sum(sent)


def windows(layers: int, sent: int, *, spread: bool) -> list[range]:
    """Layers that each copy of the first ``sent`` layers may run beside."""
    if not spread:
        return [range(i + 1, i + 2) for i in range(sent)]
    each, more = divmod(layers, sent)
    ends = [each * (i + 1) - 1 + min(i + 1, more) for i in range(sent)]
    return [range(a + 1, b + 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def waits_ns(
    layers: Sequence[str], beside: Sequence[range], copies: dict[str, Int64],
    passes: dict[str, Int64],
) -> Int64:  # fmt: skip
    """ns that one pass through all ``layers`` waits for the ``copies`` of the first ones, which run
    ``beside`` others; both by kind of layer."""
    total = np.zeros_like(next(iter(copies.values())))
    alike: Counter[tuple[str, tuple[tuple[str, int], ...]]] = Counter()
    for name, window in zip(layers, beside, strict=False):
        alike[name, tuple(sorted(Counter(layers[i] for i in window).items()))] += 1
    for (name, held), count in alike.items():
        hidden = sum([n * passes[other] for other, n in held], np.zeros_like(total))
        total += count * np.maximum(copies[name] - hidden, 0)
    return total


def send_layers(
    tables: Sequence[Int64], names: Sequence[str], workload: WorkloadGraph, shard: Shard,
    pp: Int64, machine: Machine, capacity_bytes: int,
) -> None:  # fmt: skip
    """Take what the first layers send off what the policies that send them keep, and add what both
    passes wait; in equal shares for all layers of a kind, which one stage holds.

    Where there is a pipeline a layer keeps as much as the device has, so that nothing fits: the
    software refuses it. Not without a batch: what a bound asks about stands for any pipeline.
    """
    policies = [policy for policy in workload.policies if policy.hosted_layers]
    spec = machine.stack.layer_offload
    if not policies or spec is None:
        return
    places = mode_rows(tuple(policy.name for policy in workload.policies))
    link = machine.cluster.groups[0].node.host_link.si
    sent = {name: sent_bytes(workload.kinds[name], shard, spec) for name in names}
    copies = {n: np.ceil(size / link * 1e9).astype(np.int64) for n, size in sent.items()}
    layers = workload.layers
    held = Counter(layers)
    for policy in policies:
        kept, working, extra = places[policy.name]
        if policy.hosted_layers >= len(layers):
            for table in tables:
                table[kept] = capacity_bytes
            continue
        away = Counter(layers[: policy.hosted_layers])
        beside = windows(len(layers), policy.hosted_layers, spread=spec.spread)
        waits = sum(
            waits_ns(layers, beside, copies, dict(zip(names, each, strict=True)))
            for each in ([t[field] for t in tables] for field in (Field.FORWARD, Field.BACKWARD))
        )
        most = np.max([sent[name] for name in away], axis=0)
        part = np.max([sent[name] * away[name] // held[name] for name in names], axis=0)
        # The last layer's blocks are free beside the loss (``Leaf.idle_forward`` sees ``part``).
        stays = most - part + (2 * most if spec.double_buffered else 0)
        for name, table in zip(names, tables, strict=True):
            table[kept] += -(-stays // len(layers)) - sent[name] * away[name] // held[name]
            if workload.global_batch is not None:
                table[kept] = np.where(pp > 1, capacity_bytes, table[kept])
            table[working] += 0 if spec.double_buffered else part
            table[extra] += -(-waits // len(layers))


def hosted_bytes(
    workload: WorkloadGraph, shard: Shard, policy: RecomputePolicy, spec: LayerOffload
) -> Int64:
    """What one device has on its host under a policy, of one microbatch."""
    total = np.zeros_like(shard.tp)
    for name, count in Counter(workload.layers[: policy.hosted_layers]).items():
        total = total + count * sent_bytes(workload.kinds[name], shard, spec)
    return total
