"""Orders of work of Megatron-Core's interleaved schedule in rounds of any size, as test data.

    python benchmarks/schedules/megatron_orders.py > tests/unit/data/megatron_orders.json

Needs megatron-core (0.16.1 made the file that is there), no GPU. As in
``forward_backward_pipelining_with_interleaving``, a rank runs as many forwards of
``get_schedule_table`` as ``get_pp_rank_microbatches`` says, then a forward and a backward in turns,
then the backwards left, whose chunks count down.
"""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

from megatron.core.pipeline_parallel import schedules

SIZES = {
    (2, 2, 7): (2, 3, 4, 5, 7),
    (3, 2, 10): (3, 5, 7, 10),
    (4, 3, 16): (4, 5, 6, 8, 12, 16),
}
"""Sizes of rounds by ranks, virtual stages per rank and microbatches."""


def order(pp: int, vpp: int, microbatches: int, size: int, rank: int) -> str:
    """A rank's actions as virtual stage, F or B, microbatch."""
    group = SimpleNamespace(size=lambda: pp, rank=lambda: rank)
    communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp)
    _, _, warmup, _ = schedules.get_pp_rank_microbatches(
        microbatches, vpp, size, p2p_communicator=communicator
    )
    table = schedules.get_schedule_table(microbatches, vpp, size)
    forwards = [f"{chunk * pp + rank}F{index}" for index, chunk in table]
    backwards = [f"{(vpp - 1 - chunk) * pp + rank}B{index}" for index, chunk in table]
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return " ".join(actions + backwards[len(forwards) - warmup :])


def main() -> None:
    cases = [
        {
            "pp": pp, "vpp": vpp, "microbatches": m, "size": size,
            "order": [order(pp, vpp, m, size, rank) for rank in range(pp)],
        }
        for (pp, vpp, m), sizes in SIZES.items()
        for size in sizes
    ]  # fmt: skip
    version = importlib.metadata.version("megatron-core")
    print(json.dumps({"megatron-core": version, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
