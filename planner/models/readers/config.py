"""Read values from a config mapping: checked, with errors that name the key, and on record."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError, UnsupportedError

MAX_SIZE = 2**31 - 1
"""Largest width, vocabulary or sequence taken for real."""
MAX_LAYERS = 10_000

SPELT_ALIKE = 0.88
"""Likeness of two keys (``difflib``) above which one is taken for a slip of the other: no key of
the public configs that ship comes as near to another that its reader asks for."""

_REQUIRED = object()


class Config:
    """A config of one family; every key that a reader asks for is recorded as used.

    Absent keys take the default of the family's Hugging Face config class, where it has one that
    does not decide the size of the model; without a default an absent key is an error.
    """

    def __init__(
        self, data: Mapping[str, Any], *, family: str, name: str, source: str, where: str
    ) -> None:
        self.family = family
        self.name = name
        self.source = source
        self.where = where
        self.notes: list[str] = []
        self._data = data
        self._used: set[str] = set()

    @property
    def keys_used(self) -> tuple[str, ...]:
        """Keys of the config that a reader asked for, sorted."""
        return tuple(sorted(self._used & self._data.keys()))

    @property
    def keys_ignored(self) -> tuple[str, ...]:
        """Keys of the config that no reader asked for, sorted."""
        return tuple(sorted(str(key) for key in self._data.keys() - self._used))

    @property
    def slips(self) -> tuple[str, ...]:
        """Keys that no reader asked for, each with the absent one that it is nearly spelt like."""
        absent = sorted(self._used - self._data.keys())
        found = []
        for key in self.keys_ignored:
            near = difflib.get_close_matches(key, absent, n=1, cutoff=SPELT_ALIKE)
            found += [
                f"'{key}' is not read and '{name}' took its default: a slip?" for name in near
            ]
        return tuple(found)

    def size(self, key: str, default: object = _REQUIRED, *, limit: int = MAX_SIZE) -> int:
        """A positive whole number; ``null`` counts as absent."""
        value = self._integer(key, default)
        if value < 1:
            raise self.error(f"{key} = {value}, and must be at least 1")
        return self._within(key, value, limit)

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """A positive whole number, or None where the key is absent (``default``) or ``null``."""
        if self.is_null(key) or (key not in self._data and default is None):
            return None
        return self.size(key, default)

    def count(self, key: str, default: object = _REQUIRED) -> int:
        """A whole number, 0 or more; ``null`` counts as absent."""
        value = self._integer(key, default)
        if value < 0:
            raise self.error(f"{key} = {value}, and must not be negative")
        return self._within(key, value, MAX_SIZE)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; ``null`` counts as absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} = {_show(value)}, and must be true or false")
        return value

    def given(self, key: str, default: bool) -> bool:
        """Whether ``key`` has a value; absent, the family's ``default``, and ``null`` is none."""
        return self.get(key) is not None or (default and not self.is_null(key))

    def text(self, key: str, default: str) -> str:
        """A string; ``null`` counts as absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{key} = {_show(value)}, and must be a string")
        return value

    def rate(self, key: str, default: float) -> float:
        """A number from 0 to 1 (a dropout rate); ``null`` counts as absent."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.error(f"{key} = {_show(value)}, and must be a number from 0 to 1")
        return float(value)

    def items(self, key: str) -> list[Any] | None:
        """A list, or None where the key is absent or ``null``."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise self.error(f"{key} = {_show(value)}, and must be a list")
        return value

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        self._used.add(key)
        return self._data.get(key)

    def is_null(self, key: str) -> bool:
        """Whether the config holds ``key`` and sets it to ``null``."""
        self._used.add(key)
        return key in self._data and self._data[key] is None

    def first(self, *keys: str) -> str:
        """The first of ``keys`` that the config holds (other names of one value), or the first."""
        return next((key for key in keys if self._data.get(key) is not None), keys[0])

    def refuse(self, key: str, what: str, *, unless: object = False) -> None:
        """Raise :class:`UnsupportedError` when ``key`` is set to anything but ``unless``."""
        value = self.get(key)
        if value is not None and value != unless:
            raise UnsupportedError(
                f"{self.where}: {key} = {_show(value)} asks for {what}, which is not modelled",
                hint=f"set {key} to {_show(unless)} for a plan of the model without it",
            )

    def error(self, message: str, *, hint: str | None = None) -> InputError:
        """An error about this config."""
        return InputError(f"{self.where}: {message}", hint=hint)

    def _integer(self, key: str, default: object) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if value is _REQUIRED:
            raise self._missing(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} = {_show(value)}, and must be a whole number")
        return value

    def _within(self, key: str, value: int, limit: int) -> int:
        if value > limit:
            raise self.error(f"{key} = {_show(value)}, and must be at most {limit:,}")
        return value

    def _missing(self, key: str) -> InputError:
        import difflib

        unread = [str(name)[:80] for name in self._data if name not in self._used]
        near = difflib.get_close_matches(key, unread[:1000], n=1, cutoff=0.8)
        if near:
            hint = f"the config has {near[0]!r}: is that {key!r} misspelt?"
        else:
            hint = f"add {key!r}: a model of family {self.family} has no size without it"
        return self.error(f"config has no {key!r} (family {self.family})", hint=hint)


def _show(value: object) -> str:
    if isinstance(value, Mapping | list):
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
