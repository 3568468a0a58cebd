"""A number with its unit and its provenance, and the base of every profile."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hardware_profiles.units import to_si


class Kind(StrEnum):
    """How a number is known."""

    DATASHEET = "datasheet"
    MEASURED = "measured"
    FITTED = "fitted"
    ASSUMED = "assumed"


class Profile(BaseModel):
    """Base of every profile: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Sourced(Profile):
    """A number with its unit and its provenance, e.g. ``{value: 312, unit: TFLOP/s, ...}``."""

    value: float
    unit: str = ""
    kind: Kind
    source: Annotated[str, Field(min_length=1)]
    note: str | None = None

    @property
    def si(self) -> float:
        """The value in SI base units (bytes, seconds, FLOP/s, bytes/s, watts)."""
        return to_si(self.value, self.unit)
