"""A plan on one screen: what to run, where it sits, where the time goes, what is proved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cost_models.layout import V_SHAPED
from hardware_profiles.units import format_bytes, format_count
from planner.report import parts, words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planner.plan import Certificate, Chunk, Layout, Plan, Prediction, Target

MOST_STAGE_ROWS = 12
"""Rows for stages; more runs of unlike stages than this are cut, and said so."""


def plan_table(plan: Plan) -> RenderableType:
    """Everything that ``planner plan`` shows on a terminal."""
    blocks: list[RenderableType] = [
        _title(plan),
        parts.headline(plan.prediction, _position(plan)),
        Text(),
        parts.section("Layout"),
        layout_words(plan.layout),
        Text(),
        parts.section("Stages"),
        stages_table(plan.layout, plan.prediction),
        Text(),
        parts.Beside(time_block(plan.prediction), fullest_device(plan.prediction)),
        Text(),
    ]
    proof = Group(parts.section("Certificate"), certificate_words(plan.certificate, plan.target))
    if plan.alternatives:
        others = Group(parts.section("Alternatives"), alternatives_table(plan))
        blocks.append(parts.Beside(proof, others))
    else:
        blocks.append(proof)
    if plan.tie_break:
        blocks += [Text(), parts.bullets([plan.tie_break])]
    remarks = [*plan.warnings, *plan.prediction.assumptions]
    if plan.prediction.outside_measured_region:
        remarks.insert(0, "outside the region that measurements cover: the band is a guess there")
    if remarks:
        blocks += [
            Text(),
            parts.section("Warnings and assumptions"),
            parts.bullets(remarks, style="yellow"),
        ]
    return Group(*blocks)


def _title(plan: Plan) -> RenderableType:
    job = plan.inputs.job.document
    batch = job.get("global_batch")
    sequence = job.get("sequence_length")
    tokens = batch * sequence if isinstance(batch, int) and isinstance(sequence, int) else None
    facts = [f"{plan.target.stack} {plan.target.version}".strip()]
    if batch is not None and _position(plan) == "sample":
        facts.append(f"{batch:,} samples per step")
    elif batch is not None and tokens is not None:
        facts.append(f"{batch:,} x {sequence:,} = {format_count(tokens)} tokens per step")
    facts += [str(job[key]) for key in ("precision", "optimizer") if job.get(key)]
    share = job.get("optimizer_offload_share")
    if job.get("optimizer_offload") and isinstance(share, float) and share < 1:
        facts.append(f"{share:.1%} of the optimizer on the hosts")
    return Group(
        Text(f"{plan.inputs.model.name} on {plan.inputs.cluster.name}", style="bold"),
        Padding(Text(" · ".join(facts), style="dim"), (0, 0, 0, 2)),
        Text(),
    )


def _position(plan: Plan) -> str:
    """What a sample is made of: itself, in networks that are described per sample."""
    return "sample" if plan.inputs.model.document.get("per") == "sample" else "token"


def layout_words(layout: Layout) -> RenderableType:
    """Degrees, schedule and recompute, a line each."""
    devices = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp * layout.pp
    lines = [
        Text(words.degrees(layout), style="bold"),
        Text(words.schedule(layout)),
        Text(
            f"{words.recompute(layout)} · {devices:,} device{'s' if devices > 1 else ''}"
            f" · ranks {' < '.join(layout.rank_order)}"
        ),
    ]
    return Padding(Group(*lines), (0, 0, 0, 2))


def stages_table(layout: Layout, prediction: Prediction) -> RenderableType:
    """Layers, recompute, compute time, parameters and peak of each run of equal stages."""
    table = parts.grid(
        ("stage", "right"), ("devices", "left"), ("layers", "left"), ("recompute", "left"),
        ("compute", "right"), ("params", "right"), ("peak", "right"),
    )  # fmt: skip
    runs = words.equal_runs([words.stage_shape(stage) for stage in layout.stages])
    for first, last in runs[:MOST_STAGE_ROWS]:
        held = prediction.stages[first:last]
        table.add_row(
            "",
            words.span(first, last),
            _devices(layout, first, last),
            _layers(layout, first, last),
            words.stage_recompute(layout.stages[first]),
            words.extent([stage.compute_s for stage in held], words.seconds),
            words.extent([stage.parameters for stage in held], format_count),
            words.extent([stage.peak_bytes for stage in held], format_bytes),
        )
    remarks = []
    if layout.layers_outside:
        first, last = layout.stages[0].chunks[0].layers[0], layout.stages[-1].chunks[-1].layers[1]
        span = words.span(0, first) if first else words.span(last, last + layout.layers_outside)
        where = "ahead of" if first else "behind"
        remarks.append(f"layers outside the pipeline: {span}, {where} it, on all devices")
    if len(runs) > MOST_STAGE_ROWS:
        remarks.append(f"{layout.pp - runs[MOST_STAGE_ROWS][0]} more stages: see --format json")
    if layout.schedule in V_SHAPED:
        last = 2 * layout.pp - 1
        remarks.append(f"a V: rank r holds virtual stages r and {last} - r, so rank 0 has the head")
    return Group(table, *(Text(f"  {remark}", style="dim") for remark in remarks))


def _layers(layout: Layout, first: int, last: int) -> str:
    """``8 each (7-118)``, with what sits beside the layers."""
    stages = layout.stages[first:last]
    per_chunk = [chunk.layers[1] - chunk.layers[0] for chunk in stages[0].chunks]
    alone = last - first == 1 and len(per_chunk) == 2
    text = " + ".join(
        f"{end - start} x {per_chunk[start]}" if end - start > 1 else str(per_chunk[start])
        for start, end in words.equal_runs(per_chunk)
    )
    if alone:
        text = " + ".join(_held(chunk) for chunk in stages[0].chunks)
    text += " each" if last - first > 1 else ""
    low, high = stages[0].chunks[0].layers[0], stages[-1].chunks[0].layers[1]
    if len(per_chunk) == 1 and high > low:
        text += f" ({words.span(low, high)})"
    if any(chunk.has_embedding for chunk in stages[0].chunks):
        text = f"embed + {text}"
    if any(chunk.has_head for chunk in stages[-1].chunks):
        text += " + head"
    return text


def _held(chunk: Chunk) -> str:
    """``9 (5-13)``: how many layers, and which."""
    first, last = chunk.layers
    return f"{last - first} ({words.span(first, last)})" if last > first else "0"


def _devices(layout: Layout, first: int, last: int) -> str:
    """Device ranks of stages ``first`` to ``last - 1``, where they are consecutive."""
    held = [stage.devices for stage in layout.stages[first:last]]
    if held[0] is not None and held[-1] is not None:
        return words.span(held[0][0], held[-1][1])
    per_stage = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp
    if layout.rank_order and layout.rank_order[-1] == "pp":
        return words.span(first * per_stage, last * per_stage)
    return f"{per_stage:,} each" if last - first > 1 else f"{per_stage:,}"


def time_block(prediction: Prediction) -> RenderableType:
    """Where each millisecond of a step goes."""
    return Group(
        parts.section("Time of one step"),
        parts.breakdown(prediction.time, prediction.step_time_s),
    )


def fullest_device(prediction: Prediction) -> RenderableType:
    """Memory by category of the stage with the highest peak."""
    rank = words.fullest(prediction.stages)
    held = prediction.stages[rank]
    return Group(
        parts.section(f"Memory of one device of stage {rank}, the fullest"),
        parts.breakdown(held.memory, held.peak_bytes),
    )


def certificate_words(certificate: Certificate, target: Target) -> RenderableType:
    """The claim in a sentence, then what was looked at, why layouts fell out, and what the software
    can do beyond the space."""
    style = "green" if certificate.status == "optimal" else "yellow"
    lines: list[RenderableType] = [Text(certificate.statement, style=style)]
    counts = [f"{certificate.space_size:,} layouts"]
    removed = sum(certificate.removed.values())
    if removed:
        counts.append(f"{removed:,} removed for the reasons below")
    counts.append(f"{certificate.priced:,} priced")
    if certificate.pruned_by_bound:
        counts.append(f"{certificate.pruned_by_bound:,} of them pruned by bound")
    counts.append(f"{certificate.simulated_count:,} simulated")
    lines.append(Text(", ".join(counts)))
    if certificate.removed:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", justify="right", style="dim")
        table.add_column("", style="dim", overflow="fold")
        for reason, count in sorted(certificate.removed.items(), key=lambda item: -item[1]):
            table.add_row(f"{count:,}", reason)
        lines.append(Padding(table, (0, 0, 0, 2)))
    if target.not_priced:
        left_out = "; ".join(target.not_priced)
        lines.append(
            Text(f"{target.stack} {target.version} also has, outside this space: {left_out}")
        )
    return Padding(Group(*lines), (0, 0, 0, 2))


def alternatives_table(plan: Plan) -> RenderableType:
    """What each costs in time and memory, and how it differs."""
    table = parts.grid(
        ("step time", "right"), ("price", "right"), ("peak", "right"), ("change", "left")
    )
    best = plan.prediction.step_time_s
    for other in plan.alternatives:
        price = f"{(other.step_time_s / best - 1) * 100:+.1f} %" if best else ""
        table.add_row(
            "",
            words.seconds(other.step_time_s),
            price,
            Text(format_bytes(other.max_peak_bytes), style="" if other.fits else "red"),
            words.changes(plan.layout, other.layout),
        )
    return table
