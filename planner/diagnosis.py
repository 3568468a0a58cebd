"""Why nothing fits, and the cheapest ways out, each planned and priced.

The closest layout is found by asking how much memory a device would need: the least capacity at
which the same search finds a layout. Its fullest device, by category, is the binding constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from hardware_profiles.units import format_bytes, format_seconds
from planner.claims import certificate, envelope
from planner.decisive import decisive_rules
from planner.errors import PlannerError
from planner.layouts import layout_of
from planner.leaves import Candidate
from planner.plan import Infeasibility, WayOut
from planner.predict import predict, price
from planner.request import Request, fill_defaults
from planner.search import OUT_OF_MEMORY, Search, SearchResult
from planner.specs import ConstraintSpec
from planner.stacks import fault

LARGEST_GROWTH = 4096
"""Beyond this many times the device's memory no closest layout is looked for."""
PRECISION = 0.02
"""Relative precision of the least capacity."""
COARSE = 0.2
"""Tolerance of the searches here: existence matters, and a fair price."""
MOST_WAYS = 6


def diagnose(request: Request, result: SearchResult) -> Infeasibility:
    """The diagnosis of a request for which ``result`` found nothing."""
    common = {**envelope(request), "certificate": certificate(request, result, None)}
    if result.removed[OUT_OF_MEMORY] == 0:
        return _ruled_out(request, result, common)
    closest = _closest(request)
    capacity = request.usable_bytes
    common["capacity_bytes"] = request.device_bytes
    common["usable_bytes"] = capacity
    size = request.model.name
    if closest is None:
        roomy = replace(request, capacity_bytes=LARGEST_GROWTH * request.device_bytes)
        ruled_out = Search(roomy).run()
        if ruled_out.removed[OUT_OF_MEMORY] == 0:
            return _ruled_out(request, ruled_out, common)
        text = f"{size} needs more than {LARGEST_GROWTH} times {format_bytes(capacity)} per device"
        return Infeasibility(
            message=text, binding=text, ways_out=tuple(_ways_out(request)), **common
        )
    base = {**closest.degrees, **request.layout_constants}
    layout = layout_of(base, closest.completion, request)
    prediction = predict(price(layout, request), request)
    fullest = max(prediction.stages, key=lambda stage: stage.peak_bytes)
    over = fullest.peak_bytes - capacity
    largest = max(fullest.memory, key=lambda term: term.bytes or 0)
    return Infeasibility(
        message=(
            f"no layout of {size} fits on {request.devices:,} x {request.machine.device.name}: the "
            f"closest needs {format_bytes(fullest.peak_bytes)} per device, {format_bytes(over)} "
            f"more than the {format_bytes(capacity)} that {_margin_words(request)}"
        ),
        binding=(
            f"device memory: {format_bytes(fullest.peak_bytes)} needed, {format_bytes(capacity)} "
            f"usable; most of it {largest.name} ({format_bytes(largest.bytes or 0)})"
        ),
        closest_layout=layout,
        needed_bytes=fullest.peak_bytes,
        memory=fullest.memory,
        ways_out=tuple(_ways_out(request)),
        **common,
    )


def _ruled_out(request: Request, result: SearchResult, common: dict[str, Any]) -> Infeasibility:
    """No layout got as far as memory: the rules that removed them are the answer, above all one
    that layouts break which break no other."""
    decisive = decisive_rules(request)
    if decisive:
        reason, number = decisive.most_common(1)[0]
        share = f"the only rule that {number:,} of {result.size:,} layouts break"
    else:
        reason, number = result.removed.most_common(1)[0]
        share = f"{number:,} of {result.size:,} layouts, each of which breaks another rule too"
    rules = decisive or result.removed
    return Infeasibility(
        message=f"no layout is possible on {request.devices:,} devices: {reason} ({share})",
        binding="; ".join(f"{why}: {n:,}" for why, n in rules.most_common(4)),
        ways_out=tuple(_ways_out(request)),
        **common,
    )


def _search(request: Request) -> Candidate | None:
    """The best layout within a coarse tolerance, or None."""
    job = request.job.model_copy(update={"tolerance": COARSE})
    return Search(replace(request, job=job)).run().best


def _closest(request: Request) -> Candidate | None:
    """The layout found at the least capacity at which there is one."""
    capacity = request.device_bytes
    low, high, found = capacity, 2 * capacity, None
    while found is None:
        if high > LARGEST_GROWTH * capacity:
            return None
        found = _search(replace(request, capacity_bytes=high))
        if found is None:
            low, high = high, 2 * high
    high = min(high, _device_for(request, found.peak_bytes))
    while high - low > PRECISION * low:
        middle = (low + high) // 2
        better = _search(replace(request, capacity_bytes=middle))
        if better is None:
            low = middle
        else:
            found, high = better, min(middle, _device_for(request, better.peak_bytes))
    return found


def _margin_words(request: Request) -> str:
    """What the usable bytes are of the device's."""
    margin = request.memory_margin[0]
    if not margin:
        return "there are"
    return f"{format_bytes(request.device_bytes)} leave with a margin of {margin:.1%}"


def _device_for(request: Request, peak_bytes: int) -> int:
    """Device memory with which a predicted peak fits, margin included."""
    return math.ceil(peak_bytes * (1 + request.memory_margin[0])) + 1


def _ways_out(request: Request) -> Iterator[WayOut]:
    """Changes that make it fit, cheapest to make first, each with the step time it would give."""
    one = islice(_tried(_growths(request)), 1)
    ways = chain(_tried(_attempts(request)), one, _tried(_shorter(request)))
    yield from islice(ways, MOST_WAYS)


def _tried(attempts: Iterable[Attempt]) -> Iterator[WayOut]:
    """The attempts that fit. The next is planned only when it is asked for: each is a search."""
    for change, attempt in attempts:
        try:
            changed = attempt()
        except PlannerError:
            continue
        if changed is None or fault(changed) is not None:
            continue
        best = _search(changed)
        if best is None:
            continue
        step_s = best.time_ns / 1e9
        tokens = changed.tokens_per_step / step_s
        yield WayOut(
            change=change,
            effect=(
                f"{format_seconds(step_s)} per step, {tokens:,.0f} {changed.position}s/s on "
                f"{changed.devices:,} devices, {format_bytes(best.peak_bytes)} per device"
            ),
            step_time_s=step_s,
        )


Attempt = tuple[str, Callable[[], Request | None]]

ON_DRIVES = ("parameter_offload", "optimizer_offload")
"""What a job may send to the host or, where the stack has them, to the drives."""


def _attempts(request: Request) -> Iterator[Attempt]:
    job, limits = request.job, request.job.constraints
    if request.memory_margin[0]:
        yield "--memory-margin 0 (no safety margin)", lambda: _with_job(request, memory_margin=0.0)
    if job.memory_reserve_bytes:
        yield "no memory reserve", lambda: _with_job(request, memory_reserve_bytes=0)
    if not job.allow_recompute:
        yield "allow recomputation", lambda: _with_job(request, allow_recompute=True)
    if request.stack.offload is not None and request.stack.offload.drives is not None:
        unused = [name for name in ON_DRIVES if not getattr(job, name)]
        if unused:
            yield (
                f"{' and '.join(unused)}: true (in the job)",
                lambda: _with_job(request, **dict.fromkeys(unused, True)),
            )
    for name in ("activation_offload", *ON_DRIVES):
        if getattr(job, name):
            yield f"{name}: false", lambda n=name: _with_job(request, **{n: False})  # type: ignore[misc]
    for kind, names in (("fix", limits.fix), ("max", limits.max), ("forbid", limits.forbid)):
        for name in names:
            yield f"drop --{kind} {name}", lambda k=kind, n=name: _without(request, k, n)  # type: ignore[misc]
    for name in ("schedule", "recompute", "sequence_parallel"):
        if getattr(limits, name) is not None:
            yield (
                f"drop --{name.replace('_', '-')}",
                lambda n=name: _with_job(  # type: ignore[misc]
                    request, constraints=limits.model_copy(update={n: None})
                ),
            )
    batch = _nearest_batch(request)
    if batch is not None:
        yield (
            f"a global batch of {batch} samples",
            lambda: _with_job(request, global_batch=batch, global_batch_tokens=None),
        )
    yield from _other_stacks(request)
    if job.optimizer != "sgd":
        yield "--optimizer sgd", lambda: _with_job(request, optimizer="sgd")
    yield from _other_nodes(request)


def _growths(request: Request) -> Iterator[Attempt]:
    """More nodes of the same type, the fewest first."""
    name, count = request.cluster.groups[0].node.name, request.cluster.nodes
    for factor in (2, 4, 8, 16, 32, 64):
        yield f"{name}:{count * factor}", lambda f=factor: _more_nodes(request, f)  # type: ignore[misc]


def _shorter(request: Request) -> Iterator[Attempt]:
    """As many tokens in samples of half the length."""
    if request.sequence >= 2048:
        half = request.sequence // 2
        yield (
            f"--seq-len {half}",
            lambda: _with_job(request, sequence_length=half, global_batch=request.global_batch * 2),
        )


def _with_job(request: Request, **changes: Any) -> Request:
    job = request.job.model_copy(update=changes)
    return replace(request, job=fill_defaults(job, request.model, request.devices))


def _without(request: Request, kind: str, name: str) -> Request:
    limits = request.job.constraints
    if kind == "forbid":
        changed: Any = tuple(other for other in limits.forbid if other != name)
    else:
        changed = {k: v for k, v in getattr(limits, kind).items() if k != name}
    return _with_job(request, constraints=ConstraintSpec(**{**limits.model_dump(), kind: changed}))


def _nearest_batch(request: Request) -> int | None:
    """The multiple of the device count nearest to a batch that no layout divides."""
    devices = request.devices
    if request.global_batch % devices == 0:
        return None
    return max(1, round(request.global_batch / devices)) * devices


def _other_stacks(request: Request) -> Iterator[Attempt]:
    from hardware_profiles.loader import catalog_names, load_stack

    for name in catalog_names("stack"):
        stack = load_stack(name)
        if name != request.stack.name and stack.launchable:
            yield (
                f"--stack {name}",
                lambda n=name, s=stack: replace(_with_job(request, stack=n), stack=s),  # type: ignore[misc]
            )


def _other_nodes(request: Request) -> Iterator[Attempt]:
    """Two node types with as many devices and more memory each, the smallest first."""
    from hardware_profiles.loader import catalog_names, load_cluster, load_node

    own = request.cluster.groups[0].node
    capacity = own.device.memory_capacity.si
    roomier = []
    for name in catalog_names("node"):
        node = load_node(name)
        bigger = node.device.memory_capacity.si > 1.05 * capacity
        bigger &= node.device.vendor == own.device.vendor
        if bigger and node.devices_per_node == max(own.devices_per_node, 8):
            roomier.append((node.device.memory_capacity.si, node.device.name, name))
    seen: set[str] = set()
    for _, device, name in sorted(roomier):
        if device not in seen and len(seen) < 2:
            seen.add(device)
            count = -(-request.devices // max(own.devices_per_node, 8))
            yield (
                f"{name}:{count}",
                lambda n=name, c=count: replace(  # type: ignore[misc]
                    request, cluster=load_cluster(f"{n}:{c}")
                ),
            )


def _more_nodes(request: Request, factor: int) -> Request:
    group = request.cluster.groups[0]
    groups = (group.model_copy(update={"count": group.count * factor}),)
    cluster = request.cluster.model_copy(
        update={"groups": groups, "name": f"{group.node.name}:{group.count * factor}"}
    )
    return replace(request, cluster=cluster)
