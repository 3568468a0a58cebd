"""What ships, and one entry of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from hardware_profiles.units import UnitError, format_bytes, format_count, to_si
from planner.report import parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

MOST_ITEMS = 12
"""Items of a list shown in an entry; the rest is counted."""

WIDEST_KEY = 36
"""Columns that a key of an entry takes unbroken."""


def catalog_table(listing: dict[str, list[dict[str, Any]]]) -> RenderableType:
    """Names, titles and aliases by kind; kinds without entries are left out."""
    blocks: list[RenderableType] = []
    for kind, entries in listing.items():
        if not entries:
            continue
        table = _model_list(entries) if kind == "model" else _plain_list(entries)
        blocks += [*([Text()] if blocks else []), parts.section(f"{kind}s ({len(entries)})"), table]
    return Group(*blocks)


def _plain_list(entries: list[dict[str, Any]]) -> RenderableType:
    table = parts.grid(("name", "left"), ("", "left"), ("also", "left"))
    table.columns[1].no_wrap = True
    for entry in entries:
        aliases = ", ".join(entry["aliases"])
        table.add_row("", entry["name"], entry["title"], Text(aliases, style="dim"))
    return table


def _model_list(entries: list[dict[str, Any]]) -> RenderableType:
    """Models with their size, and what is active of it where that is less."""
    table = parts.grid(
        ("name", "left"), ("family", "left"), ("parameters", "right"), ("active", "right"),
        ("layers", "left"), ("also", "left"),
    )  # fmt: skip
    table.columns[1].no_wrap = True
    for entry in entries:
        counts = entry["parameters"]
        active = format_count(counts["active"]) if counts["active"] < counts["total"] else ""
        table.add_row(
            "", entry["name"], entry["title"], format_count(counts["total"]), active,
            " ".join(entry["layers"]), Text(", ".join(entry["aliases"][:1]), style="dim"),
        )  # fmt: skip
    return table


def entry_table(kind: str, document: dict[str, Any]) -> RenderableType:
    """One entry: every field on a line, numbers with unit, kind and source."""
    body = dict(document)
    title = str(body.get("title") or body.get("name"))
    blocks: list[RenderableType] = [parts.section(f"{kind} {body.get('name', '')}")]
    if title != body.get("name"):
        blocks.append(Text(f"  {title}", style="dim"))
    counts = body.pop("parameters", None)
    if isinstance(counts, dict):
        text = " · ".join(f"{name} {format_count(value)}" for name, value in counts.items())
        blocks.append(Text(f"  parameters: {text}", style="bold"))
    for used in ("name", "title"):
        body.pop(used, None)
    prose = _prose(body)
    rows = list(_rows(body, ""))
    table = parts.grid(("", "left"), ("", "left"))
    # A key is looked up and copied, so it stays in one piece where the value still has room.
    table.columns[1].min_width = min(max((len(key) for key, _, _ in rows), default=0), WIDEST_KEY)
    for key, value, origin in rows:
        table.add_row("", key, Text.assemble(value, ("  " + origin if origin else "", "dim")))
    return Group(*blocks, table, *prose)


def _prose(body: dict[str, Any]) -> list[RenderableType]:
    """What ``body`` says in sentences, taken out of it: each under a heading of its own."""
    blocks: list[RenderableType] = []
    notes = body.pop("notes", None)
    headings = {
        "not_priced": "It also has, outside the space",
        "not_described": "Other jobs and kernels of it, which no stack here describes",
    }
    for key, heading in headings.items():
        lines = [f"{name}: {why}" for name, why in (body.pop(key, None) or {}).items()]
        if lines:
            blocks += [Text(), parts.section(heading), parts.bullets(lines)]
    if notes:
        lines = [notes] if isinstance(notes, str) else notes
        blocks += [Text(), parts.section("Notes"), parts.bullets(lines)]
    return blocks


def _rows(body: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, value in body.items():
        path = f"{prefix}{key}"
        if value in (None, [], {}, ""):
            continue
        if isinstance(value, dict) and {"value", "unit", "source"} <= value.keys():
            yield path, _quantity(value), f"{value['kind']}: {value['source']}"
        elif isinstance(value, dict):
            yield from _rows(value, f"{path}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value[:MOST_ITEMS]):
                yield from _rows(item, f"{path}[{index}].")
            if len(value) > MOST_ITEMS:
                yield path, f"... {len(value) - MOST_ITEMS} more", ""
        elif isinstance(value, list):
            shown = ", ".join(str(item) for item in value[:MOST_ITEMS])
            rest = f", ... {len(value) - MOST_ITEMS} more" if len(value) > MOST_ITEMS else ""
            yield path, shown + rest, ""
        else:
            yield path, str(value), ""


def _quantity(value: dict[str, Any]) -> str:
    text = f"{value['value']:,g} {value['unit']}".strip()
    if value["unit"] != "B":
        return text
    try:
        return f"{text} = {format_bytes(to_si(value['value'], value['unit']))}"
    except UnitError:
        return text
