"""Recomputation modes by name: what a stack offers, and what of it a model can tell apart.

A mode is ``none``, ``full``, ``full:N`` (so many layers at a time), ``partitioned`` (full, each
tensor-parallel rank with a part of a layer's input), ``partitioned:N`` (both), ``tiled`` (full,
MLPs in pieces of the sequence), ``tiled_mlp`` (these alone), ``offload:N`` (nothing again,
activations of the first N layers on the host), ``selective`` (each stack's own meaning), names of
the stack's modules in alphabetical order, joined by ``+``, the stack's own name of a list of
outputs that are kept, or a list of one's own (``planner.save_lists``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cost_models.graph import LayerKind
from cost_models.layout import FULL, OutputKind, RecomputeMode, RecomputePolicy
from cost_models.named_outputs import SAVED, expanded
from cost_models.state import is_expert
from hardware_profiles.schema import StackSpec
from hardware_profiles.stack_words import (
    EVERYTHING,
    OFFLOAD,
    PARTITIONED,
    TILED,
    TILED_MLP,
    SaveLists,
)
from planner import save_lists
from planner.errors import InputError, did_you_mean
from planner.shards import ONE
from planner.specs import JobSpec

NONE = RecomputePolicy("none")
IN_GROUPS = ("full:", f"{PARTITIONED}:")
MOST_TOGETHER = 1024
"""Layers that a mode may run again together: more than any model has on a stage."""


NOT_BOTH = "and the room that they leave to optimizer state is not priced"
"""Why a mode that sends outputs to the hosts does not run beside an offloaded optimizer, but where
:func:`shares_hosts`."""


def shares_hosts(stack: StackSpec) -> bool:
    """Whether what modes send to the hosts may be there beside optimizer state: where the device
    updates, so that the two never cross the link at once (``cost_models.host_room``)."""
    return stack.offload is not None and stack.offload.updates_on == "device"


FIRST_LAYERS = f"recompute {OFFLOAD}:N is of fewer layers than the model has, without a pipeline"
"""Why activations of the first layers cannot wait on the host."""


WHOLE_INPUTS = (
    f"recompute {PARTITIONED} splits what tensor-parallel ranks hold alike: tp above 1, without "
    "sequence parallelism"
)
"""Why inputs of layers cannot be kept in parts."""


IN_PIPELINES = f"recompute {EVERYTHING} is of layers in a pipeline, pp above 1"
"""Why a mode without a policy cannot run: elsewhere every layer has one."""


UNCOUNTED = (
    f"recompute {EVERYTHING} keeps what autodiff saves, counted in bf16, fp32 and int8 for layers "
    "of MaxText's models with SiLU or GELU, latent attention, mixtures and, where no kernel runs "
    "attention, sinks among them; in fp8 on GPUs alone, without experts "
    "(moe.py, sparse_matmul, fails), as qwix's rules match no layer that a pipeline applies "
    "(quantizations.py, get_quantization_rule)"
)
"""Why it has no price for a model or a job."""


def uncounted(name: str, kinds: Iterable[LayerKind]) -> bool:
    """Whether a mode keeps what no one has counted for some kind of layer."""
    return name == EVERYTHING and any(kind.everything is None for kind in kinds)


def named_policy(name: str, stack: StackSpec) -> RecomputePolicy:
    """The policy that ``name`` means on ``stack``; :class:`InputError` where it has none."""
    if name in ("none", "full", "selective"):
        if name not in stack.recompute:
            raise _unknown(name, name, stack)
        full = replace(FULL, to_the_end=_to_the_end(stack), needed_only=stack.recompute_needed_only)
        return {"none": NONE, "full": full, "selective": _selective(stack)}[name]
    if name == PARTITIONED and name in stack.recompute:
        return replace(named_policy("full", stack), name=name, in_parts=True)
    if name == TILED and name in stack.recompute:
        return replace(named_policy("full", stack), name=name, tiled=frozenset({"mlp"}))
    if name.startswith(f"{OFFLOAD}:") and stack.layer_offload is not None:
        return _of_first_layers(name, stack)
    together = stack.recompute_groups > 1 or stack.recompute_groups_named
    if name == TILED_MLP and name in stack.recompute:
        return RecomputePolicy(name, frozenset({"mlp"}), tiled=frozenset({"mlp"}))
    if name.startswith(IN_GROUPS) and together and name.partition(":")[0] in stack.recompute:
        return _in_groups(name, stack)
    if name == EVERYTHING and name in stack.recompute and stack.save_lists is not None:
        outside = stack.save_lists.policies[stack.save_lists.outside_pipeline or ""]
        needed = stack.recompute_needed_only
        return RecomputePolicy(name, everything=expanded(outside), needed_only=needed)
    if stack.save_lists is not None and name in stack.save_lists.policies:
        return _keeping(name, stack.save_lists.policies[name], stack)
    if stack.save_lists is not None and name in stack.save_lists.offloaded:
        hosted, in_turn = expanded(stack.save_lists.offloaded[name]), stack.save_lists.in_turn
        if SAVED in hosted:
            return RecomputePolicy(name, offloads=frozenset({SAVED}), in_turn=in_turn)
        return replace(_keeping(name, hosted, stack), offloads=hosted, in_turn=in_turn)
    if save_lists.CUSTOM in stack.recompute and name.startswith(f"{save_lists.CUSTOM}:"):
        return _custom(name, stack)
    modules = frozenset(name.split("+"))
    for module in sorted(modules):
        if module not in stack.recompute_modules:
            raise _unknown(name, module, stack)
    return _of_modules(modules, stack)


def refusal(name: str, stack: StackSpec, job: JobSpec) -> InputError | None:
    """Why the stack cannot run what ``name`` names again in the job's precision; None: it can.

    Raises :class:`InputError` where it has no such mode.
    """
    refused = sorted(named_policy(name, stack).modules & _refused(stack, job))
    if not refused:
        return None
    rest = sorted(set(stack.recompute_modules) - _refused(stack, job))
    return InputError(
        f"{stack.name} {stack.version} cannot run {' and '.join(refused)} again in {job.precision}",
        hint=f"modules that it can run again: {', '.join(rest)}; or full",
    )


def _refused(stack: StackSpec, job: JobSpec) -> frozenset[str]:
    return frozenset(stack.recompute_refused.get(job.precision, ()))


def _in_groups(name: str, stack: StackSpec) -> RecomputePolicy:
    """Whole layers that run again several at a time. Those of inputs in parts are priced where they
    are named: what is left of an eighth of an input is little beside what a group works with."""
    alone, _, count = name.partition(":")
    if not count.isascii() or not count.isdigit() or not 1 < int(count) <= MOST_TOGETHER:
        raise InputError(
            f"recompute is {name!r}: {alone}:N runs N layers again together, 2 to {MOST_TOGETHER}",
            hint=f"{alone}:2, or {alone} for one layer at a time ({stack.name})",
        )
    return replace(named_policy(alone, stack), name=f"{alone}:{int(count)}", group=int(count))


def first_layers(name: str) -> int:
    """N of ``offload:N``, from 1 on; 0 of other modes."""
    offload, _, count = name.partition(":")
    known = offload == OFFLOAD and count.isascii() and count.isdigit()
    return int(count) if known and int(count) <= MOST_TOGETHER else 0


def _of_first_layers(name: str, stack: StackSpec) -> RecomputePolicy:
    """Activations of so many first layers on the host."""
    count = first_layers(name)
    if not count:
        raise InputError(
            f"recompute is {name!r}: {OFFLOAD}:N keeps what the first N layers hold on the host",
            hint=f"{OFFLOAD}:1, or more, but not all layers ({stack.name})",
        )
    return RecomputePolicy(f"{OFFLOAD}:{count}", hosted_layers=count)


def _selective(stack: StackSpec) -> RecomputePolicy:
    spec = stack.selective_recompute
    keeps = None if spec.keeps is None else frozenset(spec.keeps)
    to_the_end = keeps is not None and _to_the_end(stack)
    return RecomputePolicy("selective", frozenset(spec.modules), keeps, to_the_end)


def _keeping(name: str, outputs: Iterable[str], stack: StackSpec) -> RecomputePolicy:
    return RecomputePolicy(name, keeps=expanded(outputs), needed_only=stack.recompute_needed_only)


def _custom(name: str, stack: StackSpec) -> RecomputePolicy:
    """The policy of a list of one's own, under the stack's own name where it has one."""
    assert stack.save_lists is not None
    asked = save_lists.read(name, stack.save_lists, stack.name)
    known = _own_lists(stack.recompute, stack.save_lists)
    mode = known.get((asked.keeps, asked.offloads))
    if mode is not None:
        return named_policy(mode, stack)
    if "selective" in stack.recompute and asked.keeps == _selective(stack).keeps:
        return _selective(stack)
    return replace(asked, needed_only=stack.recompute_needed_only, to_the_end=_to_the_end(stack))


def _own_lists(modes: tuple[str, ...], lists: SaveLists) -> dict[object, str]:
    """The stack's own names of lists, by what they keep and what of it on the host."""
    found: dict[object, str] = {}
    for mode in modes:
        hosted = expanded(lists.offloaded.get(mode, ()))
        kept = expanded(lists.policies.get(mode, ())) | hosted
        if mode == "full" or kept:
            found.setdefault((kept, hosted), mode)
    return found


def _to_the_end(stack: StackSpec) -> bool:
    """Megatron-style layers gather the gradient of their output when they have run again."""
    return stack.layers.tensor_parallel == "dtensor"


def _of_modules(modules: frozenset[str], stack: StackSpec) -> RecomputePolicy:
    selective = _selective(stack)
    if "selective" in stack.recompute and modules == selective.modules:
        return selective
    return RecomputePolicy("+".join(sorted(modules)), modules)


def _unknown(name: str, part: str, stack: StackSpec) -> InputError:
    modules = stack.recompute_modules
    kept = "+".join(stack.save_lists.outputs[:2]) if stack.save_lists is not None else "..."
    custom = save_lists.CUSTOM
    known = ", ".join(f"{custom}:{kept}" if m == custom else m for m in stack.recompute)
    also = f", or modules joined by +: {', '.join(modules)}" if modules else ""
    return InputError(
        f"recompute is {name!r}; {stack.name} knows {known}{also}",
        hint=did_you_mean(part, sorted({*stack.recompute, *modules} - {part})),
    )


def searched_policies(
    stack: StackSpec, job: JobSpec, kinds: Iterable[LayerKind], layers: int = 0
) -> tuple[RecomputePolicy, ...]:
    """What the search looks at beside no recomputation.

    Modules that no layer of the model has, or that cannot run again in the job's precision, are
    left out of a mode, and modes that are then the same as another, or send outputs to hosts that
    hold optimizer state. A mode that the job asks for stays as it is, or is none where the stack
    refuses it. ``layers`` of the model are those that may be offloaded, all but one.
    """
    asked = job.constraints.recompute
    if not job.allow_recompute or asked == "none":
        return ()
    kinds = tuple(kinds)
    if asked is not None:
        if uncounted(asked, kinds):
            return ()
        try:
            return () if refusal(asked, stack, job) else (named_policy(asked, stack),)
        except InputError:
            return ()
    present = {module for kind in kinds for module in modules_of(kind)} - _refused(stack, job)
    told_apart = frozenset(o for kind in kinds for o in save_lists.outputs_of(kind))
    found: dict[object, RecomputePolicy] = {}
    for name in _names(stack, kinds, layers):
        policy = named_policy(name, stack)
        state_leaves = job.optimizer_offload or job.parameter_offload
        if policy.sends and state_leaves and not shares_hosts(stack):
            continue
        if policy.tiled and not policy.tiled & present:
            continue
        if (policy.in_parts and not _holds_alike(stack, kinds)) or uncounted(name, kinds):
            continue
        if (
            policy.keeps is None
            and policy.everything is None
            and not policy.sends
            and not policy.tiled
        ):
            modules = policy.modules & present
            if not modules:
                continue
            policy = _of_modules(modules, stack)
        found.setdefault(_told(policy, told_apart), policy)
    return tuple(found.values())


def _holds_alike(stack: StackSpec, kinds: tuple[LayerKind, ...]) -> bool:
    """Whether tensor-parallel ranks of any layout hold the same inputs of layers."""
    experts = any(is_expert(weight) for kind in kinds for weight in kind.weights)
    ties = "moe_with_tp_needs_sequence_parallel" in stack.rules
    return stack.sequence_parallel != "always" and not (experts and ties)


def _told(policy: RecomputePolicy, outputs: frozenset[OutputKind]) -> object:
    """What tells a policy from others for a model whose lists differ by ``outputs``."""
    if policy.keeps is None or not policy.needed_only:
        return policy.name
    return policy.keeps & outputs, policy.offloads & outputs


def _names(stack: StackSpec, kinds: tuple[LayerKind, ...], layers: int) -> Iterator[RecomputeMode]:
    """Modes of the stack's list, with lists of outputs for ``custom`` and numbers of ``layers``."""
    for name in stack.recompute:
        if name == OFFLOAD:
            yield from (f"{OFFLOAD}:{n}" for n in range(1, layers))
            continue
        if name == save_lists.CUSTOM and stack.save_lists and not stack.save_lists.searched:
            continue
        if name != save_lists.CUSTOM or stack.save_lists is None:
            yield name
            if name == "full":
                yield from (f"full:{n}" for n in range(2, stack.recompute_groups + 1))
        else:
            yield from save_lists.searched(stack.save_lists, kinds)


def modules_of(kind: LayerKind) -> set[str]:
    """Modules that any op or saved tensor of a layer belongs to."""
    items = (*kind.ops(ONE), *kind.saved(ONE))
    return {module for item in items for module in item.modules}
