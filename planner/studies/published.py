"""A published run as a request and a layout: its dimensions as a model, its degrees as they stand.

A run need not be in the search space of its stack: whatever the cost model can price is priced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cost_models.leaf import Completion
from hardware_profiles.loader import load_stack
from hardware_profiles.stack_words import PARTITIONED
from planner.hosting import cannot_offload
from planner.layouts import completion_of
from planner.layouts import layout_of as rebuilt
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    LayerRun,
    Mixer,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.plan import Layout
from planner.request import Request
from planner.specs import FineTuneSpec, JobSpec
from planner.studies.machines import MachineColumns, cluster_of, machine_columns
from planner.studies.policy import Reading, pattern, precision_of, table
from planner.studies.runs import SkippedError

FFN_MULTIPLE = 256
"""What an MLP width of 8/3 x hidden is rounded up to (InternLM, LLaMA)."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the columns say of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    gated: bool
    vocab: int
    tied: bool
    positions: int
    bias: bool
    dropout: bool
    latent: bool
    experts: int = 0
    top_k: int = 0
    moe_ffn_hidden: int = 0
    shared_experts: int = 0
    moe_layers: int = 0
    mtp: int = 0
    routing_groups: int = 1
    routing_group_limit: int = 1


def request_of(reading: Reading) -> Request:
    """The run's model, cluster and job. Raises :class:`SkippedError` with the reason."""
    run = reading.run
    for column in ("gpus", "seq", "layers", "hidden", "gbs"):
        run.required(column)
    machine = machine_columns(run, reading.text("inter_link"))
    cluster = cluster_of(machine)
    precision = precision_of(reading.text("precision"))
    device = cluster.groups[0].node.device
    if precision not in device.peak_flops:
        raise SkippedError(f"{device.name} has no {precision} arithmetic")
    dims = dimensions_of(reading, tp=reading.size("tp"))
    return _request(
        dims, machine, reading.stack, run.required("seq"), run.required("gbs"), precision,
        _offload(reading), _adapters(reading), _changes(reading),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _request(
    dims: Dimensions,
    machine: MachineColumns,
    stack: str,
    sequence: int,
    batch: int,
    precision: str,
    offload: frozenset[str],
    adapters: FineTuneSpec | None,
    changes: tuple[tuple[str, Any], ...],
) -> Request:
    software = load_stack(stack)
    if changes:
        software = software.model_copy(update=dict(changes))
    job = JobSpec.model_validate(
        {
            "sequence_length": sequence, "global_batch": batch, "precision": precision,
            "global_batch_tokens": sequence * batch, "stack": stack, "mtp": dims.mtp > 0,
            "memory_margin": 0.0, "optimizer": software.optimizers[0],
            "optimizer_offload": "optimizer_cpu" in offload,
            "parameter_offload": "param_cpu" in offload, "finetune": adapters,
        }
    )  # fmt: skip
    request = Request(model_of(dims), cluster_of(machine), job, software)
    reason = cannot_offload(request)
    if reason is not None:
        raise SkippedError(reason)
    return request


def _changes(reading: Reading) -> tuple[tuple[str, Any], ...]:
    """What a policy says of the stack that ran, where it is not as the stack ships."""
    names = ("vocab_divisor", "spare_layers", "deferred_head_gradients", "overlap_dp_parameters")
    return tuple((name, reading.assume[name]) for name in names if name in reading.assume)


def _adapters(reading: Reading) -> FineTuneSpec | None:
    """The adapters that the run trains in place of the model, or None. Raises
    :class:`SkippedError` for those that are not priced."""
    kind = reading.text("adapters")
    if not kind:
        return None
    if kind != "lora":
        raise SkippedError(f"adapters not modelled: {kind}")
    targets = tuple(reading.assume.get("lora_targets", ()))
    return FineTuneSpec(lora_rank=reading.size("lora_rank"), lora_targets=targets)


def _offload(reading: Reading) -> frozenset[str]:
    """What the run keeps on the host. Raises :class:`SkippedError` for what is not priced."""
    text = reading.text("offload")
    parts = frozenset() if text in ("", "none", "0") else frozenset(text.split("+"))
    if not parts <= {"optimizer_cpu", "param_cpu"}:
        raise SkippedError(f"offload not modelled: {text}")
    return parts


def dimensions_of(reading: Reading, *, tp: int) -> Dimensions:
    """The dimensions of the run's model. Raises :class:`SkippedError` where one is missing."""
    run = reading.run
    hidden, layers = run.required("hidden"), run.required("layers")
    heads = _heads(reading, hidden, tp)
    head_dim = run.size("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise SkippedError("no head_dim, and heads do not divide hidden")
        head_dim = hidden // heads
    gated = reading.flag("gated_mlp")
    ffn = run.size("ffn_hidden")
    if ffn is None:
        ffn = -(-hidden * 8 // 3 // FFN_MULTIPLE) * FFN_MULTIPLE if gated else 4 * hidden
        reading.filled["ffn_hidden"] = ffn
    if not run.text("tied_embeddings") and "tied_embeddings" not in reading.fill:
        reading.fill = {**reading.fill, "tied_embeddings": 0 if gated else 1}
    positions = reading.assume.get("positions")
    learned = positions == "absolute" or (positions == "learned" and not gated)
    experts = run.size("experts") or 0
    moe: dict[str, int] = {}
    if experts:
        moe = {
            "experts": experts,
            "top_k": run.required("experts_active"),
            "moe_ffn_hidden": run.size("moe_ffn_hidden") or ffn,
            "shared_experts": int(run.number("shared_experts") or 0),
            "moe_layers": run.size("moe_layers") or layers,
            "mtp": int(reading.assume.get("mtp", 0)),
            "routing_groups": int(reading.assume.get("routing_groups", 1)),
            "routing_group_limit": int(reading.assume.get("routing_group_limit", 1)),
        }
    latent = run.text("mla") in ("1", "1.0", "true", "True")
    if latent:
        reading.filled["latent_attention"] = "DeepSeek-V2/V3"
    return Dimensions(
        layers=layers, hidden=hidden, heads=heads, kv_heads=run.size("kv_heads") or heads,
        head_dim=head_dim, ffn_hidden=ffn, gated=gated, vocab=reading.size("vocab"),
        tied=reading.flag("tied_embeddings"),
        positions=run.required("seq") if learned else 0,
        bias=bool(reading.assume.get("bias", True)) and not gated,
        dropout=bool(reading.assume.get("dropout", False)), latent=latent, **moe,
    )  # fmt: skip


def _heads(reading: Reading, hidden: int, tp: int) -> int:
    """Stated heads, or as many of about the policy's ``head_dim`` as tp can split."""
    stated = reading.run.size("heads")
    if stated is not None:
        return stated
    wanted = reading.fill.get("head_dim")
    counts = [n for n in range(tp, hidden + 1, tp) if hidden % n == 0]
    if wanted is None or not counts:
        raise SkippedError("no heads")
    heads = min(counts, key=lambda n: (abs(hidden / n - float(wanted)), n))
    reading.filled["heads"] = heads
    return heads


@lru_cache(maxsize=1024)
def model_of(dims: Dimensions) -> ModelSpec:
    """A decoder of these dimensions. Raises :class:`SkippedError` for impossible ones."""
    if dims.heads % dims.kv_heads:
        raise SkippedError(f"{dims.heads} heads are not a multiple of {dims.kv_heads} KV heads")
    if dims.top_k > dims.experts or dims.moe_layers > dims.layers:
        raise SkippedError("more active experts than experts, or more MoE layers than layers")
    activation = "silu" if dims.gated else "gelu"
    mlp = MlpSpec(
        intermediate=dims.ffn_hidden, gated=dims.gated, bias=dims.bias, activation=activation
    )
    blocks = {}
    runs = []
    if dims.layers > dims.moe_layers:
        blocks["dense"] = BlockSpec(mixer=_mixer(dims), feed_forward=mlp)
        runs.append(LayerRun(block="dense", count=dims.layers - dims.moe_layers))
    if dims.moe_layers:
        moe = MoeSpec(
            experts=dims.experts, top_k=dims.top_k, intermediate=dims.moe_ffn_hidden,
            gated=dims.gated, activation=activation,
            shared_intermediate=dims.shared_experts * dims.moe_ffn_hidden,
            routing_groups=dims.routing_groups, routing_group_limit=dims.routing_group_limit,
        )  # fmt: skip
        blocks["moe"] = BlockSpec(mixer=_mixer(dims), feed_forward=moe)
        runs.append(LayerRun(block="moe", count=dims.moe_layers))
    return ModelSpec(
        name="run", family="published", source="columns of the file", hidden=dims.hidden,
        vocab=dims.vocab, tied_embeddings=dims.tied, norm="rms" if dims.gated else "layer",
        norm_bias=not dims.gated, position_embeddings=dims.positions, dropout=dims.dropout,
        blocks=blocks, layers=tuple(runs),
        mtp=(LayerRun(block="moe", count=dims.mtp),) if dims.mtp else (),
    )  # fmt: skip


def _mixer(dims: Dimensions) -> Mixer:
    if dims.latent:
        shape = {k: v for k, v in table("frameworks")["latent_attention"].items() if k != "source"}
        return LatentAttentionSpec(heads=dims.heads, **shape)
    return AttentionSpec(
        heads=dims.heads, kv_heads=dims.kv_heads, head_dim=dims.head_dim, qkv_bias=dims.bias,
        out_bias=dims.bias,
    )  # fmt: skip


def layout_of(reading: Reading, request: Request) -> tuple[dict[str, Any], list[str]]:
    """The run's degrees as a partial layout for ``planner.layouts.complete_layout``, and warnings.

    ``dp`` is what the devices leave; where a page says otherwise, that is a warning. Raises
    :class:`SkippedError` with the reason.
    """
    run, warnings = reading.run, []
    tp, pp, cp = reading.size("tp"), reading.size("pp"), reading.size("cp")
    world = request.devices
    if world % (tp * pp * cp):
        raise SkippedError(f"tp {tp} x pp {pp} x cp {cp} does not divide {world} devices")
    dp = world // (tp * pp * cp)
    stated = run.size("dp")
    if stated is not None and stated != dp:
        warnings.append(f"dp {stated} is stated, {world} / (tp {tp} x pp {pp} x cp {cp}) = {dp}")
    raw: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp}
    if cp > 1:
        raw["cp_kind"] = _cp_kind(reading)
    raw["sequence_parallel"] = tp > 1 and reading.flag("sp")
    if request.model.blocks.get("moe"):
        raw["ep"] = reading.size("ep")
        raw["etp"] = tp if reading.text("etp") == "tp" else reading.size("etp")
    raw |= _sharding(reading, dp, pp)
    raw["microbatch_size"] = _microbatch(reading, request.global_batch, dp)
    raw["schedule"], raw["vpp"] = _schedule(reading, pp, warnings)
    raw |= _recompute(reading, request, raw["vpp"] * pp)
    return raw, warnings


def _cp_kind(reading: Reading) -> str:
    text = reading.text("cp_kind")
    for name, words in (("a2a", ("a2a", "ulysses")), ("all_gather", ("gather",))):
        if any(word in text for word in words):
            return name
    return "p2p"


def _sharding(reading: Reading, dp: int, pp: int) -> dict[str, Any]:
    if dp == 1 and not reading.run.text("zero_stage"):
        return {"zero_stage": 0}
    text = reading.text("zero_stage")
    stated = reading.run.size("shard_group")
    if text in ("1", "2", "3") and stated is not None and stated < dp and dp % stated == 0:
        return {"zero_stage": int(text), "dp_shard": stated, "dp_replicate": dp // stated}
    if text in ("0", "1", "2", "3"):
        return {"zero_stage": int(text)}
    if text == "fsdp":
        return {"zero_stage": 3 if pp == 1 else 2}
    group = reading.assume.get("shard_group", reading.run.size("gpus_per_node") or 8)
    if text == "hsdp" and dp % min(dp, group) == 0:
        shard = min(dp, group)
        return {"zero_stage": 3 if pp == 1 else 2, "dp_shard": shard, "dp_replicate": dp // shard}
    raise SkippedError(f"sharding not understood: {text}" if text else "no zero_stage")


def _microbatch(reading: Reading, batch: int, dp: int) -> int:
    if reading.text("mbs") == "batch":
        if batch % dp:
            raise SkippedError(f"global batch {batch} is not a multiple of dp {dp}")
        return batch // dp
    if reading.text("mbs") == "batch/stages":
        return max(1, batch // (dp * reading.size("pp") * reading.size("vpp")))
    return reading.size("mbs")


def _schedule(reading: Reading, pp: int, warnings: list[str]) -> tuple[str, int]:
    text = reading.text("schedule")
    if pp == 1:
        return "1f1b", 1
    if pattern(table("frameworks")["schedules_not_modelled"]["match"]).search(text):
        raise SkippedError(f"schedule not modelled: {text}")
    for entry in table("frameworks")["schedules_by_text"]["names"]:
        if pattern(entry["match"]).search(text):
            return entry["schedule"], 1
    vpp = reading.size("vpp")
    if "gpipe" in text:
        return "gpipe", 1
    if vpp > 1:
        return "interleaved", vpp
    if "interleaved" in text:
        warnings.append("interleaving is stated with one chunk per rank: priced as 1F1B")
    return "1f1b", 1


def stages_of(reading: Reading, layout: Layout, request: Request) -> Layout:
    """The layout with its layers where the run's schedule puts them: as they are, or moved so that
    the stage with the most FLOPs has the fewest."""
    moved = pattern(table("frameworks")["balanced_stages"]["match"])
    if layout.pp == 1 or layout.vpp > 1 or not moved.search(reading.text("schedule")):
        return layout
    model, length = request.model, request.sequence
    assert isinstance(model, ModelSpec), "published runs are read as decoders"
    layers, width = model.layer_count, model.hidden
    # Forward FLOPs per token over 2: a layer's matrices and scores, the projection to logits.
    layer, logits = 12 * width**2 + 2 * length * width, width * model.vocab
    last = min(
        range(layers - layout.pp + 2),
        key=lambda n: max(-(-(layers - n) // (layout.pp - 1)) * layer, n * layer + logits),
    )
    base, more = divmod(layers - last, layout.pp - 1)
    # The embedding is on the first stage: spare layers go behind it (peaks of the artifact's tables
    # are those of its baseline, whose first stage holds layers / pp).
    sizes = [base + (rank >= layout.pp - 1 - more) for rank in range(layout.pp - 1)] + [last]
    bounds = tuple(sum(sizes[:rank]) for rank in range(layout.pp + 1))
    completion = Completion(bounds, completion_of(layout, request).recompute)
    return rebuilt(layout.model_dump(), completion, request)


def _recompute(reading: Reading, request: Request, stages: int) -> dict[str, Any]:
    text = reading.text("recompute")
    if text in ("none", "selective", "full", PARTITIONED):
        return {"recompute": text}
    if text == "half":
        per_stage = -(-request.model.layer_count // stages)
        return {"recompute": "full", "recompute_layers": -(-per_stage // 2)}
    if set(text.split("+")) <= {*request.stack.recompute_modules}:
        return {"recompute": text}
    raise SkippedError(f"recomputation not modelled: {text}")
