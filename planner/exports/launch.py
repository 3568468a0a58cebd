"""What an exporter returns: flags, environment and remarks for one target."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Flag = tuple[str, ...]
"""A flag with its values, e.g. ``("--tensor-model-parallel-size", "8")``."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a plan on its target."""

    target: str
    devices: int
    flags: tuple[Flag, ...]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Text of files that flags name, by name."""
    notes: tuple[str, ...] = ()
    """What the plan assumes and no flag can say."""

    def placed_in(self, folder: Path) -> Launch:
        """The same with flags that name files where they lie in ``folder``."""
        paths = {name: str(folder / name) for name in self.files}
        flags = tuple(tuple(paths.get(word, word) for word in flag) for flag in self.flags)
        return replace(self, flags=flags)

    def patterns(self) -> tuple[str, ...]:
        """Values that an unquoted ``$(...)`` may expand to names of files."""
        return tuple(word for flag in self.flags for word in flag if set(word) & set("*?["))

    def line(self) -> str:
        """All flags on one line, for an unquoted ``$(...)``: no value has blanks, and a shell
        splits what it inserts by these alone. :meth:`patterns` are what else it may change."""
        return " ".join(word for flag in self.flags for word in flag) + "\n"

    def lines(self) -> str:
        """One flag a line, quoted for a shell."""
        return "".join(f"{shlex.join(flag)}\n" for flag in self.flags)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``argv`` is the list to pass to the program."""
        return {
            "target": self.target,
            "devices": self.devices,
            "argv": [word for flag in self.flags for word in flag],
            "environment": self.environment,
            "files": self.files,
            "notes": list(self.notes),
        }
