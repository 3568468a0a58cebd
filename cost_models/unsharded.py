"""Short-lived bytes of sharded data parallelism: gathered weights and unreduced gradients.

A unit (a layer, the head, the embedding) is gathered while it runs, and the next layer with it. Its
backward leaves 16-bit gradients; FSDP2 copies them to a buffer in the dtype of the reduction, and
keeps that buffer through the backward of the next unit, until the latter has gradients to send
(PyTorch, ``_fsdp_collectives.foreach_reduce`` and ``FSDPParamGroup.post_backward``).
"""

from __future__ import annotations

import numpy as np

from cost_models.data_traffic import DataParallel, reduces_each
from cost_models.graph import Bools, Int64, LayerKind, Shard
from cost_models.recompute import mode_rows
from cost_models.state import StateBytes, ceil_div
from cost_models.state_rules import StateRules
from hardware_profiles.schema import StackSpec


def add_unsharded(
    rows: Int64, kind: LayerKind, shard: Shard, used: StateBytes, *, lasting: Int64,
    whole_gradients: Bools, between: Bools, waits: Bools, rules: StateRules, ahead: Int64,
    policies: tuple[str, ...],
) -> None:  # fmt: skip
    """Add to the working bytes of every mode what is unsharded while a layer of ``kind`` runs.

    Under a pipeline and in stage 1 (``whole_gradients``) gradients are reduced once per step, layer
    by layer, where fewer microbatches are in flight than at the peak; each layer's sum is gone when
    its shard is there.
    ``used`` is the state of the weights that the layer uses, also of those that another one holds;
    ``lasting`` says where weights stay gathered all step. The layer takes the larger of two
    moments: its kernels, with ``ahead`` more layers gathered; and the end of its backward, when its
    16-bit gradients are there and its own activations gone but for the input, the gradient of that,
    and both gathered over tp. What the unit behind it reduces is beside both
    (``Field.IN_FLIGHT``). A loss in pieces reduces the head's gradients after each, with those of
    the piece before in flight. Where gradients wait for the last microbatch (``waits``) they are
    there already, and so are the shards that they become: what a unit adds is the buffer of its
    reduction, which takes their place while the next one runs.
    """
    end = kind.name in ("embedding", "head")
    pieces = kind.name == "head" and kind.in_pieces
    gathered = np.where(lasting > 0, 0, used.gathered)
    # Where a backward leaves weights gathered, a stage counts them (``cost_models.resharding``).
    running = gathered if end else np.where(between, 0, (1 + ahead) * gathered)
    reducing = np.zeros_like(gathered)
    if rules.unit_gradients:
        elements = used.unsharded
        if end:
            buffers = rules.gather_bytes + (2 if pieces else 1) * rules.gradient_bytes
            apart = np.where(waits, rules.gradient_bytes * elements, used.gradients)
            reducing = gathered + np.where(waits, 0, buffers * elements) + apart
            # The unit of both ends is resharded before its reduction (``post_backward``); with one
            # parameter, its sum of two gradients comes before that, and is as large as the buffer.
            reducing -= np.where(kind.ends_unit & (shard.tp > 1), lasting, 0)
        else:
            reducing = (
                (1 + ahead) * gathered
                + rules.gather_bytes * elements
                + 2 * kind.boundary_bytes(shard) * (1 + shard.sp)
            )
        made = (used.gathered > 0) | (used.unsharded > 0)
        reducing = np.where(made & ~whole_gradients, reducing, 0)
    for modes in mode_rows(policies).values():
        kept = 0 if pieces else rows[modes.kept]
        rows[modes.working] = np.maximum(rows[modes.working] + running, reducing - kept)


def held_by_graph(
    kind: LayerKind, used: StateBytes, data: DataParallel, *, rules: StateRules
) -> Int64:
    """Gathered weights whose memory autograd keeps from forward to backward.

    A linear layer's backward reads a transposed view of its weight, and the view keeps the memory
    when ZeRO stage 3 has emptied the parameter; the backward gathers the weights again beside it.
    DeepSpeed's own linear function keeps none, but only models made under ``zero.Init`` run it
    (DeepSpeed, ``runtime/zero/linear.py``; deepspeedai/DeepSpeed pull request 8189). A lookup reads
    no weight in its backward.
    """
    if not rules.graph_keeps_gathered or kind.name == "embedding":
        return np.zeros_like(used.gathered)
    return np.where(data.zero_stage == 3, used.gathered, 0)


def in_flight(used: StateBytes, data: DataParallel, *, rules: StateRules) -> Int64:
    """The buffer in which the gradients of a unit are reduced (``Field.IN_FLIGHT``)."""
    if not rules.unit_gradients:
        return np.zeros_like(data.pp)
    return np.where(reduces_each(data, rules), rules.gradient_bytes * used.unsharded, 0)


def add_output(
    rows: Int64, kind: LayerKind, shard: Shard, *, pipelined: Bools, policies: tuple[str, ...]
) -> None:
    """Add the output that a schedule still holds while the loss of its microbatch works.

    Where the loss runs in pieces the output is the head's input, which counts as kept already
    (torchtitan, components/loss.py, ``ChunkedCELoss``: the model leaves out its output layer).
    """
    if kind.in_pieces:
        return
    output = np.where(pipelined, kind.output_bytes(shard), 0)
    for modes in mode_rows(policies).values():
        rows[modes.working] += output


def made_each_step(held: StateBytes, zero_stage: Int64, *, stack: StackSpec) -> Int64:
    """Gradients whose memory serves other tensors before the step's first backward.

    Reduced gradients that are allocated on a stream of their own keep their blocks all along.
    """
    if not stack.new_gradients:
        return np.zeros_like(held.gradients)
    own_blocks = (zero_stage >= 2) & stack.stream_pools
    return np.where(own_blocks, 0, held.gradients)


def partly_gathered(held: StateBytes, ways: Int64, data: DataParallel) -> Int64:
    """What of the gathered weights stays for the backward: a part of ``data.reshard`` each."""
    group = np.maximum(data.reshard, 1)
    kept = (data.zero_stage == 3) & (data.reshard > 0) & (ways > group)
    return np.where(kept, ceil_div(held.gathered, group), 0)


def reduced_apart(
    held: StateBytes, data: DataParallel, *, stack: StackSpec, rules: StateRules
) -> Int64:
    """Shards of reduced gradients on a stream of their own, where whole ones accumulate all step:
    those give their memory back to another stream."""
    if not (stack.new_gradients and stack.stream_pools and rules.weight_bytes):
        return np.zeros_like(held.gradients)
    shards = held.weights // rules.weight_bytes * rules.gradient_bytes
    each = rules.held_gradient_bytes * (held.weights // rules.weight_bytes)
    shards = np.where(data.deferred, each, shards)
    return np.where(((data.pp > 1) & (data.zero_stage >= 2)) | data.deferred, shards, 0)


def update_bytes(held: StateBytes, *, copies: int, state: int) -> Int64:
    """``copies`` fp32 copies of the local parameters, each 4 of the ``state`` bytes of each, and
    what comes from the host."""
    return copies * held.optimizer * 4 // state + held.streamed
