"""How published runs are read: tables that map a framework to a stack and fill what a row leaves
out, an accelerator and a link to the catalogue, a source to its conventions.

The tables ship as YAML beside this module, each entry with its source. They look at a row's own
columns only, never at its name, source, notes or measured figures (the conventions, which decide
what was measured and not what is predicted, are by source).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hardware_profiles.documents import read_document
from planner.studies.runs import Run, SkippedError

_FOLDER = Path(__file__).parent / "policies"

Cell = str | int | float


@lru_cache(maxsize=8)
def table(name: str) -> Mapping[str, Any]:
    """One shipped table: ``frameworks``, ``machines`` or ``conventions``."""
    document = read_document(_FOLDER / f"{name}.yaml")
    assert isinstance(document, dict)
    return document


@dataclass
class Reading:
    """A run read under its framework's policy; remembers what the policy had to fill."""

    run: Run
    stack: str
    fill: Mapping[str, Cell]
    override: Mapping[str, Cell]
    values: Mapping[str, Mapping[str, Cell]]
    assume: Mapping[str, Any]
    filled: dict[str, Cell] = field(default_factory=dict)

    def text(self, column: str) -> str:
        """A column in lower case: as stated, or as the policy fills it; ``""`` if neither does."""
        stated = self.run.text(column).lower()
        if column in self.override and stated:
            self.filled[column] = self.override[column]
            return str(self.override[column])
        if stated:
            return self._rewritten(column, stated)
        if self.fill.get(column) is None:
            return ""
        self.filled[column] = self.fill[column]
        return str(self.fill[column]).lower()

    def _rewritten(self, column: str, stated: str) -> str:
        for wanted, meaning in self.values.get(column, {}).items():
            if pattern(wanted).fullmatch(stated):
                return str(meaning).lower()
        return stated

    def size(self, column: str) -> int:
        """A whole number above zero. Raises :class:`SkippedError` where there is none."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if value < 1 or value != int(value):
            raise SkippedError(f"no {column}" if not text else f"{column} not understood: {text}")
        return int(value)

    def flag(self, column: str) -> bool:
        """A 0/1 column. Raises :class:`SkippedError` where it is neither."""
        text = self.text(column)
        if text not in ("0", "1", "0.0", "1.0", "true", "false"):
            raise SkippedError(f"no {column}" if not text else f"{column} not understood: {text}")
        return text in ("1", "1.0", "true")


def precision_of(text: str) -> str:
    """The priced precision of a label. Raises :class:`SkippedError` for an unknown one."""
    for name, labels in table("frameworks")["precisions"].items():
        if name != "source" and text in labels:
            return str(name)
    raise SkippedError(f"precision not modelled: {text}")


def reading_of(run: Run, changes: Mapping[str, Cell] | None = None) -> Reading:
    """The run under the first entry of the frameworks table that fits it.

    ``changes`` replace what the policy fills: the other choices that a row leaves open. Raises
    :class:`SkippedError` where no entry fits.
    """
    frameworks = table("frameworks")
    name = run.text("framework").lower()
    if not name:
        raise SkippedError("no framework")
    entry = next((each for each in frameworks["frameworks"] if _fits(each, run, name)), None)
    stack = entry["stack"] if entry else _shipped(name)
    if stack is None:
        raise SkippedError(f"no stack for framework {run.text('framework')}")
    entry = entry or frameworks["shipped_stacks"]
    fill = {**frameworks["defaults"]["fill"], **entry.get("fill", {})}
    assume, override = dict(entry.get("assume", {})), dict(entry.get("override", {}))
    for case in entry.get("cases") or ():
        if _when(case, run):
            fill |= case.get("fill", {})
            assume |= case.get("assume", {})
            override |= case.get("override", {})
            stack = case.get("stack", stack)
    fill |= changes or {}
    reading = Reading(run, str(stack), fill, override, entry.get("values") or {}, assume)
    for column, stacks in (entry.get("variants") or {}).items():
        reading.stack = str(stacks.get(reading.text(column), reading.stack))
    return reading


def _fits(entry: Mapping[str, Any], run: Run, name: str) -> bool:
    if not pattern(entry["framework"]).fullmatch(name):
        return False
    years = entry.get("years")
    if years and not years[0] <= (run.size("year") or years[1]) <= years[1]:
        return False
    wanted = entry.get("precisions")
    if wanted and not any(_labelled(run.text("precision").lower(), each) for each in wanted):
        return False
    return _when(entry, run)


def _when(entry: Mapping[str, Any], run: Run) -> bool:
    return all(_equal(run.text(column), wanted) for column, wanted in entry.get("when", {}).items())


def _labelled(text: str, precision: str) -> bool:
    return text in table("frameworks")["precisions"][precision]


def _equal(text: str, wanted: Cell) -> bool:
    if isinstance(wanted, str):
        return bool(pattern(wanted).search(text.lower()))
    try:
        return float(text) == wanted
    except ValueError:
        return False


@lru_cache(maxsize=128)
def pattern(text: str) -> re.Pattern[str]:
    """A compiled pattern of the tables; compiled once."""
    return re.compile(text)


def _shipped(name: str) -> str | None:
    from hardware_profiles.loader import catalog_aliases, catalog_names

    return name if name in catalog_names("stack") else catalog_aliases("stack").get(name)


def family_of(source: str) -> str:
    """The family of a source: sources whose runs are judged together."""
    for family, members in table("conventions")["families"].items():
        if source in members:
            return str(family)
    return source


def convention(kind: str, source: str) -> Mapping[str, str]:
    """The entry of the longest prefix of ``source`` in a conventions table, else its default."""
    entries: Mapping[str, Mapping[str, str]] = table("conventions")[kind]
    matches = [name for name in entries if name != "default" and source.startswith(name)]
    return entries[max(matches, key=len) if matches else "default"]
