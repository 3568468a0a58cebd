"""Pieces that several tables share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hardware_profiles.units import format_bytes
from planner.report import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from planner.plan import HostPrediction, Prediction, Term

BAR_WIDTH = 24


class Beside:
    """Two blocks side by side where the terminal is wide, one below the other where it is not."""

    WIDE = 132

    def __init__(self, left: RenderableType, right: RenderableType) -> None:
        self._left = left
        self._right = right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < self.WIDE:
            yield Group(self._left, Text(), self._right)
            return
        table = Table.grid(padding=(0, 4, 0, 0), expand=True)
        table.add_column(ratio=1)
        table.add_column(ratio=1)
        table.add_row(self._left, self._right)
        yield table


def section(title: str) -> Text:
    """A heading."""
    return Text(title, style="bold")


def grid(*columns: tuple[str, str], indent: int = 2) -> Table:
    """A table without rules; ``columns`` are (header, justify) pairs, headers may be empty."""
    headed = any(header for header, _ in columns)
    table = Table(
        box=None, show_header=headed, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column("", width=max(0, indent - 2))
    for header, justify in columns:
        table.add_column(header, justify=_justify(justify), overflow="fold")
    return table


def ruled(*columns: tuple[str, str]) -> Table:
    """A table with a rule below its header."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header, justify in columns:
        table.add_column(header, justify=_justify(justify), overflow="fold")
    return table


def bar(share: float, *, width: int = BAR_WIDTH) -> Text:
    """A bar of ``share`` (0 to 1) of ``width`` characters."""
    cells = round(share * width)
    if share > 0 and cells == 0:
        cells = 1
    return Text("█" * cells, style="cyan") + Text("░" * (width - cells), style="dim")


def headline(prediction: Prediction, position: str = "token") -> Table:
    """Step time with its band, throughput, MFU and memory: what is asked first.

    ``position`` is what a sample is made of."""
    low, high = prediction.step_time_band_s
    table = grid(("", "left"), ("", "left"), ("", "left"))
    table.add_row(
        "",
        Text("step time", style="dim"),
        Text(words.seconds(prediction.step_time_s), style="bold green"),
        f"between {words.seconds(low)} and {words.seconds(high)}: {prediction.band_source}",
    )
    table.add_row(
        "",
        Text("throughput", style="dim"),
        Text(words.rate(prediction.tokens_per_s_per_device), style="bold"),
        f"{position}s/s per device",
    )
    table.add_row(
        "",
        Text("MFU", style="dim"),
        Text(f"{prediction.mfu * 100:.1f} %", style="bold"),
        prediction.mfu_convention,
    )
    table.add_row("", Text("memory", style="dim"), *memory_words(prediction))
    if prediction.host is not None:
        table.add_row("", Text("host", style="dim"), *host_words(prediction.host))
    if prediction.price_usd_per_step is not None:
        table.add_row(
            "",
            Text("price", style="dim"),
            Text(f"${words.rate(prediction.price_usd_per_step)}", style="bold"),
            f"per step, at {prediction.price_source}",
        )
    return table


def memory_words(prediction: Prediction) -> tuple[Text, str]:
    """Peak and what it is of, in red where it does not fit."""
    peak, capacity = prediction.max_peak_bytes, prediction.capacity_bytes
    over = peak - prediction.usable_bytes
    style = "bold red" if over > 0 else "bold green"
    share = f"{peak / capacity * 100:.0f} %" if capacity else "?"
    verdict = f", {format_bytes(over)} too much" if over > 0 else ""
    return (
        Text(format_bytes(peak), style=style),
        f"of {format_bytes(capacity)} ({share}) on the fullest device{verdict}: "
        f"{format_bytes(prediction.allocated_bytes)} in tensors, "
        f"{format_bytes(prediction.reserved_bytes)} with the allocator's cache; "
        f"a margin of {prediction.memory_margin * 100:.1f} % is kept free",
    )


def host_words(host: HostPrediction) -> tuple[Text, str]:
    """What the fullest node keeps for its devices, in red where it has no room, and what crosses
    the links."""
    kept, capacity = host.bytes_per_node, host.capacity_bytes_per_node
    over = 0 if capacity is None else kept - capacity
    where = "memory" if host.place == "memory" else "NVMe drives"
    words = "" if capacity is None else f"of {format_bytes(capacity)} "
    words += f"in the {where} of the fullest node"
    words += f", {format_bytes(over)} too much" if over > 0 else ""
    words += f"; {format_bytes(host.link_bytes_per_node_per_step)} a step over its links"
    return Text(format_bytes(kept), style="bold red" if over > 0 else "bold"), words


def breakdown(terms: Sequence[Term], total: float) -> Table:
    """Each term with its share and a bar, the largest first."""
    table = grid(("", "left"), ("", "right"), ("", "right"), ("", "left"))
    for term, value, share in words.shares(terms, total):
        shown = words.seconds(value) if term.seconds is not None else format_bytes(value)
        table.add_row("", words.label(term.name), shown, f"{share * 100:.1f} %", bar(share))
    return table


def bullets(lines: Sequence[str], *, style: str = "") -> Table:
    """Lines with a dash before each, wrapped under themselves."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", width=2)
    table.add_column("", overflow="fold")
    for line in lines:
        table.add_row(" -", Text(line, style=style))
    return table


def _justify(name: str) -> Any:
    return name
