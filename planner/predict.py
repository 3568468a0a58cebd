"""Price one complete layout and report the prediction.

This is the single-layout path: no tables, no solver. ``evaluate`` and ``verify`` use it as it is,
and the search reports its winner through it, so that all three say the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.configs import price_configs, shard_of
from cost_models.graph import LayerKind, WorkloadGraph
from cost_models.layer_times import LayerTimes
from cost_models.leaf import (
    Completion,
    sent_ns,
    stage_costs,
)
from cost_models.outside import recomputing
from cost_models.peaks import host_bytes
from cost_models.recompute import names_of
from cost_models.step import CATEGORIES, Field, price_layer
from cost_models.step_time import simulate_step
from hardware_profiles.stack_words import EVERYTHING, OFFLOAD
from planner.accuracy import RunClass, band
from planner.errors import InputError, did_you_mean
from planner.host_link import link_bytes
from planner.hosted_outputs import hosted_bytes
from planner.hosting import buffer_bytes_per_node, host_capacity, on_drives
from planner.layouts import completion_of, configs_of
from planner.models.spec import ModelSpec, MoeSpec
from planner.plan import HostPrediction, Layout, Prediction, Term
from planner.priced import Priced
from planner.recompute import named_policy
from planner.request import Request
from planner.stage_memory import stage_prediction

SECOND = 1e9


def price(layout: Layout, request: Request) -> Priced:
    """Price a complete layout by exact simulation."""
    request = request.offloading(layout)
    completion = completion_of(layout, request)
    tables = price_configs(
        with_policies(request, completion), request.machine, configs_of(layout),
        reserve_bytes=request.reserve_bytes, capacity_bytes=request.usable_bytes,
    )  # fmt: skip
    leaf = tables.leaf(
        0,
        schedule=layout.schedule,
        vpp=layout.vpp,
        microbatches=layout.num_microbatches,
        uneven=True,
        round_size=layout.round_size,
        order=request.order_of(layout.schedule),
        outside=layout.layers_outside,
    )
    leaf = recomputing(leaf, completion.recompute[0][0])
    ranks = stage_costs(leaf, completion)
    return Priced(layout, leaf, completion, tables, ranks, simulate_step(leaf, ranks))


def with_policies(request: Request, completion: Completion) -> WorkloadGraph:
    """The workload with the policies of ``completion`` priced beside those of the search."""
    workload = request.workload
    known = {"none", *(policy.name for policy in workload.policies)}
    named = [mode for whole, _ in completion.recompute for mode in names_of(whole)]
    more = dict.fromkeys(mode for mode in named if mode not in known)
    policies = tuple(named_policy(name, request.stack) for name in more)
    return replace(workload, policies=(*workload.policies, *policies)) if policies else workload


def predict(priced: Priced, request: Request) -> Prediction:
    """The prediction of a priced layout."""
    step = priced.step
    step_s = step.total_ns / SECOND
    tokens = request.tokens_per_step
    peak_flops = _peak_flops(request)
    mfu = request.workload.model_flops_per_token * tokens / step_s / request.devices / peak_flops
    time = _time_terms(priced, request)
    low, high, source = band(step_s, run_class(priced, request, time))
    if request.kernel_basis != "measured":
        source += f"; kernel efficiencies of {request.machine.device.name} are not its own"
    stages = tuple(stage_prediction(priced, rank, costs) for rank, costs in enumerate(priced.ranks))
    price_usd, price_source = _price(request, step_s)
    return Prediction(
        step_time_s=step_s,
        step_time_band_s=(low, high),
        band_source=source,
        tokens_per_s_per_device=tokens / step_s / request.devices,
        mfu=mfu,
        mfu_convention=(
            f"model FLOPs (causal attention, no recomputation) over the dense "
            f"{_peak_name(request)} peak of {peak_flops / 1e12:g} TFLOP/s"
        ),
        outside_measured_region=_beyond_measured(request, mfu * step_s / high),
        max_peak_bytes=max(stage.peak_bytes for stage in stages),
        allocated_bytes=max(stage.allocated_bytes for stage in stages),
        reserved_bytes=max(stage.reserved_bytes for stage in stages),
        device_bytes=max(stage.device_bytes for stage in stages),
        capacity_bytes=request.device_bytes,
        memory_margin=request.memory_margin[0],
        memory_margin_source=request.memory_margin[1],
        usable_bytes=priced.leaf.capacity_bytes,
        fits=priced.fits,
        time=time,
        stages=stages,
        assumptions=_assumptions(request),
        host=_host(priced, request),
        price_usd_per_step=price_usd,
        price_source=price_source,
    )


def run_class(priced: Priced, request: Request, time: tuple[Term, ...] | None = None) -> RunClass:
    """What decides how well the layout's step time is known; ``time`` is its breakdown, if made."""
    terms = _time_terms(priced, request) if time is None else time
    waiting_s = sum(term.seconds or 0.0 for term in terms if term.name == "launch")
    return RunClass(
        device=request.machine.device.name if _is_familiar(request) else UNFAMILIAR,
        precision=request.job.precision,
        stack=request.stack.name,
        moe=any(isinstance(b.feed_forward, MoeSpec) for b in request.model.blocks.values()),
        context_parallel=priced.layout.cp > 1,
        devices=request.devices,
        launch_share=waiting_s * SECOND / priced.step.total_ns,
        layer_s=max(_layer_ns(priced, rank) for rank in range(priced.leaf.pp)) / SECOND,
        tensor_parallel=priced.layout.tp,
    )


UNFAMILIAR = "anything like it"
"""Stands for the device of a run of which nothing like it was ever measured; printed as it is."""


def _is_familiar(request: Request) -> bool:
    """Whether bands earned on published runs say anything of this one: whole decoders, on devices
    whose kernels are those that ship or were measured on them."""
    if not isinstance(request.model, ModelSpec) or request.job.finetune is not None:
        return False
    from hardware_profiles.loader import catalog_names, load_device

    device = request.machine.device
    if request.kernel_basis == "measured":
        return True
    return device.name in catalog_names("device") and (
        load_device(device.name).kernels == device.kernels
    )


def _host(priced: Priced, request: Request) -> HostPrediction | None:
    """What is kept on the hosts, or None."""
    layout, request = priced.layout, request.offloading(priced.layout)
    spec, node = request.stack.offload, request.cluster.groups[0].node
    outputs, sent = hosted_bytes(request, layout)
    crossed = 2 * sent * layout.num_microbatches
    if outputs and not request.machine.offload.anything:
        devices = node.devices_per_node
        return HostPrediction(
            bytes_per_node=outputs * devices,
            capacity_bytes_per_node=host_capacity(request),
            link_bytes_per_step=crossed,
            link_bytes_per_node_per_step=crossed * devices,
        )
    if spec is None or not request.machine.offload.anything:
        return None
    hosts = priced.leaf.hosts
    crossing = [link_bytes(priced, r, request) + crossed for r in range(layout.pp)]
    capacity = host_capacity(request)
    if hosts is None or capacity is None:
        return None
    sizes = [host_bytes(priced.leaf, r, costs.chunks) for r, costs in enumerate(priced.ranks)]
    return HostPrediction(
        place="memory" if on_drives(request) is None else "drives",
        bytes_per_node=capacity - hosts.room + hosts.fullest(sizes),
        capacity_bytes_per_node=capacity,
        buffer_bytes_per_node=buffer_bytes_per_node(request),
        link_bytes_per_step=max(crossing),
        link_bytes_per_node_per_step=hosts.fullest(crossing),
    )


def _layer_ns(priced: Priced, rank: int) -> float:
    """Work of a rank per layer and microbatch."""
    bounds = priced.completion.bounds
    owned = priced.leaf.held(rank)
    layers = sum(bounds[j + 1] - bounds[j] for j in owned)
    return priced.ranks[rank].work_ns / max(1, layers)


def _beyond_measured(request: Request, slowest_mfu: float) -> bool:
    """Whether even the slow end of the band is beyond any published run on this device."""
    best = request.machine.device.best_run_mfu.get(request.job.precision)
    return best is not None and slowest_mfu > best.value


def _peak_name(request: Request) -> str:
    """The arithmetic that a device's peak is of, which MFU relates to."""
    return request.machine.product_dtypes[0]


def _peak_flops(request: Request) -> float:
    device, name = request.machine.device, _peak_name(request)
    if name not in device.peak_flops:
        raise InputError(
            f"{device.name} has no {name} peak: it cannot run a job with precision {name}",
            hint=did_you_mean(name, sorted(device.peak_flops)),
        )
    return device.peak_flops[name].si


def _price(request: Request, step_s: float) -> tuple[float | None, str | None]:
    """USD per step and where the rate is from: the node's, else that of its devices."""
    node = request.cluster.groups[0].node
    own, device = node.price_per_hour, node.device.price_per_hour
    if own is not None:
        rate, source = own.value * request.cluster.nodes, f"{own.value:g} USD/h per {node.name}"
        return rate * step_s / 3600, f"{source}: {own.source}"
    if device is None:
        return None, None
    source = f"{device.value:g} USD/h per {node.device.name}: {device.source}"
    return (
        device.value * request.devices * step_s / 3600,
        f"{source}; no list price of {node.name} is known",
    )


def _assumptions(request: Request) -> tuple[str, ...]:
    machine, device = request.machine, request.machine.device
    notes = list(request.workload.assumptions)
    if request.job.precision not in device.best_run_mfu:
        notes.append(f"no published {request.job.precision} training run on {device.name}")
    for dtype, constants in device.kernels.matmul.items():
        if constants.borrowed_from and dtype in machine.product_dtypes:
            notes.append(
                f"{dtype} matrix products of {device.name} are priced with the efficiencies of "
                f"{constants.borrowed_from}"
            )
    return tuple(notes)


def _time_terms(priced: Priced, request: Request) -> tuple[Term, ...]:
    """The step on its busiest rank: work by category, idle time, what follows the pipeline."""
    leaf, step, completion = priced.leaf, priced.step, priced.completion
    rank = max(range(leaf.pp), key=lambda r: (step.timeline.busy_ns[r], -r))
    if step.timeline.busy_ns[rank] > step.pipeline_ns:
        rank = step.critical_rank
    shard = shard_of(request.workload, priced.tables.configs)
    workload, machine = request.workload, request.machine
    totals = dict.fromkeys((*CATEGORIES, "pp_comm", "recompute", "host_link"), 0)
    names = priced.tables.kind_names
    pp = priced.tables.configs.pp

    def priced_alone(kind: LayerKind) -> LayerTimes:
        return price_layer(kind, shard, machine).in_pipeline(pp)

    times = {name: priced_alone(workload.kinds[name]) for name in names}
    parts: list[tuple[LayerTimes, int, tuple[int, ...]]] = []
    own_stages = leaf.held(rank)
    for j in own_stages:
        first, last = completion.bounds[j], completion.bounds[j + 1]
        for index, name in enumerate(names):
            count = leaf.counts[last][index] - leaf.counts[first][index]
            if count:
                parts.append((times[name], count, leaf.kinds[index]))
        embedding, head = leaf.ends_on(j)
        if embedding is not None:
            parts.append((priced_alone(workload.embedding), 1, embedding))
        if head is not None:
            parts.append((priced_alone(workload.head), 1, head))
    work = 0
    for layer, count, row in parts:
        own = 0
        for category, phases in layer.terms.items():
            ns = sum(int(np.rint(phases[p][0] * SECOND)) for p in ("forward", "backward"))
            totals[category] += ns * count
            own += ns
        own += row[Field.HOST_WAIT]
        totals["host_link"] += row[Field.HOST_WAIT] * count
        # What a layer costs beyond its own categories is FSDP traffic exposed per microbatch.
        totals["dp_comm"] += (row[Field.FORWARD] + row[Field.BACKWARD] - own) * count
        work += (row[Field.FORWARD] + row[Field.BACKWARD]) * count
    if leaf.shared is not None:
        totals["memory_bound"] += leaf.shared.rescaling_ns
        work += leaf.shared.rescaling_ns
    sent = sum(sum(sent_ns(leaf, j, *completion.bounds[j : j + 2])) for j in own_stages)
    totals["pp_comm"] = sent
    m, busy = leaf.microbatches, step.timeline.busy_ns[rank]
    apart = leaf.outside.ns if leaf.outside is not None else 0
    mode = completion.recompute[0][0]
    again = "host_link" if mode.startswith(OFFLOAD) else "recompute"
    again = "memory_bound" if mode == EVERYTHING else again
    totals[again] += busy // m - work - sent
    terms = [
        Term(name=name, seconds=ns * m / SECOND, detail=_DETAILS[name])
        for name, ns in totals.items()
        if ns
    ]
    for name, ns, detail in (
        (
            "pipeline_idle",
            step.pipeline_ns - busy,
            f"rank {rank}, the busiest, waits: fill, drain, transfers",
        ),
        ("gradient_reduction", step.gradient_ns, "exposed part, after the last backward"),
        ("optimizer_and_gather", step.update_ns, f"rank {step.update_rank}"),
        ("layers_outside", apart, "on all ranks at once, the stages as data parallelism"),
        ("synchronisation", step.sync_ns - apart, "gradient norm over all devices"),
    ):
        if ns:
            terms.append(Term(name=name, seconds=ns / SECOND, detail=detail))
    return tuple(terms)


_DETAILS = {
    "matmul": "matrix products",
    "attention": "fused attention kernels",
    "memory_bound": "norms, activations, rotary, softmax, loss, permutation",
    "launch": "kernels shorter than the host needs to launch them",
    "tp_comm": "tensor-parallel collectives, exposed",
    "cp_comm": "context-parallel exchange, exposed",
    "ep_comm": "expert all-to-all, exposed",
    "host_link": "activations on their way to the host and back, exposed",
    "dp_comm": "parameter gathers, gradient reductions and their copies per microbatch, exposed",
    "pp_comm": "transfers between pipeline stages that the rank waits for",
    "recompute": "forward work repeated in the backward",
}
