"""Persistent state per device: weights, gradients, optimizer state, and gathered weights.

Persistent state per parameter, for 16-bit training with AdamW in Megatron-style stacks: 2 (weight)
+ 4 (fp32 main gradient) + 12 (fp32 master weight and two moments) = 18 bytes; the optimizer part
is sharded over data parallelism from ZeRO stage 1, the gradient from stage 2, the weight from
stage 3 (Rajbhandari et al., arXiv 1910.02054, section 3). Stacks without master weights (FSDP2)
keep the fp32 weights themselves sharded: 4 + 4 + 8 = 16 bytes, plus 16-bit copies while gathered.

What is padded depends on the layout (``hardware_profiles.holdings.StateSpec``):

* ``contiguous``: Megatron-Core's distributed optimizer lays parameters end to end in one buffer,
  each start aligned to 64 elements, each bucket's end to the least common multiple of the sharding
  ranks and 128 (megatron/core/optimizer/param_layout.py). How many buckets there are depends on the
  whole stage: an upper bound here, ``cost_models.buffers`` is exact. Unsharded: no padding.
* ``flat``: DeepSpeed's stages 1 and 2 and FSDP1 flatten many parameters into one tensor and pad
  its end (a layer's share is rounded up); ``per_parameter``: its stage 3 splits each by itself.
* ``dim0``: FSDP2 splits the first dimension of each parameter, the last shards shorter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, Weight, is_quantised
from cost_models.offload import Offload
from cost_models.optimizers import OPTIMIZERS, LocalTensor, OptimizerRule
from hardware_profiles.holdings import OffloadSpec, Precision, StateSpec

StateLayout = Literal["contiguous", "flat", "per_parameter", "dim0"]

ON_DEVICE = Offload()

START_ALIGNMENT = 64
"""Elements to which a parameter's start is aligned in Megatron-Core's buffer."""
BUCKET_ALIGNMENT = 128
"""Elements to which a bucket's end is aligned there, beside the ranks that share it."""


def ceil_div(numerator: Int64, denominator: Int64) -> Int64:
    """Integer division rounded up."""
    return -(-numerator // denominator)


def local_tensor(weight: Weight, shard: Shard, vocab_divisor: int) -> LocalTensor:
    """``weight`` on one device before data-parallel sharding."""
    tp, ones = shard.tp, np.ones_like(shard.tp)
    rows, cols, count = weight.rows * ones, weight.cols * ones, weight.count * ones
    match weight.sharding:
        case "replicated":
            pass
        case "vocab" | "vocab_without_context":
            split = weight.sharding == "vocab"
            ways = shard.vocabulary_ranks if split else np.where(shard.cp > 1, 1, tp)
            rows = ceil_div(rows, vocab_divisor * ways) * vocab_divisor
        case "column":
            rows = ceil_div(rows, np.minimum(tp, weight.kv_heads) if weight.kv_heads else tp)
        case "row":
            cols = ceil_div(cols, tp)
        case "expert_column" | "expert_row":
            elements = ceil_div(rows * cols, shard.etp)
            return LocalTensor(elements, rows, ceil_div(count, shard.ep))
    return LocalTensor(rows * cols, rows, count)


@dataclass(frozen=True, slots=True)
class LocalParameters:
    """Elements of one layer on one device: those replicated over the attention mesh's data
    parallelism, and those of experts, replicated over the expert mesh's."""

    dense: Int64
    expert: Int64
    frozen_dense: Int64
    """Not trained, beside those of ``dense``."""
    frozen_expert: Int64

    @property
    def total(self) -> Int64:
        """All of them."""
        return self.dense + self.expert + self.frozen_dense + self.frozen_expert


def is_expert(weight: Weight) -> bool:
    """Whether a weight belongs to one expert, so to the expert mesh."""
    return weight.sharding.startswith("expert_")


def local_parameters(
    kind: LayerKind, shard: Shard, vocab_divisor: int, *, drop_tied: Bools | None = None
) -> LocalParameters:
    """Parameters of one layer of ``kind`` on one device, before data-parallel sharding."""
    totals = {key: np.zeros_like(shard.tp) for key in product((False, True), repeat=2)}
    for weight in kind.weights:
        elements = _kept(weight, local_tensor(weight, shard, vocab_divisor).total, drop_tied)
        key = weight.frozen, is_expert(weight)
        totals[key] = totals[key] + elements
    return LocalParameters(*totals.values())


def _kept(weight: Weight, elements: Int64, drop_tied: Bools | None) -> Int64:
    """Elements, none where a tied head shares the embedding's weights on the same device."""
    if drop_tied is None or weight.name != "head.tied":
        return elements
    return np.where(drop_tied, 0, elements)


@dataclass(frozen=True, slots=True)
class StateRules:
    """Bytes per element of the persistent state, from stack, precision and optimizer."""

    weight_bytes: int
    gradient_bytes: int
    """Of the gradients that are reduced."""
    optimizer_bytes: int
    """Of every tensor; some optimizers keep more of some (``optimizer.extra_bytes``)."""
    gather_bytes: int
    """Bytes per element of a gathered (unsharded) weight in ZeRO stages 2 and 3."""
    layout: StateLayout = "flat"
    held_gradient_bytes: int = 0
    """Of the gradients held through the step."""
    backward_gradient_bytes: int = 0
    """Of what the backward leaves beside them, whole."""
    step_bytes: int = 0
    """Of flat buffers of the optimizer step, sharded as its state is, and below stage 3 of copies
    for the gradients' norm."""
    norm_bytes: int = 0
    streamed_bytes: int = 0
    """Of what comes from the host for the update, sharded as the state is."""
    quantised_bytes_per_64: int = 0
    """Of the low-precision copies of 64 elements of a linear layer's weight."""
    gathered_bytes_per_64: int = 0
    """Of 64 elements of a linear layer's weight on their way; 0: as all others."""
    dummy_wgrad: bool = False
    copies_weights: bool = False
    unit_gradients: bool = False
    reduces_each_backward: bool = False
    graph_keeps_gathered: bool = False
    split_over_replicas: bool = False
    bucket_elements: int | None = None
    bucket_elements_per_rank: int = 0
    optimizer: OptimizerRule = OPTIMIZERS["adamw"]
    weights_split_from: int = 3
    """Least ZeRO stage in which weights are split over data parallelism."""
    updated_bytes: int = 4
    """Bytes per parameter that the optimizer reads and writes beside its state: those of the master
    weight, or of a weight that has none."""

    def least_bucket(self, ways: Int64) -> Int64:
        """Least elements of a bucket of the contiguous buffer; as good as all without one."""
        if self.bucket_elements is None:
            return np.full_like(ways, 1 << 62)
        return np.maximum(self.bucket_elements, self.bucket_elements_per_rank * ways)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Persistent and gathered bytes of one layer on one device."""

    weights: Int64
    """Low-precision copies included."""
    gradients: Int64
    optimizer: Int64
    step: Int64
    """Flat buffers of the optimizer step."""
    streamed: Int64
    """What is on the device for the update only."""
    gathered: Int64
    """Unsharded copies of a sharded layer while it is in use."""
    unsharded: Int64
    """Trained elements whose gradients are whole while their unit is in use, and sharded behind."""

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.step + other.step,
            self.streamed + other.streamed,
            self.gathered + other.gathered,
            self.unsharded + other.unsharded,
        )


@dataclass(frozen=True, slots=True)
class Sharding:
    """Where the state of some weights is split (arrays of one length)."""

    ways: Int64
    zero_stage: Int64
    pipelined: Bools
    replicas: Int64 | int = 1
    """Groups of ``ways`` ranks that hold the same weights."""
    bucket_ranks: Int64 | None = None
    """Ranks that decide how large a bucket is; None: ``ways``."""

    def of_state(self, rules: StateRules) -> Sharding:
        """Where the optimizer's state is split."""
        deeper = state_over_replicas(self.zero_stage, self.replicas, rules)
        return replace(self, ways=np.where(deeper, self.ways * self.replicas, self.ways))


def state_over_replicas(zero_stage: Int64, replicas: Int64 | int, rules: StateRules) -> Bools:
    """Whether several groups that share weights split the optimizer's state among them too."""
    result: Bools = (zero_stage == 3) & (np.asarray(replicas) > 1) & rules.split_over_replicas
    return result


def state_bytes(
    weights: Iterable[Weight],
    shard: Shard,
    sharding: Sharding,
    rules: StateRules,
    *,
    vocab_divisor: int,
    drop_tied: Bools | None = None,
) -> StateBytes:
    """State of ``weights`` sharded from the given ZeRO stage on; all of one mesh.

    Where weights are split from stage 1 or 2 on, these keep gathered ones through the step (FSDP2
    without resharding after forward); Megatron-style stacks keep their weights replicated.
    Under a pipeline FSDP2 reduces gradients once per step: until then they are whole on each rank
    (PyTorch's pipelining stage turns off gradient synchronisation before the last backward).
    """
    stage, zero = sharding.zero_stage, np.zeros_like(shard.tp)
    whole, split, copied, extra, narrower = zero, zero, zero, zero, zero
    finer, state_ways = zero, sharding.of_state(rules)
    copies = state_over_replicas(stage, sharding.replicas, rules)
    frozen, alone = FrozenBytes(zero, zero), zero
    for weight in weights:
        local = local_tensor(weight, shard, vocab_divisor)
        held, shared = _sizes(weight, local, sharding, rules.layout)
        if weight.frozen:
            frozen = frozen.plus(weight, held, shared, rules, drop_tied)
            continue
        if rules.optimizer.extra_bytes is not None:
            extra = extra + _kept(weight, rules.optimizer.extra_bytes(weight, local), drop_tied)
        whole = whole + _kept(weight, held, drop_tied)
        alone = alone + 2 * (weight.shared & sharding.pipelined)
        split = split + _kept(weight, shared, drop_tied)
        own = _sizes(weight, local, state_ways, rules.layout)[1]
        finer = finer + _kept(weight, own, drop_tied)
        if rules.quantised_bytes_per_64 and is_quantised(weight):
            copied = copied + local.total
        narrower = narrower + narrower_bytes(weight, local, rules)
    if rules.layout == "contiguous":
        whole = whole + np.where(stage >= 1, _bucket_padding(whole, sharding, rules, alone), 0)
    if rules.layout in ("contiguous", "flat"):
        split, finer = ceil_div(whole, sharding.ways), ceil_div(whole, state_ways.ways)
    fsdp = rules.weights_split_from < 3
    apart = weights_sharded(stage, rules)
    gradients_sharded = (stage >= 2) & ~(fsdp & sharding.pipelined)
    shards = np.where(stage >= 1, finer, whole)
    if rules.optimizer.extra_bytes is not None:
        extra = np.where(stage >= 1, ceil_div(extra, state_ways.ways), extra)
    return StateBytes(
        weights=np.where(apart, finer, whole) * rules.weight_bytes
        + np.where(copies, split * rules.gather_bytes, 0)
        + np.where(apart, frozen.split, frozen.whole)
        + ceil_div(copied * rules.quantised_bytes_per_64, np.array(64)),
        gradients=np.where(gradients_sharded, split, whole) * rules.held_gradient_bytes
        + np.where(gradients_sharded, 0, whole) * rules.backward_gradient_bytes,
        optimizer=shards * rules.optimizer_bytes + extra,
        step=shards * (rules.step_bytes + np.where(stage < 3, rules.norm_bytes, 0)),
        streamed=shards * rules.streamed_bytes,
        gathered=np.where(apart, whole * rules.gather_bytes - narrower + frozen.whole, 0),
        unsharded=np.where(apart | ((stage == 2) & rules.unit_gradients), whole, 0),
    )


def narrower_bytes(weight: Weight, local: LocalTensor, rules: StateRules) -> Int64:
    """By how much less than ``rules.gather_bytes`` an element a trained weight is gathered in."""
    if weight.frozen or not rules.gathered_bytes_per_64 or not is_quantised(weight):
        return np.zeros_like(local.elements)
    return local.total * (64 * rules.gather_bytes - rules.gathered_bytes_per_64) // 64


def weights_sharded(zero_stage: Int64, rules: StateRules) -> Bools:
    """Whether weights are split over data parallelism."""
    result: Bools = zero_stage >= rules.weights_split_from
    return result


def _weights_split_from(spec: StateSpec, weight_bytes: int, gather_bytes: int) -> int:
    """Stage 3, or 2 where that is FSDP without resharding; 1 where the stack holds fp32 weights,
    which are split as the optimizer's state is (MaxText,
    ``maybe_update_params_sharding_with_opt``)."""
    if weight_bytes > gather_bytes:
        return 1
    return 2 if spec.weights_follow_gradients else 3


@dataclass(frozen=True, slots=True)
class FrozenBytes:
    """Bytes of weights that are not trained: no gradient, no optimizer state, no master copy."""

    whole: Int64
    split: Int64

    def plus(
        self, weight: Weight, held: Int64, shared: Int64, rules: StateRules,
        drop_tied: Bools | None,
    ) -> FrozenBytes:  # fmt: skip
        """With one more weight, ``held`` elements whole and ``shared`` on each rank."""
        whole, split = (
            self_bytes
            + ceil_div(_kept(weight, size, drop_tied) * frozen_per_64(weight, rules), np.array(64))
            for self_bytes, size in ((self.whole, held), (self.split, shared))
        )
        return FrozenBytes(whole, split)


def frozen_per_64(weight: Weight, rules: StateRules) -> int:
    """Bytes of 64 elements of a weight that is not trained."""
    return weight.bytes_per_64 or 64 * rules.gather_bytes


def _sizes(
    weight: Weight, local: LocalTensor, sharding: Sharding, layout: StateLayout
) -> tuple[Int64, Int64]:
    """Elements of a weight on one device: whole, and one rank's shard of them."""
    ways = sharding.ways
    if layout == "contiguous":
        aligned = ceil_div(local.elements, np.array(START_ALIGNMENT)) * START_ALIGNMENT
        return np.where(
            sharding.zero_stage >= 1, aligned, local.elements
        ) * local.count, local.total
    if layout == "per_parameter":
        return local.total, ceil_div(local.elements, ways) * local.count
    if layout == "dim0":
        # Experts are one tensor with the expert as first dimension, the rows as second; where there
        # are more ranks than experts the rows are split (torchtitan's apply_fsdp).
        rows = ceil_div(local.rows, ways) * (local.elements // local.rows) * local.count
        experts = ceil_div(local.count, ways) * local.elements
        by_expert = is_expert(weight) & (ways <= local.count)
        return local.total, np.where(by_expert, experts, rows)
    return local.total, local.total


def _bucket_padding(elements: Int64, sharding: Sharding, rules: StateRules, alone: Int64) -> Int64:
    """Most elements that aligning the ends of a layer's buckets adds.

    A stage of layers with ``e`` elements has at most ``sum(e // bucket + 1)`` buckets (all but its
    last hold a whole one), and more around each weight that is ``alone`` in one."""
    ranks = sharding.ways if sharding.bucket_ranks is None else sharding.bucket_ranks
    buckets = elements // rules.least_bucket(ranks) + 1 + alone
    return np.where(elements > 0, buckets * (np.lcm(sharding.ways, BUCKET_ALIGNMENT) - 1), 0)


def state_rules(
    *, spec: StateSpec, precision: Precision, optimizer: str, master_weights: bool,
    gradient_dtype: str, offload: Offload = ON_DEVICE, host: OffloadSpec | None = None,
) -> StateRules:  # fmt: skip
    """The rules for one stack and job; see the module docstring."""
    rule = OPTIMIZERS[optimizer]
    moments = rule.moment_bytes
    if precision == "fp32":
        weight, reduced, state, gathered = 4, 4, moments, 4
    elif master_weights:
        reduced, state = 4 if gradient_dtype == "fp32" else 2, spec.master_bytes + moments
        weight, gathered = 2, 2
    else:
        # A stack that keeps fp32 weights accumulates their gradients in fp32 whatever it reduces.
        weight, reduced, state, gathered = 4, 4, moments, 2
    held, step = spec.held_gradient_bytes.get(precision, reduced), spec.step_bytes.get(precision, 0)
    norm = spec.norm_bytes.get(precision, 0)
    streamed = 0
    if offload.optimizer and host is not None:
        streamed = host.streamed_bytes(state, weight if offload.parameters else 0)
        state = step = norm = 0
        held = 0 if host.gradients else held
    stays = 0 if offload.parameters else weight
    return StateRules(
        weight_bytes=stays,
        weights_split_from=_weights_split_from(spec, stays, gathered),
        gradient_bytes=reduced,
        optimizer_bytes=state,
        gather_bytes=gathered,
        layout=spec.layout,
        held_gradient_bytes=held,
        backward_gradient_bytes=spec.backward_gradient_bytes.get(precision, 0),
        step_bytes=step,
        norm_bytes=norm,
        streamed_bytes=streamed,
        quantised_bytes_per_64=spec.quantised_bytes_per_64.get(precision, 0),
        gathered_bytes_per_64=spec.gathered_bytes_per_64.get(precision, 0),
        dummy_wgrad=spec.dummy_wgrad,
        copies_weights=spec.copies_weights,
        unit_gradients=spec.unit_gradients or spec.layout == "dim0",
        reduces_each_backward=spec.reduces_each_backward,
        graph_keeps_gathered=spec.graph_keeps_gathered,
        split_over_replicas=spec.split_over_replicas,
        bucket_elements=spec.bucket_elements,
        bucket_elements_per_rank=spec.bucket_elements_per_rank,
        optimizer=rule,
        updated_bytes=(spec.master_bytes or weight) if master_weights else 4,
    )
