"""How a workload is laid on devices: degrees, schedules, recompute, sharding.

Vocabulary of the field: ``dp_replicate * dp_shard * cp * tp * pp`` devices; expert parallelism
(``ep * etp``) reuses the ranks of ``dp_shard * cp * tp`` (Megatron-Core's rule of a second mesh).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Schedule = Literal["gpipe", "1f1b", "interleaved"]
RecomputeMode: TypeAlias = str
"""``none``, ``full``, or the name of one of the stack's policies (:class:`RecomputePolicy`)."""
CpKind = Literal["p2p", "all_gather", "a2a", "a2a_p2p"]

SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")


OutputKind = Literal[
    "attention", "reduce_scatter", "all_to_all", "matmul", "odd_matmul", "grouped_matmul",
    "qkv", "out_proj", "mlp_in", "mlp_out",
]  # fmt: skip
"""Ops whose outputs a save list may name; ``odd_matmul`` is the 1st, 3rd, 5th ... product of a
layer, products that stand for several (q, k and v) counted one by one. The last four are tensors
that some frameworks name (``cost_models.named_outputs``)."""


@dataclass(frozen=True, slots=True)
class RecomputePolicy:
    """What of a layer's forward is run again in the backward.

    Either the named ``modules``, whose inner tensors are freed, or with ``keeps`` set the whole
    layer, whose input is kept with the outputs of the named ops.
    """

    name: RecomputeMode
    modules: frozenset[str] = frozenset()
    keeps: frozenset[OutputKind] | None = None
    to_the_end: bool = False
    """Whether the layer runs again to its last op, its reduced output, while the gradient of that
    waits all-gathered."""
    needed_only: bool = False
    """Whether what no gradient needs is left out of what runs again
    (``cost_models.named_outputs``)."""


FULL = RecomputePolicy("full", keeps=frozenset())
"""The whole layer from its input."""


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Degrees of one layout. Every field is at least 1."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Devices used."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert: ranks of one stage over ``ep * etp``."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)
