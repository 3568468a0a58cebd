"""A workload as the cost models see it: layer kinds with weights, ops and saved tensors.

A layer kind's *weights* are plain data. Its ops and saved tensors depend on how it is sharded, so
they are functions of :class:`Shard`, whose fields are numpy arrays: the same code prices one
configuration or a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightSharding = Literal["column", "row", "replicated", "vocab", "expert_column", "expert_row"]
"""How tensor parallelism splits a weight.

``column`` splits the output dimension over tp, ``row`` the input dimension, ``vocab`` the rows of
an embedding or head over tp; ``replicated`` is whole on each tp rank. ``expert_*`` weights are
split over ep by expert and over etp by column or row.
"""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter tensor (or ``count`` equal ones).

    ``rows`` x ``cols`` is (output features, input features) as stored; a vector has ``cols = 1``.
    ``kv_heads`` > 0 marks a column weight that cannot be split below one KV head: with more tp
    ranks than KV heads it is replicated.
    """

    name: str
    rows: int
    cols: int
    sharding: WeightSharding = "replicated"
    count: int = 1
    kv_heads: int = 0

    @property
    def elements(self) -> int:
        """Parameters in all ``count`` tensors, unsharded."""
        return self.rows * self.cols * self.count
