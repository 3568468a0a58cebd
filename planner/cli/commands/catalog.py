"""``planner catalog``: what ships, and any of it as understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from planner.cli import options, output
from planner.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Kind(StrEnum):
    """What the catalogue holds."""

    MODEL = "model"
    CLUSTER = "cluster"
    NODE = "node"
    DEVICE = "device"
    LINK = "link"
    STACK = "stack"


@app.command()
def catalog(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help="model, cluster, node, device, link or stack; or check NAME."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One entry, or your own file.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", "-s", metavar="TEXT", help="Only names that contain this."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", metavar="TEXT", help="Only models whose family contains this."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="KIND", help="Only models with such layers: moe, mamba2."),
    ] = None,
    least: Annotated[
        str | None,
        typer.Option("--min-params", metavar="N", help="Only models of at least this size: 7B."),
    ] = None,
    most: Annotated[
        str | None,
        typer.Option("--max-params", metavar="N", help="Only models of at most this size: 70B."),
    ] = None,
    format_: options.OutputFormat = None,
) -> None:
    """List what ships, or show one entry, or your own file, as understood.

    A model is shown with its parameters: total, embedding, active per token, and those of
    multi-token-prediction modules, which are outside the total. Filters on family, layers and
    size concern models only, and narrow the list to them.

    'catalog check NAME' reads a profile of your own (or one that ships), says which numbers
    contradict each other (exit code 5), and which efficiencies were measured on that part,
    borrowed from a sibling, or assumed.
    """
    chosen = output.chosen(format_)
    if kind == "check":
        _check(reference, chosen)
        return
    if reference is not None:
        _show(_kind(kind or ""), reference, chosen)
        return
    chosen_kind = None if kind is None else _kind(kind)
    wanted = _filters(family, layers, least, most)
    if wanted and chosen_kind not in (None, Kind.MODEL):
        raise InputError(
            f"only models have a {', '.join(wanted)}, and the list asked for is of {kind}",
            hint="planner catalog model",
        )
    kinds = [Kind.MODEL] if wanted else list(Kind) if chosen_kind is None else [chosen_kind]
    listing = {item.value: _entries(item, search) for item in kinds}
    if wanted:
        listing[Kind.MODEL.value] = _filtered(listing[Kind.MODEL.value], wanted)
    if not any(listing.values()):
        asked = [*([f"contains {search!r}"] if search else []), *(w.words for w in wanted.values())]
        raise InputError(
            f"nothing in the catalogue {' and '.join(asked)}", hint="planner catalog lists it all"
        )
    if chosen is output.Format.JSON:
        body: Any = listing if len(kinds) > 1 else listing[kinds[0].value]
        output.write(json.dumps(body, indent=2) + "\n")
        return
    from planner.report.catalog import catalog_table

    output.render(lambda: catalog_table(listing))


def _check(reference: str | None, chosen: output.Format) -> None:
    from planner.errors import GateError
    from planner.studies.profile_check import check_profile

    if reference is None:
        raise InputError("check what?", hint="planner catalog check FILE")
    report = check_profile(reference)
    if chosen is output.Format.JSON:
        output.write(json.dumps(report.document(), indent=2) + "\n")
    else:
        from planner.report.profile_check import check_table

        output.render(lambda: check_table(report))
    if report.problems:
        count = len(report.problems)
        raise GateError(
            f"{reference}: {count} implausible number{'s' if count > 1 else ''}: "
            f"{report.problems[0]}"
        )


def _kind(text: str) -> Kind:
    from planner.errors import did_you_mean

    name = text.lower().removesuffix("s")
    if name not in list(Kind):
        raise InputError(
            f"no catalogue of {text!r}", hint=did_you_mean(name, [item.value for item in Kind])
        )
    return Kind(name)


def _entries(kind: Kind, search: str | None) -> list[dict[str, Any]]:
    if kind is Kind.MODEL:
        entries = _model_entries()
    else:
        from hardware_profiles.loader import Kind as Profile
        from hardware_profiles.loader import catalog_aliases, catalog_names

        profile = cast("Profile", kind.value)
        aliases = catalog_aliases(profile)
        entries = [
            {
                "name": name,
                "aliases": sorted(alias for alias, target in aliases.items() if target == name),
                "title": _title(kind, name),
            }
            for name in catalog_names(profile)
        ]
    if search is None:
        return entries
    needle = search.lower()
    return [
        entry
        for entry in entries
        if any(
            needle in text.lower() for text in (entry["name"], entry["title"], *entry["aliases"])
        )
    ]


def _model_entries() -> list[dict[str, Any]]:
    from planner.blocks.registry import model_kinds
    from planner.blocks.weights import parameters_of
    from planner.models.catalog import catalog_models
    from planner.models.reader import read_model

    entries = []
    for found in catalog_models():
        model = read_model(found.name)
        entries.append(
            {
                "name": found.name,
                "aliases": list(found.aliases),
                "title": found.family,
                "parameters": parameters_of(model),
                "layers": model_kinds(model),
                "source": found.source,
            }
        )
    return entries


@dataclass(frozen=True)
class _Filter:
    words: str
    keeps: Callable[[dict[str, Any]], bool]


def _filters(
    family: str | None, layers: str | None, least: str | None, most: str | None
) -> dict[str, _Filter]:
    """The filters that the user set, by what they look at."""
    wanted: dict[str, _Filter] = {}
    if family is not None:
        part = family.lower()
        wanted["family"] = _Filter(
            f"has a family with {family!r}", lambda entry: part in entry["title"].lower()
        )
    if layers is not None:
        wanted["kind of layer"] = _Filter(
            f"has {layers!r} layers", lambda entry: layers.lower() in entry["layers"]
        )
    for name, flag, text, sign in (
        ("least size", "--min-params", least, 1), ("largest size", "--max-params", most, -1),
    ):  # fmt: skip
        if text is not None:
            wanted[name] = _size_filter(flag, text, sign)
    return wanted


def _size_filter(flag: str, text: str, sign: int) -> _Filter:
    bound = options.count(flag, text, example=f"{flag} 7B")
    return _Filter(
        f"has {'at least' if sign > 0 else 'at most'} {text} parameters",
        lambda entry: sign * entry["parameters"]["total"] >= sign * bound,
    )


def _filtered(entries: list[dict[str, Any]], wanted: dict[str, _Filter]) -> list[dict[str, Any]]:
    return [e for e in entries if all(each.keeps(e) for each in wanted.values())]


def _title(kind: Kind, name: str) -> str:
    entry = _load(kind, name)
    if kind is Kind.CLUSTER:
        return f"{getattr(entry, 'devices', '?')} devices"
    return str(getattr(entry, "title", ""))


def _load(kind: Kind, reference: str) -> BaseModel:
    from hardware_profiles import loader

    load: dict[Kind, Any] = {
        Kind.CLUSTER: loader.load_cluster,
        Kind.NODE: loader.load_node,
        Kind.DEVICE: loader.load_device,
        Kind.LINK: loader.load_link,
        Kind.STACK: loader.load_stack,
    }
    entry: BaseModel = load[kind](reference)
    return entry


def _show(kind: Kind, reference: str, chosen: output.Format) -> None:
    if kind is Kind.MODEL:
        document = _model_document(reference)
    else:
        document = _load(kind, reference).model_dump(mode="json")
    if chosen is output.Format.JSON:
        output.write(json.dumps(document, indent=2) + "\n")
        return
    from planner.report.catalog import entry_table

    output.render(lambda: entry_table(kind.value, document))


def _model_document(reference: str) -> dict[str, Any]:
    from planner.blocks.weights import parameters_of
    from planner.cli.documents import read_stdin
    from planner.models.reader import read_model

    model = read_model(reference, stdin=read_stdin)
    return {**model.model_dump(mode="json"), "parameters": parameters_of(model)}
