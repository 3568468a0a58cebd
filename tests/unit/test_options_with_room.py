"""Options that are ruled out because all ranks together have no room for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.layout import ALL_AT_ONCE, SCHEDULES
from cost_models.leaf import Completion, stage_costs
from cost_models.peaks import peaks
from planner.interleaved import even_partitions
from planner.meshes import Meshes
from planner.options import with_room
from planner.pipeline import read_request
from planner.space import build_space, expand
from planner.tables import price_layouts, recompute_options


@pytest.mark.parametrize("capacity_gb", [12, 18, 30])
def test_what_is_ruled_out_fits_in_no_partition(capacity_gb: int) -> None:
    """Llama 3.1 8B on eight devices, in pipelines too: every list of a dozen layouts without
    layers outside, whose bytes depend on their mode."""
    request = read_request(
        "llama-3.1-8b", "dgx-h100:1", None,
        {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 16},
    )  # fmt: skip
    space = build_space(request)
    meshes: Meshes = space.meshes
    layouts = expand(request, meshes)
    priced = price_layouts(request, meshes, layouts)
    options = recompute_options(request, request.model.layer_count)
    dropped = 0
    inside = np.flatnonzero(layouts.outside == 0)
    for index in inside[:: max(1, len(inside) // 12)].tolist():
        assert SCHEDULES[int(layouts.schedule[index])] in ("1f1b", *ALL_AT_ONCE)
        leaf = priced.leaf(index)
        tight = replace(leaf, capacity_bytes=capacity_gb * 10**9)
        kept = set(with_room(tight, options))
        for option in options:
            if option in kept:
                continue
            dropped += 1
            for bounds in even_partitions(tight).tolist():
                ranks = stage_costs(tight, Completion(tuple(bounds), (option,) * tight.stages))
                assert max(peaks(tight, ranks)) > tight.capacity_bytes
    assert dropped
