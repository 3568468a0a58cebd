"""The whole data flow on one screen: request -> search -> certified plan.

Read this file first. ``read_request`` turns references into a complete request; ``plan`` searches
and certifies; ``evaluate`` prices a given layout. Rendering and exit codes are the command line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hardware_profiles.schema import ClusterSpec, NodeGroup
from planner.accuracy import band, overlap
from planner.claims import certificate, envelope, tie_break
from planner.contradictions import check_limits
from planner.errors import InfeasibleError, InputError, LimitReachedError, UnsupportedError
from planner.layouts import complete_layout, layout_of
from planner.leaves import Candidate
from planner.plan import (
    Alternative,
    Layout,
    Plan,
    Prediction,
)
from planner.predict import predict, price, run_class
from planner.priced import Priced
from planner.request import Request
from planner.search import Search
from planner.stacks import fault, request_with_stack

__all__ = ["EvaluatedLayout", "Request", "evaluate", "plan", "read_request"]

ALTERNATIVES = 3
LAUNCH_BOUND = 0.1
"""Share of the step spent waiting for the host from which a plan warns."""


def read_request(
    model_ref: str,
    cluster_ref: str,
    job_ref: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    stdin: Callable[[], str] | None = None,
) -> Request:
    """Read the three inputs and fill every default.

    ``overrides`` are the job's fields that the user set beside the job file; constraints merge.
    Raises :class:`InputError` or, for what this version cannot plan, :class:`UnsupportedError`.
    """
    from hardware_profiles.loader import load_cluster
    from planner.jobs import read_job
    from planner.models.reader import read_model

    if [model_ref, cluster_ref, job_ref].count("-") > 1:
        raise InputError("only one of MODEL, CLUSTER and JOB can be read from standard input")
    model = read_model(model_ref, stdin=stdin)
    text = stdin() if cluster_ref == "-" and stdin is not None else None
    cluster = load_cluster(cluster_ref, stdin=text)
    cluster = merge_equal_groups(cluster)
    if not cluster.is_homogeneous:
        raise UnsupportedError(
            f"cluster {cluster.name} has {len(cluster.groups)} groups of unlike nodes; planning "
            "over more than one group is not implemented yet",
            hint="plan for one group at a time",
        )
    if cluster.link_matrix is not None:
        raise UnsupportedError(
            f"cluster {cluster.name} has a measured link matrix, which is not used yet",
            hint="leave link_matrix out and describe the network as tiers",
        )
    job = read_job(job_ref, overrides or {}, stdin=stdin)
    request = request_with_stack(model, cluster, job)
    _check(request)
    return request


def merge_equal_groups(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with neighbouring groups of the same node as one."""
    groups: list[NodeGroup] = []
    for group in cluster.groups:
        if groups and groups[-1].node == group.node:
            total = groups[-1].count + group.count
            groups[-1] = groups[-1].model_copy(update={"count": total})
        else:
            groups.append(group)
    return cluster.model_copy(update={"groups": tuple(groups)})


def _check(request: Request) -> None:
    model, sequence = request.model, request.sequence
    longest = model.max_sequence
    if longest is not None and model.position_embeddings and sequence > longest:
        raise InputError(
            f"sequence length {sequence} exceeds the {longest} learned positions of {model.name}",
            hint=f"--seq-len {longest}",
        )
    _check_images(request)
    reason = fault(request)
    if reason is not None:
        raise reason
    check_limits(request)


def _check_images(request: Request) -> None:
    """Images need a tower, a number of tokens each, and room in the sample."""
    model, job, sequence = request.model, request.job, request.sequence
    if not job.images_per_sample:
        return
    if model.vision is None:
        raise InputError(
            f"images_per_sample = {job.images_per_sample}, and {model.name} has no vision tower",
            hint="leave images_per_sample out of the job",
        )
    if job.image_tokens is None:
        raise InputError(
            f"images_per_sample = {job.images_per_sample} needs image_tokens",
            hint=f"image_tokens: tokens of one image; each stands for "
            f"{model.vision.patches_per_token} patches",
        )
    shown = job.images_per_sample * job.image_tokens
    if shown > sequence:
        raise InputError(
            f"{job.images_per_sample} images of {job.image_tokens} tokens are {shown} tokens, more "
            f"than a sample of {sequence}",
            hint=f"--seq-len {shown}, or fewer images",
        )


def plan(
    request: Request,
    *,
    time_limit_s: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The best layout of the space, with its certificate.

    Raises :class:`InfeasibleError` with a diagnosis when it is proved that no layout fits, and
    :class:`LimitReachedError` when the limit came before any layout.
    """
    search = Search(request, time_limit_s=time_limit_s, progress=progress)
    result = search.run()
    if result.best is None:
        if not result.complete:
            raise LimitReachedError(
                f"no layout was found within {time_limit_s:g} s"
                if time_limit_s is not None
                else "stopped before any layout was found",
                hint="give it more time with --time-limit",
            )
        from planner.diagnosis import diagnose

        diagnosis = diagnose(request, result)
        raise InfeasibleError(diagnosis.message, diagnosis=diagnosis)
    best = result.best
    priced = price_candidate(best, request)
    others = search.alternatives(ALTERNATIVES) if result.complete else []
    prediction = predict(priced, request)
    listed = tuple(_alternative(other, best, request, prediction) for other in others)
    claim = certificate(request, result, best)
    return Plan(
        **envelope(request),
        layout=priced.layout,
        prediction=prediction,
        certificate=claim,
        alternatives=listed,
        tie_break=tie_break(listed, claim),
        warnings=_warnings(request, priced.layout, prediction),
    )


def price_candidate(candidate: Candidate, request: Request) -> Priced:
    """A search result as a priced layout, through the single-layout path."""
    base = {**candidate.degrees, **request.layout_constants}
    return price(layout_of(base, candidate.completion, request), request)


def _alternative(
    other: Candidate, best: Candidate, request: Request, prediction: Prediction
) -> Alternative:
    priced = price_candidate(other, request)
    slower = other.time_ns / best.time_ns - 1
    memory = other.peak_bytes / best.peak_bytes - 1
    low, high, _ = band(other.time_ns / 1e9, run_class(priced, request))
    return Alternative(
        reason=(
            f"{100 * slower:+.1f} % time, {100 * memory:+.0f} % memory: {_difference(other, best)}"
        ),
        layout=priced.layout,
        step_time_s=other.time_ns / 1e9,
        step_time_band_s=(low, high),
        tie=overlap((low, high), prediction.step_time_band_s),
        max_peak_bytes=other.peak_bytes,
        fits=True,
    )


def _difference(other: Candidate, best: Candidate) -> str:
    parts = [
        f"{name} {best.degrees[name]} -> {other.degrees[name]}"
        for name in ("tp", "cp", "pp", "vpp", "ep", "microbatch_size", "zero_stage")
        if best.degrees[name] != other.degrees[name]
    ]
    return ", ".join(parts)


def _warnings(request: Request, layout: Layout, prediction: Prediction) -> tuple[str, ...]:
    warnings = []
    schedule = request.job.constraints.schedule
    if schedule is not None and layout.pp == 1:
        warnings.append(
            f"schedule {schedule} was asked for, and the best layout has no pipeline to schedule: "
            "fix pp to see one"
        )
    drives = request.stack.offload is not None and request.stack.offload.drives is not None
    if drives and not request.machine.offload.anything:
        warnings.append(
            f"nothing is offloaded: {request.stack.name} uses the drives for what the job says, "
            "optimizer_offload or parameter_offload"
        )
    longest = request.model.max_sequence
    if longest is not None and request.sequence > longest:
        warnings.append(
            f"sequence length {request.sequence} exceeds the model's maximum of {longest}"
        )
    free = prediction.capacity_bytes - prediction.max_peak_bytes
    if free < 0.03 * prediction.capacity_bytes:
        warnings.append(
            f"only {free / 2**30:.1f} GiB of {prediction.capacity_bytes / 2**30:.1f} GiB stay "
            "free: published runs do not bear out a margin that small"
        )
    routing = request.stack.routing_fragmentation
    if routing is not None and layout.ep > 1 and request.job.expert_imbalance == 0:
        warnings.append(
            f"uneven routing of experts may take {routing.si / 2**30:.1f} GiB more of each device "
            "in idle blocks, and room for the fullest rank's rows"
        )
    launch_s = sum(term.seconds or 0.0 for term in prediction.time if term.name == "launch")
    if launch_s > LAUNCH_BOUND * prediction.step_time_s:
        warnings.append(
            f"{launch_s / prediction.step_time_s:.0%} of the step waits for the host to launch "
            "kernels: larger microbatches, fewer shards or CUDA graphs would help more than "
            "another layout"
        )
    if prediction.outside_measured_region:
        warnings.append(
            "the predicted MFU is beyond any measured for this device: treat it as optimistic"
        )
    return tuple(warnings)


@dataclass(frozen=True)
class EvaluatedLayout:
    """A given layout, filled and priced."""

    layout: Layout
    prediction: Prediction
    priced: Priced


def evaluate(request: Request, layout: Mapping[str, Any]) -> EvaluatedLayout:
    """Price one layout; what is left out is derived or takes its default.

    A layout that does not fit is priced too (``prediction.fits`` is False); one that cannot exist
    raises :class:`InputError`.
    """
    from planner.hosted_outputs import check_hosted_outputs
    from planner.layout_check import check_layout

    complete = complete_layout(layout, request)
    check_layout(request, complete)
    check_hosted_outputs(request, complete)
    priced = price(complete, request)
    return EvaluatedLayout(complete, predict(priced, request), priced)
