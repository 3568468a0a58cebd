"""Meshes and layouts as tables: one column per degree, one row per candidate.

A *mesh* fixes tp, sequence parallelism, cp (and its kind), pp, ep, etp and the microbatch size; a
*layout* adds the split of data parallelism into replicate and shard, the ZeRO stage, the schedule
and the number of virtual stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models.graph import Bools, Int64

COLUMNS = ("tp", "sp", "cp", "cp_kind", "pp", "ep", "etp", "microbatch", "dp")


@dataclass(frozen=True)
class Meshes:
    """Meshes as arrays of one length, with the number of layouts of each in ``weight``."""

    tp: Int64
    sp: Int64
    cp: Int64
    cp_kind: Int64
    pp: Int64
    ep: Int64
    etp: Int64
    microbatch: Int64
    dp: Int64
    weight: Int64

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: Int64 | Bools) -> Meshes:
        """The meshes at ``index``."""
        return Meshes(**{name: getattr(self, name)[index] for name in (*COLUMNS, "weight")})


def joined(tables: Sequence[Meshes]) -> Meshes:
    """Meshes of several tables in one."""
    names = (*COLUMNS, "weight")
    return Meshes(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in names})


@dataclass(frozen=True)
class Layouts:
    """Layouts as arrays of one length; ``mesh`` indexes the meshes they came from."""

    mesh: Int64
    dp_replicate: Int64
    dp_shard: Int64
    zero_stage: Int64
    reshard: Int64
    """Ranks that keep a copy of the weights for the backward in stage 3; 0: none does."""
    schedule: Int64
    """Index into ``cost_models.layout.SCHEDULES``."""
    vpp: Int64
    outside: Int64
    """Layers outside the pipeline (``cost_models.outside``)."""

    def __len__(self) -> int:
        return len(self.mesh)

    def take(self, index: Int64 | Bools) -> Layouts:
        """The layouts at ``index``."""
        return Layouts(
            self.mesh[index], self.dp_replicate[index], self.dp_shard[index],
            self.zero_stage[index], self.reshard[index], self.schedule[index], self.vpp[index],
            self.outside[index],
        )  # fmt: skip
