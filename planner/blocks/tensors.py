"""Parameter tensors that several kinds of block have: norms, linear layers, feed-forwards."""

from __future__ import annotations

from cost_models.graph import Weight, WeightSharding


def norm(name: str, width: int, *, bias: bool, count: int = 1) -> list[Weight]:
    """``count`` norms of ``width``; empty when ``count`` is 0."""
    if count == 0:
        return []
    weights = [Weight(name, width, 1, "replicated", count)]
    if bias:
        weights.append(Weight(f"{name}.bias", width, 1, "replicated", count))
    return weights


def linear(
    name: str,
    rows: int,
    cols: int,
    sharding: WeightSharding,
    *,
    bias: bool = False,
    count: int = 1,
    kv_heads: int = 0,
) -> list[Weight]:
    """A matrix (rows, cols) = (output, input) features, and its bias."""
    weights = [Weight(name, rows, cols, sharding, count, kv_heads)]
    if bias:
        # The bias of a row layer is added after the reduction, so every rank has all of it; an
        # expert's stays with the expert, whose rank the ``expert_`` shardings tell.
        of_bias: WeightSharding = "replicated" if sharding == "row" else sharding
        weights.append(Weight(f"{name}.bias", rows, 1, of_bias, count, kv_heads))
    return weights


def feed_forward(
    name: str,
    hidden: int,
    intermediate: int,
    *,
    gated: bool,
    bias: bool,
    shardings: tuple[WeightSharding, WeightSharding],
    count: int = 1,
) -> list[Weight]:
    """Two matrices, or three when ``gated``; ``count`` of each."""
    column, row = shardings
    inward = ("gate", "up") if gated else ("up",)
    return [
        *(
            weight
            for part in inward
            for weight in linear(
                f"{name}.{part}", intermediate, hidden, column, bias=bias, count=count
            )
        ),
        *linear(f"{name}.down", hidden, intermediate, row, bias=bias, count=count),
    ]
