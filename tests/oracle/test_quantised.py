"""Linear layers that quantise before they gather: the planner equals brute force there too."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from planner.refute import better_layout
from planner.request import Request
from tests.oracle.brute import brute_force
from tests.oracle.compare import compare, differences
from tests.oracle.instances import draw

JOBS = (
    ("megatron-core", "fp8"), ("megatron-bridge-fp8", "fp8"), ("megatron-bridge-fp8", "nvfp4"),
)  # fmt: skip
SEEDS = range(8400, 8442)


def quantised(seed: int) -> Request | None:
    """The instance of ``seed`` in 8 or 4 bits with tensor parallelism over two devices; None
    where its device has no such products."""
    stack, precision = JOBS[seed % len(JOBS)]
    request = draw(seed, stack)
    limits = request.job.constraints
    forbid = tuple(name for name in limits.forbid if name != "tp")
    most = {name: value for name, value in limits.max.items() if name != "tp"}
    changed = {"fix": limits.fix | {"tp": 2}, "max": most, "forbid": forbid}
    limits = limits.model_copy(update=changed)
    changes = {"precision": precision, "constraints": limits, "sequence_length": 128}
    request = replace(request, job=request.job.model_copy(update=changes), capacity_bytes=10**15)
    return request if request.unsupported is None else None


def test_the_planner_finds_the_best_layout_of_quantised_products() -> None:
    """And prices it otherwise than where each operand is quantised whole."""
    found: Counter[str] = Counter()
    for seed in SEEDS:
        request = quantised(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        assert not differences(each), seed
        time, layout = each.answer.time, each.answer.layout
        if time is None or layout is None:
            continue
        assert better_layout(request, time) is None
        assert better_layout(request, time + 1) is not None
        found[request.job.precision] += 1
        if layout.tp > 1:
            found["tp"] += 1
            plain = request.stack.model_copy(update={"quantisation": None})
            found["moved"] += brute_force(replace(request, stack=plain)).time != time
    assert found["fp8"] >= 4, found
    assert found["nvfp4"] >= 1, found
    assert found["moved"] >= 4, found
