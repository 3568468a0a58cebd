"""Verify a plan: the independent recheck, then a replay of the search for its bookkeeping."""

from __future__ import annotations

from planner.certify import differences, request_of
from planner.certify import verify as certify
from planner.plan import Plan, round_floats

SHOWN = 8


def verify(plan: Plan) -> list[str]:
    """What does not hold, as sentences; an empty list means that the plan is what it claims.

    A plan that a limit cut short (status ``feasible``) is not replayed: how far a search gets
    depends on the machine. Raises :class:`LimitReachedError` where all that was checked holds and
    the bound takes too long.
    """
    findings = certify(plan)
    if findings or plan.certificate.status != "optimal":
        return findings
    from planner.pipeline import plan as make_plan

    again = make_plan(request_of(plan))
    stated, found = (round_floats(document.model_dump(mode="json")) for document in (plan, again))
    changed = list(differences(stated, found))
    return [f"{path[1:]} is {one}, a new search says {other}" for path, one, other in changed][
        :SHOWN
    ]
