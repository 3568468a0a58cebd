"""Layouts that run an order of work of the user's own, or cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_models.given_order import GivenOrder
from cost_models.layout import Schedule
from planner.errors import InputError
from planner.request import Request


def settle_order(base: dict[str, Any], request: Request) -> None:
    """Fill in what the given order fixes, where there is one and the layout names no other
    schedule."""
    order = request.order
    if order is not None and base.get("schedule", order.schedule) == order.schedule:
        base["schedule"] = order.schedule
        base.setdefault("pp", order.pp)
        base.setdefault("vpp", order.vpp)
        base.setdefault("microbatch_size", _microbatch_size(base, order, request))


def _microbatch_size(base: Mapping[str, Any], order: GivenOrder, request: Request) -> int:
    """Samples of a microbatch that make as many as the order has, at least 1."""
    used = 1
    for name in ("tp", "cp", "pp"):
        value = base.get(name, 1)
        used *= value if isinstance(value, int) and value > 0 else 1
    dp = max(1, request.devices // used)
    return max(1, request.global_batch // (dp * order.microbatches))


def require_shape(schedule: Schedule, degree: Mapping[str, int], request: Request) -> None:
    """Raise :class:`InputError` where a layout of a given order has another shape than it."""
    order = request.order
    if order is None:
        raise InputError(
            f"schedule {schedule} is an order of work of one's own, and none is given",
            hint="--schedule-csv FILE: a row of actions for each rank",
        )
    if schedule != order.schedule:
        raise InputError(f"schedule {schedule}, but the given order is {order.schedule}")
    for name, wanted in (
        ("pp", order.pp), ("vpp", order.vpp), ("num_microbatches", order.microbatches),
    ):  # fmt: skip
        if degree[name] != wanted:
            raise InputError(
                f"layout: {name} = {degree[name]}, but the given order has {wanted}",
                hint=(
                    f"the global batch of {request.global_batch} samples is dp x microbatch_size x "
                    f"{wanted} microbatches"
                    if name == "num_microbatches"
                    else f"leave {name} out: it follows from the order"
                ),
            )
