"""A naive walk over the modules of a decoder: which tensors each leaves for its backward.

Own code, one tensor at a time, in plain integers. It reads the documents of the model and the
stack and nothing of the planner's: what a module holds is what PyTorch's, Transformer Engine's and
Megatron-Core's modules of that name hold (Korthikanti et al., arXiv 2205.05198, section 4, for the
transformer layer; DeepSeek-V2, arXiv 2405.04434, section 2.1, for latent attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hardware_profiles.loader import load_stack
from hardware_profiles.stack import StackSpec
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)


@dataclass(frozen=True)
class Case:
    """A model, a stack and a layout, as a user would write them."""

    model: ModelSpec
    stack_name: str
    sequence: int
    samples: int = 1
    microbatches: int = 4
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_kind: str = "p2p"
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    zero: int = 0
    recompute: str = "none"
    precision: str = "bf16"
    dropout: bool = False
    loss: str = "whole"

    @property
    def stack(self) -> StackSpec:
        """With stage 0 where its space has none: what holds the state whole is walked over too."""
        stack = load_stack(self.stack_name)
        if self.zero or 0 in stack.zero_stages:
            return stack
        return stack.model_copy(update={"zero_stages": (0, *stack.zero_stages)})

    @property
    def dtensor(self) -> bool:
        return self.stack.layers.tensor_parallel == "dtensor"

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a context-parallel rank."""
        return self.samples * self.sequence // self.cp

    @property
    def rows(self) -> int:
        """Tokens of the residual stream on a rank."""
        return self.tokens // (self.tp if self.sp else 1)

    @property
    def gathers_context(self) -> bool:
        return self.cp > 1 and self.cp_kind == "all_gather"

    @property
    def narrow(self) -> int:
        """Bytes of an element that a linear layer keeps of its input."""
        return 1 if self.precision == "fp8" else 2

    @property
    def chunks(self) -> int:
        """Pieces of the sequence that go through the loss one after the other."""
        return self.stack.loss_chunks if self.loss == "chunked" else 1

    @property
    def vocabulary(self) -> int:
        """Rows of the padded vocabulary on a rank."""
        multiple = self.stack.vocab_divisor * self.tp
        return -(-self.model.vocab // multiple) * multiple // self.tp

    @property
    def residual(self) -> int:
        return 2 * self.rows * self.model.hidden

    @property
    def gathered(self) -> int:
        return 2 * self.tokens * self.model.hidden

    def blocks(self) -> list[BlockSpec]:
        """The block of each layer in turn."""
        runs = self.model.layers
        return [self.model.blocks[run.block] for run in runs for _ in range(run.count)]

    def predictions(self) -> list[BlockSpec]:
        """The block of each module that predicts one token more."""
        return [self.model.blocks[run.block] for run in self.model.mtp for _ in range(run.count)]


@dataclass(frozen=True)
class Tensor:
    """Bytes left for the backward, by modules that make them again, the innermost first."""

    bytes: int
    made_by: tuple[str, ...] = ()
    instead: int = 0
    """Bytes of the module's input that wait for it where it runs again, and else are gone."""


def statistics(case: Case) -> int:
    """Bytes in fp32 that a norm keeps of a row: the deviation and, of layer norm, the mean."""
    return 8 if case.model.norm == "layer" else 4


def norm(case: Case, *made_by: str) -> Iterator[Tensor]:
    """A norm over the residual stream: input and statistics of each row.

    Op by op the input is cast to fp32 and the normalised copy is kept before it is scaled.
    """
    elements = case.rows * case.model.hidden
    yield Tensor(statistics(case) * case.rows, made_by)
    if "norm" in case.stack.fused:
        yield Tensor(2 * elements)
    else:
        yield Tensor(4 * elements)
        yield Tensor(4 * elements, made_by)


def linear_input(case: Case, readers: int, *made_by: str) -> Iterator[Tensor]:
    """What ``readers`` linear layers of one input keep of it: one 16-bit tensor for all of them, or
    a copy of 8 bits each. DTensor keeps it gathered over tp, Megatron scattered."""
    elements = (case.tokens if case.dtensor else case.rows) * case.model.hidden
    if case.precision == "fp8" and readers:
        yield Tensor(readers * elements, made_by)
    else:
        yield Tensor(2 * elements, made_by)


def dropout(case: Case) -> Iterator[Tensor]:
    """A byte of mask for each element of the residual stream (2205.05198, section 4.1)."""
    if case.dropout:
        yield Tensor(case.rows * case.model.hidden)


def core_attention(case: Case, heads: int, qk: int, kv: int, v: int) -> Iterator[Tensor]:
    """FlashAttention: queries, keys, values, output, and the logarithm of each row's sum."""
    made_by = ("mla_up_proj",) if latents(case) else ()
    yield Tensor(2 * case.tokens * heads * qk, made_by)
    yield Tensor(2 * case.tokens * kv * qk, made_by)
    yield Tensor(2 * case.tokens * kv * v, made_by)
    if case.gathers_context and case.stack.layers.gathered_context == "kept":
        others = case.cp - 1
        yield Tensor(2 * case.tokens * others * kv * (qk + v), made_by)
    yield Tensor(2 * case.tokens * heads * v)
    copied = case.stack.layers.gathered_context_output == "twice" and case.precision != "fp8"
    if case.gathers_context and copied:
        # Transformer Engine keeps the outputs of both halves of the queries beside their copy.
        yield Tensor(2 * case.tokens * heads * v, ("core_attn",))
    yield Tensor(4 * case.tokens * heads, ("core_attn",))
    if case.precision == "fp8":
        # The output projection's own copy of its input.
        yield Tensor(case.tokens * heads * v)


def latents(case: Case) -> bool:
    return any(isinstance(block.mixer, LatentAttentionSpec) for block in case.blocks())


def kv_heads(case: Case, spec: AttentionSpec) -> int:
    """Where tp has more ranks than there are KV heads, they are replicated."""
    return max(1, spec.kv_heads // case.tp)


def attention(case: Case, spec: AttentionSpec) -> Iterator[Tensor]:
    # TELayerNormColumnParallelLinear: the norm is part of the projection, no module of its own.
    joined = "norm_linear" in case.stack.fused
    yield from norm(case, *(() if joined else ("layernorm",)))
    yield from linear_input(case, 1, *(() if joined else ("layernorm",)))
    heads = spec.heads // case.tp
    yield from core_attention(case, heads, spec.head_dim, kv_heads(case, spec), spec.head_dim)
    yield from dropout(case)


def latent_attention(case: Case, spec: LatentAttentionSpec) -> Iterator[Tensor]:
    """Down-projections, norms of the latents, up-projections by head.

    Megatron projects the rank's own rows down, DTensor all rows on every rank. Values that nobody
    copies hold the product that they were split from, the keys' part of it too.
    """
    yield from norm(case, "layernorm")
    yield from linear_input(case, 2, "layernorm")
    rows = case.tokens if case.dtensor else case.rows
    # Gathered from split projections: the queries' rows are a slice of all, the keys' are copied.
    gathered = case.stack.layers.latent_down == "split" and case.sp and case.tp > 1
    rotated = 0 if gathered else rows * spec.qk_rope_head_dim
    others = (case.tokens - rows) * (spec.q_lora_rank or 0) if gathered else 0
    for width, beside in ((spec.q_lora_rank or 0, others), (spec.kv_lora_rank, rotated)):
        if width:
            yield from latent_norm(case, rows, width, beside)
            yield Tensor(case.narrow * rows * width, ("mla_up_proj",))
    # k_pos_emb goes into qkv_up_proj_and_rope_apply: gathered, or a part of all that was.
    if not case.dtensor and case.sp and case.tp > 1:
        beside = spec.kv_lora_rank if gathered else 0
        position = 2 * case.tokens * (spec.qk_rope_head_dim + beside)
        yield Tensor(0, ("mla_up_proj",), position)
    heads = spec.heads // case.tp
    qk = spec.qk_nope_head_dim + spec.qk_rope_head_dim
    yield from core_attention(case, heads, qk, heads, spec.v_head_dim)
    if case.stack.layers.latent_values == "view" and not case.gathers_context:
        yield Tensor(2 * case.tokens * heads * spec.qk_nope_head_dim, ("mla_up_proj",))
    yield from dropout(case)


def latent_norm(case: Case, rows: int, width: int, beside: int) -> Iterator[Tensor]:
    """Statistics of each row and the input, with the elements that share its storage; op by op an
    fp32 copy of the input alone and the normalised one."""
    yield Tensor(statistics(case) * rows, ("mla_up_proj",))
    if "norm" in case.stack.fused:
        yield Tensor(2 * (rows * width + beside))
    else:
        yield Tensor(4 * rows * width)
        yield Tensor(4 * rows * width, ("mla_up_proj",))


def feed_forward(case: Case, rows: int, width: int, gated: bool, *made_by: str) -> Iterator[Tensor]:
    """Output of the first product (two where gated), and the input of the second."""
    for _ in range(2 if gated else 1):
        yield Tensor(2 * rows * width, made_by)
    act = ("moe_act", *made_by) if made_by == ("moe",) else made_by
    yield Tensor(case.narrow * rows * width, act)
    if gated and "swiglu" not in case.stack.fused:
        # The activated gate is a factor of a product of its own.
        yield Tensor(2 * rows * width, act)


def mlp(case: Case, spec: MlpSpec) -> Iterator[Tensor]:
    made_by = "mlp" if "norm_linear" in case.stack.fused else "layernorm"
    yield from norm(case, made_by)
    yield from linear_input(case, 1, made_by)
    yield from feed_forward(case, case.tokens, spec.intermediate // case.tp, spec.gated, "mlp")
    yield from dropout(case)


def moe(case: Case, spec: MoeSpec) -> Iterator[Tensor]:
    """Router, permutation, grouped products, weighted sum; balanced routing.

    Ranks of expert-tensor parallelism gather each other's rows and have a part of the width.
    """
    hidden = case.model.hidden
    yield from norm(case, "layernorm")
    # The router reads the norm's output in 16 bits, whatever the experts' products run in.
    yield from linear_input(case, 0, "layernorm")
    routed = case.rows * spec.top_k
    yield Tensor(4 * case.rows * spec.experts, ("moe",))
    yield Tensor(4 * case.rows * spec.experts, ("moe",))
    arrived, width = routed * case.etp, spec.intermediate // case.etp
    if case.stack.layers.routing_maps == "megatron":
        # permute: masked_select's mask and index_select's rows; top-k: indices and their softmax.
        yield Tensor(case.rows * spec.experts, ("moe",))
        for size in (8, 4, 8):
            yield Tensor(size * routed, ("moe",))
        if case.model.family == "deepseek_v3":
            # Sigmoids, and what theirs and the loss's are divided by.
            yield Tensor(4 * case.rows * spec.experts, ("moe",))
            yield Tensor(2 * 4 * case.rows, ("moe",))
        # weighted_bias_swiglu_impl: the probability of each row.
        yield Tensor(4 * arrived, ("moe",))
    yield Tensor(case.narrow * arrived * hidden, ("moe",))
    yield from feed_forward(case, arrived, width, spec.gated, "moe")
    if case.stack.layers.expert_outputs == "weighed":
        # The gradient of their weights needs the experts' outputs; torchtitan weighs in fp32.
        yield Tensor((4 if case.dtensor else 2) * routed * hidden, ("moe",))
    elif not spec.gated or "swiglu" not in case.stack.fused:
        # It needs the activation, which only fused SwiGLU computes again.
        yield Tensor(2 * arrived * width, ("moe_act", "moe"))
    if spec.shared_intermediate:
        width = spec.shared_intermediate // case.tp
        if case.precision == "fp8":
            # linear_fc1's own copy of what the router keeps.
            yield Tensor(case.rows * hidden, ("shared_experts", "moe"))
        yield from feed_forward(case, case.tokens, width, spec.gated, "shared_experts", "moe")
    yield from dropout(case)


def layer(case: Case, block: BlockSpec) -> list[Tensor]:
    """All that a layer leaves, in the order of its forward."""
    found: list[Tensor] = []
    if isinstance(block.mixer, AttentionSpec):
        found += attention(case, block.mixer)
    elif isinstance(block.mixer, LatentAttentionSpec):
        found += latent_attention(case, block.mixer)
    if isinstance(block.feed_forward, MlpSpec):
        found += mlp(case, block.feed_forward)
    elif isinstance(block.feed_forward, MoeSpec):
        found += moe(case, block.feed_forward)
    return found


def embedding(case: Case) -> int:
    """Token ids of 64 bits, and the mask of the dropout behind them."""
    return 8 * case.tokens + sum(tensor.bytes for tensor in dropout(case))


def predictions(case: Case) -> int:
    """MultiTokenPredictionLayer: the lookup of the next tokens (enorm) and the hidden states
    (hnorm), both concatenated for eh_proj, a layer, and the head once more (final_layernorm).

    Megatron's eh_proj is gathered over tp and cut into rows by a view: the layer's first norm keeps
    all of them. torchtitan's is whole and reads a rank's own rows."""
    total = 0
    whole = case.stack.layers.prediction_projection == "whole"
    for block in case.predictions():
        norms = [*norm(case), *norm(case)]
        read = case.tokens if case.dtensor and not whole else case.rows
        pair = 2 * case.narrow * read * case.model.hidden
        layers = layer(case, block)
        total += 0 if whole else case.gathered - case.residual
        total += embedding(case) + pair + output(case)
        total += sum(tensor.bytes for tensor in (*norms, *layers))
    return total


def head(case: Case) -> int:
    """The output layer, and what modules that predict further tokens leave behind it."""
    return output(case) + predictions(case)


def output(case: Case) -> int:
    """Final norm, input of the output layer, and the softmax in fp32; of a loss in pieces the
    logits of one piece in 16 bits, and the gathered input beside its gradient."""
    kept = sum(tensor.bytes for tensor in norm(case))
    logits = case.tokens * case.vocabulary
    if case.chunks > 1:
        return kept + 2 * case.gathered + 2 * (logits // case.chunks)
    kept += case.gathered if case.dtensor else case.residual
    return kept + 4 * logits


# What a product's backward makes beside the tensors that were kept.


def context_buffers(case: Case, keys_and_values: int) -> int:
    """A ring receives the next block's keys and values and their gradients while it works on those
    at hand (2 x 2); a gather holds all ranks', unless they wait already, and their gradients."""
    if case.cp == 1 or case.cp_kind == "a2a":
        return 0
    if case.cp_kind == "p2p":
        return 4 * keys_and_values
    return keys_and_values * case.cp * (1 if case.stack.layers.gathered_context == "kept" else 2)


def backward(case: Case, block: BlockSpec) -> int:
    """Short-lived bytes of a layer's backward: gradients of the tensors inside the sub-block at
    work, and its full-width input."""
    most = [case.residual]
    mixer, forward = block.mixer, block.feed_forward
    if isinstance(mixer, AttentionSpec):
        heads, kv = mixer.heads // case.tp, kv_heads(case, mixer)
        pair = 2 * case.tokens * 2 * kv * mixer.head_dim
        both = 2 * case.tokens * 2 * heads * mixer.head_dim
        most.append(pair + both + case.gathered + context_buffers(case, pair))
    elif isinstance(mixer, LatentAttentionSpec):
        heads = mixer.heads // case.tp
        qk = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim
        pair = 2 * case.tokens * heads * (qk + mixer.v_head_dim)
        most.append(2 * pair + case.gathered + context_buffers(case, pair))
    if isinstance(forward, MlpSpec):
        width = forward.intermediate // case.tp
        tensors = 3 if forward.gated else 2
        most.append(2 * case.tokens * width * tensors + case.gathered)
    elif isinstance(forward, MoeSpec):
        routed = case.rows * forward.top_k
        tensors = 3 if forward.gated else 2
        width = forward.intermediate // case.etp
        size = 2 * routed * case.etp * (2 * case.model.hidden + tensors * width)
        most.append(size + case.gathered)
        if case.dtensor:
            # The gradient in fp32, it times the weights, and it times the outputs.
            most.append(3 * 4 * routed * case.model.hidden)
    return max([*most, ring_forward(case, block)])


def ring_forward(case: Case, block: BlockSpec) -> int:
    """Transformer Engine's ring receives each block in a buffer of its own and keeps each block's
    output until all are added; the feed-forward part has kept nothing yet."""
    mixer, forward = block.mixer, block.feed_forward
    ring = case.cp > 1 and case.cp_kind == "p2p"
    if not ring or not case.stack.layers.ring_merge.startswith("transformer_engine"):
        return 0
    heads = value = pair = 0
    if isinstance(mixer, AttentionSpec):
        heads, value = mixer.heads // case.tp, mixer.head_dim
        pair = kv_heads(case, mixer) * 2 * mixer.head_dim
    elif isinstance(mixer, LatentAttentionSpec):
        heads, value = mixer.heads // case.tp, mixer.v_head_dim
        pair = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + value)
    before = [*norm(case), *linear_input(case, 0), *dropout(case)]
    after: list[Tensor] = []
    if isinstance(forward, MlpSpec):
        before = [*norm(case), *linear_input(case, 1), *dropout(case)]
        after = list(mlp(case, forward))
    elif isinstance(forward, MoeSpec):
        after = list(moe(case, forward))
    later = sum(tensor.bytes for tensor in after) - sum(tensor.bytes for tensor in before)
    return 2 * case.tokens * case.cp * (pair + heads * value) - later


def head_backward(case: Case) -> int:
    """Short-lived bytes of the head: of its loss, or of a prediction's layer, whose backward runs
    when the softmaxes of all losses are gone."""
    blocks = case.predictions()
    logits = 4 * case.tokens * case.vocabulary * (1 + len(blocks))
    return max([loss_backward(case), *(backward(case, block) - logits for block in blocks)])


def loss_backward(case: Case) -> int:
    """Short-lived logits and their gradient, as the stack's document has them per logit."""
    stack = case.stack
    each = stack.logit_working_bytes.value
    if stack.logit_working_bytes_split is not None and case.tp > 1:
        each = stack.logit_working_bytes_split.value
    made = round(each * (case.tokens * case.vocabulary // case.chunks))
    return made if case.dtensor else made + case.gathered // case.chunks
