"""What must hold of plans whatever the request: degrees, layers, monotonicity, the document."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from hardware_profiles.schema import ClusterSpec
from planner.errors import InfeasibleError
from planner.pipeline import plan
from planner.plan import Plan, to_json
from planner.request import Request
from planner.search import Search
from planner.specs import DEGREES, ConstraintSpec
from tests.oracle.amount import of
from tests.oracle.instances import draw, draw_constraints, scaled_link

SEEDS = st.integers(0, 100_000)
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=of(30, 12),
    phases=(Phase.explicit, Phase.generate),
)
"""Seeds do not shrink to anything simpler, so no time is spent on that."""


def optimum(request: Request) -> int | None:
    """The proved least step in ns, or None where nothing fits."""
    result = Search(request).run()
    assert result.complete
    assert result.best is None or result.bound_ns == result.best.time_ns
    return None if result.best is None else result.best.time_ns


def not_worse(one: int | None, other: int | None) -> bool:
    """Whether ``one`` is at most ``other``, where None is worse than every time."""
    return other is None or (one is not None and one <= other)


@FEW
@given(SEEDS)
def test_plans_use_every_device_and_every_layer_once(seed: int) -> None:
    request = draw(seed)
    try:
        found = plan(request)
    except InfeasibleError:
        assert optimum(request) is None
        return
    x = found.layout
    assert x.dp_replicate * x.dp_shard * x.cp * x.tp * x.pp == request.devices
    assert x.expert_dp * x.ep * x.etp == x.dp_replicate * x.dp_shard * x.cp * x.tp
    assert x.num_microbatches * x.microbatch_size * x.dp_replicate * x.dp_shard == (
        request.global_batch
    )
    held = sorted(
        layer for stage in x.stages for chunk in stage.chunks for layer in range(*chunk.layers)
    )
    assert held == list(range(request.model.layer_count))
    assert sum(chunk.has_embedding for stage in x.stages for chunk in stage.chunks) == 1
    assert sum(chunk.has_head for stage in x.stages for chunk in stage.chunks) == 1
    assert found.prediction.fits
    assert found.prediction.max_peak_bytes <= found.prediction.capacity_bytes
    assert round(found.prediction.step_time_s * 1e9) == optimum(request)
    assert found.certificate.status == "optimal"
    assert found.certificate.relative_gap == 0
    assert found.certificate.space_size == found.certificate.priced + sum(
        found.certificate.removed.values()
    )


@FEW
@given(SEEDS)
def test_plans_round_trip(seed: int) -> None:
    try:
        found = plan(draw(seed))
    except InfeasibleError:
        assume(False)
        return
    text = to_json(found)
    again = Plan.model_validate_json(text)
    # Floats are written with nine digits: reading back what was written changes nothing more.
    assert to_json(again) == text
    assert again.layout == found.layout
    assert Plan.model_validate_json(to_json(again)) == again


@FEW
@given(SEEDS, st.floats(1.0, 2.0))
def test_more_memory_never_worsens_the_optimum(seed: int, more: float) -> None:
    request = draw(seed)
    assume(request.capacity_bytes is not None)
    assert request.capacity_bytes is not None
    richer = replace(request, capacity_bytes=int(request.capacity_bytes * more))
    assert not_worse(optimum(richer), optimum(request))


def _faster(cluster: ClusterSpec, link: str, factor: float) -> ClusterSpec:
    group = cluster.groups[0]
    node = group.node.model_copy(update={link: scaled_link(getattr(group.node, link), factor)})
    return cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})


@FEW
@given(SEEDS, st.sampled_from(("scale_up", "scale_out")), st.floats(0.05, 1.0))
def test_faster_links_never_worsen_the_optimum(seed: int, link: str, factor: float) -> None:
    request = draw(seed)
    assume(request.devices > 1)
    faster = replace(request, cluster=_faster(request.cluster, link, factor))
    assert not_worse(optimum(faster), optimum(request))


@FEW
@given(SEEDS, SEEDS)
def test_a_constraint_never_improves_the_optimum(seed: int, other: int) -> None:
    request = draw(seed)
    limits = request.job.constraints
    added = draw_constraints(Random(other), request.devices)
    assume(not (set(added.fix) & set(limits.fix)) and not (set(added.max) & set(limits.max)))
    assert set(added.fix) | set(added.max) | set(added.forbid) <= set(DEGREES)
    both = ConstraintSpec(
        fix={**limits.fix, **added.fix},
        max={**limits.max, **added.max},
        forbid=(*limits.forbid, *added.forbid),
        schedule=limits.schedule or added.schedule,
        recompute=limits.recompute or added.recompute,
        sequence_parallel=limits.sequence_parallel
        if limits.sequence_parallel is not None
        else added.sequence_parallel,
    )
    job = request.job.model_copy(update={"constraints": both})
    assert not_worse(optimum(request), optimum(replace(request, job=job)))


@FEW
@given(SEEDS, st.sampled_from((0.0, 0.01, 0.1, 0.5)))
def test_the_gap_is_within_the_tolerance(seed: int, tolerance: float) -> None:
    request = draw(seed)
    loose = replace(request, job=request.job.model_copy(update={"tolerance": tolerance}))
    best, result = optimum(request), Search(loose).run()
    if best is None:
        assert result.best is None
        return
    assert result.best is not None
    assert result.bound_ns is not None
    assert result.bound_ns <= best <= result.best.time_ns
    assert result.bound_ns >= (1 - tolerance) * result.best.time_ns * (1 - 1e-12)
