"""Orders of work that PyTorch builds for its pipeline schedules, as test data.

    python benchmarks/schedules/torch_orders.py > tests/unit/data/pipeline_orders.json

Needs PyTorch (2.13 made the file that is there), no GPU: stages on the meta device, a fake process
group. A pair of a forward and a backward is written as the two actions that PyTorch runs one after
the other; a number of microbatches that it refuses has its message in place of the orders.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

NAMES = {
    "Interleaved1F1B": (2, 3),
    "InterleavedZeroBubble": (2, 3),
    "ZBVZeroBubble": (2,),
    "DualPipeV": (2,),
    "LoopedBFS": (2, 3),
}
"""Classes of ``torch.distributed.pipelining`` with the virtual stages per rank to ask for."""


def orders(name: str, pp: int, vpp: int, microbatches: int) -> list[str] | str:
    """One line per rank, or why there is none."""
    count = pp * vpp
    held = (0, count - 1) if name in ("ZBVZeroBubble", "DualPipeV") else range(0, count, pp)
    with torch.device("meta"):
        stages = [
            PipelineStage(
                torch.nn.Linear(2, 2), index, count, torch.device("cpu"), group=dist.group.WORLD
            )
            for index in held
        ]
    build = schedules.get_schedule_class(name)
    try:
        schedule = build(stages, n_microbatches=microbatches, loss_fn=torch.sum, scale_grads=False)
    except (ValueError, AssertionError) as refusal:
        return f"refused: {refusal}"
    lines = []
    for rank in range(pp):
        actions = [action for action in schedule.pipeline_order[rank] if action is not None]
        each = [part for action in actions for part in (action.sub_actions or (action,))]
        lines.append(" ".join(str(part) for part in each))
    return lines


def main() -> None:
    found = []
    for pp in (2, 3, 4):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pp)
        numbers = sorted({1, pp - 1, pp, pp + 1, 2 * pp - 1, 2 * pp, 2 * pp + 1, 3 * pp})
        for name, virtual in NAMES.items():
            for vpp in virtual:
                for microbatches in numbers:
                    order = orders(name, pp, vpp, microbatches)
                    case = {"schedule": name, "pp": pp, "vpp": vpp, "microbatches": microbatches}
                    found.append({**case, "order": order})
        dist.destroy_process_group()
    about = f"torch {torch.__version__}, benchmarks/schedules/torch_orders.py"
    json.dump({"_about": about, "cases": found}, sys.stdout, indent=0)
    print()


if __name__ == "__main__":
    main()
