"""Every way a command can end badly: what is said on stderr and the exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback

import typer

from planner.errors import InfeasibleError, PlannerError, RefutedError

INTERRUPTED = 130
DEBUG_VARIABLE = "PLANNER_DEBUG"

# typer carries its own copy of click in some versions and imports click in others; the error that
# a wrong flag raises is the base of BadParameter in both.
_SUGGESTION = re.compile(r"\s*(?:\(?Possible options: |Did you mean (?:one of )?:?\s*)(.+?)\)?\??$")
_UsageError: type[BaseException] = typer.BadParameter.__mro__[1]


def exit_code_of(error: BaseException) -> int:
    """Say on stderr what went wrong and return the exit code; a closed pipe is silent and 0."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _say("interrupted")
        return INTERRUPTED
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, RefutedError):
        _say(f"refuted: {error.message}")
        return error.exit_code
    if isinstance(error, InfeasibleError):
        _say(f"error: {error.message}", error.hint, _diagnosis(error))
        return error.exit_code
    if isinstance(error, PlannerError):
        _say(f"error: {error.message}", error.hint)
        return error.exit_code
    if _is_document_error(error):
        _say(f"error: {error}", getattr(error, "hint", None))
        return 2
    return _internal(error)


def silence_stdout() -> None:
    """Keep the interpreter from complaining about a closed pipe when it flushes at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, hint: str | None = None, block: str = "") -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(message + "\n")
        if block:
            sys.stderr.write(block)
        if hint:
            sys.stderr.write(f"hint: {hint}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _usage(error: BaseException) -> int:
    """A wrong flag or argument, as ``error:`` and ``hint:`` like every other error."""
    if type(error).__name__ == "NoArgsIsHelpError":
        _say(str(error))
        return 2
    text = (
        str(getattr(error, "format_message", lambda: error)()).replace("Value error, ", "").strip()
    )
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "planner"
    found = _SUGGESTION.search(text)
    if found is None:
        _say(f"error: {text.rstrip('.')}", f"{path} --help lists the flags")
    else:
        message = text[: found.start()].rstrip(". ")
        _say(f"error: {message}", f"did you mean {found.group(1).replace(', ', ' or ')}?")
    return 2


def _is_document_error(error: BaseException) -> bool:
    documents = sys.modules.get("hardware_profiles.documents")
    return documents is not None and isinstance(error, documents.DocumentError)


def _diagnosis(error: InfeasibleError) -> str:
    """The readable form of an infeasibility, where the error carries one."""
    if error.diagnosis is None:
        return ""
    from planner.report.console import to_text
    from planner.report.infeasibility import infeasibility_table

    return to_text(infeasibility_table(error.diagnosis), stream=sys.stderr)


def _internal(error: BaseException) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        _say("".join(traceback.format_exception(error)).rstrip())
    detail = " ".join(str(error).split())[:300]
    _say(
        f"internal error: {type(error).__name__}: {detail}",
        f"set {DEBUG_VARIABLE}=1 to see the traceback; this is a fault of the planner",
    )
    return 1
