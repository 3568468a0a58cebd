"""Which software runs a plan: what a stack cannot do of a request, and which one is the default.

What a stack can do is data in its YAML; here it meets the model, the job and the device.
"""

from __future__ import annotations

from collections.abc import Iterator

from cost_models.layout import LISTED, SPLIT_BACKWARD
from hardware_profiles.loader import catalog_names, load_stack
from hardware_profiles.schema import ClusterSpec, StackSpec
from planner.blocks.registry import KIND_NAMES, attention_sorts
from planner.errors import InputError
from planner.kernels import attention_kernel
from planner.layer_contexts import context_faults
from planner.models.kinds import Model
from planner.recompute import refusal
from planner.request import Request, fill_defaults
from planner.specs import JobSpec
from planner.tensor_transpose import transpose_faults

DEFAULTS = (
    "megatron-core", "megatron-bridge", "megatron-core-muon", "megatron-core-precision-aware",
    "nemo-automodel", "maxtext-tpu", "neuron", "mindformers", "deepspeed-hf", "torch-pipelining",
)  # fmt: skip
"""Stacks that are tried, in this order, where a job names none: the first that can run it."""

MOST_NAMED = 6
"""Stacks that a hint names; the rest is counted."""


def request_with_stack(model: Model, cluster: ClusterSpec, job: JobSpec) -> Request:
    """The request with defaults filled and its stack: the one that the job names, else the first
    of :data:`DEFAULTS` that can run it.

    A default other than the first is told in ``Request.remark``. Raises ``DocumentError`` for a
    name that is no stack.
    """
    filled = fill_defaults(job, model, cluster.devices)
    if job.stack is not None:
        return Request(model, cluster, filled, load_stack(job.stack))
    first: Request | None = None
    why = ""
    for name in DEFAULTS:
        named = filled.model_copy(update={"stack": name})
        remark = why and f"planned for {name}: {why}"
        request = Request(model, cluster, named, load_stack(name), remark=remark)
        reason = _fault(request)
        if reason is None:
            return request
        first, why = first or request, why or reason.message
    assert first is not None
    return first


def fault(request: Request) -> InputError | None:
    """What keeps this stack from running the request, with the stacks that can as the hint."""
    reason = _fault(request)
    if reason is not None and reason.hint is None:
        reason.hint = _able(request)
    return reason


def _fault(request: Request) -> InputError | None:
    return next(_faults(request), None)


def _faults(request: Request) -> Iterator[InputError]:
    """The first thing of each kind that the stack, or the device under it, cannot do."""
    stack, job, device = request.stack, request.job, request.machine.device
    name = f"{stack.name} {stack.version}"
    if not _runs_on(stack, device.vendor):
        places = ", ".join(stack.runs_on)
        yield InputError(f"{name} does not run on {device.name} (it runs on devices of {places})")
    if request.foreign_kinds:
        kinds = ", ".join(KIND_NAMES.get(kind, kind) for kind in request.foreign_kinds)
        yield InputError(f"{name} has no {kinds}, and {request.model.name} is made of them")
    if request.lacking:
        features = ", ".join(request.lacking)
        yield InputError(
            f"{name} has no {features}, which {request.model.name} needs "
            f"({stack.lacks[request.lacking[0]]})"
        )
    schedule = job.constraints.schedule
    if schedule is not None and schedule not in stack.schedules:
        known = ", ".join(stack.schedules)
        yield InputError(f"{name} has no schedule {schedule} (it has {known})")
    order = request.order
    if order is not None and not stack.given_orders:
        yield InputError(f"{name} runs no order of work of one's own (--schedule-csv)")
    elif not set(SPLIT_BACKWARD).isdisjoint(request.schedules) and set(SPLIT_BACKWARD).isdisjoint(
        stack.schedules
    ):
        yield InputError(f"{name} does not split backwards, and the given order does (I and W)")
    listed = not set(LISTED).isdisjoint(request.schedules)
    if request.free_stages and not (listed and stack.free_virtual_stages):
        yield InputError(
            f"{name} has no virtual stages of any numbers of layers (--virtual-stages free)"
        )
    yield from context_faults(request)
    yield from transpose_faults(request)
    if job.constraints.recompute is not None:
        try:
            refused = refusal(job.constraints.recompute, stack, job)
        except InputError as error:
            refused = error
        if refused is not None:
            yield refused
    if job.optimizer not in stack.optimizers:
        known = ", ".join(stack.optimizers)
        yield InputError(f"{name} has no optimizer {job.optimizer} (it has {known})")
    able = stack.muon.precisions
    if job.optimizer == "muon" and able and job.precision not in able:
        yield InputError(
            f"{name} runs muon in {', '.join(able)}; in {job.precision} nothing orthogonalises",
            hint=f"--precision {able[0]}",
        )
    if job.precision not in stack.precisions:
        known = ", ".join(stack.precisions)
        only = stack.precisions[0] if len(stack.precisions) == 1 else None
        yield InputError(
            f"{name} does not train in {job.precision} (it does in {known})",
            hint=f"--precision {only}" if only in device.peak_flops else None,
        )
    if "needs_block_scaled_products" in stack.rules and "nvfp4" not in device.peak_flops:
        yield InputError(f"{device.name} has no block-scaled products, and {name} needs them")
    if job.loss == "chunked" and stack.loss_chunks == 1:
        yield _no_chunks(stack, name)
    if job.loss == "chunked" and request.predicts and "no_prediction_in_chunks" in stack.rules:
        yield InputError(
            f"{name} has no chunked loss of multi-token prediction",
            hint="loss: whole or mtp: false in the job",
        )
    if job.dropout and not stack.trains_dropout:
        yield InputError(f"the layers of {name} have no dropout")
    kernel, runs = attention_kernel(request.model, job, stack, device), device.kernels.attention
    if attention_sorts(request.model) and kernel not in ("unfused", *runs):
        known = ", ".join(sorted(runs)) or "none"
        yield InputError(f"{name} runs {kernel} attention, and {device.name} has {known}")
    tune = job.finetune
    if tune is not None and tune.method not in stack.fine_tuning:
        known = ", ".join(stack.fine_tuning) or "none"
        yield InputError(f"{name} does not do {tune.method} (fine-tuning it does: {known})")
    reason = request.unsupported
    if reason is not None:
        hint = None
        if job.precision not in device.peak_flops:
            others = sorted({"bf16", "fp16", "fp32"} & set(device.peak_flops))
            hint = " or ".join(f"--precision {other}" for other in others)
        yield InputError(reason, hint=hint)


def _no_chunks(stack: StackSpec, name: str) -> InputError:
    """Why ``loss: chunked`` is refused; a fused loss goes through the sequence in pieces anyway."""
    if stack.loss_gradient_bytes:
        return InputError(
            f"{name} has one loss, which takes the sequence in pieces of its own (loss: chunked)",
            hint="leave loss out",
        )
    return InputError(f"{name} has no chunked loss: head and loss take the sequence whole")


def _runs_on(stack: StackSpec, vendor: str) -> bool:
    """Whether the stack runs on a vendor's devices; nothing is known of a vendor that no stack
    names, nor of a stack that names none."""
    if not stack.runs_on or vendor in stack.runs_on:
        return True
    return all(vendor not in other.runs_on for other in _shipped())


def _able(request: Request) -> str:
    """The stacks that ship and can run the request, or else in which precisions they can."""
    for precision in (request.job.precision, *sorted(request.machine.device.peak_flops)):
        job = request.job.model_copy(update={"precision": precision})
        stacks = _named(request, job)
        if stacks:
            flag = f", with --precision {precision}" if job != request.job else ""
            return stacks + flag
    return "no stack that ships can run it"


def _named(request: Request, job: JobSpec) -> str:
    """The stacks that can run ``job``, those that people start new runs on first."""
    able = []
    for stack in _shipped():
        on_it = job.model_copy(update={"stack": stack.name})
        if _fault(Request(request.model, request.cluster, on_it, stack)) is None:
            able.append(stack.name)
    ordered = sorted(able, key=lambda name: (name not in DEFAULTS, name))
    if not ordered:
        return ""
    rest = f"; {len(ordered) - MOST_NAMED} more can" if len(ordered) > MOST_NAMED else ""
    return "--stack " + " or --stack ".join(ordered[:MOST_NAMED]) + rest


def _shipped() -> Iterator[StackSpec]:
    return (load_stack(name) for name in catalog_names("stack"))
