"""Exact persistent state of a rank under Megatron-Core's contiguous buffers.

A layer's bytes carry an upper bound of what bucket ends may add (``cost_models.state``). Here the
buffers of a rank's model chunks are laid out parameter by parameter, as the software does; experts
are stored as Transformer Engine's grouped layers store them, all first products before the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from cost_models import buffers, state
from cost_models.configs import shard_of
from cost_models.graph import LayerKind, Shard, Weight, is_quantised
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
    # DistributedDataParallel gives dense and expert buffers one bucket size, of all dense replicas.
    least = int(rules.least_bucket(np.array([ranks * layout.dp_replicate]))[0])
    expert_ranks = max(1, ranks * layout.tp // (layout.ep * layout.etp))
    whole = split = copied = 0
    for j in priced.leaf.held(rank):
        kinds = _as_they_stand(priced.modules(j))
        # Only the first model chunk of the first stage has more than one bucket.
        bucketed = j == 0 and machine.stack.overlap_dp_gradients
        for expert, ways in ((False, ranks), (True, expert_ranks)):
            stored = [
                each
                for kind in kinds
                for each in _tensor_sizes(
                    kind, shard, workload.vocab_divisor, expert=expert, tied=layout.pp == 1
                )
            ]
            elements = buffers.contiguous_elements(
                [size for size, _ in stored], ways, least if bucketed else None,
                alone={n for n, (_, shared) in enumerate(stored) if shared and layout.pp > 1},
            )  # fmt: skip
            whole += elements
            split += elements // ways
        copied += sum(
            int(state.local_tensor(weight, shard, workload.vocab_divisor).total[0])
            for kind in kinds
            for weight in kind.weights
            if is_quantised(weight)
        )
    copies = -(-copied * rules.quantised_bytes_per_64 // state.START_ALIGNMENT)
    gradients = split if layout.zero_stage == 2 else whole
    return {
        "weights": whole * rules.weight_bytes + copies,
        "gradients": gradients * rules.held_gradient_bytes + whole * rules.backward_gradient_bytes,
        "optimizer": split * rules.optimizer_bytes,
    }


def _as_they_stand(kinds: Iterable[LayerKind]) -> tuple[LayerKind, ...]:
    """Modules with an embedding ahead of all layers, on the stage of prediction modules too."""
    parts: tuple[list[LayerKind], list[LayerKind]] = [], []
    for kind in kinds:
        for ahead, part in zip((True, False), parts, strict=True):
            weights = [w for w in kind.weights if w.name.startswith("embedding") == ahead]
            part.append(replace(kind, weights=tuple(weights)))
    return (*parts[0], *parts[1])


def _has_frozen(priced: Priced) -> bool:
    workload = priced.tables.workload
    kinds = (*workload.kinds.values(), workload.embedding, workload.head)
    return any(weight.frozen for kind in kinds for weight in kind.weights)


def _tensor_sizes(
    kind: LayerKind, shard: Shard, vocab_divisor: int, *, expert: bool, tied: bool
) -> Iterator[tuple[int, bool]]:
    """Elements of each parameter as it is stored (q, k and v in one, gate and up in one), and
    whether another stage shares it."""
    stored: list[tuple[str, int, int]] = []
    shared = {weight.name for weight in kind.weights if weight.shared}
    for name, parts in _stored_tensors(kind, expert=expert, tied=tied).items():
        locals_ = [state.local_tensor(part, shard, vocab_divisor) for part in parts]
        size = sum(int(local.elements[0]) for local in locals_)
        stored.append((name, size, int(locals_[0].count[0])))
    # As the modules of a layer stand: the output projection before the input projection, which
    # Transformer Engine makes one with the norm ahead of it (but for latent attention).
    norms = [each for each in stored if each[0].startswith("norm")]
    most = max((count for _, _, count in norms), default=0)
    first, *others = [
        [(name, size, 1) for name, size, count in norms if place < count]
        for place in range(max(most, 1))
    ]
    mixer = [each for each in stored if each[0].startswith("attention")]
    out = [each for each in mixer if each[0].startswith("attention.out")]
    inward = [each for each in mixer if each not in out]
    fused = any(name == "attention.qkv" for name, _, _ in inward)
    ahead = [*out, *first] if fused else [*first, *out]
    for _, size, count in (*ahead, *inward, *chain.from_iterable(others)):
        yield from [(size, False)] * count
    for name, size, count in stored:
        if not name.startswith(("norm", "attention")):
            yield from [(size, name in shared)] * count


def _stored_tensors(kind: LayerKind, *, expert: bool, tied: bool) -> dict[str, list[Weight]]:
    """Weights by the tensor that holds them."""
    merged: dict[str, list[Weight]] = {}
    for weight in kind.weights:
        if state.is_expert(weight) == expert and not (tied and weight.copy):
            merged.setdefault(buffers.fused_name(weight), []).append(weight)
    return merged
