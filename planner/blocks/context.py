"""What every block needs to know about the model, the job and the stack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from cost_models.graph import Int64, Shard
from cost_models.ops import Collective, Elementwise, Op, SavedTensor
from planner.blocks import transposed
from planner.blocks.quantised import Quantiser

Item = TypeVar("Item", bound=Op | SavedTensor)


STATISTICS = {"rms": 1, "layer": 2}
"""fp32 numbers that a norm keeps of each row: the deviation, and of layer norm the mean."""


@dataclass(frozen=True, slots=True)
class BlockContext:
    """Shared by all blocks of a workload."""

    hidden: int
    element_bytes: int
    """Bytes per activation element (2 for bf16, fp16 and fp8 recipes; 4 for fp32)."""
    attention_kernel: str
    """``unfused`` or a fused kernel generation such as ``flash3``."""
    fused: frozenset[str]
    dropout: bool
    vocab: int
    vocab_divisor: int
    logit_saved_bytes: float
    logit_working_bytes: float
    norms_again: bool = False
    """Whether residual additions and the norms behind them run again in the backward, of layers
    that do not run again whole."""
    loss_traffic: tuple[int, int] = (26, 14)
    """Bytes moved per logit by a loss that is not fused, forward and backward."""
    rotary: bool = True
    """Whether queries and keys are rotated; not with a learned position table."""
    expert_imbalance: float = 0.0
    moe_dispatcher: str = "alltoall"
    """Who sends tokens to their experts (``hardware_profiles.schema.Dispatcher``)."""
    dtensor: bool = False
    """Whether tensor parallelism is DTensor's rather than Megatron's asynchronous layers."""
    keeps_gathered_context: bool = False
    """Whether attention keeps the keys and values that context parallelism gathered for it."""
    copies_context_output: bool = False
    """Whether attention over gathered keys and values keeps a copy of its output of its own."""
    values_are_views: bool = False
    """Whether values of latent attention keep all of the product that they were split from."""
    sums_expert_outputs: bool = False
    """Whether what goes into the experts' last products is weighed, and not their outputs."""
    sigmoid_router: bool = False
    """Whether each expert's score is a sigmoid, not one softmax over all."""
    maps_routing: bool = False
    """Whether what Megatron-Core's router and dispatcher keep of who goes where is known."""
    splits_latent_down: bool = False
    """Whether tp splits the down-projections of latent attention by columns."""
    separate: frozenset[str] = frozenset()
    """Projections of one input that are products of their own: ``qkv``, ``gate_up``."""
    sliced_experts: bool = False
    """Whether tp splits every expert over ranks that all have the same tokens."""
    expert_room: bool = False
    """Whether experts have buffers for all rows that their group might send them."""
    folded_experts: bool = False
    """Whether ranks of tp, which have the same tokens, deal the tokens' copies out to each other
    before they send them on, and gather all outputs."""
    document: int | None = None
    """Tokens within which tokens see each other where samples are packed; None: the sample."""
    saved_input_bytes_per_64: int | None = None
    """Bytes of 64 elements of a low-precision product's input while it waits for the backward;
    None: as any other activation."""
    original_inputs: frozenset[str] = frozenset()
    """Low-precision products that keep an input which another op keeps in 16 bits."""
    optimizer_scalar_bytes: int = 0
    """Bytes that the optimizer keeps per parameter tensor."""
    rotary_cache_bytes: int = 0
    expert_buffer_bytes: int = 0
    """Bytes per position and head dimension of the rotary factors that each layer holds."""
    norm_statistics: int = 1
    """Of :data:`STATISTICS`."""
    norm_copy_bytes: int = 4
    """Per element of the normalised copy of a norm that is not fused."""
    whole_prediction: bool = False
    """Whether every tp rank has the projection of prediction modules whole."""
    loss_chunks: int = 1
    """Pieces of the sequence that go through head and loss one after the other."""
    loss_again: bool = False
    """Whether the logits of these pieces are made again in the backward."""
    loss_gradient_bytes: int = 0
    """Per weight of the head, where the loss makes their gradient itself."""
    logit_working_bytes_split: float | None = None
    """As ``logit_working_bytes``, where the vocabulary is split over tp."""

    balanced_context: bool | Literal["where_it_splits"] = True
    """Whether the ranks of context parallelism have equal parts of a causal mask."""
    whole_vocabulary: bool = False
    """Whether every tp rank has embedding and head whole."""
    exchanges_output_again: bool = True
    """Whether two levels of context parallelism exchange attention's output in the backward too."""
    orders_gathered: bool = False
    """Whether Transformer Engine gathers keys and values too."""
    merges_ring: bool = False
    """Whether the passes that join what a ring's blocks gave are those of Transformer Engine."""
    keeps_gathered: bool = False
    """Whether attention and feed-forward keep what sequence parallelism gathers for them."""
    gathers_heads: bool = False
    """Whether tp above the KV heads divides their weights too and gathers what they make."""
    quantiser: Quantiser | None = None
    """How operands of low-precision products are quantised; None: in full precision's products, or
    each operand whole, by a kernel of its own."""
    own_operand_bytes: int | None = None
    """Where a mode may keep all that autodiff saves (``planner.blocks.autodiff``), bytes per
    element of the input that each product keeps for itself; 0: products share it."""
    whole_embedding_in_context: bool = False
    """Whether every tp rank has the embedding whole under context parallelism."""

    @property
    def pipelines_products(self) -> bool:
        """Whether a stack that pipelines gathers and scatters with products does so with these."""
        return self.quantiser is None or self.quantiser.pipelined

    @property
    def fuses_norms(self) -> bool:
        """Whether a norm with one product behind it belongs to that product's layer."""
        return "norm_linear" in self.fused

    def vocabulary_shard(self, shard: Shard) -> Shard:
        """The shard as embedding and head see it."""
        if not self.whole_vocabulary:
            return shard
        return replace(shard, tp=np.ones_like(shard.tp), vocabulary=None)

    def span(self, shard: Shard, limit: int | None = None) -> int:
        """Tokens within which tokens see each other: the sample, a document, or a chunk."""
        lengths = (shard.sequence, self.document, limit)
        return min(length for length in lengths if length is not None)

    def saved_input(self, size: Int64) -> Int64:
        """Bytes kept of the ``size`` bytes that go into a low-precision product."""
        if self.saved_input_bytes_per_64 is None:
            return size
        return -(-size // self.element_bytes * self.saved_input_bytes_per_64 // 64)

    def residual_bytes(self, shard: Shard) -> Int64:
        """Bytes of the residual stream of one microbatch on one device."""
        return shard.residual_tokens * self.hidden * self.element_bytes

    def gathered_bytes(self, shard: Shard) -> Int64:
        """Bytes of a full-width activation before tensor-parallel splitting."""
        return shard.tokens * self.hidden * self.element_bytes


def within(module: str, items: Iterable[Item]) -> tuple[Item, ...]:
    """``items`` as parts of ``module`` too."""
    return tuple([replace(item, modules=(*item.modules, module)) for item in items])


def enter_tensor_parallel(
    name: str, ctx: BlockContext, shard: Shard, *, pipelined: bool = True, products: int = 1,
    kept: bool = False, quantised: bool = True,
) -> tuple[Collective, ...]:  # fmt: skip
    """Collectives at the input of column-parallel ``products`` of one input.

    With sequence parallelism: all-gather forward, reduce-scatter of the input's gradient backward.
    Without: nothing forward, all-reduce of the gradient backward, one for each product. Megatron's
    asynchronous linear layer keeps the scattered input and gathers it again in the backward (for
    the weight gradient, behind the data gradient), and reduces behind the weight gradient
    (Korthikanti et al., arXiv 2205.05198, section 4.2.2). DTensor keeps the gathered input and
    hides nothing. ``pipelined``: whether a stack that pipelines does so with this product;
    ``kept``: whether the gathered input is kept, unless ``sp_gather`` is run again; ``quantised``:
    whether the products are, and so what is gathered, where the stack quantises it before.
    """
    size = ctx.gathered_bytes(shard)
    quantiser = ctx.quantiser if quantised else None
    gathered = size if quantiser is None else quantiser.gathered_bytes(size)
    product = f"{name}:fprop" if pipelined and ctx.pipelines_products else None
    if shard.transposed > 1:
        return transposed.enter(name, size, shard, product=product)
    sp = shard.sequence_parallel
    behind = None if ctx.dtensor else f"{name}:wgrad"
    return (
        *(() if quantiser is None else quantiser.agreed(name, shard, backward=False)),
        Collective(
            f"{name}.gather", "tp", "all_gather", gathered,
            None if ctx.dtensor or kept else "all_gather", 0 if ctx.dtensor or kept else gathered,
            backward_hidden=f"{name}:dgrad", active=sp, forward_product=product,
            modules=("sp_gather",) if kept else (),
        ),
        Collective(
            f"{name}.scatter", "tp", None, 0, "reduce_scatter", size, backward_hidden=behind,
            active=sp,
        ),
        Collective(
            f"{name}.reduce", "tp", None, 0, "all_reduce", size, backward_hidden=behind,
            backward_count=products, active=~sp,
        ),
    )  # fmt: skip


def leave_tensor_parallel(name: str, ctx: BlockContext, shard: Shard) -> tuple[Collective, ...]:
    """Collectives at the output of a row-parallel product: the adjoint of the above."""
    size = ctx.gathered_bytes(shard)
    if shard.transposed > 1:
        return transposed.leave(name, size, shard)
    sp, quantiser = shard.sequence_parallel, ctx.quantiser
    gathered = size if quantiser is None else quantiser.gathered_bytes(size, gradient=True)
    return (
        *(() if quantiser is None else quantiser.agreed(name, shard, backward=True)),
        Collective(
            f"{name}.scatter", "tp", "reduce_scatter", size, "all_gather", gathered, active=sp,
            forward_product=f"{name}:fprop" if ctx.pipelines_products else None,
            backward_product=f"{name}:dgrad" if ctx.pipelines_products else None,
        ),
        Collective(f"{name}.reduce", "tp", "all_reduce", size, None, 0, active=~sp),
    )  # fmt: skip


def norm(
    name: str, ctx: BlockContext, shard: Shard, modules: tuple[str, ...] = (), *,
    shares_input: bool = False, quantised: bool = False,
) -> Elementwise:  # fmt: skip
    """A norm over the residual stream: read and write forward; read two, write one backward.

    ``quantised``: whether a low-precision product has the norm for its own.

    ``shares_input``: its input goes on as the residual, so the backward sums two gradients.
    Autograd does that in a kernel of its own (PyTorch, torch/csrc/autograd/input_buffer.cpp): two
    more are read and one written. Compilers read one more (``gradient_sums``).
    """
    size = ctx.residual_bytes(shard)
    summed, again = 0.0, shares_input and ctx.norms_again
    if shares_input:
        summed = 1.0 if "gradient_sums" in ctx.fused else 3.0
    backward = (3.0 + summed + 2.0 * again) * size
    saved = ctx.quantiser.norm_saves if quantised and ctx.quantiser is not None else 0.0
    forward = (2.0 - saved / ctx.element_bytes) * size
    return Elementwise(
        name, forward, backward, backward_launches=1 + again, modules=modules, again=again
    )


def residual_add(name: str, ctx: BlockContext, shard: Shard, *, bias: bool = False) -> Elementwise:
    """Residual addition (with dropout and its one-byte mask where the model has it).

    ``bias``: of the product before it, whose gradient is a sum over rows in a kernel of its own,
    unless a compiler sums where it makes what is summed.
    """
    size = ctx.residual_bytes(shard)
    mask = size / ctx.element_bytes if ctx.dropout else 0
    summed = int(bias and "gradient_sums" not in ctx.fused)
    dropped = (2.0 * size + mask) if ctx.dropout else 0.0
    fused = "bias_dropout_add" in ctx.fused or not ctx.dropout
    forward, count = (3.0 * size + mask, 1) if fused else (5.0 * size + mask, 2)
    backward, launches = dropped + summed * size, int(ctx.dropout or summed)
    if ctx.norms_again:
        backward, launches = backward + forward, launches + count
    return Elementwise(name, forward, backward, count, launches, again=ctx.norms_again)


def residual_saved(
    name: str,
    ctx: BlockContext,
    shard: Shard,
    modules: tuple[str, ...],
    *,
    products: int = 1,
    norm_module: str | None = None,
    product_module: str | None = None,
    gathered: bool = False,
) -> tuple[SavedTensor, ...]:
    """The norm's input and output, and the dropout mask after the sub-block.

    ``modules`` are those that run the norm, ``norm_module`` is its own name where no product is
    fused with it, ``product_module`` that of the first products. Each of ``products`` that read
    the output keeps a low-precision copy of its own; with 0 the output itself is kept.
    ``gathered``: whether they keep the parts of other ranks too.
    """
    size = ctx.residual_bytes(shard)
    inputs = product_input_bytes(ctx, shard)
    if products and ctx.saved_input_bytes_per_64 is not None:
        inputs = products * ctx.saved_input(inputs)
    saved = [
        *norm_saved(
            f"{name}.norm",
            size // ctx.element_bytes,
            shard.residual_tokens,
            ctx,
            modules,
            input_of=norm_module or product_module,
        ),
        SavedTensor(f"{name}.input", inputs, modules=modules, input_of=product_module),
    ]
    if gathered:
        others = ctx.gathered_bytes(shard) - size
        saved.append(SavedTensor(f"{name}.gathered", others, modules=("sp_gather",)))
    if ctx.dropout:
        saved.append(SavedTensor(f"{name}.dropout_mask", size // ctx.element_bytes))
    return tuple(saved)


def product_input_bytes(ctx: BlockContext, shard: Shard) -> Int64:
    """What column-parallel products keep of their shared input."""
    return ctx.gathered_bytes(shard) if ctx.dtensor else ctx.residual_bytes(shard)


def norm_saved(
    name: str,
    elements: Int64,
    rows: Int64,
    ctx: BlockContext,
    modules: tuple[str, ...] = (),
    *,
    input_of: str | None = None,
) -> tuple[SavedTensor, ...]:
    """What a norm keeps of ``elements`` in ``rows``, without its output.

    A fused kernel keeps its input and fp32 statistics of each row: ``rsigma``, and ``mu`` of layer
    norm (Transformer Engine, pytorch/module/layernorm_linear.py; PyTorch's native_layer_norm and
    Apex's FusedLayerNorm alike). Op by op PyTorch casts the input to fp32, keeps that copy and the
    normalised one as it is scaled, and the statistics.
    """
    statistics = SavedTensor(f"{name}_statistics", 4 * ctx.norm_statistics * rows, modules=modules)
    if "norm" in ctx.fused:
        kept = SavedTensor(f"{name}_input", elements * ctx.element_bytes, input_of=input_of)
        return (kept, statistics)
    return (
        SavedTensor(f"{name}_input_fp32", 4 * elements),
        SavedTensor(f"{name}_normalised", ctx.norm_copy_bytes * elements, modules=modules),
        statistics,
    )


def vocabulary_rows(ctx: BlockContext, shard: Shard) -> Int64:
    """Vocabulary rows of one of the ranks that share them, padded to a multiple of
    ``vocab_divisor``."""
    multiple = ctx.vocab_divisor * shard.vocabulary_ranks
    return -(-np.int64(ctx.vocab) // multiple) * ctx.vocab_divisor
