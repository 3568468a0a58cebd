"""Layouts, stages and changes in the few words of a table cell."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from cost_models.rounds import usual_round

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from planner.plan import Layout, Stage, StagePrediction, Term

_ALWAYS = ("tp", "pp", "dp_shard")
_DEGREES = ("tp", "cp", "pp", "vpp", "dp_replicate", "dp_shard", "ep", "etp")


def degrees(layout: Layout) -> str:
    """``tp 8 · pp 16 · dp_shard 128``: what exceeds 1, and the three that are always said."""
    parts = []
    for name in _DEGREES:
        value = getattr(layout, name)
        if value == 1 and name not in _ALWAYS:
            continue
        text = f"{name} {value}"
        if name == "tp" and layout.sequence_parallel:
            text += " + sp"
        if name == "cp" and value > 1:
            inner = f", {layout.cp_inner} x {value // layout.cp_inner}"
            text += f" ({layout.cp_kind}{inner if layout.cp_kind.startswith('a2a_') else ''})"
        parts.append(text)
    return " · ".join(parts)


def schedule(layout: Layout) -> str:
    """Schedule, microbatches and sharding in a phrase."""
    parts: list[str] = [layout.schedule] if layout.pp > 1 else []
    if layout.round_size > layout.pp:
        parts[0] += f" in rounds of {layout.round_size}"
    if layout.layers_outside:
        parts.append(f"{layout.layers_outside} layers outside the pipeline")
    plural = "" if layout.num_microbatches == 1 else "es"
    parts.append(
        f"{layout.num_microbatches:,} microbatch{plural} of {layout.microbatch_size} per step"
    )
    parts.append(sharding(layout))
    if layout.optimizer_offload:
        parts.append("optimizer offloaded")
    if layout.parameter_offload:
        parts.append("weights offloaded")
    if any(stage.activation_offload_layers for stage in layout.stages):
        parts.append("layer inputs on the host")
    return " · ".join(parts)


def sharding(layout: Layout) -> str:
    """What ZeRO shards, e.g. ``ZeRO 1 (optimizer state)``."""
    kinds = {
        0: "ZeRO 0 (nothing sharded)",
        1: "ZeRO 1 (optimizer state sharded)",
        2: "ZeRO 2 (optimizer state, gradients sharded)",
        3: "ZeRO 3 (optimizer state, gradients, weights sharded)",
    }
    return kinds[layout.zero_stage]


def recompute(layout: Layout) -> str:
    """Recompute over all stages: ``none``, or how many layers in which mode."""
    totals: dict[str, int] = {}
    for stage in layout.stages:
        for item in stage.recompute:
            totals[item.mode] = totals.get(item.mode, 0) + item.layers
    if not totals:
        return "no recompute"
    layers = sum(chunk.layers[1] - chunk.layers[0] for s in layout.stages for chunk in s.chunks)
    return "recompute " + ", ".join(
        f"{mode} {'all' if count == layers else f'{count} of {layers}'} layers"
        for mode, count in sorted(totals.items())
    )


def stage_recompute(stage: Stage) -> str:
    """Recompute of one stage: ``full 2``, ``all`` where one mode covers every layer, or ``-``."""
    totals: dict[str, int] = {}
    for item in stage.recompute:
        totals[item.mode] = totals.get(item.mode, 0) + item.layers
    layers = sum(chunk.layers[1] - chunk.layers[0] for chunk in stage.chunks)
    if list(totals.values()) == [layers]:
        return "all"
    return ", ".join(f"{mode} {count}" for mode, count in sorted(totals.items())) or "-"


def stage_shape(stage: Stage) -> tuple[Any, ...]:
    """What must be equal for two stages to share a row of a table."""
    chunks = tuple(
        (chunk.layers[1] - chunk.layers[0], chunk.has_embedding, chunk.has_head)
        for chunk in stage.chunks
    )
    return chunks, stage.recompute, stage.activation_offload_layers


def equal_runs(keys: Sequence[object]) -> list[tuple[int, int]]:
    """``[first, last_exclusive]`` of each run of equal neighbours in ``keys``."""
    runs, start = [], 0
    for _, group in groupby(keys):
        length = sum(1 for _ in group)
        runs.append((start, start + length))
        start += length
    return runs


def span(first: int, last_exclusive: int) -> str:
    """``3`` or ``3-7`` for a half-open range."""
    return f"{first}" if last_exclusive - first == 1 else f"{first}-{last_exclusive - 1}"


def changes(base: Layout, other: Layout) -> str:
    """How ``other`` differs from ``base``: ``vpp 2 -> 1, zero_stage 0 -> 1``."""
    names = (*_DEGREES, "cp_kind", "cp_inner", "sequence_parallel", "microbatch_size", "zero_stage",
             "reshard_after_forward", "schedule", "round_size", "layers_outside",
             "optimizer_offload")  # fmt: skip
    parts = [
        f"{name} {_plain(getattr(base, name))} -> {_plain(getattr(other, name))}"
        for name in names
        if getattr(other, name) != getattr(base, name)
        and not (name == "round_size" and _follows(base) and _follows(other))
    ]
    if recompute(base) != recompute(other):
        parts.append(recompute(other))
    if not parts and base.stages != other.stages:
        parts.append("other layers per stage")
    return ", ".join(parts) or "same degrees"


def _follows(layout: Layout) -> bool:
    """Whether rounds are what the schedule has where nobody says their size."""
    return layout.round_size in (0, layout.pp, usual_round(layout.pp, layout.num_microbatches))


def seconds(value: float) -> str:
    """Seconds to three digits, trailing zeros kept so that a column lines up: ``18.0 s``."""
    for suffix, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            scaled = value / scale
            text = f"{scaled:,.0f}" if abs(scaled) >= 999.5 else f"{scaled:#.3g}"
            return f"{text.rstrip('.')} {suffix}"
    return f"{value * 1e9:.0f} ns" if value else "0 s"


def label(name: str) -> str:
    """A term's name as words: ``optimizer_and_gather`` reads ``optimizer and gather``."""
    return name.replace("_", " ")


def rate(value: float) -> str:
    """A number to three digits or more, never in powers of ten: ``12,840``, ``28.4``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def extent(values: Sequence[float], show: Callable[[float], str]) -> str:
    """``show`` of the values: once where all read the same, else from the least to the most."""
    low, high = show(min(values)), show(max(values))
    if low == high:
        return low
    number, _, unit = low.rpartition(" ")
    return f"{number if high.endswith(' ' + unit) else low}-{high}"


def fullest(stages: Sequence[StagePrediction]) -> int:
    """Index of the stage with the highest peak."""
    return max(range(len(stages)), key=lambda rank: (stages[rank].peak_bytes, -rank))


def shares(terms: Sequence[Term], total: float) -> list[tuple[Term, float, float]]:
    """Terms with their value and share of ``total``, the largest first, zeros left out."""
    rows = []
    for term in terms:
        value = float(term.seconds if term.seconds is not None else term.bytes or 0)
        if value:
            rows.append((term, value, value / total if total else 0.0))
    return sorted(rows, key=lambda row: -row[1])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
