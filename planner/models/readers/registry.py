"""Which reader understands which config, by ``model_type``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError
from planner.models.readers.config import Config
from planner.models.readers.families import FAMILIES, OPTIONAL_TOWER, TOWERS, Family
from planner.models.spec import ModelSpec, VisionSpec

_META = ("name", "source", "model_type", "architectures")


def read_config(data: Mapping[str, Any], *, where: str, name: str, source: str) -> ModelSpec:
    """A Hugging Face config as a model.

    ``where`` names the config in errors, ``name`` and ``source`` those of the model unless the
    config has its own. An architecture without a reader is read by its keys where they say enough
    (``planner.models.readers.generic``). Raises :class:`UnknownModelError` where they do not, and
    :class:`InputError` for values that make no model.
    """
    name, source = _string(data, "name", name), _string(data, "source", source)
    outer = data.get("model_type")
    if isinstance(outer, (list, Mapping)):
        raise InputError(f"{where}: model_type = {outer!r}, and must be a string")
    try:
        if outer in TOWERS and isinstance(outer, str):
            return _with_tower(data, outer, where=where, name=name, source=source)
        text = data.get("text_config")
        if isinstance(text, Mapping) and outer not in FAMILIES:
            data = {**text, **data} if _towers(data) else _decoder_part(data, text)
        family = _family(data)
        if family is None:
            from planner.models.readers.generic import read_unknown

            return read_unknown(data, where=where, name=name, source=source)
        config = Config(data, family=family.model_type, name=name, source=source, where=where)
        return _read(config, family)
    except ValidationError as error:
        raise InputError(f"{where}: {error.errors()[0]['msg']}") from None


def _read(config: Config, family: Family) -> ModelSpec:
    for key in _META:
        config.get(key)
    reader: Callable[[Config], ModelSpec] = _function(
        family.module, family.reader or family.model_type
    )
    return reader(config).model_copy(
        update={
            "keys_used": config.keys_used,
            "keys_ignored": config.keys_ignored,
            "notes": (*config.notes, *config.slips),
        }
    )


def _function(module: str, reader: str) -> Callable[..., Any]:
    loaded = importlib.import_module(f"planner.models.readers.{module}")
    function: Callable[..., Any] = getattr(loaded, f"read_{reader}")
    return function


def _with_tower(
    data: Mapping[str, Any], outer: str, *, where: str, name: str, source: str
) -> ModelSpec:
    """A decoder with a vision tower: nested in ``text_config`` and ``vision_config``, or flat."""
    config = Config(data, family=outer, name=name, source=source, where=where)
    for key in (*_META, "text_config", "vision_config"):
        config.get(key)
    config.refuse("audio_config", "an audio tower", unless=None)
    decoder, reader = TOWERS[outer]
    text = data.get("text_config")
    nested = isinstance(text, Mapping)
    part = _decoder_part(data, text) if isinstance(text, Mapping) else data
    family = FAMILIES[decoder]
    model = _read(
        Config(
            part, family=decoder, name=name, source=source,
            where=f"{where} (text_config)" if nested else where,
        ),
        family,
    )  # fmt: skip
    tower = _tower(config, data, reader, model.hidden)
    # What the decoder inherits from the outer config is no key of its own.
    own = set(text) if isinstance(text, Mapping) else set()
    prefix = "text_config." if nested else ""
    used = {prefix + key if key in own else key for key in model.keys_used}
    ignored = {prefix + key for key in model.keys_ignored if not nested or key in own}
    vision_used, vision_ignored = tower[1:]
    ignored -= {"vision_config"}
    ignored |= vision_ignored | (set(config.keys_ignored) - used if nested else set())
    return model.model_copy(
        update={
            "family": outer,
            "vision": tower[0],
            "keys_used": tuple(sorted(used | set(config.keys_used) | vision_used)),
            "keys_ignored": tuple(sorted(ignored)),
            "notes": (*model.notes, *config.notes),
        }
    )


def _tower(
    config: Config, data: Mapping[str, Any], reader: str, hidden: int
) -> tuple[VisionSpec | None, set[str], set[str]]:
    """The tower of ``vision_config`` (``null``: none; absent: the class's own), and its keys."""
    absent = "vision_config" not in data
    if data.get("vision_config") is None and (not absent or config.family in OPTIONAL_TOWER):
        return None, set(), set()
    given = data.get("vision_config", {})
    if not isinstance(given, Mapping):
        raise config.error("vision_config must be a mapping of keys to values, or null")
    if absent:
        config.notes.append(
            "vision_config is absent: the tower has the default sizes of its config class"
        )
    part = Config(
        given, family=f"{config.family} (vision tower)", name=config.name, source=config.source,
        where=f"{config.where} (vision_config)",
    )  # fmt: skip
    for key in ("model_type", "architectures"):
        part.get(key)
    tower: VisionSpec = _function("towers", reader)(part, hidden)
    config.notes += (*part.notes, *part.slips)
    return (
        tower,
        {f"vision_config.{key}" for key in part.keys_used},
        {f"vision_config.{key}" for key in part.keys_ignored},
    )


def _string(data: Mapping[str, Any], key: str, default: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) and value else default


def _towers(data: Mapping[str, Any]) -> bool:
    return any(data.get(key) for key in ("vision_config", "audio_config", "vision_tower"))


def _decoder_part(data: Mapping[str, Any], text: Mapping[str, Any]) -> Mapping[str, Any]:
    inherited = {key: data[key] for key in ("tie_word_embeddings",) if key in data}
    return {**inherited, **text}


def _family(data: Mapping[str, Any]) -> Family | None:
    model_type = data.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    names = data.get("architectures")
    if model_type is None and isinstance(names, list):
        for family in FAMILIES.values():
            if family.architecture in names:
                return family
    return None
