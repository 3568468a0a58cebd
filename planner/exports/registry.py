"""Exporters by the name of their target."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from planner.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.exports.launch import Launch
    from planner.plan import Plan

_MODULES = {
    "megatron-core": "planner.exports.megatron_core",
    "torchtitan": "planner.exports.torchtitan",
}


def targets() -> list[str]:
    """Targets that have an exporter."""
    return list(_MODULES)


def exporter(target: str) -> Callable[[Plan], Launch]:
    """The ``export`` function of ``target``; raises :class:`InputError` for an unknown one."""
    name = target.lower().replace("_", "-")
    if name not in _MODULES:
        raise InputError(f"no exporter for {target!r}", hint=did_you_mean(name, targets()))
    return cast("Callable[[Plan], Launch]", importlib.import_module(_MODULES[name]).export)
