"""Recomputation modes by name: what a stack offers, and what of it a model can tell apart.

A mode is ``none``, ``full``, ``selective`` (each stack's own meaning), or names of the stack's
modules in alphabetical order, joined by ``+``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cost_models.graph import LayerKind, Shard
from cost_models.layout import FULL, RecomputeMode, RecomputePolicy
from hardware_profiles.schema import StackSpec
from planner.errors import InputError, did_you_mean
from planner.specs import JobSpec

NONE = RecomputePolicy("none")


def named_policy(name: str, stack: StackSpec) -> RecomputePolicy:
    """The policy that ``name`` means on ``stack``; :class:`InputError` where it has none."""
    if name in ("none", "full", "selective"):
        if name not in stack.recompute:
            raise _unknown(name, name, stack)
        full = replace(FULL, to_the_end=_to_the_end(stack))
        return {"none": NONE, "full": full, "selective": _selective(stack)}[name]
    modules = frozenset(name.split("+"))
    for module in sorted(modules):
        if module not in stack.recompute_modules:
            raise _unknown(name, module, stack)
    return _of_modules(modules, stack)


def _selective(stack: StackSpec) -> RecomputePolicy:
    spec = stack.selective_recompute
    keeps = None if spec.keeps is None else frozenset(spec.keeps)
    to_the_end = keeps is not None and _to_the_end(stack)
    return RecomputePolicy("selective", frozenset(spec.modules), keeps, to_the_end)


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
    known = ", ".join(stack.recompute)
    also = f", or modules joined by +: {', '.join(modules)}" if modules else ""
    return InputError(
        f"recompute is {name!r}; {stack.name} knows {known}{also}",
        hint=did_you_mean(part, sorted({*stack.recompute, *modules})),
    )


def searched_policies(
    stack: StackSpec, job: JobSpec, kinds: Iterable[LayerKind]
) -> tuple[RecomputePolicy, ...]:
    """What the search looks at beside no recomputation.

    Modules that no layer of the model has are left out of a mode, and modes that are then the same
    as another. A mode that the job asks for stays as it is.
    """
    asked = job.constraints.recompute
    if not job.allow_recompute or asked == "none":
        return ()
    if asked is not None:
        try:
            return (named_policy(asked, stack),)
        except InputError:
            return ()
    present = {module for kind in kinds for module in modules_of(kind)}
    found: dict[RecomputeMode, RecomputePolicy] = {}
    for name in stack.recompute:
        policy = named_policy(name, stack)
        if policy.keeps is None:
            modules = policy.modules & present
            if not modules:
                continue
            policy = _of_modules(modules, stack)
        found.setdefault(policy.name, policy)
    return tuple(found.values())


def modules_of(kind: LayerKind) -> set[str]:
    """Modules that any op or saved tensor of a layer belongs to."""
    one = np.ones(1, dtype=np.int64)
    shard = Shard(1, one, one, one, one, one, one.astype(bool), one * 0)
    items = (*kind.ops(shard), *kind.saved(shard))
    return {module for item in items for module in item.modules}
