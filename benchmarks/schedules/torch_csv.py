"""Orders of work as PyTorch writes and reads them in files.

    python benchmarks/schedules/torch_csv.py write tests/data/schedules
    python benchmarks/schedules/torch_csv.py load FILE VPP MICROBATCHES

``write`` has PyTorch dump its own schedules (``_dump_csv``, ``compute_only``) for four ranks and
eight microbatches; ``load`` reads a file as torchtitan does and fails where PyTorch refuses it.
Needs PyTorch (2.13 made the files that are there), no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

RANKS, MICROBATCHES = 4, 8
NAMES = ("Interleaved1F1B", "InterleavedZeroBubble", "LoopedBFS", "ZBVZeroBubble", "DualPipeV")
ON_A_V = ("ZBVZeroBubble", "DualPipeV")


def stages(ranks: int, held: range | tuple[int, ...], count: int) -> list[PipelineStage]:
    """The stages of rank 0, with nothing in them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with torch.device("meta"):
        return [
            PipelineStage(
                torch.nn.Linear(2, 2), index, count, torch.device("cpu"), group=dist.group.WORLD
            )
            for index in held
        ]


def write(folder: Path) -> None:
    """One file for each of ``NAMES``, of two virtual stages per rank."""
    for name in NAMES:
        held = (0, 2 * RANKS - 1) if name in ON_A_V else range(0, 2 * RANKS, RANKS)
        build = schedules.get_schedule_class(name)
        schedule = build(
            stages(RANKS, held, 2 * RANKS), n_microbatches=MICROBATCHES, loss_fn=torch.sum
        )
        schedule._dump_csv(folder / f"{name}.csv", format="compute_only")
        dist.destroy_process_group()


def load(path: Path, vpp: int, microbatches: int) -> None:
    """Read ``path`` into the runtime that torchtitan uses."""
    ranks = len(path.read_text().splitlines())
    first = stages(ranks, range(0, ranks * vpp, ranks), ranks * vpp)
    runtime = schedules._PipelineScheduleRuntime(
        first, n_microbatches=microbatches, loss_fn=torch.sum
    )
    runtime._load_csv(str(path))
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        load(Path(sys.argv[2]), *map(int, sys.argv[3:]))
