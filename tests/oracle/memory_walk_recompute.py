"""What recomputation leaves of a layer, and what comes back while its backward runs: a naive walk.

Megatron-Core (``--recompute-modules``): a module that runs again keeps its input only; the modules
of a layer come back one after the other. torchtitan's SelectiveAC: the products of odd number, the
attention's outputs, and outputs of reduce-scatters and all-to-alls stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.models.spec import AttentionSpec, BlockSpec, LatentAttentionSpec, MlpSpec, MoeSpec
from tests.oracle.memory_walk import Case, backward, kv_heads, layer


def kept_and_short(case: Case, block: BlockSpec) -> tuple[int, int]:
    """Bytes that a layer keeps for each microbatch, and the most short-lived ones beside them."""
    tensors = layer(case, block)
    everything = sum(tensor.bytes for tensor in tensors)
    short = backward(case, block)
    if case.recompute == "none":
        return everything, short
    if case.recompute == "full" or (case.recompute == "selective" and case.dtensor):
        kept = case.residual
        if case.recompute == "selective":
            kept = min(everything, kept + sum(outputs(case, block)))
        if case.dtensor:
            # The layer runs again to its last op: the gradient gathered over tp, the last product's
            # output, that output as it is laid out for its reduction, and the reduced one.
            ways = case.tp if case.sp else 1
            short = max(short, case.residual * (3 * ways + 1))
        return kept, short + everything - kept
    named = ["core_attn"] if case.recompute == "selective" else case.recompute.split("+")
    again = dict.fromkeys(named, 0)
    for tensor in tensors:
        owner = [module for module in tensor.made_by if module in again]
        if owner:
            again[owner[0]] += tensor.bytes
            everything += tensor.instead
    return everything - sum(again.values()), short + max(again.values())


def outputs(case: Case, block: BlockSpec) -> Iterator[int]:
    """Outputs that torchtitan's SelectiveAC keeps, beside the layer's input."""
    for number, size in enumerate(products(case, block)):
        if number % 2 == 0:
            yield size
    heads, value = 0, 0
    if isinstance(block.mixer, AttentionSpec):
        heads, value = block.mixer.heads // case.tp, block.mixer.head_dim
    elif isinstance(block.mixer, LatentAttentionSpec):
        heads, value = block.mixer.heads // case.tp, block.mixer.v_head_dim
    yield case.tokens * heads * (2 * value + 4)
    forward = block.feed_forward
    scattered = 1 + isinstance(forward, MlpSpec)
    if isinstance(forward, MoeSpec) and forward.shared_intermediate:
        scattered += 1
    if case.sp:
        yield scattered * case.residual
    if isinstance(forward, MoeSpec) and case.ep > 1:
        # Dispatch, combine, and how many rows each expert gets, as 64-bit numbers.
        yield 2 * 2 * case.rows * forward.top_k * case.model.hidden
        yield 8 * forward.experts


def products(case: Case, block: BlockSpec) -> Iterator[int]:
    """Bytes of the outputs of matrix products in the order of the forward; grouped ones apart."""
    hidden, mixer, forward = case.model.hidden, block.mixer, block.feed_forward
    if isinstance(mixer, AttentionSpec):
        heads = mixer.heads // case.tp + 2 * kv_heads(case, mixer)
        yield 2 * case.tokens * heads * mixer.head_dim
    elif isinstance(mixer, LatentAttentionSpec):
        heads, nope = mixer.heads // case.tp, mixer.qk_nope_head_dim
        rope = mixer.qk_rope_head_dim
        if mixer.q_lora_rank:
            yield 2 * case.tokens * mixer.q_lora_rank
        yield 2 * case.tokens * heads * (nope + rope)
        yield 2 * case.tokens * (mixer.kv_lora_rank + rope)
        yield 2 * case.tokens * heads * (nope + mixer.v_head_dim)
    yield 2 * case.tokens * hidden
    if isinstance(forward, MoeSpec):
        yield 2 * case.rows * forward.experts
        width, gated = forward.shared_intermediate // case.tp, forward.gated
    elif isinstance(forward, MlpSpec):
        width, gated = forward.intermediate // case.tp, forward.gated
    if width:
        for _ in range(2 if gated else 1):
            yield 2 * case.tokens * width
        yield 2 * case.tokens * hidden
