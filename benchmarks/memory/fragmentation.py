"""What a caching allocator holds beyond its tensors, replayed beside two formulas.

    python benchmarks/memory/fragmentation.py

Both formulas are those of ``cost_models.fragments``, with no constant in them. The replays allocate
and free, in the order of the software, what one pipeline rank of a GPT has: Megatron-DeepSpeed with
full recomputation and unfused attention (sizes as BLOOM's tune-ups had them), Megatron-Core with
FlashAttention and a distributed optimizer. Biases, norms and statistics are left out. No published
reading is used.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from allocator import MIB, Block, CachingAllocator

GIB = 1 << 30
REDUCTION_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Rank:
    """The first rank of a pipeline; sizes in elements unless they say otherwise."""

    hidden: int
    heads: int
    layers: int
    tp: int
    pp: int
    dp: int
    microbatch: int
    sequence: int = 2048
    vocab: int = 250_112
    ffn: int = 0
    kv_heads: int = 0

    @property
    def residual(self) -> int:
        """Bytes of the residual stream, whole."""
        return 2 * self.microbatch * self.sequence * self.hidden

    @property
    def scores(self) -> int:
        """Bytes of one layer's 16-bit attention scores."""
        return 2 * self.microbatch * self.heads // self.tp * self.sequence**2

    @property
    def microbatches(self) -> int:
        """Enough for every pair of forward and backward to come twice."""
        return 2 * self.pp + 2


class Tensors:
    """Tensors by name, on one allocator."""

    def __init__(self, memory: CachingAllocator) -> None:
        self.memory, self.blocks = memory, dict[str, Block]()

    def make(self, **sizes: float) -> None:
        """Allocate, in order; bytes."""
        for name, size in sizes.items():
            self.blocks[name] = self.memory.allocate(int(size))

    def drop(self, *names: str) -> None:
        """Free, in order."""
        for name in names:
            self.memory.release(self.blocks.pop(name))


def checkpointed_forward(of: Tensors, rank: Rank, *, again: bool) -> None:
    """One layer; all but ``output`` is dropped unless it runs ``again`` for its backward."""
    h, s, t = rank.residual, rank.scores, rank.tp
    of.make(norm1=h, qkv=3 * h / t, empty=s, scores=s)
    of.drop("empty")
    of.make(softmax=s, dropped=s, mask=s / 2)
    if not again:
        of.drop("softmax", "mask")
    of.make(context=h / t, contiguous=h / t)
    of.drop("context", "scores")
    if not again:
        of.drop("dropped", "qkv")
    of.make(projected=h)
    if not again:
        of.drop("contiguous")
    of.make(middle=h, mask1=h / 2)
    of.drop("projected", *(() if again else ("mask1", "norm1")))
    of.make(norm2=h, fc1=4 * h / t, gelu=4 * h / t)
    if not again:
        of.drop("fc1")
    of.make(fc2=h)
    if not again:
        of.drop("gelu")
    of.make(output=h, mask2=h / 2)
    of.drop("fc2", *(() if again else ("mask2", "middle", "norm2")))


def checkpointed_backward(of: Tensors, rank: Rank, weight: Callable[[str], None]) -> None:
    """One layer after it ran again, from ``gradient`` to a new ``gradient``."""
    h, s, t = rank.residual, rank.scores, rank.tp
    of.drop("output")
    of.make(d2=h)
    of.drop("mask2")
    of.make(d_gelu=4 * h / t)
    weight("fc2")
    of.drop("d2", "gelu")
    of.make(d_fc1=4 * h / t)
    of.drop("d_gelu", "fc1")
    of.make(d_norm2=h)
    weight("fc1")
    of.drop("d_fc1", "norm2")
    of.make(d_middle=h)
    of.drop("d_norm2", "middle")
    of.make(sum=h)
    of.drop("d_middle")
    of.make(d1=h)
    of.drop("mask1")
    of.make(d_context=h / t)
    weight("out")
    of.drop("d1", "contiguous")
    of.make(d_view=h / t)
    of.drop("d_context")
    of.make(d_dropped=s, d_value=h / t)
    of.drop("d_view", "dropped")
    of.make(d_softmax=s)
    of.drop("d_dropped", "mask", "softmax")
    of.make(d_query=h / t, d_key=h / t)
    of.drop("d_softmax")
    of.make(d_qkv=3 * h / t)
    of.drop("d_query", "d_key", "d_value", "qkv")
    of.make(d_norm1=h)
    weight("qkv")
    of.drop("d_qkv", "norm1")
    of.make(d_input=h)
    of.drop("d_norm1", "gradient")
    of.make(gradient=h)
    of.drop("d_input", "sum")


def checkpointed(rank: Rank, steps: int = 2) -> float:
    """GiB that the first rank holds beyond its peak of tensors (Megatron-DeepSpeed, fp16)."""
    memory = CachingAllocator()
    of, h, t = Tensors(memory), rank.residual, rank.tp
    square = rank.hidden**2 / t
    weights = {"qkv": 3 * square, "out": square, "fc1": 4 * square, "fc2": 4 * square}
    table = rank.vocab * rank.hidden / t
    held = rank.layers * sum(weights.values()) + table
    weights["table"] = table
    of.make(flat=2 * held, master=4 * held / rank.dp, m=4 * held / rank.dp, v=4 * held / rank.dp)
    for _ in range(steps):
        made: set[str] = set()
        flights: list[str] = []

        def accumulate(layer: int, name: str, made: set[str] = made) -> None:
            key, size = f"grad {layer} {name}", 2 * weights[name]
            of.make(**{"grad" if key in made else key: size})
            if key in made:
                of.drop("grad")
            made.add(key)

        def forward(number: int, flights: list[str] = flights) -> None:
            of.make(rows=h, output=h, **{f"{number} mask": h / 2})
            of.drop("rows")
            for layer in range(rank.layers):
                of.blocks[f"{number} {layer}"] = of.blocks.pop("output")
                checkpointed_forward(of, rank, again=False)
            # The output is handed on in tp parts (DeepSpeed, PartitionedTensor).
            of.make(**{f"{number} part": h / t}, sent=h / t)
            of.drop("sent", "output")
            flights.append(str(number))

        def backward(
            flights: list[str] = flights,
            accumulate: Callable[[int, str], None] = accumulate,
        ) -> None:
            number = flights.pop(0)
            of.make(whole=h, received=h / t, gradient=h)
            of.drop("received", f"{number} part")
            for layer in reversed(range(rank.layers)):
                checkpointed_forward(of, rank, again=True)
                add = partial(accumulate, layer)
                checkpointed_backward(of, rank, add)
                of.drop(f"{number} {layer}", *(("whole",) if "whole" in of.blocks else ()))
            of.make(d_rows=h)
            of.drop(f"{number} mask", "gradient")
            accumulate(0, "table")
            of.drop("d_rows")

        warm = min(rank.pp - 1, rank.microbatches)
        for number in range(rank.microbatches):
            forward(number)
            if number >= warm:
                backward()
        while flights:
            backward()
        of.make(bucket=2 * max(REDUCTION_ELEMENTS, table))
        of.drop("bucket")
        of.drop(*made)
    return (memory.reserved - memory.peak_allocated) / GIB


def copied(rank: Rank, *, copies: bool, steps: int = 3) -> float:
    """GiB that one rank without a loss holds beyond its peak of tensors (Megatron-Core, bf16)."""
    memory = CachingAllocator()
    of, h = Tensors(memory), rank.residual / rank.tp
    shapes = weight_bytes(rank)
    names = [f"{layer} {name}" for layer in range(rank.layers) for name in shapes]
    held = rank.layers * sum(shapes.values())
    if copies:
        of.make(**{name: shapes[name.split()[1]] for name in names})
    of.make(weights=held, gradients=2 * held)
    if copies:
        of.drop(*names)
    own = names[: max(1, len(names) // rank.dp)]
    for name in own:
        of.make(clone=shapes[name.split()[1]], **{f"master {name}": 2 * shapes[name.split()[1]]})
        of.drop("clone")
    gated, width = 2 * rank.ffn, rank.residual / rank.hidden / rank.tp
    heads = rank.hidden + 2 * rank.kv_heads * rank.hidden // rank.heads
    saved = {
        "norm1": h, "mask1": h / 2, "qkv": heads * width, "core": h, "middle": h, "norm2": h,
        "mask2": h / 2, "fc1": gated * width, "act": gated / 2 * width,
    }  # fmt: skip

    def forward(number: int) -> None:
        of.make(**{f"{number} in 0": h})
        for layer in range(rank.layers):
            for name, size in saved.items():
                gathers = rank.tp > 1 and name in ("qkv", "fc1")
                of.make(**({"gathered": rank.residual} if gathers else {}))
                of.make(**{f"{number} {layer} {name}": size})
                of.drop(*(("gathered",) if gathers else ()))
            of.make(product=rank.residual, **{f"{number} in {layer + 1}": h})
            of.drop("product")

    def backward(number: int) -> None:
        of.make(gradient=h)
        of.drop(f"{number} in {rank.layers}")
        for layer in reversed(range(rank.layers)):
            of.make(through=h, current=h)
            for name, size in reversed(saved.items()):
                if name in ("qkv", "fc1"):
                    of.make(d=size, gathered=rank.residual, d_in=rank.residual)
                    of.drop("current", f"{number} {layer} {name}", "gathered", "d")
                    of.make(current=h)
                    of.drop("d_in")
                elif name.startswith("mask"):
                    of.drop(f"{number} {layer} {name}")
                else:
                    of.make(d=size)
                    of.drop("current", f"{number} {layer} {name}")
                    of.blocks["current"] = of.blocks.pop("d")
            of.drop("gradient", "through", f"{number} in {layer}")
            of.blocks["gradient"] = of.blocks.pop("current")
        of.drop("gradient")

    for step in range(steps):
        done = 0
        for number in range(rank.microbatches):
            forward(number)
            if number >= rank.pp - 1:
                backward(done)
                done += 1
        for number in range(done, rank.microbatches):
            backward(number)
        if step == 0:
            # Adam makes its moments when it first steps.
            for name in own:
                size = 2 * shapes[name.split()[1]]
                of.make(**{f"m {name}": size, f"v {name}": size})
    return (memory.reserved - memory.peak_allocated) / GIB


def weight_bytes(rank: Rank) -> dict[str, int]:
    """16-bit weights of one layer as Megatron-Core stores them."""
    h, t = rank.hidden, rank.tp
    kv = 2 * rank.kv_heads * h // rank.heads
    return {
        "qkv": 2 * (h + kv) * h // t, "out": 2 * h * h // t, "fc1": 4 * rank.ffn * h // t,
        "fc2": 2 * rank.ffn * h // t,
    }  # fmt: skip


def split_formula(rank: Rank) -> float:
    """GiB that layer inputs leave of the blocks of score matrices."""
    inputs, rest = divmod(rank.scores, rank.residual)
    if not inputs:
        return 0.0
    next_fits = rank.residual * (rank.residual - rest) // rank.scores
    return rank.layers * rank.pp * min(rest // inputs, next_fits) / GIB


def left_formula(rank: Rank) -> float:
    """GiB left of the blocks in which weights were made."""
    h = rank.residual // rank.tp
    sizes = weight_bytes(rank).values()
    return rank.layers * sum(min(size, h) for size in sizes if size > MIB) / GIB


def checkpointed_ranks() -> Iterator[Rank]:
    """Shapes around those of models of 200 B parameters."""
    for hidden, heads, tp, pp, batch in itertools.product(
        (12288, 13824, 14336), (64, 96, 128), (4, 8), (4, 6, 12), (1, 2, 4)
    ):
        if hidden % heads == 0:
            yield Rank(hidden, heads, 72 // pp, tp, pp, 8, batch)


def copied_ranks() -> Iterator[Rank]:
    """Dense models of 3 to 70 B parameters."""
    models = (
        (3200, 32, 32, 8640, 26), (4096, 32, 8, 14336, 32), (5120, 40, 40, 13824, 40),
        (6144, 64, 8, 16384, 48), (8192, 64, 8, 28672, 80),
    )  # fmt: skip
    for (hidden, heads, kv, ffn, layers), tp, pp, dp, sequence, batch in itertools.product(
        models, (1, 2, 4, 8), (1, 2, 4), (2, 8), (4096, 8192), (1, 2)
    ):
        if layers % pp == 0 and kv % tp == 0 and layers * hidden**2 // (tp * pp) <= 6 * 10**8:
            yield Rank(
                hidden, heads, layers // pp, tp, pp, dp, batch, sequence, ffn=ffn, kv_heads=kv
            )  # fmt: skip


def report(title: str, replayed: list[float], formula: list[float]) -> None:
    """Print how far the formula and no formula are from the replays."""
    slope, intercept = statistics.linear_regression(formula, replayed)
    errors = [r - f for r, f in zip(replayed, formula, strict=True)]
    rest = statistics.fmean(errors)
    print(f"{title}: {len(replayed)} layouts")
    print(
        f"  replayed {statistics.fmean(replayed):.2f} GiB, formula {statistics.fmean(formula):.2f}"
    )
    print(f"  replayed = {intercept:.2f} + {slope:.2f} x formula")
    print(f"  correlation {statistics.correlation(formula, replayed):.2f}; mean rest {rest:+.2f}")
    print(f"  spread of the rest {statistics.pstdev(errors):.2f}, of the replays "
          f"{statistics.pstdev(replayed):.2f}")  # fmt: skip


def main() -> None:
    """Replay both families of layouts."""
    ranks = list(checkpointed_ranks())
    report("layer inputs in blocks of scores", [checkpointed(r) for r in ranks],
           [split_formula(r) for r in ranks])  # fmt: skip
    ranks = list(copied_ranks())
    report("blocks of copied weights", [copied(r, copies=True) for r in ranks],
           [left_formula(r) for r in ranks])  # fmt: skip
    without = [copied(r, copies=False) for r in ranks]
    print(f"  the same without the copies: {statistics.fmean(without):.2f} GiB")


if __name__ == "__main__":
    main()
