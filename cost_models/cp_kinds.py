"""Kinds of context parallelism as codes, for the integer columns of configurations.

A code is the index of the kind. Those of two levels also hold the size of their inner groups, which
exchange heads for sequence, while a ring (``a2a_p2p``: USP, arXiv 2405.07719; Megatron-Core's
``--hierarchical-context-parallel-sizes inner outer``) or a gather of keys and values
(``a2a_all_gather``: MindFormers' ``hybird_cp``) joins the ``cp / inner`` groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import CpKind

CP_KINDS: tuple[CpKind, ...] = ("p2p", "all_gather", "a2a", "a2a_p2p", "a2a_all_gather")
TWO_LEVELS: tuple[CpKind, ...] = ("a2a_p2p", "a2a_all_gather")


def cp_kind_code(kind: str, inner: int = 1) -> int:
    """The code of a kind; ``inner`` counts for those of two levels only."""
    index = CP_KINDS.index(kind)
    return index + len(CP_KINDS) * inner if kind in TWO_LEVELS else index


def cp_kind_of(code: int) -> tuple[CpKind, int]:
    """Kind and size of the inner groups (1 where it has none)."""
    return CP_KINDS[code % len(CP_KINDS)], max(1, code // len(CP_KINDS))


def is_kind(codes: NDArray[np.int64], *kinds: CpKind) -> NDArray[np.bool_]:
    """Where a code is of one of ``kinds``."""
    result: NDArray[np.bool_] = np.array([kind in kinds for kind in CP_KINDS])[
        codes % len(CP_KINDS)
    ]
    return result


def exchange_ways(codes: NDArray[np.int64], cp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks that deal heads out among them: all under ``a2a``, inner groups of two levels."""
    inner = np.where(is_kind(codes, *TWO_LEVELS), codes // len(CP_KINDS), 1)
    return np.where(is_kind(codes, "a2a"), cp, np.minimum(inner, cp))


def gather_ways(codes: NDArray[np.int64], cp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks that gather keys and values: all under ``all_gather``, one of each inner group of
    ``a2a_all_gather``."""
    gathers = is_kind(codes, "all_gather", "a2a_all_gather")
    return np.where(gathers, cp // exchange_ways(codes, cp), 1)


def ring_ways(codes: NDArray[np.int64], cp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks on a ring of keys and values: all under ``p2p``, one of each inner group of
    ``a2a_p2p``."""
    return np.where(is_kind(codes, "p2p", "a2a_p2p"), cp // exchange_ways(codes, cp), 1)
