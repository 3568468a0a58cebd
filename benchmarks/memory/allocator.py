"""PyTorch's caching allocator, replayed: which segments a sequence of allocations makes it hold.

The rules of c10/cuda/CUDACachingAllocator.cpp (PyTorch 1.11 to 2.8, default settings): sizes are
multiples of 512 bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, what is larger gets a segment of its own in multiples of 2 MiB. The smallest free block that
is large enough is taken and split where more than 512 bytes (small) or 1 MiB (large) are left; free
neighbours inside a segment are joined, segments never. One stream, and no memory is given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 1 << 20
SMALL, OWN_SEGMENT = 1 * MIB, 10 * MIB
SMALL_SEGMENT, LARGE_SEGMENT, ROUND_SEGMENT = 2 * MIB, 20 * MIB, 2 * MIB
ROUND = 512


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    start: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)


class CachingAllocator:
    """Bytes in tensors and in segments, now and at most."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = 0
        self._address = 0
        self._idle: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> Block:
        """A block for a tensor of ``size`` bytes."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        idle = self._idle[small]
        place = bisect_left(idle, (size, -1))
        block = idle.pop(place)[2] if place < len(idle) else self._segment(size, small)
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = Block(block.start + size, left, small, True, block, block.after)
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            self._keep(rest)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Give a tensor's block back."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._idle[block.small].remove((other.size, other.start, other))
                block = self._joined(block, other)
        self._keep(block)

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            whole = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        self.reserved += whole
        block = Block(self._address, whole, small)
        self._address += whole
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._idle[block.small], (block.size, block.start, block))

    @staticmethod
    def _joined(one: Block, other: Block) -> Block:
        first, second = (one, other) if one.start < other.start else (other, one)
        first.size += second.size
        first.after = second.after
        if second.after:
            second.after.before = first
        return first
