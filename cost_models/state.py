"""Persistent state per device: weights, gradients, optimizer state, and gathered weights.

Persistent state per parameter, for 16-bit training with AdamW in Megatron-style stacks: 2 (weight)
+ 4 (fp32 main gradient) + 12 (fp32 master weight and two moments) = 18 bytes; the optimizer part
is sharded over data parallelism from ZeRO stage 1, the gradient from stage 2, the weight from
stage 3 (Rajbhandari et al., arXiv 1910.02054, section 3). Stacks without master weights (FSDP2)
keep the fp32 weights themselves sharded: 4 + 4 + 8 = 16 bytes, plus 16-bit copies while gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.graph import Bools, Int64, LayerKind, Shard, Weight

OPTIMIZER_MOMENTS = {"adamw": 2, "sgd": 1}
"""fp32 moments per parameter (SGD with momentum)."""


def ceil_div(numerator: Int64, denominator: Int64) -> Int64:
    """Integer division rounded up."""
    return -(-numerator // denominator)


def local_elements(weight: Weight, shard: Shard, vocab_divisor: int) -> Int64:
    """Elements of ``weight`` on one device before data-parallel sharding."""
    tp, ones = shard.tp, np.ones_like(shard.tp)
    match weight.sharding:
        case "replicated":
            split = weight.rows * weight.cols * ones
        case "vocab":
            padded = ceil_div(weight.rows * ones, vocab_divisor * tp) * vocab_divisor * tp
            split = padded // tp * weight.cols
        case "column":
            ways = np.minimum(tp, weight.kv_heads) if weight.kv_heads else tp
            split = ceil_div(weight.rows * ones, ways) * weight.cols
        case "row":
            split = ceil_div(weight.cols * ones, tp) * weight.rows
        case "expert_column" | "expert_row":
            return ceil_div(weight.rows * weight.cols * ones, shard.etp) * (
                ceil_div(weight.count * ones, shard.ep)
            )
    return split * weight.count


@dataclass(frozen=True, slots=True)
class LocalParameters:
    """Elements of one layer on one device: those replicated over the attention mesh's data
    parallelism, and those of experts, replicated over the expert mesh's."""

    dense: Int64
    expert: Int64


def local_parameters(kind: LayerKind, shard: Shard, vocab_divisor: int) -> LocalParameters:
    """Parameters of one layer of ``kind`` on one device, before data-parallel sharding."""
    dense = np.zeros_like(shard.tp)
    expert = np.zeros_like(shard.tp)
    for weight in kind.weights:
        elements = local_elements(weight, shard, vocab_divisor)
        if weight.sharding.startswith("expert_"):
            expert = expert + elements
        else:
            dense = dense + elements
    return LocalParameters(dense, expert)


@dataclass(frozen=True, slots=True)
class StateRules:
    """Bytes per element of the persistent state, from stack, precision and optimizer."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gather_bytes: int
    """Bytes per element of a gathered (unsharded) weight in ZeRO stages 2 and 3."""


def state_rules(
    *, precision: str, optimizer: str, master_weights: bool, gradient_dtype: str
) -> StateRules:
    """The rules for one stack and job; see the module docstring."""
    moments = 4 * OPTIMIZER_MOMENTS[optimizer]
    if precision == "fp32":
        return StateRules(4, 4, moments, 4)
    gradient = 4 if gradient_dtype == "fp32" else 2
    if master_weights:
        return StateRules(2, gradient, 4 + moments, 2)
    return StateRules(4, 4, moments, 2)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Persistent and gathered bytes of one layer on one device."""

    weights: Int64
    gradients: Int64
    optimizer: Int64
    gathered: Int64
    """Unsharded copies of a sharded layer while it is in use."""


def state_bytes(
    elements: Int64, *, ways: Int64, zero_stage: Int64, pipelined: Bools, rules: StateRules
) -> StateBytes:
    """State of ``elements`` parameters sharded ``ways`` ways from the given ZeRO stage on.

    Stage 2 keeps unsharded 16-bit weights through the step when the stack holds fp32 shards
    (FSDP2 without resharding after forward); Megatron-style stacks keep their weights replicated.
    Under a pipeline FSDP2 reduces gradients once per step: until then they are whole on each rank
    (PyTorch's pipelining stage turns off gradient synchronisation before the last backward).
    """
    shard = ceil_div(elements, ways)
    fsdp = rules.weight_bytes > rules.gather_bytes
    weights_sharded = (zero_stage >= 3) | ((zero_stage >= 2) & fsdp)
    zero = np.zeros_like(elements)
    return StateBytes(
        weights=np.where(weights_sharded, shard, elements) * rules.weight_bytes,
        gradients=np.where((zero_stage >= 2) & ~(fsdp & pipelined), shard, elements)
        * rules.gradient_bytes,
        optimizer=np.where(zero_stage >= 1, shard, elements) * rules.optimizer_bytes,
        gathered=np.where(weights_sharded, elements * rules.gather_bytes, zero),
    )
