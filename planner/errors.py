"""The exceptions of the planner and their exit codes.

::

    PlannerError
    ├── InputError            2  bad input: a file, a flag, a name, a number
    │   ├── UnknownModelError 2  an architecture that no reader understands
    │   └── UnsupportedError  2  understood, but not in what this version can plan
    ├── InfeasibleError       3  proven: no layout of the space fits
    ├── LimitReachedError     4  a limit came before what was asked for
    ├── GateError             5  a check or validation threshold failed
    └── RefutedError          6  ``verify`` found a plan that is not what it claims

Every error carries a message with the user's own numbers and, where there is one, a ``hint``: the
change that would fix it. The command line prints both on stderr and exits with ``exit_code``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.plan import Infeasibility


class PlannerError(Exception):
    """Base of all errors that a user may see."""

    exit_code = 1
    code = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(PlannerError):
    """The request cannot be read or makes no sense."""

    exit_code = 2
    code = "bad_input"


class UnknownModelError(InputError):
    """No reader understands this architecture."""

    code = "unknown_model"


class UnsupportedError(InputError):
    """Described correctly, but planning for it is not implemented."""

    code = "unsupported"


class InfeasibleError(PlannerError):
    """Proven: no layout of the space fits. ``diagnosis`` is the document that says why."""

    exit_code = 3
    code = "infeasible"

    def __init__(
        self, message: str, *, hint: str | None = None, diagnosis: Infeasibility | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.diagnosis = diagnosis


class LimitReachedError(PlannerError):
    """A time limit or interruption came before what was asked for."""

    exit_code = 4
    code = "limit_reached"


class GateError(PlannerError):
    """A gate (``validate`` threshold, ``check``) failed."""

    exit_code = 5
    code = "gate_failed"


class RefutedError(PlannerError):
    """``verify`` found a claim of the plan that does not hold."""

    exit_code = 6
    code = "refuted"


def did_you_mean(name: str, known: list[str]) -> str | None:
    """A hint that names the nearest of ``known``, or lists them when none is near and few exist."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    if 0 < len(known) <= 12:
        return "known: " + ", ".join(sorted(known))
    return None
