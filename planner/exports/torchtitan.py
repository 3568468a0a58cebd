"""A plan as command-line flags of torchtitan: its layout and batch.

The names are those of torchtitan 0.3.0 (``config/configs.py``, parsed by ``config/manager.py``).
The model is a ``--module`` and a ``--config`` of torchtitan's own, which no flag describes. Stages
are always spelled out (``module_fqns_per_model_part``); an order of work of one's own is a file.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from planner.errors import InputError, UnsupportedError
from planner.exports.launch import Launch
from planner.models.kinds import model_of
from planner.models.spec import ModelSpec, MoeSpec
from planner.specs import JobSpec

if TYPE_CHECKING:
    from planner.exports.launch import Flag
    from planner.plan import Layout, Plan

TARGET = "torchtitan"
ORDER_FILE = "schedule.csv"

_COMPILED: tuple[Flag, ...] = (("--compile.enable",),)
_STACKS: dict[str, tuple[Flag, ...]] = {
    TARGET: (),
    "torchtitan-compile": _COMPILED,
    "torchtitan-async-tp": (*_COMPILED, ("--compile.enable-async-tensor-parallel",)),
}
"""Stacks that are this software, with the flags that make them."""
_PARAMETERS = {"bf16": "bfloat16", "fp32": "float32"}
_SCHEDULES = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}  # fmt: skip


def export(plan: Plan) -> Launch:
    """Flags, files and notes for ``plan``.

    Raises :class:`InputError` for a plan made for another stack, and :class:`UnsupportedError`
    when a part of it has no flag.
    """
    if plan.target.stack not in _STACKS:
        raise InputError(
            f"the plan is for {plan.target.stack}, not for {TARGET}",
            hint=f"planner plan ... --stack {' or '.join(_STACKS)}",
        )
    model = model_of(plan.inputs.model.document, where="inputs.model")
    if not isinstance(model, ModelSpec):
        raise UnsupportedError(f"{model.name} is not a decoder: {TARGET} has no model for it")
    job = JobSpec.model_validate(plan.inputs.job.document)
    layout = plan.layout
    experts = any(isinstance(b.feed_forward, MoeSpec) for b in model.blocks.values())
    problems = list(chain(_job_problems(job), _layout_problems(layout, has_experts=experts)))
    if problems:
        raise UnsupportedError("no torchtitan flag for: " + "; ".join(problems))
    given = layout.pp > 1 and layout.schedule not in _SCHEDULES
    return Launch(
        target=TARGET,
        devices=layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp * layout.pp,
        flags=(
            *_degree_flags(layout, has_experts=experts),
            *_pipeline_flags(layout),
            *_batch_flags(layout, job),
            ("--training.mixed-precision-param", _PARAMETERS[job.precision]),
            # No pipeline runs under them, and prices have every launch.
            ("--training.disable-cuda-graphs",),
            *_STACKS[plan.target.stack],
            # A subcommand of its parser: whatever follows would be its own.
            (f"activation-checkpoint:{_recompute(layout)}",),
        ),
        files={ORDER_FILE: "\n".join(job.schedule_actions) + "\n"} if given else {},
        notes=(
            f"--module and --config name {model.name} in torchtitan, with its loss "
            f"({job.loss}) and optimizer ({job.optimizer})",
        ),
    )


def _degree_flags(layout: Layout, *, has_experts: bool) -> list[Flag]:
    names = {
        "data-parallel-replicate-degree": layout.dp_replicate,
        "data-parallel-shard-degree": layout.dp_shard,
        "tensor-parallel-degree": layout.tp,
        "context-parallel-degree": layout.cp,
        "pipeline-parallel-degree": layout.pp,
    }
    if has_experts:
        names["expert-parallel-degree"] = layout.ep
    flags: list[Flag] = [(f"--parallelism.{name}", str(v)) for name, v in names.items()]
    if layout.zero_stage:
        kept = "always" if layout.zero_stage == 3 else "never"
        flags.append(("--parallelism.fsdp-reshard-after-forward", kept))
    if layout.tp > 1 and not layout.sequence_parallel:
        flags.append(("--parallelism.no-enable-sequence-parallel",))
    if layout.parameter_offload:
        flags.append(("--training.enable-cpu-offload",))
    return list(flags)


def _pipeline_flags(layout: Layout) -> list[Flag]:
    if layout.pp == 1:
        return []
    flags: list[Flag] = [("--parallelism.pipeline-parallel-schedule", _schedule(layout))]
    if layout.schedule not in _SCHEDULES:
        flags.append(("--parallelism.pipeline-parallel-schedule-csv", ORDER_FILE))
    chunks = sorted(
        (chunk for stage in layout.stages for chunk in stage.chunks),
        key=lambda chunk: (*chunk.layers, not chunk.has_embedding, chunk.has_head),
    )
    parts = []
    for chunk in chunks:
        names = ["tok_embeddings"] if chunk.has_embedding else []
        names += [f"layers.{index}" for index in range(*chunk.layers)]
        names += ["norm", "lm_head"] if chunk.has_head else []
        parts.append(",".join(names))
    return [*flags, ("--parallelism.module-fqns-per-model-part", *parts)]


def _schedule(layout: Layout) -> str:
    """The schedule's class; of an order of one's own, one that puts stages where it has them."""
    if layout.schedule in _SCHEDULES:
        return _SCHEDULES[layout.schedule]
    if layout.schedule.startswith("given_v"):
        return "ZBVZeroBubble"
    return "Interleaved1F1B" if layout.vpp > 1 else "1F1B"


def _batch_flags(layout: Layout, job: JobSpec) -> list[Flag]:
    """A pipeline's microbatches are one local batch; without one they are accumulated."""
    ranks = layout.dp_replicate * layout.dp_shard
    samples = layout.microbatch_size * layout.num_microbatches
    flags: list[Flag] = [
        ("--training.seq-len", str(job.sequence_length)),
        ("--training.global-batch-size", str(samples * ranks)),
    ]
    if layout.pp == 1:
        return [*flags, ("--training.local-batch-size", str(layout.microbatch_size))]
    size = ("--parallelism.pipeline-parallel-microbatch-size", str(layout.microbatch_size))
    return [*flags, ("--training.local-batch-size", str(samples)), size]


def _recompute(layout: Layout) -> str:
    modes = {part.mode for stage in layout.stages for part in stage.recompute}
    return next(iter(modes), "none")


def _job_problems(job: JobSpec) -> list[str]:
    problems = []
    if job.precision not in _PARAMETERS:
        problems.append(f"{job.precision} products (a converter in the model's --config)")
    if job.finetune is not None:
        problems.append("training of a part of the model")
    return problems


def _layout_problems(layout: Layout, *, has_experts: bool) -> list[str]:
    problems = []
    if layout.cp > 1 and layout.cp_kind != "all_gather":
        problems.append(f"{layout.cp_kind} context parallelism")
    if has_experts and layout.etp != (layout.tp if layout.ep == 1 else 1):
        problems.append(f"experts over etp {layout.etp} beside ep {layout.ep} and tp {layout.tp}")
    if _recompute(layout) not in ("none", "full", "selective"):
        problems.append(f"recomputation of {_recompute(layout)}")
    return problems
