"""Tensor parallelism of which a part splits feed-forwards along the residual stream's width.

MaxText's mesh axis ``tensor_transpose`` (configs/base.yml, ``logical_axis_rules``): ``embed`` of a
feed-forward's weights is split over it, ``mlp`` over ``tensor``, heads and vocabulary over both. Of
t x u ranks, u of them this way, XLA for TPUs (jax 0.10.2, libtpu 0.0.42, MaxText 0.1.0, one program
without an fsdp axis; ``benchmarks/collectives/maxtext_tensor_transpose.py``) then does this, with T
tokens, h the stream's width and f the feed-forward's:

* The residual stream, its norms and sums, and what a layer keeps of its input, are T x h / u on
  each rank, alike on the t ranks.
* Heads gather T x h over u in front of their projections; behind them the products' T x h are
  scattered over u, and T x h / u summed over t. The gradients go the same way.
* The feed-forward gathers nothing: its first products, T x h / u by h / u x f / t, are summed whole
  over u, all of them in one call, and what follows on them is computed by each of the u ranks; the
  last one, T x f / t by f / t x h / u, is summed over t. Backward, the gradient of T x f / t is
  summed over u, that of T x h / u over t.
* Looked-up rows are summed over u and scattered, or summed whole over all t x u ranks where t > 1;
  the head gathers and reduces as heads do.

Experts are split like feed-forwards, by MaxText's own calls (layers/moe.py, sparse_matmul): rows
keep T x h / u, each product is summed over u inside, and what follows is computed by each of them.

Beside ``fsdp``, which splits ``embed`` too, ``planner.blocks.transposed_fsdp`` has what XLA does.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Bools, Int64, Shard
from cost_models.ops import Collective, Group, Reals


def enter(name: str, size: Int64, shard: Shard, *, product: str | None) -> tuple[Collective, ...]:
    """Calls around the input of products that all of tp splits by columns; ``size`` bytes of it,
    gathered. ``product`` may run in a pipeline with the gather."""
    around = tuple(
        call
        for group, where in _around(shard)
        for call in (
            Collective(
                f"{name}.gather", group, "all_gather", size, "all_gather", size,
                backward_hidden=f"{name}:dgrad", forward_product=product, active=where,
            ),
            Collective(
                f"{name}.scatter", group, None, 0, "reduce_scatter", size,
                backward_hidden=f"{name}:wgrad", active=where,
            ),
        )
    )  # fmt: skip
    return (*around, reduced_gradient(name, size, shard))


def _around(shard: Shard) -> tuple[tuple[Group, Bools], ...]:
    """Ranks that the residual stream is split over, and where."""
    return ("tp_transposed", ~shard.beside), ("tp", shard.beside)


def reduced_gradient(name: str, size: Int64, shard: Shard) -> Collective:
    """The sum of the input's gradient over the ranks that have other columns of the products."""
    return Collective(
        f"{name}.reduce", "tp_straight", None, 0, "all_reduce", size // shard.transposed,
        backward_hidden=f"{name}:wgrad", active=~shard.beside,
    )  # fmt: skip


def leave(name: str, size: Int64, shard: Shard) -> tuple[Collective, ...]:
    """Calls behind a product that all of tp splits by rows."""
    around = tuple(
        Collective(
            f"{name}.scatter",
            group,
            "reduce_scatter",
            size,
            "all_gather",
            size,
            forward_product=f"{name}:fprop",
            backward_product=f"{name}:dgrad",
            active=where,
        )
        for group, where in _around(shard)
    )
    return (*around, reduced(name, size, shard))


def reduced(name: str, size: Int64, shard: Shard) -> Collective:
    """The sum of a product's output over the ranks that have other rows of its weight."""
    each = size // shard.transposed
    return Collective(
        f"{name}.reduce", "tp_straight", "all_reduce", each, None, 0, active=~shard.beside
    )


def first_sum(name: str, size: Int64) -> Collective:
    """The sum of the feed-forward's first products, ``size`` bytes, over parts of the width."""
    return Collective(f"{name}.sum", "tp_transposed", "all_reduce", size, None, 0)


def over_width(name: str, shard: Shard, size: Reals) -> tuple[Collective, ...]:
    """The sum of products by router or experts, ``size`` bytes, over parts of the width, and of
    their gradients alike (MaxText 0.1.0, layers/moe.py: ``psum`` of each product inside a
    ``shard_map``, whose derivative is one too)."""
    if shard.transposed == 1:
        return ()
    return (Collective(f"{name}.sum", "tp_transposed", "all_reduce", size, "all_reduce", size),)


def expert_weights(shard: Shard, elements: Int64) -> tuple[Collective, ...]:
    """What brings experts' weights together beside an fsdp axis, of ``elements`` of them that a
    rank has without it: they are ordered and gathered in fp32 (a unit's gather has 16 bits of it)
    and their gradients put back in that order, twice as many bytes of each (compiled with 2 and 4
    fsdp ranks)."""
    if shard.transposed == 1:
        return ()
    some, own = shard.shards > 1, elements // shard.shards
    return (
        Collective(
            "experts.order", "tp_and_shards", "permute", 4 * own, "permute", 4 * own, active=some
        ),
        Collective(
            "experts.fp32", "tp_shards", "all_gather", 2 * elements, "all_gather", 2 * elements,
            active=some,
        ),
        Collective("experts.back", "tp_and_shards", None, 0, "permute", 8 * own, active=some),
    )  # fmt: skip


def expert_working(shard: Shard, elements: Int64) -> Int64:
    """Bytes beside what a unit's gather and gradients take of those weights: they and their
    gradients are there in fp32, 2 and 4 more of each (temporaries of the programs of
    ``benchmarks/collectives/maxtext_tensor_transpose.py``)."""
    result: Int64 = np.where((shard.shards > 1) & (shard.transposed > 1), 6 * elements, 0)
    return result


def last_sum(name: str, size: Int64) -> Collective:
    """The sum of the gradient of the last product's input, ``size`` bytes, over those parts."""
    return Collective(
        f"{name}.sum", "tp_transposed", None, 0, "all_reduce", size,
        backward_hidden=f"{name}:wgrad",
    )  # fmt: skip


def looked_up(size: Int64, shard: Shard) -> tuple[Collective, ...]:
    """What brings rows of a table that all of tp splits together, ``size`` bytes of them."""
    apart = np.array(shard.straight == 1)
    return (
        Collective(
            "embedding.scatter", "tp_transposed", "reduce_scatter", size, None, 0, active=apart
        ),
        Collective("embedding.reduce", "tp", "all_reduce", size, None, 0, active=~apart),
        *(
            Collective("embedding.gather", group, None, 0, "all_gather", size, active=where)
            for group, where in _around(shard)
        ),
        Collective(
            "embedding.permute", "tp_and_shards", "permute", size // shard.tp, None, 0,
            active=shard.shards > 1,
        ),
    )  # fmt: skip
