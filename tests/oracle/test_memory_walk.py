"""Activations, parameters and moments of the peak by a naive walk over the modules.

Own code, one tensor at a time, in plain integers: what each module of a decoder layer leaves for
its backward, pushed in the forward and popped in the backward. Only the sizes that are the stack's
choices (which kernels are fused, what tensor parallelism gathers again) are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.models.spec import AttentionSpec, BlockSpec, LayerRun, MlpSpec, ModelSpec
from planner.pipeline import evaluate
from planner.request import Request
from planner.specs import JobSpec


@dataclass(frozen=True)
class Case:
    """A dense decoder on one tensor-parallel group and ``dp`` data-parallel ranks."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int
    layers: int
    sequence: int
    samples: int
    tp: int
    dp: int
    recompute: str
    stack: str

    @property
    def eager(self) -> bool:
        return self.stack == "torchtitan-decomposed"

    @property
    def tokens(self) -> int:
        return self.sequence * self.samples

    @property
    def split_tokens(self) -> int:
        return self.tokens // self.tp


def draw(seed: int) -> Case:
    rng = Random(seed)
    tp = rng.choice((1, 2, 4))
    kv = rng.choice((4, 8))
    return Case(
        hidden=rng.choice((512, 1024)), heads=kv * rng.choice((1, 2)), kv_heads=kv, head_dim=64,
        width=rng.choice((1024, 2816)), vocab=rng.choice((512, 32_000)), layers=rng.randint(1, 6),
        sequence=rng.choice((256, 1024)), samples=rng.choice((1, 2)), tp=tp, dp=8 // tp,
        recompute=rng.choice(("none", "selective", "full")),
        stack=rng.choice(("torchtitan-decomposed", "megatron-core")),
    )  # fmt: skip


def norm(case: Case) -> Iterator[int]:
    rows, elements = case.split_tokens, case.split_tokens * case.hidden
    yield 4 * rows
    if case.eager:
        yield 4 * elements
        yield 4 * elements
    else:
        yield 2 * elements


def column_input(case: Case) -> int:
    rows = case.tokens if case.eager else case.split_tokens
    return 2 * rows * case.hidden


def attention(case: Case) -> Iterator[int]:
    yield from norm(case)
    yield column_input(case)
    heads, kv = case.heads // case.tp, case.kv_heads // case.tp
    for count in (heads, kv, kv):
        yield 2 * case.tokens * count * case.head_dim
    yield 2 * case.tokens * heads * case.head_dim
    if not (case.recompute == "selective" and not case.eager):
        yield 4 * case.tokens * heads


def feed_forward(case: Case) -> Iterator[int]:
    yield from norm(case)
    yield column_input(case)
    inner = 2 * case.tokens * (case.width // case.tp)
    yield inner
    yield inner
    yield inner
    if case.eager:
        yield inner


def layer(case: Case) -> int:
    """Bytes that one layer leaves for its backward."""
    boundary = 2 * case.split_tokens * case.hidden
    if case.recompute == "full":
        return boundary
    if case.recompute == "selective" and case.eager:
        heads, kv = case.heads // case.tp, case.kv_heads // case.tp
        width = case.width // case.tp
        products = [(heads + 2 * kv) * case.head_dim, case.hidden, width, width, case.hidden]
        kept = boundary + sum(2 * case.tokens * n for n in products[::2])
        kept += case.tokens * heads * (2 * case.head_dim + 4)
        scatters = 2 if case.tp > 1 else 0
        everything = sum((*attention(case), *feed_forward(case)))
        return min(kept + scatters * boundary, everything)
    return sum((*attention(case), *feed_forward(case)))


def head(case: Case) -> int:
    multiple = 1 if case.eager else 128 * case.tp
    logits = case.tokens * (-(-case.vocab // multiple) * multiple // case.tp)
    return sum(norm(case)) + column_input(case) + 4 * logits


def parameters(case: Case) -> int:
    """Elements on one device before data parallelism."""
    heads, kv = case.heads // case.tp, case.kv_heads // case.tp
    each = (2 * heads + 2 * kv) * case.head_dim * case.hidden
    each += 3 * (case.width // case.tp) * case.hidden + 2 * case.hidden
    multiple = 1 if case.eager else 128 * case.tp
    rows = -(-case.vocab // multiple) * multiple // case.tp
    return case.layers * each + 2 * rows * case.hidden + case.hidden


def walked(case: Case) -> tuple[int, int]:
    """Activations with the loss, and without what the head left, as a stack that is unwound."""
    stack = [8 * case.tokens]
    stack += [layer(case)] * case.layers
    before = sum(stack)
    stack.append(head(case))
    return sum(stack), before


def terms(case: Case) -> dict[str, int]:
    block = BlockSpec(
        mixer=AttentionSpec(heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim),
        feed_forward=MlpSpec(intermediate=case.width, gated=True),
    )
    model = ModelSpec(
        name="walk", family="llama", source="test", hidden=case.hidden, vocab=case.vocab,
        tied_embeddings=False, norm="rms", norm_bias=False, blocks={"dense": block},
        layers=(LayerRun(block="dense", count=case.layers),),
    )  # fmt: skip
    stack = load_stack(case.stack)
    job = JobSpec(
        sequence_length=case.sequence, global_batch=case.dp * case.samples, stack=stack.name
    )
    request = Request(model, load_cluster("dgx-h100:1"), job, stack)
    layout = {
        "tp": case.tp, "sequence_parallel": case.tp > 1, "microbatch_size": case.samples,
        "zero_stage": 3 if case.eager else 0, "recompute": case.recompute,
    }  # fmt: skip
    found = evaluate(request, layout).prediction.stages[0]
    assert sum(term.bytes or 0 for term in found.memory) == found.peak_bytes
    return {term.name: term.bytes or 0 for term in found.memory} | {"parameters": found.parameters}


@pytest.mark.parametrize("seed", range(60))
def test_the_prediction_is_what_a_walk_over_the_modules_gives(seed: int) -> None:
    case = draw(seed)
    found = terms(case)
    assert found["parameters"] == parameters(case)
    if case.eager:
        assert found["weights"] >= 4 * parameters(case) // case.dp
        assert found["optimizer"] == 2 * found["weights"]
    else:
        assert found["weights"] == 2 * parameters(case)
        assert found["optimizer"] == 12 * parameters(case)
    with_loss, without = walked(case)
    alone = {0, 8 * case.tokens, layer(case)}
    assert found["activations"] in {with_loss, without, *alone}
    if not case.eager:
        # Gradients stay in their buffers: the peak is where most activations are.
        assert found["activations"] in {with_loss, without}
