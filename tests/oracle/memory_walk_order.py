"""Microbatches in flight on a rank, by a replay of the order in which it works.

PipeDream-Flush (1F1B; Narayanan et al., arXiv 2104.04473, section 2.2.1) and its interleaved form
(section 2.2.2; Megatron-LM, core/pipeline_parallel/schedules.py).
"""

from __future__ import annotations

from collections.abc import Iterator


def passes(pp: int, vpp: int, microbatches: int, rank: int) -> Iterator[tuple[str, int]]:
    """Forward and backward passes of a rank in turn, each with its chunk."""
    total = microbatches * vpp
    ahead = pp - 1 - rank
    if vpp > 1:
        ahead = 2 * ahead + (vpp - 1) * pp
    ahead = min(ahead, total)
    for n in range(ahead):
        yield "forward", n // pp % vpp
    for n in range(ahead, total):
        yield "forward", n // pp % vpp
        yield "backward", vpp - 1 - (n - ahead) // pp % vpp
    for n in range(total - ahead, total):
        yield "backward", vpp - 1 - n // pp % vpp


def most_in_flight(pp: int, vpp: int, microbatches: int, rank: int, sizes: list[int]) -> int:
    """Most bytes of microbatches whose backward is to come; ``sizes`` of one by chunk."""
    alive, most = [0] * vpp, 0
    for direction, chunk in passes(pp, vpp, microbatches, rank):
        alive[chunk] += 1 if direction == "forward" else -1
        assert min(alive) >= 0
        most = max(most, sum(n * size for n, size in zip(alive, sizes, strict=True)))
    assert not any(alive)
    return most
