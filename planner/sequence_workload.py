"""Lower a layer sequence to the graph that the cost models price."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cost_models.graph import Int64, LayerKind, Shard, Weight, WorkloadGraph
from cost_models.ops import Attention, Collective, Elementwise, MatMul, Op, Roofline, SavedTensor
from hardware_profiles.schema import DeviceSpec, StackSpec
from planner.models.sequence import (
    AttentionOp,
    ConvOp,
    LayerEntry,
    LayerKindSpec,
    LayerSequenceSpec,
    MatmulOp,
    MemoryOp,
    WorkOp,
)
from planner.recompute import searched_policies
from planner.specs import JobSpec

BACKWARD = 2.0
"""FLOPs of a backward over its forward: a data gradient and a weight gradient."""


def build_workload(
    model: LayerSequenceSpec, job: JobSpec, stack: StackSpec, device: DeviceSpec
) -> WorkloadGraph:
    """The workload graph of a layer sequence; ``job.sequence_length`` must be set."""
    assert job.sequence_length is not None, "job defaults are filled before lowering"
    element = 4 if job.precision == "fp32" else 2
    cuts = cut_elements(model)
    layers, kinds = _kinds(model, element)
    sizes = tuple((on * element, back * element) for on, back in cuts)
    least = min(min(size) for size in sizes)
    uniform = all(size == (least, least) for size in sizes)
    return WorkloadGraph(
        name=model.name,
        sequence=job.sequence_length,
        hidden=max(on for on, _ in cuts),
        layers=layers,
        kinds=kinds,
        embedding=_nothing("embedding"),
        head=_nothing("head"),
        tied_embeddings=False,
        model_flops_per_token=sum(unit_flops(model.kinds[e.kind]) * e.count for e in model.layers),
        expert_count=0,
        vocab_divisor=1,
        boundary_bytes_per_token=least,
        boundaries=() if uniform else sizes,
        policies=searched_policies(stack, job, kinds.values()),
        global_batch=job.global_batch,
        assumptions=_assumptions(model, stack, device),
    )


def cut_elements(model: LayerSequenceSpec) -> tuple[tuple[int, int], ...]:
    """Per cut, from before the first layer to after the last: elements sent on, and gradients back.

    A cut carries the output of the layer before it and every tensor that was sent earlier and is
    taken later; an output that is itself such a tensor travels once.
    """
    entries = model.expanded
    last_use = {name: place for place, e in enumerate(entries) for name in e.takes}
    result = [(model.input, 0)]
    passing: dict[str, int] = {}
    for place, entry in enumerate(entries):
        kind = model.kinds[entry.kind]
        passing = {name: size for name, size in passing.items() if last_use[name] > place}
        own = kind.output if kind.output_gradient is None else kind.output_gradient
        over = sum(passing.values())
        extra = sum(size for size in entry.sends.values() if size is not None)
        result.append((kind.output + over + extra, own + over + extra))
        passing |= {name: size or kind.output for name, size in entry.sends.items()}
    return tuple(result)


def unit_flops(kind: LayerKindSpec) -> float:
    """Forward and backward FLOPs of one layer per unit; attention counted causal where it is."""
    total = 0.0
    for op in kind.ops:
        match op:
            case MatmulOp():
                total += (1 + BACKWARD) * 2.0 * op.m * op.n * op.k * op.times
            case ConvOp():
                total += (1 + BACKWARD) * op.flops * op.times
            case WorkOp():
                total += op.flops + _backward(op.flops, op.backward_flops)
            case AttentionOp():
                pairs = op.queries * op.keys / (2 if op.causal else 1)
                total += (1 + BACKWARD) * 4.0 * op.heads * op.head_dim * pairs
            case MemoryOp():
                pass
    return total


def _backward(forward: float, stated: float | None) -> float:
    return BACKWARD * forward if stated is None else stated


def _kinds(model: LayerSequenceSpec, element: int) -> tuple[tuple[str, ...], dict[str, LayerKind]]:
    """The kind of each layer and the kinds by name; one kind with two input sizes becomes two."""
    layers: list[str] = []
    kinds: dict[str, LayerKind] = {}
    inputs: dict[tuple[str, int], str] = {}
    sizes = _taken_sizes(model)
    for place, entry in enumerate(model.expanded):
        main = model.input if place == 0 else model.kinds[model.expanded[place - 1].kind].output
        kept = main + sum(sizes[name] for name in entry.takes)
        name = inputs.get((entry.kind, kept))
        if name is None:
            same = sum(kind == entry.kind for kind, _ in inputs)
            name = entry.kind if not same else f"{entry.kind}#{same + 1}"
            inputs[entry.kind, kept] = name
            kinds[name] = _layer_kind(name, model.kinds[entry.kind], kept, element)
        layers.append(name)
    return tuple(layers), kinds


def _taken_sizes(model: LayerSequenceSpec) -> dict[str, int]:
    def sent(entry: LayerEntry) -> dict[str, int]:
        output = model.kinds[entry.kind].output
        return {name: size or output for name, size in entry.sends.items()}

    return {name: size for entry in model.layers for name, size in sent(entry).items()}


def _layer_kind(name: str, kind: LayerKindSpec, kept: int, element: int) -> LayerKind:
    working = 2 * kind.output if kind.working is None else kind.working

    def bytes_of(elements: int) -> Callable[[Shard], Int64]:
        return lambda shard: shard.tokens * (elements * element)

    def saved(shard: Shard) -> tuple[SavedTensor, ...]:
        split = shard.tokens * (kind.saved_split * element) // shard.tp
        return (
            SavedTensor("kept", shard.tokens * (kind.saved * element)),
            SavedTensor("kept_split", split),
        )

    return LayerKind(
        name,
        _weights(kind),
        lambda shard: _ops(kind, shard, element),
        saved,
        bytes_of(kept),
        bytes_of(working),
        element,
    )


def _weights(kind: LayerKindSpec) -> tuple[Weight, ...]:
    result = [Weight("parameters", kind.parameters, 1)] if kind.parameters else []
    for index, op in enumerate(kind.ops):
        if isinstance(op, MatmulOp) and op.weight:
            sharding = {"none": "replicated", "column": "column", "row": "row"}[op.split]
            result.append(Weight(f"op{index}", op.n, op.k, sharding, op.times))  # type: ignore[arg-type]
            if op.bias:
                split = "column" if op.split == "column" else "replicated"
                result.append(Weight(f"op{index}.bias", op.n, 1, split, op.times))  # type: ignore[arg-type]
        elif isinstance(op, ConvOp):
            made = op.channels[1]
            result.append(Weight(f"op{index}", made, op.weights // made, "replicated", op.times))
            if op.bias:
                result.append(Weight(f"op{index}.bias", made, 1, "replicated", op.times))
        elif isinstance(op, WorkOp | MemoryOp) and op.parameters:
            result.append(Weight(f"op{index}", op.parameters, 1))
    return tuple(result)


def _ops(kind: LayerKindSpec, shard: Shard, element: int) -> tuple[Op, ...]:
    result: list[Op] = []
    for index, op in enumerate(kind.ops):
        name = f"op{index}"
        match op:
            case MatmulOp():
                result += _products(name, op, shard, element)
            case ConvOp():
                flops, moved = op.flops * shard.tokens, op.moved * element * shard.tokens
                each = Roofline(name, flops, moved, BACKWARD * flops, BACKWARD * moved)
                result += [each] * op.times
            case WorkOp():
                moved = op.moved * element * shard.tokens
                backward = _backward(op.moved, op.backward_moved) * element * shard.tokens
                result.append(
                    Roofline(
                        name, op.flops * shard.tokens, moved,
                        _backward(op.flops, op.backward_flops) * shard.tokens, backward,
                        op.launches, 2 * op.launches,
                    )
                )  # fmt: skip
            case MemoryOp():
                back = op.moved if op.backward_moved is None else op.backward_moved
                bytes_each = element * shard.tokens / (shard.tp if op.split else 1)
                result.append(
                    Elementwise(
                        name, op.moved * bytes_each, back * bytes_each, op.launches, op.launches
                    )
                )
            case AttentionOp():
                kv_heads = np.maximum(1, (op.kv_heads or op.heads) // shard.tp)
                result.append(
                    Attention(
                        name, shard.tokens, op.queries, op.keys, op.heads // shard.tp, kv_heads,
                        op.head_dim, op.head_dim, causal=op.causal,
                    )
                )  # fmt: skip
    return tuple(result)


def _products(name: str, op: MatmulOp, shard: Shard, element: int) -> list[Op]:
    """The products of one op, with the reductions that tensor parallelism needs around them."""
    n = op.n // shard.tp if op.split == "column" else op.n
    k = op.k // shard.tp if op.split == "row" else op.k
    result: list[Op] = []
    for index in range(op.times):
        label = f"{name}.{index}"
        if op.weight:
            result.append(MatMul(label, op.m * shard.tokens, n, k))
        else:
            result.append(MatMul(label, op.m, n, k, shard.tokens, weight=False))
        if op.split == "column":
            size = shard.tokens * (op.m * op.k * element)
            result.append(
                Collective(f"{label}.reduce", "tp", None, 0, "all_reduce", size,
                           backward_hidden=f"{label}:wgrad")
            )  # fmt: skip
        elif op.split == "row":
            size = shard.tokens * (op.m * op.n * element)
            result.append(Collective(f"{label}.reduce", "tp", "all_reduce", size, None, 0))
    return result


def _nothing(name: str) -> LayerKind:
    """An end of the network that does nothing: the first and last layers are layers."""

    def zero(shard: Shard) -> Int64:
        return np.zeros_like(shard.tp)

    return LayerKind(name, (), lambda _: (), lambda _: (), zero, zero)


def _assumptions(model: LayerSequenceSpec, stack: StackSpec, device: DeviceSpec) -> tuple[str, ...]:
    notes = list(model.notes)
    if model.per == "sample":
        notes.append("tokens are samples: the network is described per sample")
    kinds = {type(op) for kind in model.kinds.values() for op in kind.ops}
    if kinds & {ConvOp, WorkOp}:
        notes.append(
            f"convolutions and layers given as FLOPs run at {device.name}'s rate for large matrix "
            "products, without an effect of their shapes"
        )
    if model.tensor_parallel == 1:
        notes.append(f"{model.name} declares no tensor parallelism")
    elif stack.sequence_parallel == "always":
        notes.append(f"{stack.name} ties tp to sequence parallelism, which this network has not")
    return tuple(notes)
