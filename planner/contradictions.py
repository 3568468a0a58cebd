"""Limits of a job that contradict its order of work, each other or the number of devices.

A search would prove that none of its layouts is possible, and say of each limit how many it
removed. That is no answer to a slip in a flag, so such requests are refused before.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from planner.errors import InputError
from planner.request import Request
from planner.specs import ConstraintSpec

MESH = ("tp", "cp", "pp", "dp_replicate", "dp_shard")
"""Degrees whose product is the number of devices."""


def check_limits(request: Request) -> None:
    """Raise :class:`InputError` with the limits that no layout of the request can keep."""
    limits = request.job.constraints
    for fault in (
        *_order_faults(request), *_pipeline_faults(limits), *_device_faults(request),
        *_offload_faults(request),
    ):  # fmt: skip
        raise fault


def _order_faults(request: Request) -> Iterator[InputError]:
    """A given order has a number of ranks and of virtual stages."""
    order, limits = request.order, request.job.constraints
    if order is None:
        return
    has = {
        "pp": (order.pp, f"has {order.pp} rows, one for each pipeline rank"),
        "vpp": (order.vpp, f"has vpp = {order.vpp}: virtual stages on each of its ranks"),
    }
    for name, (value, said) in has.items():
        hint = f"leave the limit of {name} out, or give an order of another shape"
        if limits.fix.get(name, value) != value:
            yield InputError(f"--fix {name}={limits.fix[name]}, but the order {said}", hint=hint)
        if limits.max.get(name, value) < value:
            yield InputError(f"--max {name}={limits.max[name]}, but the order {said}", hint=hint)
        if name in limits.forbid and value > 1:
            yield InputError(f"--forbid {name}, but the order {said}", hint=hint)


def _pipeline_faults(limits: ConstraintSpec) -> Iterator[InputError]:
    """A schedule with a name, and virtual stages, are of a pipeline."""
    alone = {
        "--fix pp=1": limits.fix.get("pp") == 1,
        "--max pp=1": limits.max.get("pp") == 1,
        "--forbid pp": "pp" in limits.forbid,
    }
    said = next((flag for flag, holds in alone.items() if holds), None)
    if said is None:
        return
    hint = f"drop {said}, or what asks for a pipeline"
    # One stage runs each microbatch forward and backward, which is what 1F1B is without others.
    if limits.schedule not in (None, "1f1b"):
        yield InputError(
            f"--schedule {limits.schedule} is an order of pipeline stages, and {said} leaves one",
            hint=hint,
        )
    if limits.fix.get("vpp", 1) > 1:
        yield InputError(
            f"--fix vpp={limits.fix['vpp']} divides a pipeline's stages, and {said} leaves one",
            hint=hint,
        )


def _offload_faults(request: Request) -> Iterator[InputError]:
    """State and weights that leave the devices together."""
    job, spec = request.job, request.stack.offload
    label = f"{request.stack.name} {request.stack.version}"
    if spec is None:
        return
    if job.optimizer_offload_share < 1 and not job.optimizer_offload:
        yield InputError(
            f"optimizer_offload_share: {job.optimizer_offload_share:g} without optimizer_offload",
            hint="set optimizer_offload: true",
        )
    if job.optimizer_offload and not job.parameter_offload and spec.with_weights:
        yield InputError(
            f"optimizer_offload: true without parameter_offload: {label} offloads optimizer state "
            "with the weights only",
            hint=f"set optimizer_offload and parameter_offload together on {request.stack.name}",
        )
    if job.parameter_offload and not job.optimizer_offload and spec.updates_on == "host":
        yield InputError(
            f"parameter_offload: true without optimizer_offload: with {label} weights leave the "
            "device only with the optimizer state",
            hint=f"set optimizer_offload and parameter_offload together on {request.stack.name}",
        )


def _device_faults(request: Request) -> Iterator[InputError]:
    """Fixed degrees of a mesh divide the devices, and are as many where all are fixed."""
    fixed = {name: n for name, n in request.job.constraints.fix.items() if name in MESH}
    product, devices = prod(fixed.values()), request.devices
    said = " x ".join(f"{name}={n}" for name, n in fixed.items())
    total = f" = {product}" if len(fixed) > 1 else ""
    if devices % product:
        near = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        yield InputError(
            f"--fix {said}{total}, which does not divide the {devices} devices of "
            f"{request.cluster.name}",
            hint=f"their product must be one of {near}",
        )
    if len(fixed) == len(MESH) and product != devices:
        yield InputError(
            f"--fix {said}{total}, but {request.cluster.name} has {devices} devices",
            hint="leave dp_shard out: it follows from the others",
        )
