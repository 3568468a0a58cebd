"""What a caching allocator cannot use again: remains of blocks that it has split.

PyTorch's allocator takes the smallest free block that is large enough, splits it, and joins the
rest to nothing but its neighbours in the same ``cudaMalloc``
(c10/cuda/CUDACachingAllocator.cpp, ``expandable_segments`` off). Three formulas follow, with no
constant in them; ``benchmarks/memory/fragmentation.py`` replays the allocator beside both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cost_models.buffers import fused_name
from cost_models.data_traffic import DataParallel
from cost_models.graph import Int64, LayerKind, Shard, WorkloadGraph
from cost_models.layout import RecomputePolicy
from cost_models.recompute import mode_rows
from cost_models.state import is_expert, local_tensor
from cost_models.state_rules import StateRules
from cost_models.step import Field

SMALL_BYTES = 1 << 20
"""Smaller tensors have segments of their own."""


def left_by_weights(
    kind: LayerKind, shard: Shard, data: DataParallel, *, rules: StateRules, vocab_divisor: int
) -> Int64:
    """What stays free of the blocks in which a layer's weights were made.

    Megatron-Core makes weights one by one, then copies them to the buffer of its distributed
    optimizer (megatron/core/distributed/param_and_grad_buffer.py, ``old_param_data``). Activations
    take the blocks that are left, until the rest of one is smaller than the residual stream, which
    most of them are. Experts are left out: tensors of as many sizes as experts have rows fill
    their blocks.
    """
    total = np.zeros_like(shard.tp)
    if not rules.copies_weights or rules.layout != "contiguous":
        return total
    sizes: dict[str, Int64] = {}
    for weight in kind.weights:
        if not is_expert(weight) and not weight.frozen and weight.count == 1:
            local = local_tensor(weight, shard, vocab_divisor)
            name = fused_name(weight)
            made = np.where(weight.copy & (data.pp == 1), 0, local.elements)
            sizes[name] = sizes.get(name, total) + made * rules.weight_bytes
    for size in sizes.values():
        rest = np.minimum(size, kind.boundary_bytes(shard))
        total = total + np.where(size > SMALL_BYTES, rest, 0)
    return np.where((data.zero_stage == 1) | (data.zero_stage == 2), total, 0)


def add_lookups(
    kinds_and_head: Sequence[Int64], embedding: Int64, workload: WorkloadGraph, shard: Shard,
    pp: Int64, rules: StateRules, of: Int64,
) -> None:  # fmt: skip
    """Add to the priced rows of both ends, and of the layers between them, what the gradients of
    their lookups hold: entry ``of`` of the configurations that ``shard`` and ``pp`` have.

    Prediction modules look rows up in a table of their own on the last stage of a pipeline. On one
    stage with the embedding they share its table: autograd sums a tensor's gradients before a hook
    sees them, so the modules' waits for the embedding's through all layers' backward. So does the
    head's of a table that it shares in one unit with the embedding, beside what the layers reduce.
    """
    head = kinds_and_head[-1]
    block = lookup_block(workload, workload.embedding, shard, pp, rules)
    embedding[Field.LOOKUP_BLOCK] = block[of]
    embedding[Field.STATIC] += block[of]
    own = lookup_block(workload, workload.head, shard, np.ones_like(pp), rules)
    own = np.where(pp > 1, own, 0)
    head[Field.LOOKUP_BLOCK] = own[of]
    head[Field.STATIC] += own[of]
    waits = np.where(pp == 1, _largest_table(workload, workload.head, shard, rules), 0)
    head[Field.IN_FLIGHT] += waits[of]
    if workload.embedding.ends_unit:
        table = _largest_table(workload, workload.embedding, shard, rules)[of]
        for rows in kinds_and_head:
            rows[Field.IN_FLIGHT] += np.where(embedding[Field.IN_FLIGHT] > 0, table, 0)


def lookup_block(
    workload: WorkloadGraph, end: LayerKind, shard: Shard, pp: Int64, rules: StateRules
) -> Int64:
    """The block of the dense gradient of the tables that an end of the model looks rows up in.

    Products write their weights' gradients into the buffer themselves; a lookup's is a tensor of
    its own, as large as the table, which a hook adds to the buffer with each backward
    (megatron/core/distributed/distributed_data_parallel.py, ``param.main_grad.add_``). The smallest
    free block that holds an activation is one that held such another, so the block stays for the
    next backward unless a larger one is free then: of a layer, or of the logits on the same rank,
    where no softmax of them waits.
    """
    largest = np.zeros_like(shard.tp)
    if not rules.dummy_wgrad or rules.layout != "contiguous":
        return largest
    table = _largest_table(workload, end, shard, rules)
    for kind in workload.kinds.values():
        for tensor in kind.saved(shard):
            largest = np.maximum(largest, tensor.bytes)
    logits = workload.head.output_bytes(shard)
    wide = logits * 4 // workload.head.element_bytes
    over_pipeline = workload.vocabulary_over_pipeline
    beside = np.where(pp == 1, wide, logits if over_pipeline else 0)
    return np.where(table > np.maximum(largest, beside), table, 0)


def _largest_table(
    workload: WorkloadGraph, end: LayerKind, shard: Shard, rules: StateRules
) -> Int64:
    """Bytes of the largest gradient of what stands before the first layer, among an end's own."""
    table = np.zeros_like(shard.tp)
    for weight in end.weights:
        if weight.name.startswith("embedding") and not weight.frozen:
            local = local_tensor(weight, shard, workload.vocab_divisor)
            table = np.maximum(table, local.elements * rules.gather_bytes)
    return table


def split_by_checkpoints(
    rows: Int64, kind: LayerKind, shard: Shard, policies: tuple[RecomputePolicy, ...]
) -> None:
    """Add to what each policy keeps of a layer what :func:`split_rest` says that it leaves."""
    places = mode_rows(tuple(policy.name for policy in policies))
    for policy in policies:
        rows[places[policy.name].kept] += split_rest(kind, shard, policy)


def split_rest(kind: LayerKind, shard: Shard, policy: RecomputePolicy) -> Int64:
    """A layer's part of the rest of the blocks that inputs of layers lie in: 0 where a policy keeps
    more of a layer than that, or attention has no scores.

    The score matrices of an unfused attention are the largest tensors of a layer that runs again.
    Between two such layers their blocks are free, and the inputs that stay for the backward, or a
    rank's parts of them, are put there, as many as fit. Scores find no room beside them and get
    another block.

    That rest, shared by the inputs of a block, falls to nothing at every sequence length at which
    one more fits. An input is counted with no more than it takes at the next such length, so that a
    longer sequence never takes less memory.
    """
    scores = np.zeros_like(shard.tp)
    if policy.keeps is None or policy.keeps:
        return scores
    tensors = kind.saved(shard)
    for tensor in tensors:
        if "core_attn" in tensor.modules:
            scores = np.maximum(scores, tensor.bytes)
    everything = np.zeros_like(shard.tp) + sum(tensor.bytes for tensor in tensors)
    kept = np.minimum(kind.boundary_bytes(shard), everything)
    if policy.in_parts:
        kept = -(-kept // shard.input_parts)
    inputs, rest = np.divmod(scores, np.maximum(kept, 1))
    # Scores grow with the square of the length: (kept / scores) x kept is the same at all lengths.
    common = np.maximum(np.gcd(scores, kept), 1)
    next_fits = kept // common * (kept - rest) // np.maximum(scores // common, 1)
    each = np.minimum(rest // np.maximum(inputs, 1), next_fits)
    each = np.where((kept > SMALL_BYTES) & (inputs > 0), each, 0)
    # Of layers that run again together one keeps its input; each has its part of that.
    result: Int64 = -(-each // policy.group)
    return result
