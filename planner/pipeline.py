"""The whole data flow on one screen: request -> search -> certified plan.

Read this file first. ``read_request`` turns references into a complete request; ``plan`` searches
and certifies; ``evaluate`` prices a given layout. Rendering and exit codes are the command line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import InfeasibleError, InputError, LimitReachedError, UnsupportedError
from planner.plan import (
    Alternative,
    Certificate,
    Input,
    Inputs,
    Layout,
    Plan,
    Prediction,
    ProgramCertificate,
    Target,
    digest,
)
from planner.predict import Priced, complete_layout, layout_of, predict, price
from planner.request import Request, fill_defaults
from planner.search import Candidate, Search, SearchResult, within

__all__ = ["EvaluatedLayout", "Request", "evaluate", "plan", "read_request"]

ALTERNATIVES = 3
SURROGATE = "nested round trips (cost_models.leaf), a lower bound on the simulated step"


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
    from hardware_profiles.loader import load_cluster, load_stack
    from planner.jobs import read_job
    from planner.models.reader import read_model

    if [model_ref, cluster_ref, job_ref].count("-") > 1:
        raise InputError("only one of MODEL, CLUSTER and JOB can be read from standard input")
    model = read_model(model_ref, stdin=stdin)
    text = stdin() if cluster_ref == "-" and stdin is not None else None
    cluster = load_cluster(cluster_ref, stdin=text)
    if not cluster.is_homogeneous:
        raise UnsupportedError(
            f"cluster {cluster.name} has {len(cluster.groups)} groups of unlike nodes; planning "
            "over unequal nodes is not implemented yet",
            hint="plan for one group at a time",
        )
    if cluster.link_matrix is not None:
        raise UnsupportedError(
            f"cluster {cluster.name} has a measured link matrix, which is not used yet",
            hint="leave link_matrix out and describe the network as tiers",
        )
    job = read_job(job_ref, overrides or {}, stdin=stdin)
    stack = load_stack(job.stack)
    request = Request(model, cluster, fill_defaults(job, model, cluster.devices), stack)
    _check(request)
    return request


def _check(request: Request) -> None:
    model, sequence = request.model, request.sequence
    longest = model.max_sequence
    if longest is not None and model.position_embeddings and sequence > longest:
        raise InputError(
            f"sequence length {sequence} exceeds the {longest} learned positions of {model.name}",
            hint=f"--seq-len {longest}",
        )
    device, precision = request.machine.device, request.job.precision
    if precision not in device.peak_flops:
        raise InputError(
            f"{device.name} has no {precision} arithmetic "
            f"(it has {', '.join(sorted(device.peak_flops))})",
            hint="--precision bf16" if "bf16" in device.peak_flops else "--precision fp16",
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

        diagnosis = diagnose(request, result, envelope(request))
        raise InfeasibleError(diagnosis.message, diagnosis=diagnosis)
    best = result.best
    priced = price_candidate(best, request)
    others = search.alternatives(ALTERNATIVES) if result.complete else []
    prediction = predict(priced, request)
    return Plan(
        **envelope(request),
        layout=priced.layout,
        prediction=prediction,
        certificate=certificate(request, result, best),
        alternatives=tuple(_alternative(other, best, request) for other in others),
        warnings=_warnings(request, prediction),
    )


def price_candidate(candidate: Candidate, request: Request) -> Priced:
    """A search result as a priced layout, through the single-layout path."""
    base = {**candidate.degrees, "rank_order": request.stack.rank_order}
    return price(layout_of(base, candidate.completion, request), request)


def envelope(request: Request) -> dict[str, Any]:
    """What every document starts with: versions, inputs with digests, target."""
    from planner import __version__

    return {
        "planner_version": __version__,
        "inputs": Inputs(
            model=_input(request.model.name, request.model.model_dump(mode="json")),
            cluster=_input(request.cluster.name, request.cluster.model_dump(mode="json")),
            job=_input("job", request.job.model_dump(mode="json")),
        ),
        "target": Target(stack=request.stack.name, version=request.stack.version),
        "cost_model_digest": cost_model_digest(request),
    }


def _input(name: str, document: dict[str, Any]) -> Input:
    return Input(name=name, digest=digest(document), document=document)


def cost_model_digest(request: Request) -> str:
    """Digest of everything that prices depend on: the stack's profile and the formulas' version."""
    from planner import __version__

    return digest({"planner": __version__, "stack": request.stack.model_dump(mode="json")})


def certificate(request: Request, result: SearchResult, best: Candidate | None) -> Certificate:
    """What the search proved, in numbers and in a sentence."""
    tolerance = request.job.tolerance
    removed = dict(sorted(result.removed.items(), key=lambda item: (-item[1], item[0])))
    common: dict[str, Any] = {
        "tolerance": tolerance,
        "space_size": result.size,
        "removed": removed,
        "priced": result.size - sum(removed.values()),
        "pruned_by_bound": result.pruned,
        "quantum": _quantum(),
        "simulated_count": result.simulated,
    }
    if best is None or result.bound_ns is None:
        return Certificate(
            status="infeasible", objective_s=None, lower_bound_s=None, relative_gap=None,
            statement=(
                f"none of {result.size:,} layouts is possible: each was removed under a reason"
            ),
            **common,
        )  # fmt: skip
    gap = max(0.0, 1 - result.bound_ns / best.time_ns)
    proved = result.complete and result.bound_ns >= within(best.time_ns, tolerance)
    status = "optimal" if proved else "feasible"
    program = best.program
    objective = program.objective_ns or 0
    return Certificate(
        status=status,
        objective_s=best.time_ns / 1e9,
        lower_bound_s=result.bound_ns / 1e9,
        relative_gap=gap,
        program=ProgramCertificate(
            surrogate=SURROGATE,
            objective_s=objective / 1e9,
            bound_s=objective / 1e9,
            gap=0.0,
            solver=program.solver,
            termination=program.termination,
        ),
        statement=_statement(status, gap, result),
        **common,
    )


def _quantum() -> str:
    from planner.tables import QUANTUM

    return QUANTUM


def _statement(status: str, gap: float, result: SearchResult) -> str:
    space = f"{result.size:,} layouts and all their partitions and recomputation"
    if status == "optimal":
        within = "optimal" if gap == 0 else f"optimal within {100 * gap:.2g} %"
        return f"{within} under the cost model, over {space}"
    return f"not proved: at most {100 * gap:.2g} % above the optimum, over {space}"


def _alternative(other: Candidate, best: Candidate, request: Request) -> Alternative:
    priced = price_candidate(other, request)
    slower = other.time_ns / best.time_ns - 1
    memory = other.peak_bytes / best.peak_bytes - 1
    return Alternative(
        reason=(
            f"{100 * slower:+.1f} % time, {100 * memory:+.0f} % memory: {_difference(other, best)}"
        ),
        layout=priced.layout,
        step_time_s=other.time_ns / 1e9,
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


def _warnings(request: Request, prediction: Prediction) -> tuple[str, ...]:
    warnings = []
    longest = request.model.max_sequence
    if longest is not None and request.sequence > longest:
        warnings.append(
            f"sequence length {request.sequence} exceeds the model's maximum of {longest}"
        )
    free = prediction.capacity_bytes - prediction.max_peak_bytes
    if free < 0.03 * prediction.capacity_bytes:
        warnings.append(
            f"only {free / 2**30:.1f} GiB of {prediction.capacity_bytes / 2**30:.1f} GiB stay "
            "free: set a reserve if the run shares its devices"
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
    from planner.space import check_layout

    complete = complete_layout(layout, request)
    check_layout(request, complete)
    priced = price(complete, request)
    return EvaluatedLayout(complete, predict(priced, request), priced)
