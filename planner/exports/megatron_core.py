"""A plan as command-line flags of Megatron-Core's training scripts (``pretrain_gpt.py``).

The names and rules of the flags are those of ``megatron/training/arguments.py`` and of
``TransformerConfig`` (megatron-core 0.13 and later; checked against 0.19.2). A plan that these
flags cannot say is refused, with everything that stands in the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import InputError, UnsupportedError
from planner.exports.launch import Launch
from planner.exports.megatron_model import model_flags
from planner.exports.megatron_stages import pipeline_flags, recompute_flags
from planner.layer_contexts import contexts_of_layers
from planner.models.kinds import model_of
from planner.models.spec import ModelSpec, MoeSpec
from planner.specs import JobSpec

if TYPE_CHECKING:
    from hardware_profiles.schema import StackSpec
    from planner.exports.launch import Flag
    from planner.plan import Layout, Plan

TARGET = "megatron-core"
STACKS = (TARGET, "megatron-core-deepep", "megatron-core-mxfp8", "megatron-core-offload")
"""Stacks that are this software, with other flags."""

# The flag's help says allgather, transformer_config.py and what reads it all_gather (Transformer
# Engine, pytorch/attention, attn_forward_func_with_cp).
_CP_KINDS = {"p2p": "p2p", "all_gather": "all_gather", "a2a": "a2a", "a2a_p2p": "a2a+p2p"}
_PRECISION: dict[str, tuple[Flag, ...]] = {
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp32": (),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid")),
}
_RECIPE: dict[str, tuple[Flag, ...]] = {
    "megatron-core-mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
}
"""The precision's flags of stacks that are one recipe."""
_OPTIMIZER = {"adamw": "adam", "sgd": "sgd"}


def export(plan: Plan) -> Launch:
    """Flags, environment and notes for ``plan``.

    Raises :class:`InputError` for a plan made for another stack, and :class:`UnsupportedError`
    when a part of it has no flag.
    """
    from hardware_profiles.loader import load_stack

    software, reference = _software(plan)
    model = model_of(plan.inputs.model.document, where="inputs.model")
    if not isinstance(model, ModelSpec):
        raise UnsupportedError(f"{model.name} is not a decoder: {TARGET} has no model for it")
    job = JobSpec.model_validate(plan.inputs.job.document)
    layout, stack = plan.layout, load_stack(reference)
    mtp_layers = sum(run.count for run in model.mtp) if job.mtp else 0

    shape, problems, notes = model_flags(model, job, stack, mtp_layers=mtp_layers)
    stages, more = pipeline_flags(layout, mtp_layers=mtp_layers)
    recompute, other = recompute_flags(layout, predicts=mtp_layers > 0)
    problems = [*problems, *more, *other, *_layout_problems(layout)]
    if job.precision not in _PRECISION:
        problems.append(f"{job.precision} products")
    if problems:
        raise UnsupportedError("no Megatron-Core flag for: " + "; ".join(problems))
    flags = (
        *shape,
        *_degree_flags(layout, has_experts=_has_experts(model)),
        *_context_flags(layout, job, model),
        *stages,
        *recompute,
        *_batch_flags(layout, job),
        *_data_parallel_flags(layout, stack),
        *_offload_flags(stack),
        *_deferral_flags(layout, stack),
        *_RECIPE.get(software, _PRECISION[job.precision]),
        ("--optimizer", _OPTIMIZER[job.optimizer]),
    )
    return Launch(
        target=TARGET,
        devices=layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp * layout.pp,
        flags=flags,
        environment=_environment(layout, stack),
        notes=tuple(notes),
    )


def _software(plan: Plan) -> tuple[str, str]:
    """The one of :data:`STACKS` that the plan's stack is, or that the user's own file extends, and
    what names the plan's stack."""
    if plan.target.stack in STACKS:
        return plan.target.stack, plan.target.stack
    from hardware_profiles.ancestry import shipped_stack_name
    from hardware_profiles.loader import load_stack

    own = str(plan.inputs.job.document.get("stack"))
    if Path(own).is_file() and load_stack(own).name == plan.target.stack:
        software = shipped_stack_name(own)
        if software in STACKS:
            return software, own
    raise InputError(
        f"the plan is for {plan.target.stack}, not for {TARGET}",
        hint=f"planner plan ... --stack {TARGET}, or a file that extends it",
    )


def _has_experts(model: ModelSpec) -> bool:
    return any(isinstance(block.feed_forward, MoeSpec) for block in model.blocks.values())


def _degree_flags(layout: Layout, *, has_experts: bool) -> list[Flag]:
    flags: list[Flag] = [("--tensor-model-parallel-size", str(layout.tp))]
    if layout.sequence_parallel:
        flags.append(("--sequence-parallel",))
    flags.append(("--pipeline-model-parallel-size", str(layout.pp)))
    if layout.cp > 1:
        flags.append(("--context-parallel-size", str(layout.cp)))
    if has_experts:
        flags.append(("--expert-model-parallel-size", str(layout.ep)))
        flags.append(("--expert-tensor-parallel-size", str(layout.etp)))
    if _pipeline_is_inside(layout):
        flags.append(("--use-tp-pp-dp-mapping",))
    return flags


def _context_flags(layout: Layout, job: JobSpec, model: ModelSpec) -> list[Flag]:
    """The kind of context parallelism, or one for each layer."""
    if layout.cp == 1:
        return []
    listed = [_CP_KINDS[kind] for _, kind in contexts_of_layers(job, model)]
    one = len(set(listed)) <= 1
    flags: list[Flag] = [
        ("--cp-comm-type", *([_CP_KINDS[layout.cp_kind]] if one else listed)),
    ]
    if layout.cp_kind == "a2a_p2p":
        sizes = (str(layout.cp_inner), str(layout.cp // layout.cp_inner))
        flags.append(("--hierarchical-context-parallel-sizes", *sizes))
    return flags


def _batch_flags(layout: Layout, job: JobSpec) -> list[Flag]:
    ranks = layout.dp_replicate * layout.dp_shard
    samples = layout.microbatch_size * layout.num_microbatches * ranks
    return [
        ("--micro-batch-size", str(layout.microbatch_size)),
        ("--global-batch-size", str(job.global_batch or samples)),
    ]


def _data_parallel_flags(layout: Layout, stack: StackSpec) -> list[Flag]:
    """ZeRO 1 is the distributed optimizer; 2 and 3 are Megatron-FSDP."""
    flags: list[Flag] = []
    sharded = layout.zero_stage >= 1
    if sharded:
        flags.append(("--use-distributed-optimizer",))
    if layout.zero_stage >= 2:
        strategy = "optim_grads" if layout.zero_stage == 2 else "optim_grads_params"
        flags += [
            ("--use-megatron-fsdp",),
            ("--data-parallel-sharding-strategy", strategy),
            ("--no-gradient-accumulation-fusion",),
            ("--ckpt-format", "fsdp_dtensor"),
        ]
    if sharded and layout.dp_replicate > 1:
        flags.append(("--num-distributed-optimizer-instances", str(layout.dp_replicate)))
    if layout.dp_replicate * layout.dp_shard * layout.cp > 1:
        if stack.overlap_dp_gradients:
            flags.append(("--overlap-grad-reduce",))
        if stack.overlap_dp_parameters and stack.overlap_dp_gradients and sharded:
            flags.append(("--overlap-param-gather",))
    if layout.optimizer_offload:
        flags += [("--optimizer-cpu-offload",), ("--use-precision-aware-optimizer",)]
    return flags


def _offload_flags(stack: StackSpec) -> tuple[Flag, ...]:
    """Modules whose inputs go to the host (developer guide, Fine-Grained Activation Offloading)."""
    if stack.offload is None or not stack.offload.inputs:
        return ()
    modules = ("--offload-modules", *stack.offload.inputs)
    return (("--fine-grained-activation-offloading",), modules)


def _deferral_flags(layout: Layout, stack: StackSpec) -> tuple[Flag, ...]:
    """Weight gradients of the output layer behind the last stage's passes (arguments.py)."""
    if layout.pp == 1 or not stack.deferred_head_gradients:
        return ()
    limit = ("--wgrad-deferral-limit", str(stack.deferred_head_gradients))
    return (("--defer-embedding-wgrad-compute",), limit)


def _environment(layout: Layout, stack: StackSpec) -> dict[str, str]:
    """Before Blackwell, ordered tensor- and context-parallel kernels need one hardware queue."""
    result = {}
    if (layout.tp > 1 or layout.cp > 1) and layout.zero_stage < 2:
        result["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if _offload_flags(stack):
        # arguments.py, with Transformer Engine 2.10 and later.
        result["NVTE_CPU_OFFLOAD_V1"] = "1"
    return result


def _pipeline_is_inside(layout: Layout) -> bool:
    order = layout.rank_order
    return layout.pp > 1 and "pp" in order and order.index("pp") < order.index("dp_shard")


def _layout_problems(layout: Layout) -> list[str]:
    problems = []
    if layout.pp > 1 and layout.schedule not in ("1f1b", "interleaved"):
        problems.append(f"the schedule {layout.schedule}")
    inner = [name for name in layout.rank_order if name not in ("pp", "dp_replicate")]
    if inner and inner != ["tp", "cp", "dp_shard"]:
        problems.append(f"rank order {', '.join(layout.rank_order)}")
    if any(stage.activation_offload_layers for stage in layout.stages):
        problems.append("activation offload of a number of layers")
    return problems
