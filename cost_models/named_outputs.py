"""What of a layer's forward a compiled program runs again beside a list of named tensors that stay.

Frameworks on XLA name tensors (``jax.ad_checkpoint.checkpoint_name``): queries, keys and values
after their rotation, the projection's output, the outputs of the feed-forward's products. A name
that is kept spares the ops that made it; a product that stands for several (``MatMul.pieces``) is
spared in parts, its collective where all of them are kept. And what no gradient needs is not run
again at all: a layer's last product, whose output goes into the residual stream only, with its
reduction and the addition. Counted on jax 0.10.2, the backward of a scanned transformer layer under
``jax.checkpoint`` runs 6 of its 7 products again if nothing is saved, and a name on the output of
the last one adds nothing to what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cost_models.layout import OutputKind
from cost_models.ops import Collective, Elementwise, GroupedMatMul, Ints, MatMul, Op, Reals

PARTS: dict[str, tuple[OutputKind, ...]] = {
    "qkv": ("query", "key", "value"),
    "mlp_in": ("mlp_gate", "mlp_up"),
}
"""Names that stand for several tensors."""
NAMED: dict[str, tuple[OutputKind, ...]] = {
    "qkv": PARTS["qkv"], "qkv.gather": PARTS["qkv"], "qkv_bias": PARTS["qkv"],
    "latent_norm": ("mla_q", "mla_kv"),
    "rope": ("query", "key"), "q_up": ("query",), "kv_up": ("key", "value"),
    "proj": ("out_proj",), "proj.scatter": ("out_proj",), "proj.reduce": ("out_proj",),
    **{
        f"{prefix}fc1{call}": PARTS["mlp_in"]
        for prefix in ("", "shared_")
        for call in ("", ".gather", ".sum", ".scatter", ".over")
    },
    "expert_fc1": PARTS["mlp_in"], "expert_fc1.sum": PARTS["mlp_in"],
    **{
        f"{prefix}fc2{call}": ("mlp_out",)
        for prefix in ("", "shared_")
        for call in ("", ".scatter", ".reduce", ".gather", ".permute", ".outer")
    },
    "expert_fc2": ("mlp_out",), "router": ("router",), "router.sum": ("router",),
}  # fmt: skip
"""Tensors that the ops of ``planner.blocks`` make, in the order of their pieces."""
LATENTS: dict[OutputKind, str] = {"mla_q": "q_up", "mla_kv": "kv_up"}
"""Latents behind their norms, by the product that reads each."""
NORM_WRITES = 0.5
"""Of a norm, what a kept output spares: writing it. Its own backward needs its statistics again,
which read all of its input, so the products before it run again."""
ONCE = frozenset({"experts.order", "experts.fp32"}) | {
    f"{prefix}{call}"
    for prefix in ("", "shared_")
    for call in (
        "fc1.order",
        "fc2.order",
        "fc1.weights",
        "fc2.weights",
        "fc1.permute",
        "fc1.samples",
        "fc1.input",
        "fc1.columns",
        "fc2.rows",
        "fc2.inner",
    )
}
"""Calls that bring weights, or a product's input, to where the backward uses them too: it makes
them once, whether the product runs again or not (``planner.blocks.transposed_fsdp``)."""
REDUCED: frozenset[OutputKind] = frozenset({"out_proj", "mlp_out"})
"""Named behind their reduction, so scattered under sequence parallelism."""
LAYER_INPUT: OutputKind = "layer_input"
"""What a layer starts from: kept in any case, on the device or on the host."""
SAVED: OutputKind = "saved"
"""All that autograd saves of a layer, its 16-bit weights among it: PyTorch's default hooks of saved
tensors pack leaves too (csrc/autograd/saved_variable.cpp)."""


def expanded(names: Iterable[str]) -> frozenset[OutputKind]:
    """Tensors that names stand for."""
    found: set[OutputKind] = set()
    for name in names:
        found.update(PARTS.get(name, (name,)))  # type: ignore[arg-type]
    return frozenset(found)


class Piece(NamedTuple):
    """A tensor that an op makes, ``width`` of the ``whole`` of what it makes."""

    name: OutputKind
    width: Ints
    whole: Ints

    @property
    def share(self) -> Reals:
        """Its share of the op."""
        return np.asarray(self.width) / self.whole


def pieces(op: Op, ops: tuple[Op, ...]) -> tuple[Piece, ...]:
    """Tensors that ``op`` of a layer of ``ops`` makes."""
    named = NAMED.get(op.name, ())
    if op.name == "latent_norm":
        return _latents(op, ops)
    widths = _widths(op, ops)[: len(named)]
    whole: Ints = sum(np.asarray(width) for width in widths)
    return tuple(Piece(name, width, whole) for name, width in zip(named, widths, strict=False))


def _latents(op: Op, ops: tuple[Op, ...]) -> tuple[Piece, ...]:
    """Latents that one norm op makes: those of queries only where they are projected down, those of
    keys and values only where they are projected up (sparse attention works on them)."""
    products = {other.name: other for other in ops if isinstance(other, MatMul)}
    projected = [name for name in NAMED[op.name] if LATENTS[name] in products]
    made = [name for name in projected if name != "mla_q" or "q_down" in products]
    widths = [products[LATENTS[name]].k for name in made]
    whole: Ints = sum(np.asarray(width) for width in widths)
    return tuple(Piece(name, width, whole) for name, width in zip(made, widths, strict=True))


def latent_rows(ops: tuple[Op, ...]) -> Reals:
    """Rows of a layer's latents: those of the product that projects down."""
    return next(op.m for op in ops if isinstance(op, MatMul) and op.name == "kv_down")


def _widths(op: Op, ops: tuple[Op, ...]) -> tuple[Ints, ...]:
    """Widths of an op's pieces; a bias and a rotation have those of their product."""
    if isinstance(op, MatMul | GroupedMatMul):
        return op.pieces
    product = next((other for other in ops if other.name == "qkv"), None)
    if op.name in ("rope", "qkv_bias") and isinstance(product, MatMul):
        return product.pieces
    return (1,)


def spared(op: Op, ops: tuple[Op, ...]) -> tuple[tuple[frozenset[OutputKind], Reals], ...]:
    """Tensors that together, if they are kept, spare running a share of ``op`` again.

    Queries and keys are named behind their own norm, whose backward needs what the product made.
    """
    if op.name in ONCE:
        return ((frozenset(), 1.0),)
    if isinstance(op, Collective):
        named = NAMED.get(op.name, ())
        product = next((o for o in ops if o.name == op.name.split(".")[0]), op)
        made = frozenset(piece.name for piece in pieces(product, ops))
        return ((made, 1.0),) if named else ()
    if op.name == "latent_norm":
        return tuple((frozenset({p.name}), NORM_WRITES * p.share) for p in pieces(op, ops))
    normed = op.name != "rope" and any(other.name == "qk_norm" for other in ops)
    return tuple(
        (frozenset({piece.name}), piece.share)
        for piece in pieces(op, ops)
        if not (normed and op.name in ("qkv", "qkv_bias") and piece.name in ("query", "key"))
    )


def unneeded(ops: tuple[Op, ...]) -> frozenset[str]:
    """Names of the ops at the end of a layer whose results no gradient needs."""
    found: set[str] = set()
    for op in reversed(ops):
        if isinstance(op, Elementwise) and not op.name.endswith("_residual"):
            break
        if not isinstance(op, Elementwise | Collective | MatMul):
            break
        if isinstance(op, Collective) and not op.group.startswith("tp"):
            break
        found.add(op.name)
        if isinstance(op, MatMul):
            break
    return frozenset(found)


def no_better(ops: tuple[Op, ...]) -> frozenset[tuple[OutputKind, OutputKind]]:
    """Pairs of tensors of one size of which keeping the first spares no more than the second.

    The product behind a gate is as wide as the gate's; values are as wide as keys, which are
    rotated besides, unless keys have a norm that needs their product.
    """
    found: set[tuple[OutputKind, OutputKind]] = set()
    for op in ops:
        made = pieces(op, ops)
        spares = {name for names, _ in spared(op, ops) for name in names}
        for one, other in pairwise(made):
            same = np.all(np.asarray(one.width) == other.width)
            if op.name != "rope" and same and one.name in spares:
                found.add((other.name, one.name))
    return frozenset(found)
