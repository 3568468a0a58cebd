"""How a block may be split: sizes that a degree must divide, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Over = Literal["tp", "kv", "ep", "etp", "exchange", "tp_cp"]
"""Which degree must divide the size.

``kv`` is tp over KV heads, which some stacks replicate; ``exchange`` is tp x cp where the stack
exchanges heads for sequence (all-to-all context parallelism); ``tp_cp`` is tp x cp under any
context parallelism, because the layer always exchanges."""

LATE_SPLITS = 8
"""Ranks from here on concern context parallelism and are counted after its other rules."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """``size`` must be a multiple of the degree ``over``, else ``reason`` stands."""

    rank: int
    """Order in which reasons are counted."""
    size: int
    reason: str
    over: Over


def heads(size: int, what: str = "attention heads") -> Split:
    """Query (or state) heads, split over tp."""
    return Split(0, size, f"{size} {what} do not split over tp", "tp")


def kv_heads(size: int, *, gated: bool = False) -> Split:
    """Key-value heads, split or replicated over tp; no stack replicates those beside ``gated``
    outputs (megatron-core 0.16.1, transformer/attention.py, takes a rank's queries out of its
    group's, not its gates)."""
    return Split(1, size, f"{size} KV heads do not split over tp", "tp" if gated else "kv")


def exchanged(size: int) -> Split:
    """Heads that all-to-all context parallelism deals out."""
    reason = f"{size} (KV) heads do not split over tp x cp (all-to-all context parallelism)"
    return Split(9, size, reason, "exchange")


def recurrent(size: int, what: str) -> Split:
    """Heads or channels of a recurrence, dealt out over tp x cp under any context parallelism."""
    reason = f"{size} {what} do not split over tp x cp (a recurrence needs the whole sequence)"
    return Split(8, size, reason, "tp_cp")
