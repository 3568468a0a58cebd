"""Tiny random requests from a seed: model, cluster, job, stack, and a device memory that binds.

Shapes are small so that brute force can look at everything; speeds, links and memory are the
shipped profiles' with one or two numbers changed, so that every kind of layout wins somewhere.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import ceil
from random import Random
from typing import Any

from cost_models.layout import DELAYED, NAMED, OVER_PIPELINE
from hardware_profiles.loader import load_node, load_stack
from hardware_profiles.schema import (
    ClusterSpec,
    Kind,
    LinkSpec,
    NetworkTier,
    NodeGroup,
    NodeSpec,
    Sourced,
    StackSpec,
)
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LayerRun,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from planner.request import Request
from planner.specs import ConstraintSpec, JobSpec
from tests.oracle.brute_prices import Prices, price_all
from tests.oracle.brute_sums import apart_of, chunks_of, rank_peak, work_per_rank
from tests.oracle.layouts import (
    Layout,
    Option,
    every_layout,
    partitions,
    parts,
    recompute_choices,
    rounds,
)
from tests.oracle.timeline import held

MOST_WORK = 14_000
"""Completions of an instance at most (layouts x partitions x recompute options)."""
NODES = ("dgx-h100", "dgx-a100", "rtx4090-x4", "dgx-b200")
STACKS = ("megatron-core", "torchtitan", "megatron-lm-2022")


def number(value: float, unit: str = "") -> Sourced:
    """A made-up number."""
    return Sourced(value=value, unit=unit, kind=Kind.ASSUMED, source="test")


def scaled_link(link: LinkSpec, factor: float) -> LinkSpec:
    """``link`` with every time multiplied by ``factor``."""
    simple = link.simple_latency
    return link.model_copy(
        update={
            "bandwidth": number(link.bandwidth.si / factor, "B/s"),
            "latency": number(link.latency.si * factor, "s"),
            "simple_latency": None if simple is None else number(simple.si * factor, "s"),
            "collectives": tuple(
                each.model_copy(
                    update={
                        "latency_s": each.latency_s * factor,
                        "simple_latency_s": each.simple_latency_s * factor,
                        "ll_bandwidth": each.ll_bandwidth / factor,
                        "bandwidth": each.bandwidth / factor,
                    }
                )
                for each in link.collectives
            ),
        }
    )


@lru_cache(maxsize=8)
def _node(name: str) -> NodeSpec:
    return load_node(name)


@lru_cache(maxsize=8)
def _stack(name: str) -> StackSpec:
    return load_stack(name)


def draw_cluster(rng: Random) -> ClusterSpec:
    """1 to 8 devices in one or several nodes, with fast or slow links."""
    devices = rng.choice((1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8, 8))
    per_node = rng.choice([d for d in range(1, devices + 1) if devices % d == 0])
    node = _node(rng.choice(NODES))
    node = node.model_copy(
        update={
            "devices_per_node": per_node,
            "nics": min(node.nics, per_node),
            "scale_up": scaled_link(node.scale_up, rng.choice((0.3, 1.0, 1.0, 5.0, 40.0))),
            "scale_out": scaled_link(node.scale_out, rng.choice((0.3, 1.0, 4.0, 30.0))),
        }
    )
    tiers: tuple[NetworkTier, ...] = ()
    if rng.random() < 0.3:
        tiers = (
            NetworkTier(name="leaf", nodes=2, latency_s=1e-6),
            NetworkTier(name="spine", oversubscription=rng.choice((1.0, 3.0)), latency_s=3e-6),
        )
    count = devices // per_node
    return ClusterSpec(name="tiny", groups=(NodeGroup(node=node, count=count),), tiers=tiers)


def draw_model(rng: Random, layers: int) -> ModelSpec:
    """A decoder of ``layers`` layers: dense, MoE, or both kinds."""
    heads = rng.choice((1, 2, 3, 4, 4, 5, 6, 8, 8, 12))
    kv = rng.choice([d for d in range(1, heads + 1) if heads % d == 0])
    hidden = rng.choice((48, 96, 256, 768, 1536, 3072))
    head_dim = rng.choice((8, 32, 64))
    mixer = AttentionSpec(heads=heads, kv_heads=kv, head_dim=head_dim, qkv_bias=rng.random() < 0.3)
    width = rng.choice((96, 120, 210, 1024, 4096, 8192))
    dense = BlockSpec(mixer=mixer, feed_forward=MlpSpec(intermediate=width, gated=True))
    experts = rng.choice((2, 3, 4, 6, 8))
    moe = BlockSpec(
        mixer=mixer,
        feed_forward=MoeSpec(
            experts=experts, top_k=rng.randint(1, 2), intermediate=rng.choice((30, 64, 256, 1024)),
            shared_intermediate=rng.choice((0, 0, 60)),
        ),
    )  # fmt: skip
    shape = rng.choice(("dense", "dense", "dense", "moe", "mixed"))
    if layers == 1 and shape == "mixed":
        shape = "moe"
    first = rng.randint(1, layers - 1) if shape == "mixed" else 0
    runs = {
        "dense": (LayerRun(block="dense", count=layers),),
        "moe": (LayerRun(block="moe", count=layers),),
        "mixed": (
            LayerRun(block="dense", count=max(first, 1)),
            LayerRun(block="moe", count=max(layers - first, 1)),
        ),
    }[shape]
    blocks = {run.block: {"dense": dense, "moe": moe}[run.block] for run in runs}
    return ModelSpec(
        name="tiny",
        family="tiny",
        source="test",
        hidden=hidden,
        vocab=rng.choice((64, 500, 500, 8_000, 8_000, 50_257, 200_000)),
        tied_embeddings=rng.random() < 0.4,
        norm="rms",
        norm_bias=False,
        blocks=blocks,
        layers=runs,
    )


def draw_stack(rng: Random, moe: bool, name: str | None = None) -> StackSpec:
    """A shipped stack, often with one of its limits moved; of those drawn, or a given one."""
    drawn = rng.choice(STACKS[:2] if moe else STACKS)
    stack = _stack(name or drawn)
    changes: dict[str, Any] = {
        "launch_overhead": number(rng.choice((0.05, 0.5, 5.0, 50.0)), "us"),
        "expert_sync": number(rng.choice((0.0, 20.0)), "us"),
        "gradient_bucket_bytes": number(rng.choice((0.1, 10.0, 160.0)), "MB"),
    }
    if rng.random() < 0.25:
        changes["recompute_per_stage"] = True
        if rng.random() < 0.5:
            changes["recompute_layer_count"] = False
    if rng.random() < 0.25:
        changes["uneven_stages"] = not stack.uneven_stages
    if rng.random() < 0.25:
        changes["schedules"] = rng.choice(
            (("gpipe",), ("gpipe", "1f1b"), ("gpipe", "1f1b", "interleaved"), ("interleaved",))
        )
    if rng.random() < 0.3:
        changes["hybrid_sharding"] = not stack.hybrid_sharding
    if rng.random() < 0.25:
        changes["zero_stages"] = rng.choice(((0,), (1,), (0, 1, 2, 3), (2,), (0, 3), (1, 2)))
    if rng.random() < 0.3:
        changes["cp_kinds"] = rng.choice(((), ("all_gather",), ("a2a", "p2p")))
    # Drawn apart, so that the instances that follow stay what they were.
    own = Random(f"{name} {changes['launch_overhead'].value} {sorted(changes)} {moe}")
    if own.random() < 0.4:
        changes["reshard_group"] = own.choice((2, 3, "node", "any"))
    if own.random() < 0.4:
        changes["replica_reduction"] = "step"
    if own.random() < 0.4:
        kinds = changes.get("cp_kinds", stack.cp_kinds)
        levels = (("a2a_p2p",), ("a2a_all_gather",), ("a2a_p2p", "a2a_all_gather"))
        two = Random(f"levels of {name} {sorted(changes)} {kinds}").choice(levels)
        changes["cp_kinds"] = (*(kind for kind in kinds if kind not in two), *two)
    if own.random() < 0.3:
        changes["cp_kinds_of"] = {"sliding windows": ("a2a", "all_gather")}
    if own.random() < 0.3:
        moved = {"weight_wire_bytes_per_64": 65, "gradient_wire_bytes_per_64": 33}
        moved = own.choice((moved, {"hierarchical_gathers": True}))
        changes["layers"] = stack.layers.model_copy(update=moved)
    if own.random() < 0.5:
        known = changes.get("schedules", stack.schedules)
        others = (name for name in NAMED if name not in (*known, *OVER_PIPELINE, *DELAYED))
        more = [name for name in others if own.random() < 0.5]
        changes["schedules"] = (*known, *more)
    if own.random() < 0.3:
        changes["recompute_groups"] = own.choice((2, 3))
    if own.random() < 0.3:
        changes["keeps_outputs"] = True
    if stack.layers.vocabulary == "over_pipeline":
        # Its schedules are no other stack's, and it has no others.
        changes |= {"schedules": stack.schedules, "layers": stack.layers}
    if own.random() < 0.6:
        changes["rounds"] = own.choice(("pp", "equal", "at_least_pp", "at_least_pp", "any"))
    if own.random() < 0.4:
        changes["deferred_head_gradients"] = own.choice((1, 2, 3, 50))
    if stack.outside_layers:
        # What they need stays: equal stages that all recompute alike.
        for fixed in ("uneven_stages", "recompute_per_stage", "recompute_layer_count"):
            changes.pop(fixed, None)
    per_stage = changes.get("recompute_per_stage", stack.recompute_per_stage)
    if per_stage and Random(f"mixed {name} {sorted(changes)} {moe}").random() < 0.5:
        changes["recompute_mixed"] = True
    apart = Random(f"refused {name} {sorted(changes)} {moe}")
    if apart.random() < 0.2:
        refused = apart.choice((("core_attn",), ("layernorm", "moe_act"), ("mlp",)))
        changes["recompute_refused"] = dict.fromkeys(("bf16", "fp16", "fp32", "fp8"), refused)
    return stack.model_copy(update=changes)


def draw_constraints(rng: Random, devices: int) -> ConstraintSpec:
    """The user's limits: often a pipeline, sometimes others."""
    fix: dict[str, int] = {}
    most: dict[str, int] = {}
    forbid: list[str] = []
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    if rng.random() < 0.5:
        fix["pp"] = rng.choice(divisors)
    if rng.random() < 0.1:
        fix[rng.choice(("tp", "cp", "dp_shard", "dp_replicate", "ep", "etp"))] = rng.choice(
            divisors
        )
    if rng.random() < 0.15:
        fix["microbatch_size"] = rng.choice((1, 2, 3))
    if rng.random() < 0.1:
        fix["zero_stage"] = rng.choice((0, 1, 2, 3))
    if rng.random() < 0.2:
        most[rng.choice(("tp", "cp", "ep", "etp", "pp", "dp_shard", "vpp"))] = rng.choice((1, 2, 4))
    if rng.random() < 0.2:
        forbid.append(rng.choice(("tp", "cp", "ep", "zero_stage", "vpp", "dp_replicate")))
    return ConstraintSpec(
        fix=fix,
        max=most,
        forbid=tuple(forbid),
        schedule=rng.choice(("gpipe", "1f1b", "interleaved")) if rng.random() < 0.12 else None,
        recompute=rng.choice(("none", "selective", "full")) if rng.random() < 0.1 else None,
        sequence_parallel=rng.random() < 0.5 if rng.random() < 0.1 else None,
    )


def _limit_rounds(limits: ConstraintSpec, rng: Random) -> ConstraintSpec:
    """The same with a limit on the size of rounds, or two."""
    size, name = rng.randint(1, 6), "round_size"
    changes: dict[str, Any] = {"forbid": (*limits.forbid, name)}
    if rng.random() < 0.9:
        changes = {"max": limits.max | {name: size}}
        if rng.random() < 0.5:
            changes = {"fix": limits.fix | {name: rng.randint(1, 6)}}
            changes |= {"max": limits.max | {name: size}} if rng.random() < 0.2 else {}
    return limits.model_copy(update=changes)


def _candidate(rng: Random, stack_name: str | None) -> Request:
    cluster = draw_cluster(rng)
    layers = rng.choice((1, 2, 3, 4, 5, 5, 6, 7, 7, 8))
    model = draw_model(rng, layers)
    moe = any(isinstance(b.feed_forward, MoeSpec) for b in model.blocks.values())
    stack = draw_stack(rng, moe, stack_name)
    job = JobSpec(
        sequence_length=rng.choice((8, 30, 64, 97, 128, 210, 512)),
        global_batch=rng.choice((1, 2, 4, 5, 6, 7, 8, 8, 11, 12, 12, 16, 24)),
        precision=rng.choice(("bf16", "bf16", "fp32")),
        optimizer=rng.choice(("adamw", "adamw", "sgd")),
        stack=stack.name,
        allow_recompute=rng.random() < 0.9,
        constraints=draw_constraints(rng, cluster.devices),
        tolerance=0.0,
    )
    # Drawn apart, as in draw_stack.
    own = Random(f"{job.model_dump_json()} {layers} {cluster.devices}")
    if stack.free_virtual_stages and stack.uneven_stages and own.random() < 0.2:
        free = job.constraints.model_copy(update={"virtual_stages": "free"})
        job = job.model_copy(update={"constraints": free})
    if "interleaved" in stack.schedules and own.random() < 0.1:
        limited = _limit_rounds(job.constraints, own)
        job = job.model_copy(update={"constraints": limited})
    if "multi-token prediction" not in stack.lacks and own.random() < 0.2:
        last = model.layers[-1].block
        model = model.model_copy(update={"mtp": (LayerRun(block=last, count=own.choice((1, 2))),)})
    return Request(model, cluster, job, stack)


def _work(request: Request, layouts: list[Layout]) -> int:
    options = len(recompute_choices(request))
    total = 0
    for x in layouts:
        count = len(_sizes(request, x))
        free = request.stack.recompute_per_stage and x.vpp == 1
        total += count * (options**x.pp if free else options) * len(rounds(request, x))
    return total


def _middle(sizes: list[list[int]]) -> list[int]:
    return min(sizes, key=lambda each: (max(each), each))


def _needs(request: Request, x: Layout, prices: Prices, sizes: list[int], option: Option) -> int:
    """Bytes that the fullest device needs."""
    m = request.global_batch // (x.dp * x.microbatch)
    before, inside, behind = parts(request, x.outside)
    apart = apart_of(prices, before, behind, option[0]) if x.outside else None
    chunks = chunks_of(prices, x, m, sizes, (option,) * x.pp, inside.start)
    own = [[chunks[j] for j in held(x.schedule, x.pp, x.vpp, rank)] for rank in range(x.pp)]
    return max(rank_peak(prices, x, m, rank, each, apart=apart) for rank, each in enumerate(own))


def capacity_of(request: Request, layouts: list[Layout], rng: Random) -> int | None:
    """Device memory: below what the thriftiest layout needs, just what a quick one needs with some
    partition and recomputation, or plenty."""
    sample = layouts if len(layouts) <= 40 else rng.sample(layouts, 40)
    options = recompute_choices(request)
    if not sample or not options:
        return None
    priced = list(zip(sample, price_all(request, sample), strict=True))
    fixed = min(prices.fixed for _, prices in priced)
    kind = rng.random()
    if 0.3 <= kind < 0.87:
        priced.sort(key=lambda item: work_per_rank(request, *item))
        x, prices = rng.choice(priced[: 1 + len(priced) // 4])
        every = _sizes(request, x)
        sizes = _middle(every) if rng.random() < 0.6 else rng.choice(every)
        partial = [option for option in options if option[0] != "full"]
        option = rng.choice(partial if partial and rng.random() < 0.3 else options)
        need = _needs(request, x, prices, sizes, option)
        return need + int((need - fixed) * rng.choice((0.0, 0.0, 0.01, 0.05)))
    thrifty = [
        _needs(request, x, prices, _middle(_sizes(request, x)), option)
        for x, prices in priced
        for option in (options[0], options[-1])
    ]
    if kind < 0.3:
        return fixed + int((min(thrifty) - fixed) * rng.uniform(0.3, 0.97))
    return fixed + 2 * (max(thrifty) - fixed)


def _sizes(request: Request, x: Layout) -> list[list[int]]:
    uneven = request.stack.uneven_stages
    layers, free = request.model.layer_count - x.outside, request.free_stages
    return partitions(layers, x.schedule, x.pp, x.vpp, uneven, free)


def draw(seed: int, stack: str | None = None) -> Request:
    """The request of a seed; always the same one. ``stack`` is a shipped one instead of a drawn."""
    rng = Random(seed)
    while True:
        request = _candidate(rng, stack)
        layouts = list(every_layout(request))
        if _work(request, layouts) > MOST_WORK:
            continue
        if not layouts and rng.random() < 0.7:
            continue
        usable = capacity_of(request, layouts, rng)
        margin = Random(f"margin {seed}").choice((0.0, 0.0, 0.037))
        capacity = None if usable is None else ceil(usable * (1 + Fraction(str(margin))))
        job = request.job.model_copy(update={"memory_margin": margin})
        return replace(request, job=job, capacity_bytes=capacity)
