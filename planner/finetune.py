"""A workload of which a part is trained: LoRA, QLoRA, frozen first layers.

A transformation of the graph, whatever it was lowered from. Frozen weights keep their products and
data gradients and lose weight gradient, gradient and optimizer state (Hu et al., arXiv 2106.09685);
in QLoRA they are stored in NF4 and dequantised before each use (Dettmers et al., arXiv 2305.14314).
Layers below the first trained weight have no backward at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, Weight, WorkloadGraph, is_quantised
from cost_models.ops import (
    Collective,
    CollectiveKind,
    Elementwise,
    GroupedMatMul,
    MatMul,
    Op,
    Repeat,
    Roofline,
    SavedTensor,
)
from cost_models.state import local_tensor
from planner.errors import InputError, did_you_mean
from planner.specs import FineTuneSpec

NF4_BYTES_PER_64 = 33
"""64 weights of 4 bits, and 0.127 bits each for doubly quantised scales (arXiv 2305.14314, 3)."""

PRODUCTS = {
    "qkv": ("attention.q", "attention.k", "attention.v"),
    "proj": ("attention.out",),
    "q_down": ("attention.q_down",),
    "q_up": ("attention.q_up",),
    "kv_down": ("attention.kv_down",),
    "kv_up": ("attention.kv_up",),
    "fc1": ("mlp.gate", "mlp.up"),
    "fc2": ("mlp.down",),
    "shared_fc1": ("moe.shared.gate", "moe.shared.up"),
    "shared_fc2": ("moe.shared.down",),
}
"""Weights of each product that may have an adapter."""

JOINED = {"qkv": "qkv", "fc1": "gate_up", "shared_fc1": "gate_up"}
"""Products of several weights, by what ``StackSpec.separate_adapters`` calls them."""

SHARED = "weights of one product share an adapter"

Separate: TypeAlias = Collection[str]
"""Of :data:`JOINED`, those whose weights are linear layers with adapters of their own."""


def adapt(graph: WorkloadGraph, spec: FineTuneSpec, separate: Separate = ()) -> WorkloadGraph:
    """``graph`` with what ``spec`` does not train frozen; raises :class:`InputError`."""
    return _frozen_front(graph, spec) if spec.lora_rank is None else _lora(graph, spec, separate)


def _frozen_front(graph: WorkloadGraph, spec: FineTuneSpec) -> WorkloadGraph:
    """The embedding and the first layers without a backward."""
    count = spec.freeze_layers
    if count >= len(graph.layers):
        raise InputError(
            f"freeze_layers = {count}, and {graph.name} has {len(graph.layers)} layers",
            hint=f"at most {len(graph.layers) - 1}",
        )
    front = tuple(f"{name}.frozen" for name in graph.layers[:count])
    kinds = {name: kind for name, kind in graph.kinds.items() if name in graph.layers[count:]}
    kinds |= {name: _silent(graph.kinds[name.removesuffix(".frozen")], name) for name in front}
    trained = sum(_gradient_flops(graph.kinds[name]) for name in graph.layers[count:])
    everything = sum(_gradient_flops(graph.kinds[name]) for name in graph.layers)
    spared = everything - trained
    tables = tuple(w for w in graph.head.weights if w.copy)
    own = tuple(w for w in graph.head.weights if w not in tables)
    head, notes = replace(graph.head, weights=(*_freeze(tables, bits=16), *own)), []
    if graph.tied_embeddings:
        head = _frozen_head(graph.head, norm=False)
        spared += _weight_gradients(graph.head)
        notes.append("the head shares the embedding's table, which is frozen: it trains no weight")
    share = 1.0 - spared / max(graph.model_flops_per_token, everything)
    return replace(
        graph,
        layers=(*front, *graph.layers[count:]),
        kinds=kinds,
        embedding=_silent(graph.embedding, graph.embedding.name),
        head=head,
        tied_embeddings=False,
        model_flops_per_token=graph.model_flops_per_token * share,
        assumptions=(
            *graph.assumptions,
            f"the embedding and {count} layers are frozen: no backward, nothing kept for one",
            *notes,
        ),
    )  # fmt: skip


def _frozen_head(head: LayerKind, *, norm: bool) -> LayerKind:
    """A head without weight gradients; its norm may train on."""
    trained = tuple(w for w in head.weights if not norm and not w.name.startswith("head"))
    frozen = tuple(w for w in head.weights if w not in trained)
    return replace(head, weights=(*trained, *_freeze(frozen, bits=16)), ops=_frozen_ops(head))


def _silent(kind: LayerKind, name: str) -> LayerKind:
    return replace(
        kind, name=name, weights=_freeze(kind.weights, bits=16), saved=lambda _: (), backward=False
    )


def _gradient_flops(kind: LayerKind) -> float:
    """FLOPs per token of the backward of a layer's products with weights."""
    return sum(2 * _flops(op) for op in kind.ops(_ONE) if isinstance(op, (MatMul, GroupedMatMul)))


_LENGTH = 1024
_UNIT = np.ones(1, dtype=np.int64)
_ONE = Shard(_LENGTH, _UNIT, _UNIT, _UNIT, _UNIT, _UNIT, _UNIT.astype(bool) & False, _UNIT * 0)


def _flops(op: MatMul | GroupedMatMul) -> float:
    """Forward FLOPs per token of a product with a weight."""
    if isinstance(op, GroupedMatMul):
        size = 2.0 * np.asarray(op.groups) * op.rows * op.n * op.k
    else:
        size = 2.0 * np.asarray(op.m) * op.n * op.k * op.batch * op.weight
    return float(np.broadcast_to(size, 1)[0]) / _LENGTH


def _lora(graph: WorkloadGraph, spec: FineTuneSpec, separate: Separate) -> WorkloadGraph:
    _check_targets(graph, spec)
    kinds = {
        name: _with_adapters(kind, graph, spec, separate) for name, kind in graph.kinds.items()
    }
    saved = sum(_weight_gradients(graph.kinds[name]) for name in graph.layers)
    saved += _weight_gradients(graph.head)
    added = sum(_weight_gradients(kinds[name], frozen=False) for name in graph.layers)
    share = "linear layers have adapters of their own" if separate else SHARED
    notes = [
        f"LoRA of rank {spec.lora_rank}: {share}; routed experts have none; what frozen layers "
        "keep is counted as if they were trained",
    ]
    if spec.base_bits == 4:
        notes.append(
            "frozen linear layers in NF4, dequantised before each use, in the backward too"
        )
    return replace(
        graph,
        kinds=kinds,
        embedding=_silent(graph.embedding, graph.embedding.name),
        head=_frozen_head(graph.head, norm=True),
        tied_embeddings=False,
        model_flops_per_token=graph.model_flops_per_token - saved + 3 * added,
        assumptions=(*graph.assumptions, *notes),
    )


def _weight_gradients(kind: LayerKind, *, frozen: bool | None = None) -> float:
    """FLOPs per token of the weight gradients of a layer's products; of those that are frozen, or
    not, only."""
    return sum(
        _flops(op)
        for op in kind.ops(_ONE)
        if isinstance(op, (MatMul, GroupedMatMul)) and frozen in (None, op.frozen)
    )


def _check_targets(graph: WorkloadGraph, spec: FineTuneSpec) -> None:
    names = {op.name for kind in graph.kinds.values() for op in kind.ops(_ONE)} & PRODUCTS.keys()
    if not names:
        raise InputError(f"{graph.name} has no product that an adapter fits")
    if (spec.lora_rank or 0) > graph.hidden:
        raise InputError(
            f"lora_rank = {spec.lora_rank:,}, and {graph.name} is {graph.hidden:,} wide",
            hint="an adapter of full rank is no smaller than what it adapts: 8 to 256 are usual",
        )
    for target in spec.lora_targets:
        if target not in names:
            raise InputError(
                f"lora_targets: {graph.name} has no product {target!r}",
                hint=did_you_mean(target, sorted(names)),
            )


def _freeze(weights: tuple[Weight, ...], *, bits: int) -> tuple[Weight, ...]:
    return tuple(
        replace(
            weight, frozen=True,
            bytes_per_64=NF4_BYTES_PER_64 if bits == 4 and is_quantised(weight) else 0,
        )
        for weight in weights
    )  # fmt: skip


def _frozen_ops(kind: LayerKind) -> Callable[[Shard], tuple[Op, ...]]:
    return lambda shard: tuple(_frozen(op) for op in kind.ops(shard))


def _frozen(op: Op) -> Op:
    """``op`` without the gradient of its weight."""
    match op:
        case MatMul() if op.weight:
            return replace(op, frozen=True)
        case GroupedMatMul():
            return replace(op, frozen=True)
        case Roofline():
            half = 0.5 * np.asarray(op.backward_flops)
            return replace(op, backward_flops=half, backward_launches=1)
        case Repeat():
            return replace(op, ops=tuple(_frozen(inner) for inner in op.ops))
    return op


@dataclass(frozen=True, slots=True)
class _Adapted:
    """A product with adapters: one, or one for each of the weights that it joins."""

    name: str
    weights: tuple[Weight, ...]
    apart: bool

    @property
    def adapters(self) -> tuple[tuple[Weight, ...], ...]:
        """The weights that each adapter is for."""
        return tuple((weight,) for weight in self.weights) if self.apart else (self.weights,)

    def pairs(self, rank: int) -> tuple[Weight, ...]:
        """Their matrices."""
        names = [weight.name for weight in self.weights] if self.apart else [self.name]
        return tuple(
            matrix
            for name, group in zip(names, self.adapters, strict=True)
            for matrix in _pair(name, group, rank)
        )


def _with_adapters(
    kind: LayerKind, graph: WorkloadGraph, spec: FineTuneSpec, separate: Separate
) -> LayerKind:
    """A layer with frozen weights, its adapters, and what 4-bit storage costs."""
    assert spec.lora_rank is not None
    rank, four = spec.lora_rank, spec.base_bits == 4
    found = {
        name: tuple(weight for weight in kind.weights if weight.name in PRODUCTS[name])
        for name in (spec.lora_targets or PRODUCTS)
    }
    groups = {
        name: _Adapted(name, weights, len(weights) > 1 and JOINED.get(name) in separate)
        for name, weights in found.items()
        if weights
    }
    base = _freeze(kind.weights, bits=spec.base_bits)

    def ops(shard: Shard) -> tuple[Op, ...]:
        result: list[Op] = []
        for op in kind.ops(shard):
            if four and isinstance(op, (MatMul, GroupedMatMul)):
                result += _dequantise(op, kind)
            result.append(_frozen(op))
            if isinstance(op, MatMul) and op.name in groups:
                result += _adapter_ops(op, groups[op.name], rank, kind.element_bytes)
        return tuple(result)

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        count = sum(len(group.adapters) for group in groups.values())
        inner = shard.tokens * (count * rank * kind.element_bytes)
        return (*kind.saved(shard), SavedTensor("lora", inner))

    def working(shard: Shard) -> Int64:
        own = kind.working_bytes(shard)
        if not four:
            return own
        sizes = [
            local_tensor(weight, shard, graph.vocab_divisor).total
            for weight in base
            if weight.bytes_per_64
        ]
        largest: Int64 = np.max([np.zeros_like(shard.tp), *sizes], axis=0)
        return own + largest * kind.element_bytes

    adapters = tuple(matrix for group in groups.values() for matrix in group.pairs(rank))
    return replace(kind, weights=(*base, *adapters), ops=ops, saved=saved, working_bytes=working)


def _pair(name: str, weights: tuple[Weight, ...], rank: int) -> tuple[Weight, Weight]:
    """The two matrices of an adapter: the one on the side that tp splits is split."""
    rows, cols = sum(weight.rows for weight in weights), weights[0].cols
    by_row, by_column = weights[0].sharding == "row", weights[0].sharding == "column"
    return (
        Weight(f"lora.{name}.a", rank, cols, "row" if by_row else "replicated"),
        Weight(f"lora.{name}.b", rows, rank, "column" if by_column else "replicated"),
    )


def _adapter_ops(op: MatMul, adapted: _Adapted, rank: int, element: int) -> list[Op]:
    """Down, up, scale and add; over tp the narrow tensors are summed, once."""
    count = len(adapted.adapters)
    m, n, k, inner = np.asarray(op.m), op.n, op.k, rank * count
    each, widths = ((1,) * count, op.pieces) if adapted.apart else ((1,), (1,))
    narrow = m * inner * element
    kind: CollectiveKind = "all_reduce"
    row = adapted.weights[0].sharding == "row"
    forward, backward = (kind, None) if row else (None, kind)
    return [
        MatMul(
            f"{op.name}.lora_a", m, inner, k, parts=each, low_precision=False,
            modules=op.modules,
        ),
        Collective(
            f"{op.name}.lora_sum", "tp", forward, narrow, backward, narrow, modules=op.modules
        ),
        MatMul(
            f"{op.name}.lora_b", m, n, rank, parts=widths, low_precision=False,
            modules=op.modules,
        ),
        Elementwise(
            f"{op.name}.lora_add", 3.0 * m * n * element, 3.0 * count * m * k * element,
            modules=op.modules,
        ),
    ]  # fmt: skip


def _dequantise(op: MatMul | GroupedMatMul, kind: LayerKind) -> list[Op]:
    """Reading 4 bits and writing 16 of a product's weight, in the forward and in the backward."""
    if isinstance(op, MatMul) and (not op.weight or op.name not in PRODUCTS):
        return []
    groups = op.groups if isinstance(op, GroupedMatMul) else 1
    elements = 1.0 * np.asarray(groups) * op.n * op.k
    moved = elements * (NF4_BYTES_PER_64 / 64 + kind.element_bytes)
    return [Elementwise(f"{op.name}.dequantise", moved, moved, modules=op.modules)]
