"""Load devices, links, nodes, stacks and clusters by catalogue name, alias, or file.

A reference is a catalogue name, an alias, or a path to a YAML or JSON file (it holds a ``/`` or
ends in ``.yaml``, ``.yml`` or ``.json``). Documents refer to each other by the same rules: a node's
``device``, ``scale_up`` and ``scale_out`` are references or mappings, relative to the document, and
a mapping may start from a catalogue entry with ``extends``. Where a number with provenance belongs,
``"50 GB/s"`` may stand; its kind is then ``assumed`` and its source the document.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from hardware_profiles.borrowing import DEFAULT_LENDER, EARNED, SILICON, lend, lend_link
from hardware_profiles.cluster_documents import ClusterRequest, split_short_form
from hardware_profiles.documents import (
    MAX_BYTES,
    DocumentError,
    decode,
    did_you_mean,
    parse_document,
    read_document,
    validate,
)
from hardware_profiles.schema import (
    DIMENSIONS,
    POSITIVE,
    ClusterSpec,
    DeviceSpec,
    LinkSpec,
    NodeGroup,
    NodeSpec,
    Sourced,
    StackSpec,
)
from hardware_profiles.units import UnitError, dimension

Kind = Literal["device", "link", "node", "stack", "cluster"]

_M = TypeVar("_M", bound=BaseModel)
_FOLDERS: dict[str, str] = {
    "device": "devices",
    "link": "links",
    "node": "nodes",
    "stack": "stacks",
    "cluster": "clusters",
}
_REFERENCES: dict[type[BaseModel], dict[str, tuple[Kind, type[BaseModel]]]] = {
    NodeSpec: {
        "device": ("device", DeviceSpec),
        "scale_up": ("link", LinkSpec),
        "scale_out": ("link", LinkSpec),
    }
}
_EXAMPLES: dict[type[BaseModel], tuple[Kind, str]] = {
    DeviceSpec: ("device", "h100-sxm-80gb"),
    LinkSpec: ("link", "infiniband-ndr"),
    NodeSpec: ("node", "dgx-h100"),
    StackSpec: ("stack", "megatron-core"),
}
"""An entry to start from, by type of document."""
_NODE_KEYS = NodeSpec.model_fields.keys() - {"name", "title", "aliases", "source"} | {"extends"}
_CLUSTER_KEYS = ClusterRequest.model_fields.keys() - {"name"}
_SPOKEN = {
    "B/s": "bytes per second (GB/s, Gb/s)", "B": "bytes (GB, GiB)", "s": "seconds (us)",
    "FLOP/s": "FLOP per second (TFLOP/s)", "W": "watts (W)", "USD/h": "USD per hour (USD/h)",
}  # fmt: skip
_QUANTITY = re.compile(r"^\s*([-+]?[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*(\S*)\s*$")


def load_device(ref: str) -> DeviceSpec:
    """The device that ``ref`` names; raises :class:`DocumentError`."""
    return _load("device", DeviceSpec, ref, Path())


def load_link(ref: str) -> LinkSpec:
    """The link that ``ref`` names; raises :class:`DocumentError`."""
    return _load("link", LinkSpec, ref, Path())


def load_node(ref: str) -> NodeSpec:
    """The node type that ``ref`` names; raises :class:`DocumentError`."""
    return _load("node", NodeSpec, ref, Path())


def load_stack(ref: str) -> StackSpec:
    """The software stack that ``ref`` names; raises :class:`DocumentError`."""
    return _load("stack", StackSpec, ref, Path())


def load_cluster(ref: str, *, stdin: str | None = None) -> ClusterSpec:
    """The cluster that ``ref`` names; raises :class:`DocumentError`.

    ``ref`` is ``NODE_TYPE:NODES`` (``dgx-h100:128``), a catalogue name, a node type alone (one node
    of it), a file, or ``-`` for a document on standard input (``stdin``, or else the process's).
    """
    if ref == "-":
        where = "standard input"
        text = stdin if stdin is not None else _standard_input(where)
        return _cluster(parse_document(text, where=where), where=where, folder=Path())
    if ref in catalog_names("cluster"):
        return _shipped_cluster(ref)
    if (_is_path(ref) and ":" not in ref) or Path(ref).is_file():
        path = Path(ref)
        return _cluster(read_document(path), where=ref, folder=path.parent)
    if ":" in ref:
        node, nodes = split_short_form(ref)
        return _single(ref, _load("node", NodeSpec, node, Path()), nodes)
    if _catalog_path("node", ref) is not None:
        return _single(f"{ref}:1", load_node(ref), 1)
    known = [*catalog_names("cluster"), *catalog_names("node")]
    advice = did_you_mean(ref, known) or "a cluster is NODE_TYPE:NODES, e.g. dgx-h100:16, or a file"
    raise DocumentError(f"unknown cluster {ref!r}", hint=advice)


@lru_cache(maxsize=len(_FOLDERS))
def _catalog(kind: Kind) -> dict[str, Path]:
    folder = Path(__file__).parent / _FOLDERS[kind]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def catalog_names(kind: Kind) -> list[str]:
    """Names that ship for ``kind``, sorted, without aliases."""
    return list(_catalog(kind))


@lru_cache(maxsize=len(_FOLDERS))
def catalog_aliases(kind: Kind) -> dict[str, str]:
    """Alias to name, of what ships for ``kind``."""
    aliases: dict[str, str] = {}
    for name, path in _catalog(kind).items():
        document = read_document(path)
        if isinstance(document, Mapping):
            aliases |= {str(alias): name for alias in document.get("aliases", ())}
    return aliases


def _catalog_path(kind: Kind, ref: str) -> Path | None:
    """The file of a name or alias, written as vendors do too: ``ND H100 v5``, ``Standard_ND96``."""
    catalog = _catalog(kind)
    ref = "-".join(ref.lower().replace("_", " ").split())
    if ref in catalog:
        return catalog[ref]
    name = catalog_aliases(kind).get(ref)
    return catalog[name] if name is not None else None


def _is_path(ref: str) -> bool:
    return "/" in ref or ref.endswith((".yaml", ".yml", ".json"))


def _load(kind: Kind, model: type[_M], ref: str, folder: Path, chain: tuple[Path, ...] = ()) -> _M:
    """What ``ref`` names; ``chain`` are the files that lead to it by ``extends``."""
    path = folder / ref
    if _is_path(ref) or ((kind_path := _catalog_path(kind, ref)) is None and path.is_file()):
        here = (*chain, path.resolve())
        if path.resolve() in chain:
            round_trip = " -> ".join(file.name for file in here)
            raise DocumentError(f"{path}: extends goes round in circles: {round_trip}")
        return _build(model, read_document(path), where=str(path), folder=path.parent, chain=here)
    if kind_path is None:
        known = [*catalog_names(kind), *catalog_aliases(kind)]
        hint = did_you_mean(ref, known) or f"`planner catalog` lists the {_FOLDERS[kind]}"
        raise DocumentError(f"unknown {kind} {ref!r}", hint=hint)
    shipped: _M = _shipped(model, kind_path)
    return shipped


@lru_cache(maxsize=256)
def _shipped(model: type[_M], path: Path) -> _M:
    where = f"{path.parent.name}/{path.name}"
    return _build(model, read_document(path), where=where, folder=path.parent)


@lru_cache(maxsize=64)
def _shipped_cluster(name: str) -> ClusterSpec:
    path = _catalog("cluster")[name]
    return _cluster(read_document(path), where=f"clusters/{path.name}", folder=path.parent)


def _build(
    model: type[_M], data: object, *, where: str, folder: Path, chain: tuple[Path, ...] = ()
) -> _M:
    if isinstance(data, Mapping):
        data = _expand(model, data, where=where, folder=folder, chain=chain)
    try:
        spec = validate(model, data, where=where, also=("extends",))
    except DocumentError as error:
        example = _EXAMPLES.get(model)
        if example is None or error.hint is not None or " is missing" not in error.message:
            raise
        hint = (
            f"start from one that ships ('extends: {example[1]}'), or see how one is written: "
            f"planner catalog {' '.join(example)}"
        )
        raise DocumentError(error.message, hint=hint) from None
    for place, number in _numbers(spec, ""):
        _check_number(number, f"{where}: {place}", place.split("."))
    return spec


def _expand(
    model: type[BaseModel],
    data: Mapping[Any, Any],
    *,
    where: str,
    folder: Path,
    chain: tuple[Path, ...],
) -> dict[str, Any]:
    """``data`` with ``extends``, references and written quantities replaced by what they mean."""
    fields = {str(key): value for key, value in data.items()}
    kinds = {DeviceSpec: "device", LinkSpec: "link", NodeSpec: "node", StackSpec: "stack"}
    if "extends" in fields:
        parent = fields.pop("extends")
        if not isinstance(parent, str) or model not in kinds:
            raise DocumentError(f"{where}: extends: must be a catalogue name, got {parent!r}")
        kind: Any = kinds[model]
        base = _load(kind, model, parent, folder, chain)
        fields = _inherit(base, fields, where=where)
    elif (
        model is DeviceSpec
        and "kernels" not in fields
        and isinstance(peaks := fields.get("peak_flops"), Mapping)
    ):
        fields["kernels"] = lend(load_device(DEFAULT_LENDER), peaks)
    if "title" in model.model_fields and "name" in fields:
        fields.setdefault("title", fields["name"])
    for name, (kind, inner) in _REFERENCES.get(model, {}).items():
        value = fields.get(name)
        if isinstance(value, str):
            try:
                fields[name] = _load(kind, inner, value, folder)
            except DocumentError as error:
                raise DocumentError(f"{where}: {name}: {error.message}", hint=error.hint) from None
        elif isinstance(value, Mapping):
            fields[name] = _build(inner, value, where=f"{where}: {name}", folder=folder)
    for name, field in model.model_fields.items():
        if field.annotation in (Sourced, Sourced | None) and isinstance(
            fields.get(name), (str, int, float)
        ):
            fields[name] = _quantity(fields[name], where=where, name=name)
        elif field.annotation == dict[str, Sourced] and isinstance(fields.get(name), Mapping):
            fields[name] = _quantities(fields[name], where=where, name=name)
    return fields


def _inherit(base: BaseModel, fields: dict[str, Any], *, where: str) -> dict[str, Any]:
    """``fields`` over those of ``base``; maps of numbers merge key by key, null removes one.

    Names, aliases and list prices are not inherited. A device of other silicon than its parent
    keeps the parent's kernel efficiencies as borrowed ones (``hardware_profiles.borrowing``).
    """
    inherited = {name: getattr(base, name) for name in type(base).model_fields}
    reset = {"name": f"{inherited['name']}-custom", "aliases": (), "price_per_hour": None}
    merged = {**inherited, **{key: value for key, value in reset.items() if key in inherited}}
    for name, value in fields.items():
        parent = inherited.get(name)
        if isinstance(value, Mapping) and isinstance(parent, Mapping) and _is_numbers(parent):
            own = _quantities(value, where=where, name=name)
            value = {key: v for key, v in {**parent, **own}.items() if v is not None}
        merged[name] = value
    if isinstance(base, DeviceSpec) and SILICON & fields.keys():
        for name in EARNED:
            if name not in fields:
                merged[name] = DeviceSpec.model_fields[name].get_default(call_default_factory=True)
        if "kernels" not in fields:
            merged["kernels"] = lend(base, merged["peak_flops"])
    elif isinstance(base, DeviceSpec) and "price_per_hour" not in fields:
        merged["price_per_hour"] = base.price_per_hour
    if isinstance(base, LinkSpec) and "bandwidth" in fields:
        merged |= _lent(base, fields, where=where)
    return merged


def _lent(base: LinkSpec, fields: dict[str, Any], *, where: str) -> dict[str, Any]:
    """What a link with a bandwidth of its own takes from ``base``, beside what it states itself."""
    written = fields["bandwidth"]
    if isinstance(written, Mapping):
        bandwidth = validate(Sourced, written, where=f"{where}: bandwidth")
    else:
        bandwidth = _quantity(written, where=where, name="bandwidth")
    try:
        rate = bandwidth.si
    except UnitError as error:
        raise DocumentError(f"{where}: bandwidth: {error}") from None
    return {k: v for k, v in lend_link(base, rate).items() if k not in fields}


def _is_numbers(values: Mapping[str, Any]) -> bool:
    return bool(values) and all(isinstance(value, Sourced) for value in values.values())


def _quantities(values: Mapping[Any, Any], *, where: str, name: str) -> dict[str, Any]:
    """``values`` with numbers written as text replaced by numbers with provenance."""
    return {
        str(key): _quantity(value, where=where, name=f"{name}.{key}")
        if isinstance(value, (str, int, float))
        else value
        for key, value in values.items()
    }


def _quantity(value: str | float, *, where: str, name: str) -> Sourced:
    match = _QUANTITY.match(str(value))
    if match is None:
        raise DocumentError(
            f"{where}: {name}: cannot read {value!r} as a number with a unit",
            hint='write it as "50 GB/s", or as {value, unit, kind, source}',
        )
    number, unit = match.groups()
    return validate(
        Sourced,
        {
            "value": float(number.replace("_", "")),
            "unit": unit,
            "kind": "assumed",
            "source": where,
        },
        where=f"{where}: {name}",
    )


def _check_number(number: Sourced, place: str, names: list[str]) -> None:
    """Raise :class:`DocumentError` unless it is finite, not negative, and of its field's unit."""
    try:
        good, measures = math.isfinite(number.si) and number.si >= 0, dimension(number.unit)
    except UnitError as error:
        raise DocumentError(f"{place}: {error}") from None
    if not good:
        raise DocumentError(f"{place}: must be finite and >= 0, got {number.value!r}")
    if number.si == 0 and POSITIVE.intersection(names):
        raise DocumentError(f"{place}: must be more than 0")
    wanted = next((DIMENSIONS[name] for name in reversed(names) if name in DIMENSIONS), measures)
    if measures != wanted:
        written = f"{number.value:g} {number.unit}".strip()
        needs = f"a number of {_SPOKEN[wanted]}" if wanted else "a plain number"
        raise DocumentError(f"{place}: must be {needs}, got {written!r}")


def _numbers(value: object, place: str) -> Iterator[tuple[str, Sourced]]:
    if isinstance(value, Sourced):
        yield place, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _numbers(getattr(value, name), f"{place}.{name}" if place else name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}")


def _standard_input(where: str) -> str:
    return decode(sys.stdin.buffer.read(MAX_BYTES + 1), where=where)


def _single(name: str, node: NodeSpec, nodes: int) -> ClusterSpec:
    return ClusterSpec(name=name, groups=(NodeGroup(node=node, count=nodes),))


def _cluster(data: object, *, where: str, folder: Path) -> ClusterSpec:
    if isinstance(data, Mapping) and _NODE_KEYS & data.keys() and not _CLUSTER_KEYS & data.keys():
        single = _build(NodeSpec, data, where=where, folder=folder)
        return _single(f"{single.name}:1", single, 1)
    request = validate(ClusterRequest, data, where=where, also=("extends",))
    groups: list[NodeGroup] = []
    for member in request.members():
        if isinstance(member.node, str):
            try:
                node = _load("node", NodeSpec, member.node, folder)
            except DocumentError as error:
                raise DocumentError(f"{where}: node: {error.message}", hint=error.hint) from None
        else:
            mapping = {"name": "custom", **member.node}
            if "extends" in mapping and "name" not in member.node:
                del mapping["name"]
            node = _build(NodeSpec, mapping, where=f"{where}: node", folder=folder)
        groups.append(NodeGroup(node=node, count=member.count))
    name = request.name or "+".join(f"{group.node.name}:{group.count}" for group in groups)
    return validate(
        ClusterSpec,
        {
            "name": name,
            "groups": tuple(groups),
            "tiers": request.network_tiers(),
            "link_matrix": request.link_matrix,
        },
        where=where,
    )
