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
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, Weight, is_quantised
from cost_models.optimizers import LocalTensor
from cost_models.state_rules import StateRules

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
    again: Int64
    """Of ``dense``, what is gathered and reduced twice (``Weight.twice``)."""

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
    again = np.zeros_like(shard.tp)
    totals = {key: np.zeros_like(shard.tp) for key in product((False, True), repeat=2)}
    for weight in kind.weights:
        elements = _kept(weight, local_tensor(weight, shard, vocab_divisor).total, drop_tied)
        again = again + _again(weight, elements, shard)
        key = weight.frozen, is_expert(weight)
        totals[key] = totals[key] + elements
    dense, expert, frozen_dense, frozen_expert = totals.values()
    return LocalParameters(dense, expert, frozen_dense, frozen_expert, again)


def _again(weight: Weight, elements: Int64, shard: Shard) -> Int64:
    """Elements of a weight's second parameter."""
    return np.where(shard.tp > 1, elements, 0) if weight.twice else np.zeros_like(shard.tp)


def _kept(weight: Weight, elements: Int64, drop_tied: Bools | None) -> Int64:
    """Elements, none of a copy where the embedding's weights are on the same device."""
    if drop_tied is None or not weight.copy:
        return elements
    return np.where(drop_tied, 0, elements)


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
    streamed_extra: Int64
    """Of it, what some tensors have more than others (``StateRules.streams_extra``)."""
    gathered: Int64
    """Unsharded copies of a sharded layer while it is in use."""
    unsharded: Int64
    """Trained elements whose gradients are whole while their unit is in use, and sharded behind."""

    def __add__(self, other: StateBytes) -> StateBytes:
        names = (field.name for field in fields(self))
        return StateBytes(*(getattr(self, name) + getattr(other, name) for name in names))


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
    deferred: Bools | bool = False
    """Whether gradients wait whole for the last microbatch, without a pipeline too."""

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
    Under a pipeline FSDP2 reduces stage 2's gradients once per step: until then they are whole on
    each rank (PyTorch's pipelining stage turns off gradient synchronisation before the last
    backward; MaxText's ``pipeline_fsdp_ag_once``). Stage 3's are reduced with every microbatch,
    or wait too where a stack keeps weights behind the backward (``keeps_after_backward``).
    """
    stage, zero = sharding.zero_stage, np.zeros_like(shard.tp)
    whole, split, copied, extra, narrower = zero, zero, zero, zero, zero
    finer, state_ways = zero, sharding.of_state(rules)
    copies = state_over_replicas(stage, sharding.replicas, rules)
    frozen, alone, again = FrozenBytes(zero, zero), zero, zero
    for weight in weights:
        local = local_tensor(weight, shard, vocab_divisor)
        held, shared = _sizes(weight, local, sharding, rules)
        if weight.frozen:
            frozen = frozen.plus(weight, held, shared, rules, drop_tied)
            continue
        if rules.optimizer.extra_bytes is not None:
            extra = extra + _kept(weight, rules.optimizer.extra_bytes(weight, local), drop_tied)
        whole = whole + _kept(weight, held, drop_tied)
        again = again + _again(weight, local.total, shard)
        alone = alone + 2 * (weight.shared & sharding.pipelined)
        split = split + _kept(weight, shared, drop_tied)
        own = _sizes(weight, local, state_ways, rules)[1]
        finer = finer + _kept(weight, own, drop_tied)
        if rules.quantised_bytes_per_64 and is_quantised(weight):
            copied = copied + local.total
        narrower = narrower + narrower_bytes(weight, local, rules)
    if rules.layout == "contiguous":
        whole = whole + np.where(stage >= 1, _bucket_padding(whole, sharding, rules, alone), 0)
    if rules.layout in ("contiguous", "flat"):
        split, finer = ceil_div(whole, sharding.ways), ceil_div(whole, state_ways.ways)
    apart = weights_sharded(stage, rules)
    in_use = apart | ((stage == 0) & rules.casts_whole_weights)
    waits = (rules.weights_split_from < 3) & sharding.pipelined
    late = (stage < 3) | rules.keeps_after_backward
    gradients_sharded = (stage >= 2) & ~(waits & late) & ~np.asarray(sharding.deferred)
    summed = np.where(stage >= 2, rules.whole_gradient_bytes, rules.kept_gradient_bytes)
    shards = np.where(stage >= 1, finer, whole)
    if rules.optimizer.extra_bytes is not None:
        flat = rules.optimizer.flat_bytes * (rules.layout in ("flat", "per_parameter"))
        own = finer * flat if flat else ceil_div(extra, state_ways.ways)
        extra = np.where(stage >= 1, own, extra)
    coming, staying = (extra, zero) if rules.streams_extra else (zero, extra)
    staying = zero if rules.hosts_extra else staying
    return StateBytes(
        weights=np.where(apart, finer, whole) * rules.weight_bytes
        + np.where(copies, split * rules.gather_bytes, 0)
        + np.where(apart, frozen.split, frozen.whole)
        + ceil_div(copied * rules.quantised_bytes_per_64, np.array(64)),
        gradients=np.where(gradients_sharded, split, 0) * rules.held_gradient_bytes
        + np.where(gradients_sharded, 0, whole) * (summed + rules.backward_gradient_bytes)
        + np.where((stage == 1) | sharding.pipelined, whole, 0) * rules.waiting_gradient_bytes,
        optimizer=shards * rules.optimizer_bytes
        + ceil_div(shards * rules.split_bytes_per_1000, np.array(1000))
        + staying,
        step=shards * (rules.step_bytes + np.where(stage < 3, rules.norm_bytes, 0)),
        streamed=shards * rules.streamed_bytes + coming,
        streamed_extra=coming,
        gathered=np.where(
            in_use, (whole + again) * rules.gather_bytes - narrower + frozen.whole, 0
        ),
        unsharded=np.where(apart | ((stage == 2) & rules.unit_gradients), whole + again, 0),
    )


def narrower_bytes(weight: Weight, local: LocalTensor, rules: StateRules) -> Int64:
    """By how much less than ``rules.gather_bytes`` an element a trained weight is gathered in."""
    if weight.frozen or not rules.gathered_bytes_per_64 or not is_quantised(weight):
        return np.zeros_like(local.elements)
    return local.total * (64 * rules.gather_bytes - rules.gathered_bytes_per_64) // 64


def weights_sharded(zero_stage: Int64, rules: StateRules) -> Bools:
    """Whether weights are split over data parallelism."""
    return zero_stage >= rules.weights_split_from


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
    weight: Weight, local: LocalTensor, sharding: Sharding, rules: StateRules
) -> tuple[Int64, Int64]:
    """Elements of a weight on one device: whole, and one rank's shard of them."""
    ways, layout = sharding.ways, rules.layout
    if layout == "contiguous":
        aligned = ceil_div(local.elements, np.array(START_ALIGNMENT)) * START_ALIGNMENT
        return np.where(
            sharding.zero_stage >= 1, aligned, local.elements
        ) * local.count, local.total
    if layout == "per_parameter":
        return local.total, ceil_div(local.elements, ways) * local.count
    if layout == "dim0":
        # Experts are one tensor with the expert as first dimension, the rows as second; where there
        # are more ranks than experts the rows are split (torchtitan's apply_fsdp), or always
        # (AutoModel's, Shard(1)).
        rows = ceil_div(local.rows, ways) * (local.elements // local.rows) * local.count
        experts = ceil_div(local.count, ways) * local.elements
        by_expert = is_expert(weight) & (ways <= local.count) & (not rules.expert_rows)
        return local.total, np.where(by_expert, experts, rows)
    return local.total, local.total


def _bucket_padding(elements: Int64, sharding: Sharding, rules: StateRules, alone: Int64) -> Int64:
    """Most elements that aligning the ends of a layer's buckets adds.

    A stage of layers with ``e`` elements has at most ``sum(e // bucket + 1)`` buckets (all but its
    last hold a whole one), and more around each weight that is ``alone`` in one."""
    ranks = sharding.ways if sharding.bucket_ranks is None else sharding.bucket_ranks
    buckets = elements // rules.least_bucket(ranks) + 1 + alone
    return np.where(elements > 0, buckets * (np.lcm(sharding.ways, BUCKET_ALIGNMENT) - 1), 0)
