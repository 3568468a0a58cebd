"""Mixture of experts: router, permutation, all-to-all, grouped products, shared experts.

Each device routes its own tokens (the residual stream, so 1/tp of the sequence with sequence
parallelism), sends them to the ranks that hold their ``top_k`` experts by the dispatcher of the
stack, and with expert-tensor parallelism gathers the rows over etp. Where experts are sliced as all
other layers are, ranks send nothing to each other before they sum. Where they are folded over
tensor-parallel ranks, ``planner.blocks.folded_experts`` says what comes before and after.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Int64, Shard, Weight
from cost_models.ops import Collective, Elementwise, GroupedMatMul, MatMul, Op, Routing, SavedTensor
from planner.blocks import folded_experts, mlp, routing, transposed
from planner.blocks.context import BlockContext, product_input_bytes, residual_add, within
from planner.blocks.quantised import plain
from planner.blocks.splits import Split
from planner.blocks.tensors import feed_forward, linear
from planner.models.spec import MoeSpec


def weights(spec: MoeSpec, hidden: int) -> list[Weight]:
    """Router and latent projections whole on every rank, experts over ep and etp, shared experts
    over tp."""
    result = [
        *linear("moe.router", spec.experts, hidden, "replicated", bias=spec.router_bias),
        *feed_forward(
            "moe.experts", spec.latent or hidden, spec.intermediate, gated=spec.gated,
            bias=spec.expert_bias, shardings=("expert_column", "expert_row"), count=spec.experts,
        ),
    ]  # fmt: skip
    if spec.latent is not None:
        result += linear("moe.latent_down", spec.latent, hidden, "replicated")
        result += linear("moe.latent_up", hidden, spec.latent, "replicated")
    if spec.router_scales:
        result.append(Weight("moe.router.scales", hidden + spec.experts, 1))
    if spec.shared_intermediate:
        result += feed_forward(
            "moe.shared", hidden, spec.shared_intermediate, gated=spec.gated, bias=False,
            shardings=("column", "row"),
        )  # fmt: skip
    if spec.shared_gate:
        result += linear("moe.shared_gate", 1, hidden, "replicated")
    return result


def splits(spec: MoeSpec) -> tuple[Split, ...]:
    """Experts over ep, their width over etp, the shared experts' over tp."""
    width, shared, experts = spec.intermediate, spec.shared_intermediate, spec.experts
    result = [Split(3, width, f"expert width {width} does not split over etp", "etp")]
    if shared:
        reason = f"shared expert width {shared} does not split over tp"
        result.append(Split(4, shared, reason, "tp"))
    result.append(Split(5, experts, f"{experts} experts do not split over ep", "ep"))
    return tuple(result)


def flops_per_token(_spec: MoeSpec, _span: int) -> float:
    """Nothing beyond the matrices of the experts that a token meets."""
    return 0.0


def assumptions(_spec: MoeSpec) -> tuple[str, ...]:
    """None of its own: the job's routing skew is told with the job."""
    return ()


def imbalance(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> NDArray[np.float64]:
    """Rows of the hottest rank over the balanced rows.

    ``min(ep^(0.45 alpha), ep * min(k, E / ep) / k)``: a power law fitted on serving kernels, an
    assumption for training; alpha = 0 is balanced routing. The cap is every token choosing the
    same rank.
    """
    ep = shard.ep.astype(np.float64)
    local = spec.experts / ep
    cap = ep * np.minimum(spec.top_k, local) / spec.top_k
    result: NDArray[np.float64] = np.minimum(ep ** (0.45 * ctx.expert_imbalance), cap)
    return result


def rows(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Balanced rows that one rank's experts see: its own tokens' copies, times etp where those of
    its neighbours are gathered. Sliced experts see what all tensor-parallel ranks have alike,
    folded ones a part of that."""
    own = folded_experts.dealt(ctx, shard, shard.residual_tokens * spec.top_k)
    return own if ctx.sliced_experts else own * shard.etp


def hot_rows(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Whole rows that the experts of the hottest rank see."""
    hot = np.ceil(rows(spec, ctx, shard) * imbalance(spec, ctx, shard))
    return hot.astype(np.int64)


def held_rows(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Rows that the hottest rank's experts have room for.

    Shapes that cannot depend on routing have room for every token of the group, as often as one
    may choose experts of the rank (MaxText, layers/moe.py: ``buffer_size``, by samples of a
    device). Where all tokens are gathered, their copies for other ranks' experts are sorted behind
    the rank's own.
    """
    hot = hot_rows(spec, ctx, shard)
    if not ctx.expert_room:
        return hot
    group = shard.ep * shard.residual_tokens
    if ctx.moe_dispatcher == "allgather":
        most = group * shard.etp * spec.top_k
    else:
        most = group * np.minimum(spec.top_k, spec.experts // shard.ep)
    room: Int64 = np.where(shard.ep > 1, np.maximum(hot, most), hot)
    return room


def expert_widths(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> tuple[int, Int64]:
    """Columns of a row that enter the experts of a rank, and by how many their products are wide
    inside: etp splits these, or those where tensor parallelism is transposed."""
    hidden = spec.latent or ctx.hidden
    if shard.transposed > 1:
        return hidden // shard.transposed, np.full_like(shard.etp, spec.intermediate)
    return hidden, spec.intermediate // shard.etp


def reorderings(
    ctx: BlockContext, own: Int64, gathered: Int64, local: Int64
) -> tuple[tuple[Elementwise, ...], ...]:
    """Kernels that reorder rows before the dispatch, after it, before the combine and after it.

    A plain exchange wants the rows of the ``own`` tokens by rank, and the experts want what arrives
    (``gathered`` bytes) by expert, where a rank has more than one (Megatron-Core's ``permute`` and
    ``sort_chunks_by_idxs``). DeepEP sends tokens as they lie, so that only what arrives is copied
    and sorted; HybridEP reorders inside its own kernels (Megatron-Core, core/transformer/moe/
    token_dispatcher.py: ``_DeepepManager``, ``_HybridEPManager``), taken to run at ep 1 as well.
    """
    if ctx.moe_dispatcher == "hybridep":
        return (), (), (), ()
    if ctx.moe_dispatcher == "deepep":
        size = 2.0 * gathered
        return (), (Elementwise("permute", size, size, 2, 2),), (
            Elementwise("unpermute", size, size, 2, 2),
        ), ()  # fmt: skip
    if ctx.expert_room and ctx.moe_dispatcher == "allgather":
        size = 2.0 * gathered
        return (), (Elementwise("permute", size, size, 2, 2),), (
            Elementwise("unpermute", size, size, 2, 2),
        ), ()  # fmt: skip
    moved = np.where(local > 1, 2.0 * gathered, 0.0)
    return (
        (Elementwise("permute", 2.0 * own, 2.0 * own, 2, 2),),
        (Elementwise("sort_rows", moved, moved),),
        (Elementwise("unsort_rows", moved, moved),),
        (Elementwise("unpermute", 2.0 * own, 2.0 * own, 2, 2),),
    )


def exchanges(
    spec: MoeSpec, ctx: BlockContext, shard: Shard, own: Int64, gathered: Int64, routing: Routing
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """Collectives before the experts and after them.

    Sliced experts exchange nothing: each expert's output is summed over tp, and in the backward the
    gradient of its input, once for each product that reads it (DeepSpeed, module_inject/auto_tp.py:
    every expert's last product is a ``LinearAllreduce``, the others ``LinearLayer``). Transposed
    ones sum their products over parts of the width instead (``transposed.over_width``).
    """
    if shard.transposed > 1:
        return (), ()
    if not ctx.sliced_experts:
        return (
            Collective("dispatch", "ep", "all_to_all", own, "all_to_all", own, routing=routing),
            Collective("etp_gather", "etp", "all_gather", gathered, "reduce_scatter", gathered),
        ), (
            Collective("etp_scatter", "etp", "reduce_scatter", gathered, "all_gather", gathered),
            Collective(
                "combine", "ep", "all_to_all", own, "all_to_all", own, routing=routing, back=True
            ),
        )  # fmt: skip
    each, count = own / spec.experts, spec.experts
    behind = None if ctx.dtensor else "expert_fc1:wgrad"
    return (
        Collective(
            "expert_input", "tp", None, 0, "all_reduce", each, backward_hidden=behind,
            backward_count=(2 if spec.gated else 1) * count,
        ),
    ), (
        Collective("expert_output", "tp", "all_reduce", each, None, 0, forward_count=count),
    )  # fmt: skip


def ops(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> tuple[Op, ...]:
    """Ops of the sub-block after its norm, up to and including the residual add."""
    r, e = shard.residual_tokens, ctx.element_bytes
    h, width = expert_widths(spec, ctx, shard)
    copies = r * spec.top_k
    own = folded_experts.dealt(ctx, shard, copies) * (spec.latent or ctx.hidden) * e
    hot = rows(spec, ctx, shard) * imbalance(spec, ctx, shard)
    local = spec.experts // shard.ep
    gathered = rows(spec, ctx, shard) * h * e
    router = 1.0 * r * spec.experts * 4
    fc1 = (2 if spec.gated else 1) * width
    held = held_rows(spec, ctx, shard)
    room = held / hot if ctx.expert_room else 1
    inner = (held if ctx.expert_room else hot) * width * e
    read = 2 if spec.gated else 1
    route = Routing(
        tokens=folded_experts.dealt(ctx, shard, r), row_bytes=h * e, experts=spec.experts,
        top_k=spec.top_k, groups=spec.routing_groups,
        group_limit=spec.routing_group_limit,
    )  # fmt: skip
    sorted_bytes = held * h * e if ctx.expert_room else gathered
    before, arrived, leaving, after = reorderings(ctx, own, sorted_bytes, local)
    deal, restore = folded_experts.around(ctx, shard, copies, h * e)
    inward, outward = exchanges(spec, ctx, shard, own, gathered, route)
    result: list[Op] = [
        MatMul("router", r, spec.experts, ctx.hidden, low_precision=False),
        Elementwise("routing", 4 * router, 3 * router, 6, 4),
        *transposed.over_width("router", shard, shard.tokens * spec.experts * e),
        *_latent("latent_down", spec, r, h, ctx.hidden),
        *deal,
        *before,
        *_count_exchange(spec, ctx),
        *inward,
        *transposed.expert_weights(shard, local * h * width * (read + 1)),
        *arrived,
        GroupedMatMul("expert_fc1", local, hot / local, fc1, h, pieces=(1,) * read,
                      room=room, quantised=plain(ctx.quantiser, hot, fc1, h, local)),
        *transposed.over_width("expert_fc1", shard, read * inner),
        Elementwise("expert_activation", (read + 1) * inner, (2 * read + 1) * inner,
                    modules=("moe_act",)),
        GroupedMatMul("expert_fc2", local, hot / local, h, width, room=room,
                      quantised=plain(ctx.quantiser, hot, h, width, local)),
        *leaving,
        *outward,
        *after,
        *restore,
        *_latent("latent_up", spec, r, ctx.hidden, h),
    ]  # fmt: skip
    if spec.shared_intermediate:
        result += within("shared_experts", mlp.products(
            "shared_", spec.shared_intermediate, ctx, shard, gated=spec.gated, bias=False
        ))  # fmt: skip
    return (*within("moe", result), residual_add("moe_residual", ctx, shard))


def _latent(name: str, spec: MoeSpec, rows: Int64, out: int, into: int) -> tuple[MatMul, ...]:
    """A projection to or from the width in which the experts work."""
    return () if spec.latent is None else (MatMul(name, rows, out, into),)


def _count_exchange(spec: MoeSpec, ctx: BlockContext) -> tuple[Collective, ...]:
    """torchtitan's dispatcher tells every rank how many rows each expert will get."""
    if not ctx.dtensor:
        return ()
    return (Collective("row_counts", "ep", "all_to_all", 8 * spec.experts, None, 0),)


def saved(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """Tensors kept for the backward, after the norm's input and output."""
    h, width = expert_widths(spec, ctx, shard)
    e, held = ctx.element_bytes, held_rows(spec, ctx, shard)
    inner = held * width * e
    weighed = shard.residual_tokens * spec.top_k
    if ctx.expert_room and ctx.moe_dispatcher == "allgather":
        weighed = held // shard.etp
    result = [
        SavedTensor("router_probabilities", 2 * shard.residual_tokens * spec.experts * 4),
        *routing.saved(spec, ctx, shard, held),
        SavedTensor("dispatched", ctx.saved_input(held * h * e), input_of="expert_fc1"),
        SavedTensor("expert_fc1_output", (2 if spec.gated else 1) * inner, input_of="moe_act"),
        SavedTensor("expert_activation", ctx.saved_input(inner), modules=("moe_act",)),
        _weighing(spec, ctx, shard, inner, weighed * (spec.latent or ctx.hidden)),
    ]
    if spec.gated and "swiglu" not in ctx.fused:
        result.append(SavedTensor("expert_gate_activation", inner, modules=("moe_act",)))
    if spec.latent is not None:
        result.append(SavedTensor("latent_tokens", 2 * shard.residual_tokens * spec.latent * e))
    if spec.shared_intermediate:
        result += within("shared_experts", (
            *_shared_input(ctx, shard),
            *mlp.inner_saved("shared_", spec.shared_intermediate, ctx, shard, gated=spec.gated),
        ))  # fmt: skip
    return within("moe", result)


def _weighing(
    spec: MoeSpec, ctx: BlockContext, shard: Shard, inner: Int64, outputs: Int64
) -> SavedTensor:
    """What the gradients of the routing probabilities need: the factor that they multiply.

    Where that is the activation's output, a fused SwiGLU computes it again from the first
    product's (Megatron-Core 0.13.1, core/fusions/fused_bias_swiglu.py, WeightedSwiGLUFunction); it
    is kept otherwise (core/transformer/moe/experts.py, TEGroupedMLP, bias_act_func).
    """
    if not ctx.sums_expert_outputs:
        return SavedTensor("combined", outputs * _weighed_bytes(ctx, shard))
    fused = spec.gated and "swiglu" in ctx.fused
    return SavedTensor("expert_unweighed", 0 * inner if fused else inner, modules=("moe_act",))


def _shared_input(ctx: BlockContext, shard: Shard) -> tuple[SavedTensor, ...]:
    """What the shared experts' first product keeps of its input beside the router, which keeps it
    in 16 bits (Megatron-Core 0.14, core/transformer/moe/shared_experts.py)."""
    if ctx.saved_input_bytes_per_64 is None or "shared_experts" in ctx.original_inputs:
        return ()
    return (SavedTensor("shared_input", ctx.saved_input(product_input_bytes(ctx, shard))),)


def _weighed_bytes(ctx: BlockContext, shard: Shard) -> Int64:
    """Of an element of the experts' outputs when they are weighed: fp32 in torchtitan's combine
    (token_dispatcher.py), 16 bits where all of them were gathered."""
    plain = np.full_like(shard.tp, 4 if ctx.dtensor else ctx.element_bytes)
    weighed: Int64 = np.where(folded_experts.folds(ctx, shard), ctx.element_bytes, plain)
    return weighed


def working(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Gradients of the dispatched rows and of the experts' inner tensors.

    Where torchtitan weighs the experts' outputs, its backward holds three such tensors before: the
    gradient, and it times the weights and times the outputs.
    """
    held = held_rows(spec, ctx, shard)
    hidden = spec.latent or ctx.hidden
    columns, width = expert_widths(spec, ctx, shard)
    inner = held * width
    gradients = (2 * held * columns + (3 if spec.gated else 2) * inner) * ctx.element_bytes
    whole = spec.experts // shard.ep * columns * width * (3 if spec.gated else 2)
    gathered = ctx.gathered_bytes(shard) + transposed.expert_working(shard, whole)
    plain: Int64 = gradients + gathered
    if not ctx.dtensor:
        return plain
    weighing = 3 * _weighed_bytes(ctx, shard) * shard.residual_tokens * spec.top_k * hidden
    largest: Int64 = np.maximum(plain, weighing)
    return largest
