"""What every document claims besides its layout: inputs, versions, digests, certificate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cost_models.layout import LISTED
from planner import __version__
from planner.leaves import Candidate, within
from planner.plan import (
    Alternative,
    Certificate,
    Input,
    Inputs,
    ProgramCertificate,
    Target,
    digest,
)
from planner.request import Request
from planner.search import SearchResult
from planner.tables import QUANTUM

SURROGATE = "nested round trips (cost_models.surrogate), a lower bound on the simulated step"


def envelope(request: Request) -> dict[str, Any]:
    """What every document starts with: versions, inputs with digests, target."""
    return {
        "planner_version": __version__,
        "inputs": Inputs(
            model=_input(request.model.name, request.model.model_dump(mode="json")),
            cluster=_input(request.cluster.name, request.cluster.model_dump(mode="json")),
            job=_input("job", request.job.model_dump(mode="json")),
        ),
        "target": Target(
            stack=request.stack.name,
            version=request.stack.version,
            not_priced=tuple(request.stack.not_priced),
        ),
        "cost_model_digest": cost_model_digest(request),
    }


def _input(name: str, document: dict[str, Any]) -> Input:
    return Input(name=name, digest=digest(document), document=document)


def cost_model_digest(request: Request) -> str:
    """Digest of everything that prices depend on: the stack's profile and the formulas' version."""
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
        "quantum": QUANTUM,
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
        statement=_statement(status, gap, _space(request, result)),
        **common,
    )


def _space(request: Request, result: SearchResult) -> str:
    """What was looked at. Virtual stages, where there are any, are even unless freed."""
    narrowed = (
        request.stack.free_virtual_stages
        and not request.free_stages
        and not set(LISTED).isdisjoint(request.schedules)
    )
    even = " (virtual stages even)" if narrowed else ""
    return f"{result.size:,} layouts, all their partitions{even} and recomputation"


def _statement(status: str, gap: float, space: str) -> str:
    if status == "optimal":
        within = "optimal" if gap == 0 else f"optimal within {100 * gap:.2g} %"
        return f"{within} under the cost model, over {space}"
    return f"not proved: the optimum may be up to {100 * gap:.2g} % less, over {space}"


def tie_break(alternatives: Sequence[Alternative], proof: Certificate) -> str | None:
    """Why the plan's layout was taken, where alternatives tie with it; None where none does."""
    ties = sum(other.tie for other in alternatives)
    if not ties:
        return None
    gap = proof.relative_gap
    more = f"more than {100 * gap:.2g} % " if gap else ""
    proven = (
        f", and under the model no layout of the space is {more}faster" if gap is not None else ""
    )
    return (
        f"a tie with {ties} of the {len(alternatives)} alternatives: the error bands overlap, so a "
        f"measurement may order them otherwise; this layout is taken because its predicted step "
        f"time is the least{proven}"
    )
