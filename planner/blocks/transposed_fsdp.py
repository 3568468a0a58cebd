"""What a feed-forward split over ``tensor`` and ``tensor_transpose`` sends beside an fsdp axis or
in a pipeline.

``fsdp`` and ``tensor_transpose`` split the same dimension of its weights, ``embed``, fsdp outermost
(MaxText 0.1.0, configs/base.yml), while activations have their samples over fsdp and their width
over ``tensor`` and ``tensor_transpose``. XLA (jax 0.10.2, libtpu 0.0.42) cannot have a product's
operands meet without sending one of them; which one, and where, follows from the degrees alone: F
fsdp ranks, t of ``tensor``, u of ``tensor_transpose``. With T tokens of a rank, h the stream's
width, f the feed-forward's, a weight of W = h x f, the residual stream and what surrounds attention
are split over t x u, as without ``tensor_transpose``. Of the feed-forward,

* where t is 1, each rank sends its part of a weight to where it belongs in the other order of the
  ranks (a permutation), and weights are gathered over fsdp as ever. The backward gathers T x h of
  the input, and of the output's gradient, over u; then each rank makes the gradients of *whole*
  weights, u times the arithmetic, and they are summed over fsdp, W each.
* else weights of the first products stay where they are: the input comes to them, F x T x h / (F u)
  on each rank, and their outputs, F x T x f / t, are summed and scattered over fsdp, then summed
  over u. Where F <= t a permutation and a gather over t bring that input; where F > t, XLA gathers
  all of F x T x h on each rank, and takes its part.
* The last product is like that where F is t; elsewhere its input is gathered over t, T x f, and its
  weights come to it: a permutation and a gather over fsdp where F > t; where F < t all of W, on
  each rank.

In a pipeline (F is 1) calls are those of ``planner.blocks.transposed`` where t is 1. Else the input
is gathered over t, T x h / u, behind a permutation; weights of the last product are gathered over
u, and each of the u ranks computes all of its output, T x h, which is summed over t. So does the
gradient of the first products' input.

Beside ``context``, whose ranks come behind ``tensor_transpose`` in that dimension, weights need no
permutation: they are gathered over it as ever, and calls are those without it.

Where neither of F and t is a multiple of the other, no program was compiled: F is only compared.

Where data or context, D or C ranks, are beside both F and t (23 programs), tokens are shared out
over S = D x F x C ranks, weights over F, and what comes to what depends on which degrees are equal:

* D is 1: first products are summed over all S, S x T x f / t each, and scattered by taking a part;
  the last one has its weights gathered over S, W / (t u), and its input over t. Backward, S x T x
  f / t is gathered for each weight, and summed once more.
* None of D and F is t or u: weights of the first products are gathered over F x u, W / t each, and
  the input, T x h, over t x u; the last product is as above. Gradients are summed over S.
* else all weights are gathered so, and T x h of the output summed over t; for the gradients of
  weights some of S x T x f / t is gathered. Where F is t, for the last product too, whose output is
  made on each rank for all S. With F < t, or F = u, XLA may do with less: this is the dearer way.

All of the u ranks then compute the same of the products whose weights are gathered over them. So
do they where t is 1 and D is u.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cost_models.graph import Bools, Int64, Shard
from cost_models.ops import Collective, CollectiveKind, Group, Ints

Row = tuple[str, Group, Bools, CollectiveKind, Int64, Ints]
"""What a call is for, over whom, where, its kind, bytes of one, and how often."""


class Beside:
    """Calls of one feed-forward. ``element`` are the bytes of its T x f / t, ``size`` of T x h,
    ``weight`` of one matrix; ``inward`` is the number of first products."""

    def __init__(
        self, prefix: str, shard: Shard, element: Int64, size: Int64, weight: int, inward: int
    ) -> None:
        ways, t = shard.shards, shard.straight
        self.first, self.last, self.inward = f"{prefix}fc1", f"{prefix}fc2", inward
        self.alone, self.shared = (ways > 1) & (t == 1), shared(shard)
        self.spread = self.shared & (shard.sharing == ways * shard.cp)
        self.tidy = self.shared & tidy(shard)
        self.wide = self.shared & ~self.tidy & ~self.spread
        self.local = self.tidy | self.spread
        self.split = (ways > 1) & (t > 1) & ~self.shared
        self.even, self.piped = self.split & (ways == t), shard.beside & (ways == 1)
        self.more, self.less = self.split & (ways > t), self.split & (ways < t)
        self.near, self.uneven = self.even | self.less | self.piped, self.more | self.less
        # T x h whole, of all samples, over u, and over t x u; T x f whole, and F x T x f / t.
        self.whole, self.samples = size, size * ways
        self.stream, self.part = size // shard.transposed, size // shard.tp
        self.every, self.scattered = element * t, element * ways
        # Of a weight: what its rank has, and what is there of it without fsdp; over t; whole.
        self.own, self.gathered = weight // (shard.tp * ways * shard.cp), weight // shard.tp
        self.column, self.matrix = weight // t, np.full_like(t, weight)
        # Of all ranks that share out tokens: T x f / t, and of T x h what a rank makes.
        self.inner = element * shard.sharing
        self.outer = size * np.where(ways == t, shard.sharing, 1)

    def enter(self) -> Iterator[Collective]:
        """Around the first products."""
        n, name = self.inward, self.first
        rows: tuple[Row, ...] = (
            ("order", "tp_and_shards", self.alone, "permute", self.own, n),
            ("permute", "tp_and_shards", self.near, "permute", self.part, 1),
            ("samples", "tp_straight", self.near, "all_gather", self.stream, 1),
            ("samples", "tp_and_shards", self.more, "all_gather", self.samples, 1),
            ("input", "tp", self.wide | self.tidy, "all_gather", self.whole, 1),
            ("columns", "tp_and_shards", self.wide | self.tidy, "all_gather", self.column, n),
        )
        yield from _calls(name, rows, forward=True, backward=True)
        behind: tuple[Row, ...] = (
            ("whole", "tp_transposed", self.alone, "all_gather", self.whole, 1),
            ("gradients", "tp_shards", self.split, "all_gather", self.scattered, n),
            ("reduce", "tp_straight", self.even, "reduce_scatter", self.stream, n),
            ("back", "tp_and_shards", self.even, "permute", self.part, n),
            ("gradients", "tp_straight", self.uneven, "all_gather", self.every, n),
            *self._weights(n),
            ("reduce", "tp_straight", self.piped, "all_reduce", self.whole, 1),
            ("inner", "tp_sharing", self.wide, "all_gather", self.inner, 1),
            ("inner", "tp_straight", self.local, "all_gather", self.every, 1),
            ("outer", "tp_straight", self.wide, "all_reduce", self.outer, 1),
            ("sums", "tp_sharing", self.wide | self.tidy, "all_reduce", self.column, n),
            ("inner", "tp_sharing", self.spread, "all_gather", self.inner, n),
        )
        yield from _calls(name, behind, forward=False, backward=True)

    def sums(self) -> Iterator[Collective]:
        """Behind the first products, ahead of their sum over the width's parts."""
        row: Row = (
            "scatter", "tp_shards", self.split, "reduce_scatter", self.scattered, self.inward
        )  # fmt: skip
        over: Row = (
            "over", "tp_sharing", self.spread, "all_reduce", self.inner * self.inward, 1
        )  # fmt: skip
        yield from _calls(self.first, (row, over), forward=True, backward=False)

    def leave(self) -> Iterator[Collective]:
        """Around the last product."""
        name, sums = self.last, self.matrix * (self.inward + 1)
        around: tuple[Row, ...] = (
            ("order", "tp_and_shards", self.alone, "permute", self.own, 1),
            ("rows", "tp_and_shards", self.wide, "all_gather", self.column, 1),
            ("rows", "tp_sharing", self.local, "all_gather", self.gathered, 1),
            ("inner", "tp_sharing", self.wide, "all_gather", self.inner, 1),
            ("inner", "tp_straight", self.local, "all_gather", self.every, 1),
        )
        yield from _calls(name, around, forward=True, backward=True)
        behind: tuple[Row, ...] = (
            ("whole", "tp_transposed", self.alone, "all_gather", self.whole, 1),
            ("sums", "tp_shards", self.alone, "all_reduce", sums, 1),
            ("permute", "tp_and_shards", self.near, "permute", self.part, 1),
            ("gradient", "tp_straight", self.near, "all_gather", self.stream, 1),
            ("gradient", "tp_and_shards", self.more, "all_gather", self.samples, 1),
            ("sum", "tp_shards", self.split, "reduce_scatter", self.scattered, 1),
            ("input", "tp_straight", self.even, "all_gather", self.every, 1),
            ("input", "tp_shards", self.uneven, "all_gather", self.scattered, 1),
            ("order", "tp_and_shards", self.even, "permute", self.own, 1),
            ("weights", "tp_shards", self.even, "reduce_scatter", self.gathered, 1),
            ("output", "tp", self.wide | self.tidy, "all_gather", self.whole, 1),
            ("sums", "tp_sharing", self.wide | self.tidy, "all_reduce", self.column, 1),
            ("own", "tp_sharing", self.spread, "all_gather", self.inner, 1),
            ("over", "tp_sharing", self.spread, "all_reduce", self.inner, 1),
        )
        yield from _calls(name, behind, forward=False, backward=True)
        ahead: tuple[Row, ...] = (
            ("gather", "tp_shards", self.even, "all_gather", self.scattered, 1),
            ("scatter", "tp_straight", self.even, "reduce_scatter", self.stream, 1),
            ("permute", "tp_and_shards", self.even, "permute", self.part, 1),
            ("gather", "tp_straight", self.uneven, "all_gather", self.every, 1),
            *self._weights(1),
            ("reduce", "tp_straight", self.piped, "all_reduce", self.whole, 1),
            ("outer", "tp_straight", self.wide, "all_reduce", self.outer, 1),
        )
        yield from _calls(name, ahead, forward=True, backward=False)

    def _weights(self, count: int) -> tuple[Row, ...]:
        """Weights that come to a product which is not computed where they are."""
        return (
            ("order", "tp_and_shards", self.more, "permute", self.own, count),
            ("weights", "tp_shards", self.more, "all_gather", self.gathered, count),
            ("weights", "tp_and_shards", self.less, "all_gather", self.matrix, count),
            ("weights", "tp_transposed", self.piped, "all_gather", self.column, count),
        )


def shared(shard: Shard) -> Bools:
    """Where samples or tokens are shared out over more ranks than an fsdp axis beside tensor."""
    return (shard.shards > 1) & (shard.straight > 1) & (shard.sharing > shard.shards)


def tidy(shard: Shard) -> Bools:
    """Where XLA does not take ranks of one axis for those of another, as many."""
    t, u, others = shard.straight, shard.transposed, shard.sharing // shard.shards
    alike = (shard.shards == t) | (shard.shards == u) | (others == t) | (others == u)
    result: Bools = ~alike & (shard.cp == 1)
    return result


def least_working(gated: bool, element: Int64, size: Int64, shard: Shard) -> Int64:
    """Bytes that work at once where fsdp splits weights and t > 1: the input and the output's
    gradient as they come to the weights, and of what is wide inside F x T x f / t of each gradient,
    of the input, and of two sums that are not scattered yet; where tokens are shared out over
    more ranks, of all of these instead of F."""
    ways, t, wide = shard.shards, shard.straight, shared(shard)
    inner = (5 if gated else 4) * element * np.where(wide, shard.sharing, ways)
    spread = np.where(ways == t, shard.sharing, 1)
    outer = np.where(wide, spread, np.where(ways > t, ways, 0)) * size
    outer = 2 * np.where(outer > 0, outer, size // shard.transposed)
    return np.where((ways > 1) & (t > 1), outer + inner, 0)


def alike(shard: Shard, *, inward: bool) -> tuple[Ints, Ints, Ints]:
    """How often ranks compute the same of a product, of its input's gradient and of its weight's
    (``cost_models.ops.MatMul.alike``)."""
    u = shard.transposed
    if u == 1:
        return (1, 1, 1)
    alone, split = shard.straight == 1, shard.shards * shard.cp
    copied = shared(shard) & (shard.sharing > split)
    each, even = np.where(copied, u, 1), copied & (shard.shards == shard.straight)
    piped = np.where(shard.beside & (shard.shards == 1), u, each)
    narrow = piped * np.where(even, shard.sharing, 1)
    # As many data-parallel ranks as u: weights come whole to each.
    taken = np.where(alone & (shard.sharing == u * split) & (split > 1), u, 1)
    whole = np.where((shard.shards > 1) & alone, u, each)
    if inward:
        return each * taken, narrow, whole
    return narrow * taken, each, whole * np.where(even, shard.straight, 1)


def _calls(
    name: str, rows: tuple[Row, ...], *, forward: bool, backward: bool
) -> Iterator[Collective]:
    for suffix, group, where, kind, size, count in rows:
        yield Collective(
            f"{name}.{suffix}", group, kind if forward else None, size if forward else 0,
            kind if backward else None, size if backward else 0, forward_count=count,
            backward_count=count, active=where,
        )  # fmt: skip
