"""What JAX keeps of MaxText's layers for the backward where no policy says what runs again.

Tensors that the derivatives of a layer's primitives need, in each precision, counted on MaxText
0.1.0 and 0.2.0 with JAX 0.10.2 (``benchmarks/memory/maxtext_pipeline.py``; ``src/maxtext/layers``
of 0.2.0: normalizations.py, attention_op.py, attention_mla.py, embeddings.py, linears.py, moe.py):

- RMS norms: their input and its square's derivative in fp32, the normalised rows, their output for
  each product that reads it, and two fp32 numbers of a row; GPT-3's layer norm works in the
  precision of the activations.
- Attention: queries, keys and values as the kernel reads them, its output before and behind the
  transposition, and the softmax's statistics; sines and cosines of each token. Under context
  parallelism keys and values of all ranks, where they are gathered.
- Attention without a kernel (``dot_product``, in fp32): the mask, the masked scores (for the
  maximum's derivative) and their exponentials ahead of a reshape and behind it, of all keys; three
  numbers of a row; the output ahead of the division by the sum and behind it. Keys and values are
  gathered again. Softcaps add two of all keys, and one layer of Gemma 2's pairs works in fp32 (so
  half of either is counted). Sinks are one more key of the scores and of their
  exponentials, but for those behind the reshape. Layers that have them (gpt-oss) rotate by YaRN's
  complex factors, which the two layers of a block, MaxText's unit there, share.
- Dropout: nothing. Layers of a pipeline are applied without keys (``layers/pipeline.py``,
  ``func_to_vmap``), so 0.2.0 draws masks once, of the width alone (``broadcast_dims``), and 0.1.0
  fails.
- int8: what bf16 keeps. AQT's products take their inputs in 16 bits again in the backward.
- fp8: each product's input once more, in 8 bits (``Fp8DirectDotGeneralOp``), or as 16 bits of an
  8-bit number (``NANOOFp8DotGeneralOp``), instead of the input that products share, and the history
  of its largest values. qwix's rules (``decoder/.*layers.*``) do not match layers that a pipeline
  applies, which stay in 16 bits; ``sparse_matmul`` fails with flax's (no ``quant_dg``).
- Feed-forwards: both products' outputs, the derivative of the activation by parts, and its output.
- Mixtures: the norm's output whole, which tensor parallelism splits elsewhere; the same of every
  row that the experts have room for, the rows in the experts' order,
  their outputs in fp32 where they are weighed, and who goes where. Experts with biases (gpt-oss)
  clip what both products make: nine tensors, the three factors of the clips' derivatives, the
  sigmoid's derivative, both factors of either product, and the output.

The compiler makes one of copies that differ by where they were constrained to lie: a normalised
input that queries and keys name apart (0.2.0) adds nothing to what XLA for TPUs allocates, nor for
GPUs in fp32. In bf16 no compiler for GPUs was asked: cuDNN's attention transposes nothing, so a
copy of its output may be too many there, 3 % at most. Nor were layers that share a stage: they may
share sines and cosines.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64, Shard
from planner.blocks import moe
from planner.blocks.attention import local_kv_heads
from planner.blocks.context import BlockContext
from planner.blocks.registry import parts
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    FeedForward,
    LatentAttentionSpec,
    Mixer,
    MlpSpec,
    MoeSpec,
)

SHARED = ("bf16", "fp32", "int8")
"""Precisions whose products share the inputs that are kept."""
OWN = {("fp8", "nvidia"): 1, ("fp8", "amd"): 2}
"""Of precisions and vendors, bytes per element of the input that each product keeps for itself."""
_HISTORY = 1024
"""Largest values, one of a step, from which flax's products in fp8 take their scales
(``amax_history_length``)."""
_FP32 = 4
_SILU, _GELU = ("silu",), ("gelu", "gelu_new", "gelu_pytorch_tanh")
_INNER = {(True, _SILU): 6, (True, _GELU): 8, (False, _GELU): 6}
"""Tensors as wide as a feed-forward, by whether it is gated and its activation: what the products
make, what the last one reads, and between them the sigmoid, the two products of its derivative and
of SiLU's output (``jax.nn.silu``), or what ``jax.nn.gelu`` keeps of its polynomial and tanh."""

_CLIPPED = 9
"""The same of experts that clip gates and inputs (0.2.0, moe.py, ``apply_ffn_activation``)."""


def own_operand_bytes(precision: str, vendor: str) -> int | None:
    """Bytes per element of what each product keeps of its input for itself, 0 where products share
    it; None where it was not counted."""
    return 0 if precision in SHARED else OWN.get((precision, vendor))


def counted(block: BlockSpec, ctx: BlockContext) -> bool:
    """Whether what is kept of such a block is known: parts of which a layer of MaxText was asked,
    in fp8 those that have no experts or latents."""
    if ctx.own_operand_bytes is None or block.parallel:
        return False
    plain = not ctx.own_operand_bytes
    kinds = all(plain or isinstance(part, AttentionSpec | MlpSpec) for part in parts(block))
    return kinds and all(_known(part, ctx) for part in parts(block))


def _known(part: Mixer | FeedForward, ctx: BlockContext) -> bool:
    match part:
        case AttentionSpec():
            own = part.alibi or part.output_gate or part.tied_kv
            own = own or (part.sinks and ctx.attention_kernel != "unfused")
            return not own and part.chunk is None and part.qk_norm != "full"
        case LatentAttentionSpec():
            return True
        case MlpSpec():
            return _inner(part.activation, gated=part.gated) > 0
        case MoeSpec():
            apart = part.shared_gate or part.router_scales
            apart = apart or (part.expert_bias and part.shared_intermediate > 0)
            plain = part.latent is None and not apart
            return plain and part.gated and part.activation in _SILU
        case _:
            return False


def _inner(activation: str, *, gated: bool) -> int:
    """Tensors of :data:`_INNER`; 0 where they were not counted."""
    return sum(n for (g, names), n in _INNER.items() if g == gated and activation in names)


def _inner_width(spec: MlpSpec, shard: Shard) -> Int64:
    """What is wide inside a feed-forward is whole on each rank where XLA splits tensor parallelism
    both ways in a pipeline (two of each, compiled for TPUs)."""
    whole = shard.beside & (shard.straight > 1) & (shard.transposed > 1)
    return spec.intermediate // np.where(whole, 1, shard.straight)


def everything(block: BlockSpec, ctx: BlockContext, shard: Shard) -> Int64:
    """Bytes of one microbatch on one device, of a block that was :func:`counted`."""
    # Tensor parallelism splits the width: each rank has all rows.
    elements, rows = shard.residual_tokens * ctx.hidden, shard.tokens
    size, own = ctx.element_bytes, ctx.own_operand_bytes or 0
    total = np.zeros_like(shard.tp)
    for index, part in enumerate(parts(block)):
        total = total + _norm(elements, rows, ctx, read=not own)
        if own:
            products = _readers(part, ctx)
            total = total + own * products * elements + _FP32 * _HISTORY * (products + 1)
        if index + len(parts(block)) < block.norms:
            total = total + _norm(elements, rows, ctx, read=False)
        match part:
            case AttentionSpec():
                total = total + _attention(part, ctx, shard)
            case LatentAttentionSpec():
                total = total + _latent_attention(part, ctx, shard)
            case MlpSpec():
                inner = _inner(part.activation, gated=part.gated) * size
                inner += own - size if own else 0
                total = total + inner * shard.tokens * _inner_width(part, shard)
            case MoeSpec():
                # The router reads whole rows of the norm's output, the experts those of their own.
                whole = shard.tokens * ctx.hidden - elements
                total = total + size * np.where(np.asarray(shard.transposed) > 1, 0, whole)
                total = total + _mixture(part, ctx, shard)
    return total


def _readers(part: Mixer | FeedForward, ctx: BlockContext) -> int:
    """Products that read a norm's output: queries, keys and values apart, but for GPT-3
    (``fused_qkv`` of models/gpt3.py), whose norms alone are layer norms."""
    if isinstance(part, AttentionSpec):
        return 1 if ctx.norm_statistics == 2 else 3
    return 1 + (isinstance(part, MlpSpec) and part.gated)


def _norm(elements: Int64, rows: Int64, ctx: BlockContext, *, read: bool) -> Int64:
    """``read``: whether a product keeps the output."""
    size = ctx.element_bytes
    if ctx.norm_statistics == 2:
        return (3 + read) * size * elements + 2 * size * rows
    return (2 * _FP32 + size + size * read) * elements + 2 * _FP32 * rows


def _core(
    queries: Int64,
    keys: Int64,
    output: Int64,
    heads: Int64,
    ctx: BlockContext,
    shard: Shard,
    *,
    sinks: bool = False,
    softcap: bool = False,
) -> Int64:
    """The kernel's, where ``queries``, ``keys`` with values and ``output`` are elements of this
    rank."""
    size = ctx.element_bytes
    outputs = (size + (ctx.own_operand_bytes or size)) * output
    if ctx.attention_kernel == "unfused":
        wide = (size + _FP32) / 2 if softcap else size
        scores = ((3 + 2 * softcap) * wide + 1) * shard.sequence + 2 * size * sinks
        inputs = size * (queries + keys) + (wide - size) * (2 * output + keys / 2)
        kept = inputs + outputs + (scores + 3 * wide) * heads * shard.tokens
        return np.ceil(kept).astype(np.int64)
    gathered = size * (queries + keys * shard.cp_gather) + outputs
    return gathered + _FP32 * heads * shard.tokens


def _attention(spec: AttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    x, heads = shard.tokens, spec.heads // shard.tp
    kv = local_kv_heads(spec.kv_heads, shard.tp)
    queries, keys = heads * spec.head_dim * x, kv * spec.head_dim * x
    kept = _core(
        queries, 2 * keys, queries, heads, ctx, shard, sinks=spec.sinks, softcap=spec.softcap
    )
    if ctx.rotary and spec.rotary and spec.sinks:
        # Complex factors of halves, of each head's queries and keys, half of those of a block.
        kept = kept + 8 * (queries + keys) // 4
    elif ctx.rotary and spec.rotary:
        # Sines and cosines, which queries and keys share.
        kept = kept + 2 * ctx.element_bytes * spec.head_dim * x
    if spec.qk_norm == "per_head":
        kept = kept + _norm(queries + keys, (heads + kv) * x, ctx, read=False)
    return kept


def _latent_attention(spec: LatentAttentionSpec, ctx: BlockContext, shard: Shard) -> Int64:
    x, heads = shard.tokens, spec.heads // shard.tp
    qk, output = spec.qk_nope_head_dim + spec.qk_rope_head_dim, heads * spec.v_head_dim * x
    kept = _core(heads * qk * x, heads * qk * x + output, output, heads, ctx, shard)
    rows = shard.residual_tokens
    for rank in (spec.q_lora_rank, spec.kv_lora_rank):
        if rank is not None:
            kept = kept + _norm(rank * rows, rows, ctx, read=True)
    # Complex factors of halves, of each head's queries and of the keys that all heads share.
    return kept + 8 * (spec.qk_rope_head_dim // 2) * (heads + 1) * x


def _mixture(spec: MoeSpec, ctx: BlockContext, shard: Shard) -> Int64:
    x, size = shard.tokens, ctx.element_bytes
    hidden, width = moe.expert_widths(spec, ctx, shard)
    held = moe.held_rows(spec, ctx, shard)
    weighed = shard.residual_tokens * spec.top_k * ctx.hidden
    masked = np.zeros_like(held)
    if ctx.moe_dispatcher == "allgather":
        # Rows of other ranks' experts are masked ahead of the experts and behind them.
        weighed = np.where(shard.ep > 1, held // shard.etp * ctx.hidden, weighed)
        masked = np.where(shard.ep > 1, size * held * ctx.hidden, 0)
    inner = (_CLIPPED if spec.expert_bias else _inner(spec.activation, gated=True)) * size
    kept = (size * hidden + inner * width) * held + _FP32 * weighed + masked
    # Of a choice its expert, score and weight, and where its row goes and comes from; of a token
    # the softmax's maximum and sum, or what sigmoids become.
    kept = kept + (5 * _FP32 * spec.top_k + 2 * _FP32) * x
    # Rows that arrive are sorted by expert once more.
    kept = kept + np.where(shard.ep > 1, 2 * _FP32 * held, 0)
    if ctx.sigmoid_router:
        kept = kept + size * spec.experts * x
    if spec.shared_intermediate:
        kept = kept + inner * x * (spec.shared_intermediate // shard.straight)
    return kept
