"""Exact persistent state of a rank under Megatron-Core's contiguous buffers.

A layer's bytes carry an upper bound of what bucket ends may add (``cost_models.state``). Here the
buffers of a rank's model chunks are laid out parameter by parameter, as the software does; experts
are stored as Transformer Engine's grouped layers store them, all first products before the second.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cost_models import buffers, state
from cost_models.configs import shard_of
from cost_models.graph import LayerKind, Shard, Weight
from planner.priced import Priced


def exact_state(priced: Priced, rank: int) -> dict[str, int] | None:
    """Bytes of weights, gradients and optimizer state; None where a layer's own bytes are exact."""
    rules, layout = priced.tables.machine.rules, priced.layout
    if rules.layout != "contiguous" or layout.zero_stage not in (1, 2):
        return None
    if rules.optimizer.extra_bytes is not None or _has_frozen(priced):
        return None
    workload, machine = priced.tables.workload, priced.tables.machine
    shard = shard_of(workload, priced.tables.configs)
    ranks = layout.dp_shard * layout.cp
    expert_ranks = max(1, ranks * layout.tp // (layout.ep * layout.etp))
    whole = split = copied = 0
    for j in priced.leaf.held(rank):
        kinds = tuple(priced.modules(j))
        # Only the first model chunk of the first stage has more than one bucket.
        bucketed = j == 0 and machine.stack.overlap_dp_gradients
        for expert, ways in ((False, ranks), (True, expert_ranks)):
            sizes = [
                size
                for kind in kinds
                for size in _tensor_sizes(
                    kind, shard, workload.vocab_divisor, expert=expert, tied=layout.pp == 1
                )
            ]
            least = int(rules.least_bucket(np.array([ways]))[0]) if bucketed else None
            elements = buffers.contiguous_elements(sizes, ways, least)
            whole += elements
            split += elements // ways
        copied += sum(
            int(state.local_tensor(weight, shard, workload.vocab_divisor).total[0])
            for kind in kinds
            for weight in kind.weights
            if state.is_quantised(weight)
        )
    copies = -(-copied * rules.quantised_bytes_per_64 // state.START_ALIGNMENT)
    gradients = split if layout.zero_stage == 2 else whole
    return {
        "weights": whole * rules.weight_bytes + copies,
        "gradients": gradients * rules.held_gradient_bytes + whole * rules.backward_gradient_bytes,
        "optimizer": split * rules.optimizer_bytes,
    }


def _has_frozen(priced: Priced) -> bool:
    workload = priced.tables.workload
    kinds = (*workload.kinds.values(), workload.embedding, workload.head)
    return any(weight.frozen for kind in kinds for weight in kind.weights)


def _tensor_sizes(
    kind: LayerKind, shard: Shard, vocab_divisor: int, *, expert: bool, tied: bool
) -> Iterator[int]:
    """Elements of each parameter as it is stored: q, k and v in one, gate and up in one."""
    stored: list[tuple[str, int, int]] = []
    for name, parts in _stored_tensors(kind, expert=expert, tied=tied).items():
        locals_ = [state.local_tensor(part, shard, vocab_divisor) for part in parts]
        size = sum(int(local.elements[0]) for local in locals_)
        stored.append((name, size, int(locals_[0].count[0])))
    # As the modules of a layer stand: norm, output and input projection, then the second norm.
    norms = [size for name, size, count in stored if name == "norm" for _ in range(count)]
    mixer = [each for each in stored if each[0].startswith("attention")]
    mixer.sort(key=lambda each: each[0] != "attention.out")
    yield from norms[:1]
    for _, size, count in mixer:
        yield from [size] * count
    yield from norms[1:]
    for name, size, count in stored:
        if name != "norm" and not name.startswith("attention"):
            yield from [size] * count


def _stored_tensors(kind: LayerKind, *, expert: bool, tied: bool) -> dict[str, list[Weight]]:
    """Weights by the tensor that holds them."""
    merged: dict[str, list[Weight]] = {}
    for weight in kind.weights:
        if state.is_expert(weight) == expert and not (tied and weight.name == "head.tied"):
            merged.setdefault(buffers.fused_name(weight), []).append(weight)
    return merged
