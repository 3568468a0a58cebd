"""Pipeline stages and recompute as Megatron-Core flags."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from cost_models.recompute import group_of, in_parts
from hardware_profiles.stack_words import OFFLOAD

if TYPE_CHECKING:
    from planner.exports.launch import Flag
    from planner.plan import Chunk, Layout, Stage


def pipeline_flags(layout: Layout, *, mtp_layers: int) -> tuple[list[Flag], list[str]]:
    """How layers lie on stages, and what has no flag.

    Equal chunks are the default split (``--num-layers-per-virtual-pipeline-stage`` with virtual
    stages); unequal ones are spelled with ``--pipeline-model-parallel-layout``. Multi-token
    prediction is placed by Megatron-Core, before the loss on the last stage.
    """
    if layout.pp == 1:
        return [], (["virtual stages without a pipeline"] if layout.vpp > 1 else [])
    split = _split_flags(layout, mtp_layers=mtp_layers)
    if layout.round_size in (0, layout.pp):
        return split, []
    group = "--microbatch-group-size-per-virtual-pipeline-stage"
    return [*split, (group, str(layout.round_size))], []


def _split_flags(layout: Layout, *, mtp_layers: int) -> list[Flag]:
    sizes = {_size(chunk) for stage in layout.stages for chunk in stage.chunks}
    if len(sizes) == 1:
        size = next(iter(sizes))
        return [("--num-layers-per-virtual-pipeline-stage", str(size))] if layout.vpp > 1 else []
    text = pipeline_layout(layout.stages, mtp_layers=mtp_layers)
    return [("--pipeline-model-parallel-layout", text)]


def pipeline_layout(stages: tuple[Stage, ...], *, mtp_layers: int) -> str:
    """The layout string: ``E`` embedding, ``t`` layer, ``m`` MTP, ``L`` loss, ``|`` between stages.

    All ranks of the first virtual stage come first, then all of the second; ``x*n`` and
    ``(...)*n`` repeat (megatron/core/transformer/pipeline_parallel_layer_layout.py).
    """
    depth = len(stages[0].chunks)
    chunks = [stage.chunks[virtual] for virtual in range(depth) for stage in stages]
    words = [_chunk_text(chunk, mtp_layers) for chunk in chunks]
    parts = []
    for text, group in groupby(words[:-1]):
        times = sum(1 for _ in group)
        parts.append(f"({text}|)*{times}," if times > 2 else f"{text}|" * times)
    return "".join(parts) + words[-1]


def recompute_flags(layout: Layout, *, predicts: bool = False) -> tuple[list[Flag], list[str]]:
    """Recompute as one granularity and one number of layers for every virtual stage.

    Full recompute of ``n`` layers of each chunk is ``--recompute-method block``; of every layer it
    is ``uniform``. Counts that no common ``n`` gives have no flag.

    ``predicts``: whether the model has prediction modules. From 0.14 on ``uniform`` runs these
    again too, and only one layer at a time (core/transformer/multi_token_prediction.py,
    _checkpointed_forward); the plan keeps what they hold, as ``block`` does in every version.
    """
    modes = {item.mode for stage in layout.stages for item in stage.recompute}
    if not modes:
        return [], []
    if len(modes) > 1:
        return [], [f"different recomputation on different stages ({', '.join(sorted(modes))})"]
    counts = [sum(item.layers for item in stage.recompute) for stage in layout.stages]
    held = [[_size(chunk) for chunk in stage.chunks] for stage in layout.stages]
    whole = counts == [sum(sizes) for sizes in held]
    mode = next(iter(modes))
    parts = [("--distribute-saved-activations",)] if in_parts(mode) else []
    if mode.startswith(f"{OFFLOAD}:"):
        return [("--cpu-offloading-num-layers", mode.partition(":")[2])], []
    if group_of(mode) > 1 and predicts:
        return [], [f"recompute {mode} beside prediction modules"]
    if group_of(mode) > 1:
        return [*_full("uniform", group_of(mode)), *parts], []
    if mode != "full" and not parts:
        if not whole:
            return [], ["selective recompute of some layers"]
        modules = ("core_attn",) if mode == "selective" else tuple(mode.split("+"))
        return [("--recompute-granularity", "selective"), ("--recompute-modules", *modules)], []
    if whole and not predicts:
        return [*_full("uniform", 1), *parts], []
    deepest = max(size for sizes in held for size in sizes)
    for per_chunk in range(1, deepest + 1):
        if counts == [sum(min(per_chunk, size) for size in sizes) for sizes in held]:
            return [*_full("block", per_chunk), *parts], []
    return [], [f"recompute that differs between stages ({_runs(counts)} layers per stage)"]


def _full(method: str, layers: int) -> list[Flag]:
    return [
        ("--recompute-granularity", "full"),
        ("--recompute-method", method),
        ("--recompute-num-layers", str(layers)),
    ]


def _size(chunk: Chunk) -> int:
    return chunk.layers[1] - chunk.layers[0]


def _chunk_text(chunk: Chunk, mtp_layers: int) -> str:
    text = "E" if chunk.has_embedding else ""
    layers = _size(chunk)
    text += "t" * layers if layers < 3 else f"t*{layers}"
    if chunk.has_head:
        text += "m" * mtp_layers + "L"
    return text


def _runs(counts: list[int]) -> str:
    shown = [
        f"{count}" if (times := sum(1 for _ in group)) == 1 else f"{times} x {count}"
        for count, group in groupby(counts)
    ]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
