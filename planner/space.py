"""The space: every layout that the target stack could be asked for, and why some are removed.

A *mesh* fixes tp, sequence parallelism, cp (and its kind), pp, ep, etp and the microbatch size; a
*layout* adds the split of data parallelism into replicate and shard, the ZeRO stage, the schedule
and the number of virtual stages. Partition and recompute complete a layout; they are chosen inside
its leaf. Degrees are divisors, not powers of two only.

Nothing is dropped in silence: a mesh that breaks a rule takes all its layouts with it, and they
are counted under the rule's reason, so ``space_size = sum(removed) + priced``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from cost_models.configs import cp_kind_code
from cost_models.graph import CP_KINDS, Bools, Int64
from cost_models.layout import Schedule
from planner.errors import InputError
from planner.models.spec import AttentionSpec, LatentAttentionSpec, MlpSpec, MoeSpec
from planner.plan import Layout
from planner.request import Request
from planner.specs import ConstraintSpec

COLUMNS = ("tp", "sp", "cp", "cp_kind", "pp", "ep", "etp", "microbatch", "dp")


@dataclass(frozen=True)
class Meshes:
    """Meshes as arrays of one length, with the number of layouts of each in ``weight``."""

    tp: Int64
    sp: Int64
    cp: Int64
    cp_kind: Int64
    pp: Int64
    ep: Int64
    etp: Int64
    microbatch: Int64
    dp: Int64
    weight: Int64

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: Int64 | Bools) -> Meshes:
        """The meshes at ``index``."""
        return Meshes(**{name: getattr(self, name)[index] for name in (*COLUMNS, "weight")})


@dataclass
class Space:
    """Meshes that survive the rules, and the layouts removed so far by reason."""

    meshes: Meshes
    size: int
    removed: Counter[str] = field(default_factory=Counter)


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors of a positive integer in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def virtual_stage_options(request: Request, pp: int) -> tuple[tuple[Schedule, int], ...]:
    """Schedules with their numbers of virtual stages per rank for a pipeline of ``pp``."""
    if pp == 1:
        return (("1f1b", 1),)
    options: list[tuple[Schedule, int]] = []
    for schedule in request.stack.schedules:
        if schedule != "interleaved":
            options.append((schedule, 1))
            continue
        layers = request.model.layer_count
        most = (layers + 2) // pp if request.stack.uneven_stages else layers // pp
        options += (("interleaved", vpp) for vpp in range(2, most + 1))
    return tuple(options)


def data_parallel_options(request: Request, dp: int) -> tuple[tuple[int, int, int], ...]:
    """``(dp_replicate, dp_shard, zero_stage)`` for ``dp`` data-parallel ranks.

    Stage 0 shards nothing, so all ranks replicate. The other stages shard over every divisor
    where the stack can do hybrid sharding, else over all ranks.
    """
    options: list[tuple[int, int, int]] = []
    for stage in request.stack.zero_stages:
        if stage == 0:
            options.append((dp, 1, 0))
        elif request.stack.hybrid_sharding:
            options += ((dp // shard, shard, stage) for shard in divisors(dp))
        else:
            options.append((1, dp, stage))
    return tuple(options)


def enumerate_meshes(request: Request) -> Meshes:
    """All meshes of the space, before any rule."""
    devices, stack = request.devices, request.stack
    experts = request.workload.expert_count
    sp_options = {"optional": (0, 1), "always": (1,), "never": (0,)}[stack.sequence_parallel]
    kinds = [cp_kind_code(kind) for kind in stack.cp_kinds] or [cp_kind_code("p2p")]
    weights: dict[tuple[int, int], int] = {}
    blocks: list[Int64] = []
    eps = divisors(experts) if experts else (1,)
    for tp in divisors(devices):
        etps = divisors(tp) if experts and stack.expert_tensor_parallel else (1,)
        for cp in divisors(devices // tp):
            for pp in divisors(devices // tp // cp):
                dp = devices // (tp * cp * pp)
                key = (dp, pp)
                if key not in weights:
                    weights[key] = len(data_parallel_options(request, dp)) * len(
                        virtual_stage_options(request, pp)
                    )
                batch, rest = divmod(request.global_batch, dp)
                microbatches = divisors(batch) if batch and not rest else (1,)
                blocks.append(
                    _product(
                        (tp,), sp_options if tp > 1 else (0,), (cp,),
                        kinds if cp > 1 else kinds[:1], (pp,), eps, etps, microbatches, (dp,),
                        (weights[key],),
                    )
                )  # fmt: skip
    table = np.concatenate(blocks)
    return Meshes(*(np.ascontiguousarray(table[:, i]) for i in range(table.shape[1])))


def _product(*axes: Sequence[int]) -> Int64:
    """All combinations of the axes' values as rows, the last axis fastest."""
    grids = np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    return np.stack([grid.ravel() for grid in grids], axis=1)


def build_space(request: Request) -> Space:
    """Enumerate, apply every rule of the request, and count what each removes."""
    meshes = enumerate_meshes(request)
    space = Space(meshes, int(meshes.weight.sum()))
    for reason, broken in mesh_rules(request):
        bad = broken(space.meshes)
        if bad.any():
            space.removed[reason] += int(space.meshes.weight[bad].sum())
            space.meshes = space.meshes.take(~bad)
    return space


Rule = tuple[str, Callable[[Meshes], Bools]]


def mesh_rules(request: Request) -> Iterator[Rule]:
    """Reasons to remove a mesh, in the order in which they are counted."""
    yield from _constraint_rules(request)
    yield from _batch_rules(request)
    yield from _model_rules(request)
    yield from _stack_rules(request)


def _constraint_rules(request: Request) -> Iterator[Rule]:
    limits = request.job.constraints
    for name in ("tp", "cp", "pp", "ep", "etp", "microbatch_size"):
        column = "microbatch" if name == "microbatch_size" else name
        for reason, broken in degree_limits(limits.fix, limits.max, limits.forbid, name):
            yield reason, _on(column, broken)
    if limits.sequence_parallel is not None:
        wanted = int(limits.sequence_parallel)
        yield (
            f"asked for sequence_parallel = {bool(wanted)}",
            lambda m: (m.tp > 1) & (m.sp != wanted),
        )


def _on(column: str, broken: Callable[[Int64], Bools]) -> Callable[[Meshes], Bools]:
    return lambda meshes: broken(getattr(meshes, column))


def degree_limits(
    fix: dict[str, int], most: dict[str, int], forbid: tuple[str, ...], name: str
) -> Iterator[tuple[str, Callable[[Int64], Bools]]]:
    """The user's limits on one degree as rules over its values."""
    if name in fix:
        value = fix[name]
        yield f"asked for {name} = {value}", lambda x: x != value
    if name in most:
        limit = most[name]
        yield f"asked for {name} <= {limit}", lambda x: x > limit
    if name in forbid:
        yield f"asked for no {name}", lambda x: x > (0 if name == "zero_stage" else 1)


def _batch_rules(request: Request) -> Iterator[Rule]:
    batch = request.global_batch
    yield (
        f"the global batch of {batch:,} is not a multiple of dp x microbatch",
        lambda m: batch % (m.dp * m.microbatch) != 0,
    )


def _model_rules(request: Request) -> Iterator[Rule]:
    model, sequence = request.model, request.sequence
    blocks = tuple(model.blocks.values())
    for heads in sorted({b.mixer.heads for b in blocks if b.mixer is not None}):
        yield f"{heads} attention heads do not split over tp", _splits(heads, lambda m: m.tp)
    for kv in sorted({b.mixer.kv_heads for b in blocks if isinstance(b.mixer, AttentionSpec)}):
        yield (
            f"{kv} KV heads neither split nor replicate over tp",
            lambda m, kv=kv: (kv % m.tp != 0) & (m.tp % kv != 0),  # type: ignore[misc]
        )
    feed_forwards = [b.feed_forward for b in blocks]
    for width in sorted({f.intermediate for f in feed_forwards if isinstance(f, MlpSpec)}):
        yield f"feed-forward width {width} does not split over tp", _splits(width, lambda m: m.tp)
    moes = [f for f in feed_forwards if isinstance(f, MoeSpec)]
    for width in sorted({f.intermediate for f in moes}):
        yield f"expert width {width} does not split over etp", _splits(width, lambda m: m.etp)
    for width in sorted({f.shared_intermediate for f in moes if f.shared_intermediate}):
        yield f"shared expert width {width} does not split over tp", _splits(width, lambda m: m.tp)
    for experts in sorted({f.experts for f in moes}):
        yield f"{experts} experts do not split over ep", _splits(experts, lambda m: m.ep)
    yield (
        "ep x etp does not divide dp x cp x tp",
        lambda m: (m.dp * m.cp * m.tp) % (m.ep * m.etp) != 0,
    )
    yield (
        f"sequence of {sequence} does not split over cp (twice, for a balanced causal mask)",
        lambda m: (m.cp > 1) & (sequence % (2 * m.cp) != 0),
    )
    yield (
        f"sequence of {sequence} does not split over cp x tp (sequence parallelism)",
        lambda m: (m.sp == 1) & (sequence % (m.cp * m.tp) != 0),
    )
    yield (
        f"more pipeline stages than the {model.layer_count} layers can fill",
        lambda m: m.pp > model.layer_count + (2 if request.stack.uneven_stages else 0),
    )
    exchange = cp_kind_code("a2a")
    for heads in sorted({_exchanged_heads(b.mixer) for b in blocks if b.mixer is not None}):
        yield (
            f"{heads} (KV) heads do not split over tp x cp (all-to-all context parallelism)",
            lambda m, heads=heads: (
                (m.cp > 1)  # type: ignore[misc]
                & (m.cp_kind == exchange)
                & (heads % (m.tp * m.cp) != 0)
            ),
        )


def _exchanged_heads(mixer: AttentionSpec | LatentAttentionSpec) -> int:
    return mixer.kv_heads if isinstance(mixer, AttentionSpec) else mixer.heads


def _splits(size: int, ways: Callable[[Meshes], Int64]) -> Callable[[Meshes], Bools]:
    return lambda meshes: size % ways(meshes) != 0


def _stack_rules(request: Request) -> Iterator[Rule]:
    stack = request.stack
    label = f"{stack.name} {stack.version}"
    if not stack.cp_kinds:
        yield f"{label} has no context parallelism", lambda m: m.cp > 1
    if stack.tensor_parallel_max is not None:
        most = stack.tensor_parallel_max
        yield f"{label} splits tensors at most {most} ways", lambda m: m.tp > most
    for name in stack.rules:
        if name in STACK_RULES:
            reason, broken = STACK_RULES[name]
            if reason is not None and _concerns(name, request):
                yield f"{label}: {reason}", broken


def _concerns(rule: str, request: Request) -> bool:
    return request.workload.expert_count > 0 or rule not in {
        "moe_with_tp_needs_sequence_parallel",
        "no_experts",
    }


STACK_RULES: dict[str, tuple[str | None, Callable[[Meshes], Bools]]] = {
    "moe_with_tp_needs_sequence_parallel": (
        "experts with tp need sequence parallelism",
        lambda m: (m.tp > 1) & (m.sp == 0),
    ),
    "no_experts": ("no mixture of experts", lambda m: m.tp >= 1),
}
"""Rules on meshes by the name that a stack's YAML uses."""


@dataclass(frozen=True)
class Layouts:
    """Layouts as arrays of one length; ``mesh`` indexes the meshes they came from."""

    mesh: Int64
    dp_replicate: Int64
    dp_shard: Int64
    zero_stage: Int64
    schedule: Int64
    """Index into :data:`SCHEDULE_NAMES`."""
    vpp: Int64

    def __len__(self) -> int:
        return len(self.mesh)

    def take(self, index: Int64 | Bools) -> Layouts:
        """The layouts at ``index``."""
        return Layouts(
            self.mesh[index], self.dp_replicate[index], self.dp_shard[index],
            self.zero_stage[index], self.schedule[index], self.vpp[index],
        )  # fmt: skip


SCHEDULE_NAMES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")


def expand(request: Request, meshes: Meshes) -> Layouts:
    """All layouts of ``meshes``, before any rule."""
    data: dict[int, Int64] = {}
    stages: dict[int, Int64] = {}
    blocks: list[Int64] = []
    for dp, pp in set(zip(meshes.dp.tolist(), meshes.pp.tolist(), strict=True)):
        if dp not in data:
            data[dp] = np.array(data_parallel_options(request, dp), dtype=np.int64)
        if pp not in stages:
            stages[pp] = np.array(
                [(SCHEDULE_NAMES.index(s), v) for s, v in virtual_stage_options(request, pp)],
                dtype=np.int64,
            ).reshape(-1, 2)
        index = np.flatnonzero((meshes.dp == dp) & (meshes.pp == pp))
        left, right = data[dp], stages[pp]
        shape = (len(index), len(left), len(right))
        block = np.empty((*shape, 6), dtype=np.int64)
        block[..., 0] = index[:, None, None]
        block[..., 1:4] = left[None, :, None, :]
        block[..., 4:6] = right[None, None, :, :]
        blocks.append(block.reshape(-1, 6))
    table = np.concatenate(blocks) if blocks else np.empty((0, 6), dtype=np.int64)
    table = table[np.lexsort(table.T[::-1])]
    return Layouts(*(np.ascontiguousarray(table[:, i]) for i in range(6)))


LayoutRule = tuple[str, Callable[[Meshes, Layouts], Bools]]


def layout_rules(request: Request) -> Iterator[LayoutRule]:
    """Reasons to remove a layout. ``meshes`` are already gathered to the layouts' length."""
    limits, stack, batch = request.job.constraints, request.stack, request.global_batch
    label = f"{stack.name} {stack.version}"
    for name in ("dp_replicate", "dp_shard", "zero_stage", "vpp"):
        for reason, broken in degree_limits(limits.fix, limits.max, limits.forbid, name):
            yield reason, lambda _, x, name=name, broken=broken: broken(getattr(x, name))  # type: ignore[misc]
    if limits.schedule is not None:
        wanted = SCHEDULE_NAMES.index(limits.schedule)
        yield (
            f"asked for schedule {limits.schedule}",
            lambda m, x: (m.pp > 1) & (x.schedule != wanted),
        )
    yield (
        "ep x etp does not divide dp_shard x cp x tp",
        lambda m, x: (
            (x.dp_shard * m.cp * m.tp) % (m.ep * m.etp) != 0
            if request.workload.expert_count
            else np.zeros(len(x), dtype=bool)
        ),
    )
    yield (
        "sharding over one rank is ZeRO stage 0",
        lambda m, x: (x.zero_stage > 0) & (x.dp_shard * m.cp == 1) & (0 in stack.zero_stages),
    )
    interleaved = SCHEDULE_NAMES.index("interleaved")
    if "interleaved_needs_multiple_of_pp" in stack.rules:
        yield (
            f"{label}: interleaving needs a multiple of pp microbatches",
            lambda m, x: (
                (x.schedule == interleaved) & ((batch // (m.dp * m.microbatch)) % m.pp != 0)
            ),
        )
    yield (
        "no even split into virtual stages, the first and last lighter at most",
        lambda m, x: (x.schedule == interleaved) & ~_even_enough(request, m.pp * x.vpp),
    )
    if "zero_0_is_replicate_only" in stack.rules:
        yield (
            f"{label}: replication alone (DDP) does not combine with tp, cp or pp",
            lambda m, x: (x.zero_stage == 0) & (m.tp * m.cp * m.pp > 1) & (m.dp > 1),
        )
    if "no_zero_3_with_pipeline" in stack.rules:
        yield (
            f"{label}: parameters stay gathered under a pipeline",
            lambda m, x: (x.zero_stage == 3) & (m.pp > 1),
        )
    if not stack.uneven_stages:
        layers = request.model.layer_count
        yield (
            f"{label}: {layers} layers do not split evenly over the stages",
            lambda m, x: layers % (m.pp * x.vpp) != 0,
        )


def _even_enough(request: Request, stages: Int64) -> Bools:
    """Whether equal virtual stages with a lighter first and last one can hold the layers."""
    layers = request.model.layer_count
    height = -(-layers // stages)
    spare = stages * height - layers
    result: Bools = spare <= (2 * height if request.stack.uneven_stages else 0)
    return result


def cp_kind_name(code: int) -> str:
    """Name of a context-parallel kind."""
    return CP_KINDS[code]


def check_layout(request: Request, layout: Layout) -> None:
    """Raise :class:`InputError` with the reason where the space would remove this layout.

    The user's constraints are not applied: they bound the search, not a layout that is asked about.
    """
    free = replace(request, job=request.job.model_copy(update={"constraints": ConstraintSpec()}))

    def one(value: int) -> Int64:
        return np.array([value], dtype=np.int64)

    meshes = Meshes(
        tp=one(layout.tp), sp=one(layout.sequence_parallel), cp=one(layout.cp),
        cp_kind=one(cp_kind_code(layout.cp_kind)), pp=one(layout.pp), ep=one(layout.ep),
        etp=one(layout.etp), microbatch=one(layout.microbatch_size),
        dp=one(layout.dp_replicate * layout.dp_shard), weight=one(1),
    )  # fmt: skip
    for reason, broken in mesh_rules(free):
        if broken(meshes).any():
            raise InputError(f"layout {_brief(layout)}: {reason}")
    layouts = Layouts(
        mesh=one(0), dp_replicate=one(layout.dp_replicate), dp_shard=one(layout.dp_shard),
        zero_stage=one(layout.zero_stage), schedule=one(SCHEDULE_NAMES.index(layout.schedule)),
        vpp=one(layout.vpp),
    )  # fmt: skip
    if layout.zero_stage not in request.stack.zero_stages:
        raise InputError(
            f"{request.stack.name} has no ZeRO stage {layout.zero_stage}; "
            f"it has {', '.join(map(str, request.stack.zero_stages))}"
        )
    if layout.pp > 1 and layout.schedule not in request.stack.schedules:
        raise InputError(
            f"{request.stack.name} has no schedule {layout.schedule}; "
            f"it has {', '.join(request.stack.schedules)}"
        )
    for reason, layout_broken in layout_rules(free):
        if layout_broken(meshes, layouts).any() and not reason.startswith("no even split"):
            raise InputError(f"layout {_brief(layout)}: {reason}")


def _brief(layout: Layout) -> str:
    return (
        f"tp {layout.tp} cp {layout.cp} pp {layout.pp} vpp {layout.vpp} ep {layout.ep} "
        f"etp {layout.etp} dp {layout.dp_replicate}x{layout.dp_shard} "
        f"microbatch {layout.microbatch_size}"
    )
