"""Read YAML and JSON documents and check them against a schema, with errors a person can act on."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

MAX_BYTES = 8 * 1024 * 1024
"""Largest document read; a model, cluster or job is a few kilobytes."""

M = TypeVar("M", bound=BaseModel)
MAX_DEPTH = 64
"""Levels of nesting; no document that is read here needs a quarter of it."""
MAX_ALIASES = 16
"""YAML aliases; a few of them nested in each other stand for more than any memory holds."""
_BRACKETS = re.compile(r"[\[\]{}]")
_INDENT = re.compile(rf"^[ \-?:]{{{MAX_DEPTH // 4}}}", re.MULTILINE)
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_MAPPING = re.compile(r"must be a valid dictionary( or (an )?instance of \w+)?")
_FEW = re.compile(r"(?:Tuple|List|Dictionary) should have at least (\d+) item.*")
_LISTED = 3


class DocumentError(ValueError):
    """A document that cannot be read or does not say what it must; ``hint`` says how to fix it."""

    def __init__(self, message: str, *, hint: str | None = None, other_keys: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.other_keys = other_keys
        """Whether keys are unknown or missing: it is a document of another kind or version."""


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest of ``known`` in either case and those that ``name`` starts with
    (``ZBVZeroBubble``: ``zbv``), or lists them when few exist."""
    names = sorted(set(known))
    folded = {each.lower(): each for each in names}
    typed = name.lower()
    near = [folded[each] for each in difflib.get_close_matches(typed, folded, n=3, cutoff=0.6)]
    starts = [each for low, each in folded.items() if low and typed.startswith(low)]
    near = list(dict.fromkeys([*near, *starts]))
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    if 0 < len(names) <= 20:
        return "known: " + ", ".join(names)
    return None


class _Loader(yaml.CSafeLoader):
    """The C loader, except that a key written twice is an error rather than the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is written twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def decode(data: bytes, *, where: str) -> str:
    """``data`` as text; raises :class:`DocumentError` when it is too large or not UTF-8."""
    _check_size(len(data), where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{where}: not a text file (byte {error.start} is not UTF-8)",
            hint="give a YAML or JSON file",
        ) from None


def parse_document(text: str, *, where: str) -> object:
    """Parse JSON or YAML; ``where`` names the document in errors.

    Raises :class:`DocumentError` for text that is empty, larger than ``MAX_BYTES``, binary, or
    neither JSON nor YAML, with line and column where there is one.
    """
    _check_size(len(text), where)
    stripped = text.lstrip("\ufeff \t\r\n")
    if not stripped:
        raise DocumentError(f"{where}: empty", hint="give a YAML or JSON document")
    control = _CONTROL.search(text)
    if control is not None:
        raise DocumentError(
            f"{where}: not a text file (control character at position {control.start()})",
            hint="give a YAML or JSON document",
        )
    _refuse_nesting(text, where)
    try:
        if stripped[0] in "{[":
            try:
                return json.loads(stripped)
            except json.JSONDecodeError as error:
                if where.endswith(".json"):
                    raise DocumentError(
                        f"{where}: not valid JSON at line {error.lineno}, column {error.colno}: "
                        f"{error.msg}"
                    ) from None
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise DocumentError(f"{where}: not valid YAML{_at(error)}") from None
    except RecursionError:
        raise DocumentError(f"{where}: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{where}: {error}") from None


def _refuse_nesting(text: str, where: str) -> None:
    """Refuse what would exhaust the C stack or the memory of the parser, before it is parsed.

    Depth needs brackets or columns, and aliases need their two signs: a document without is not
    looked at twice. Any other is read as a stream of events, which is made without recursion, so
    that what stands in strings does not count; JSON is YAML here.
    """
    if not (_may_be_deep(text) or ("&" in text and "*" in text)):
        return
    depth = aliases = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
            if depth > MAX_DEPTH:
                raise DocumentError(f"{where}: nested more than {MAX_DEPTH} deep")
            if aliases > MAX_ALIASES:
                raise DocumentError(f"{where}: more than {MAX_ALIASES} YAML aliases")
    except (yaml.YAMLError, UnicodeError):
        return  # The parser itself will say what is wrong, and where.


def _may_be_deep(text: str) -> bool:
    """Whether brackets nest, or a line begins, deep enough for ``MAX_DEPTH`` levels together.

    A column holds at most two levels: a list may begin where the key that holds it does.
    """
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH // 2 or _INDENT.search(text) is not None


def read_document(path: Path) -> object:
    """Read and parse the file at ``path``; raises :class:`DocumentError`."""
    where = str(path)
    try:
        if path.is_dir():
            raise DocumentError(f"{where}: is a folder, not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DocumentError(f"{where}: cannot be read: {reason}") from None
    return parse_document(decode(data, where=where), where=where)


def validate(model: type[M], data: object, *, where: str, also: Collection[str] = ()) -> M:
    """``data`` as a ``model``; raises one :class:`DocumentError` that names field, value and rule.

    Up to three problems are listed. An unknown key gets a "did you mean" over the fields that the
    model has there and, at the top, over the keys ``also``, which are read before. True and false
    are no numbers, although Python takes them for 1 and 0.
    """
    if not isinstance(data, (Mapping, model)):
        raise DocumentError(
            f"{where}: expected a mapping with keys such as {_some(model)}, got {_show(data)}"
        )
    refuse_flags(model, data, where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        lines: list[str] = []
        hint: str | None = None
        for problem in problems:
            line, advice = _describe(model, data, problem, also)
            lines.append(line)
            hint = hint or advice
        if len(lines) == 1:
            message = f"{where}: {lines[0]}"
        else:
            shown = "".join(f"\n  {line}" for line in lines[:_LISTED])
            rest = len(lines) - _LISTED
            more = f"\n  and {rest} more" if rest > 0 else ""
            message = f"{where}: {len(lines)} problems{shown}{more}"
        keys = any(problem["type"] in ("extra_forbidden", "missing") for problem in problems)
        raise DocumentError(message, hint=hint, other_keys=keys) from None


def refuse_flags(model: type[BaseModel], data: object, where: str) -> None:
    """Raise :class:`DocumentError` where ``data`` holds true or false in place of a number."""
    found = next(_flags((model,), data, ""), None)
    if found is not None:
        path, value = found
        raise DocumentError(f"{where}: {path}: must not be true or false, got {value}")


def _flags(expected: tuple[object, ...], value: object, path: str) -> Iterator[tuple[str, bool]]:
    """Where ``value`` holds true or false and none of the ``expected`` types takes them."""
    if isinstance(value, bool):
        if not any(map(_takes_flags, expected)):
            yield path, value
    elif isinstance(value, Mapping):
        models = [e for e in expected if isinstance(e, type) and issubclass(e, BaseModel)]
        others = tuple(x for e in expected for x in get_args(e)[1:])
        for key, inner in value.items():
            fields = tuple(m.model_fields[key].annotation for m in models if key in m.model_fields)
            types = _alternatives(*fields, *others)
            if types:
                yield from _flags(types, inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        types = _alternatives(*(x for e in expected for x in get_args(e) if x is not Ellipsis))
        for index, inner in enumerate(value):
            yield from _flags(types, inner, f"{path}[{index}]")


def _alternatives(*annotations: object) -> tuple[object, ...]:
    """The members of unions, without their annotations."""
    result: list[object] = []
    for annotation in annotations:
        origin = get_origin(annotation)
        if origin in (Union, UnionType):
            result += _alternatives(*get_args(annotation))
        elif origin is Annotated:
            result += _alternatives(get_args(annotation)[0])
        else:
            result.append(annotation)
    return tuple(result)


def _takes_flags(annotation: object) -> bool:
    if get_origin(annotation) is Literal:
        return any(isinstance(choice, bool) for choice in get_args(annotation))
    return annotation in (bool, object, Any)


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise DocumentError(
            f"{where}: larger than {MAX_BYTES // 1024**2} MiB",
            hint="models, clusters and jobs are a few kilobytes: is this the right file?",
        )


def _at(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{place}: {problem}"


def _describe(
    model: type[BaseModel], data: object, problem: Mapping[str, Any], also: Collection[str]
) -> tuple[str, str | None]:
    kind, loc, value = problem["type"], tuple(problem["loc"]), problem.get("input")
    path = _path(data, loc, missing=kind == "missing")
    if kind == "extra_forbidden":
        known = _fields_at(model, loc[:-1]).union(also if len(loc) == 1 else ())
        parent = _path(data, loc[:-1], missing=False)
        place = f" in {parent}" if parent else ""
        return f"unknown key {str(loc[-1])!r}{place}", did_you_mean(str(loc[-1]), known)
    if kind == "missing":
        return f"{path} is missing", None
    context = problem.get("ctx", {})
    if kind == "union_tag_not_found":
        return f"{path}.{str(context['discriminator']).strip(chr(39))} is missing", None
    if kind == "union_tag_invalid":
        key, tag = str(context["discriminator"]).strip("'"), str(context["tag"])
        tags = re.findall(r"'([^']*)'", str(context["expected_tags"]))
        line = f"{path}.{key}: must be one of {', '.join(tags)}, got {tag!r}"
        return line, did_you_mean(tag, tags)
    message = str(context["error"]) if "error" in context else problem["msg"]
    rule = message.replace("Input should be", "must be").removeprefix("Value error, ")
    rule = _FEW.sub(r"must have at least \1 item", _MAPPING.sub("must be a mapping", rule))
    hint = None
    if kind == "value_error" and isinstance(value, (Mapping, list, tuple)):
        return (f"{path}: {rule}" if path else rule), hint
    if kind == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, re.findall(r"'([^']*)'", str(context.get("expected", ""))))
    return f"{path or 'document'}: {rule}, got {_show(value)}", hint


def _path(data: object, loc: Sequence[Any], *, missing: bool) -> str:
    """The user's path to ``loc``: union tags, which the document does not hold, are left out."""
    path, here = "", data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(part, int) and isinstance(here, (list, tuple)):
            path += f"[{part}]"
            here = here[part] if part < len(here) else None
        elif isinstance(here, Mapping) and part in here:
            path += f".{part}" if path else str(part)
            here = here[part]
        elif last and missing:
            path += f".{part}" if path else str(part)
    return path


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> set[str]:
    models = {model}
    for part in loc:
        inner = {
            found
            for candidate in models
            if part in candidate.model_fields
            for found in _models_in(candidate.model_fields[part].annotation)
        }
        tagged = {found for found in models if _tag_of(found) == part}
        models = inner or tagged or models
    return {name for found in models for name in found.model_fields}


def _tag_of(model: type[BaseModel]) -> object:
    kind = model.model_fields.get("kind")
    return kind.default if kind is not None else None


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _some(model: type[BaseModel]) -> str:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return ", ".join((required or list(model.model_fields))[:4])


def _show(value: object) -> str:
    text = repr(value)
    if isinstance(value, (Mapping, list, tuple)):
        kind = "a mapping" if isinstance(value, Mapping) else "a list"
        text = f"{kind} of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."
