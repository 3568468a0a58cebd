"""Any reference to a model as a :class:`ModelSpec`.

A reference is a catalogue name or alias, a file (a Hugging Face ``config.json``, or YAML or JSON in
our own schema), a folder that holds a ``config.json``, or ``-`` for standard input. A bare name is
looked up in the catalogue first; anything that looks like a path is a path first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hardware_profiles.documents import DocumentError, decode, parse_document, validate
from planner.errors import InputError, did_you_mean
from planner.models import catalog
from planner.models.kinds import Model
from planner.models.readers.config import MAX_LAYERS, MAX_SIZE
from planner.models.sequence import LayerSequenceSpec
from planner.models.spec import ModelSpec

MAX_BYTES = 1024 * 1024
"""Largest model document read; the largest published configs are some tens of kilobytes."""

FORMATS = ("megatron_gpt", "model", "huggingface", "layers")


def read_model(reference: str, *, stdin: Callable[[], str] | None = None) -> Model:
    """The model that ``reference`` names; ``stdin`` reads the text for ``-``.

    Raises :class:`InputError` for what cannot be found or read, and
    :class:`~planner.errors.UnknownModelError` for an architecture without a reader.
    """
    if not reference.strip():
        raise InputError("the model is empty", hint="give a catalogue name, a file, or - for stdin")
    if reference == "-":
        if stdin is None:
            raise InputError("model '-': there is no standard input to read here")
        return _from_text(stdin(), where="stdin", name="stdin")
    path_like = "/" in reference or "\\" in reference or reference.endswith(_SUFFIXES)
    path = _existing(reference)
    shipped = catalog.find(reference)
    if path is not None and (path_like or shipped is None):
        return _from_path(path)
    if shipped is not None:
        return _from_path(shipped, name=shipped.stem)
    raise _not_found(reference, path_like=path_like)


def model_from_document(
    data: object, *, where: str, name: str = "model", source: str | None = None
) -> Model:
    """A parsed document as a model: a Hugging Face config, ``megatron_gpt``, or our own schema."""
    if not isinstance(data, Mapping):
        shapes: dict[type, str] = {list: "a list", str: "text", int: "a number", float: "a number"}
        raise InputError(
            f"{where}: expected a mapping of keys to values, got "
            f"{shapes.get(type(data), 'something else')}",
            hint="give a config.json, or YAML with keys such as model_type and hidden_size",
        )
    source = source or f"given as {Path(where).name or where}"
    form = data.get("format")
    if form is None:
        form = "model" if "blocks" in data else "huggingface"
    if form == "megatron_gpt":
        from planner.models.readers.megatron_gpt import read_megatron_gpt

        return read_megatron_gpt(data, where=where, name=name, source=source)
    if form == "model":
        return _own_schema(data, where=where, name=name, source=source)
    if form == "layers":
        return _layer_sequence(data, where=where, name=name, source=source)
    if form == "huggingface":
        from planner.models.readers.registry import read_config

        return read_config(data, where=where, name=name, source=source)
    raise InputError(
        f"{where}: unknown format {str(form)[:60]!r}", hint=did_you_mean(str(form), list(FORMATS))
    )


_SUFFIXES = (".json", ".yaml", ".yml")


def _existing(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _from_path(path: Path, *, name: str | None = None) -> Model:
    where = str(path) if name is None else name
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(
                f"{where}: the folder has no config.json",
                hint="give a folder with a Hugging Face config.json, or the file itself",
            )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        _refuse_large(len(data), where)
        text = decode(data, where=where)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    except DocumentError as error:
        raise InputError(error.message, hint=error.hint) from None
    own_name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _from_text(text, where=where, name=name or own_name or "model")


def _from_text(text: str, *, where: str, name: str) -> Model:
    _refuse_large(len(text), where)
    try:
        data = parse_document(text, where=where)
    except DocumentError as error:
        raise InputError(error.message, hint=error.hint) from None
    return model_from_document(data, where=where, name=name)


def _refuse_large(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise InputError(
            f"{where}: larger than {MAX_BYTES // 1024**2} MiB",
            hint="a model's config is a few kilobytes: is this the right file?",
        )


def _own_schema(data: Mapping[str, Any], *, where: str, name: str, source: str) -> ModelSpec:
    document = {"name": name, "family": "custom", "source": source, **data}
    document.pop("format", None)
    try:
        model = validate(ModelSpec, document, where=where)
    except DocumentError as error:
        raise InputError(error.message, hint=error.hint) from None
    _refuse_oversize(model.model_dump(), where=where, path="")
    if model.layer_count > MAX_LAYERS:
        raise InputError(f"{where}: {model.layer_count:,} layers, and at most {MAX_LAYERS:,}")
    return model


def _layer_sequence(
    data: Mapping[str, Any], *, where: str, name: str, source: str
) -> LayerSequenceSpec:
    document = {"name": name, "source": source, **data}
    try:
        model = validate(LayerSequenceSpec, document, where=where)
    except DocumentError as error:
        raise InputError(error.message, hint=error.hint) from None
    _refuse_oversize(model.model_dump(), where=where, path="")
    return model


def _refuse_oversize(value: object, *, where: str, path: str) -> None:
    """Refuse numbers beyond any model, whose products would overflow 64 bits."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_oversize(inner, where=where, path=f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_oversize(inner, where=where, path=f"{path}[{index}]")
    elif isinstance(value, int) and value > MAX_SIZE:
        raise InputError(f"{where}: {path} must be at most {MAX_SIZE:,}")


def _not_found(reference: str, *, path_like: bool) -> InputError:
    shown = reference if len(reference) <= 80 else reference[:77] + "..."
    near = did_you_mean(reference.lower()[:80], catalog.known_names())
    if path_like:
        return InputError(
            f"{shown}: no such file or folder, and no catalogue model of that name",
            hint=near or "`planner catalog` lists the models that ship",
        )
    return InputError(
        f"no model named {shown!r} in the catalogue, and no such file",
        hint=near or "`planner catalog` lists the models that ship; a file or folder works too",
    )
