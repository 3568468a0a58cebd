"""Bytes of a step that cross a device's link to its host."""

from __future__ import annotations

from cost_models import offload
from cost_models.activation_offload import moved_bytes
from cost_models.configs import shard_of
from cost_models.graph import LayerKind
from cost_models.host_room import extra_bytes, matrix_elements, shard_elements
from cost_models.orthogonalise import momentum_bytes
from cost_models.recompute import group_of, in_parts, keeps_inputs
from planner.priced import Priced
from planner.request import Request


def link_bytes(priced: Priced, rank: int, request: Request) -> int:
    """Of a device of pipeline rank ``rank``, both directions.

    Gradients leave and weights come back once a step, or gradients leave with each reduction, or
    state comes and leaves; Muon's momentum comes and leaves with each reduction; weights that live
    on the host come for each forward and each backward; layer inputs and modules' inputs leave and
    come with each microbatch.
    """
    spec, layout, machine = request.stack.offload, priced.layout, request.machine
    assert spec is not None
    trained, frozen = _elements(priced, rank)
    each_update = offload.link_bytes(spec, machine.rules.streamed_bytes)
    leaves = machine.offload.optimizer or machine.offload.parameters
    share = offload.crossing_share(machine.offload.optimizer_per_1000)
    crossing = round(trained * each_update * share) if leaves else 0
    crossing += 2 * _extra(priced, rank, request) if machine.rules.streams_extra else 0
    crossing += _momentum(priced, rank, request) * layout.num_microbatches
    each_pass = 0
    if machine.offload.parameters:
        fetched = (trained + frozen) * (spec.fetch_bytes or machine.rules.gather_bytes)
        # Without resharding weights come for the forward alone; under a pipeline once per step, or
        # for the passes that follow a forward.
        between = layout.zero_stage == 3 and layout.pp > 1 and machine.rules.keeps_after_backward
        times = layout.num_microbatches if layout.zero_stage == 3 or layout.pp == 1 else 1
        gathers = times * (2 if layout.zero_stage == 3 else 1)
        crossing += fetched * (times + 1 if between else gathers)
        once = machine.rules.reduces_last_backward or between
        crossing += trained * spec.reduced_bytes * (1 if once else times)
    shard = shard_of(request.workload, priced.tables.configs)
    for part in layout.stages[rank].recompute if machine.offload.checkpoints else ():
        if keeps_inputs(part.mode):
            size = int(request.workload.kinds[part.kind].boundary_bytes(shard)[0])
            size = -(-size // int(shard.input_parts[0])) if in_parts(part.mode) else size
            each_pass += -(-part.layers // group_of(part.mode)) * size
    each_pass += _input_bytes(priced, rank, request)
    return crossing + 2 * each_pass * layout.num_microbatches


def _elements(priced: Priced, rank: int) -> tuple[int, int]:
    """Of a device's shard: trained, and not trained."""
    workload, configs = priced.tables.workload, priced.tables.configs
    shard = shard_of(workload, configs)

    def of(kind: LayerKind) -> tuple[int, int]:
        counts = shard_elements(kind, shard, configs, workload.vocab_divisor)
        return int(counts[0][0]), int(counts[1][0])

    held = [of(kind) for stage in priced.leaf.held(rank) for kind in priced.modules(stage)]
    return sum(trained for trained, _ in held), sum(frozen for _, frozen in held)


def _extra(priced: Priced, rank: int, request: Request) -> int:
    """State of a device's shard that some tensors have more than others, where it leaves."""
    workload, configs = priced.tables.workload, priced.tables.configs
    shard, rules = shard_of(workload, configs), request.machine.rules
    held = [kind for stage in priced.leaf.held(rank) for kind in priced.modules(stage)]
    return sum(
        int(extra_bytes(kind, shard, configs, rules, workload.vocab_divisor)[0]) for kind in held
    )


def _momentum(priced: Priced, rank: int, request: Request) -> int:
    """Bytes that come and leave with each reduction for Muon's iterations."""
    each = momentum_bytes(request.machine)
    if not each:
        return 0
    workload, configs, rules = priced.tables.workload, priced.tables.configs, request.machine.rules
    shard = shard_of(workload, configs)
    held = [kind for stage in priced.leaf.held(rank) for kind in priced.modules(stage)]
    return each * sum(
        int(matrix_elements(kind, shard, configs, rules, workload.vocab_divisor)[0])
        for kind in held
    )


def _input_bytes(priced: Priced, rank: int, request: Request) -> int:
    """Modules' inputs that one microbatch sends there."""
    modules = request.machine.offload.inputs
    if not modules:
        return 0
    shard = shard_of(request.workload, priced.tables.configs)
    kinds, policies = request.workload.kinds, {p.name: p for p in priced.tables.workload.policies}

    def each(kind: str, mode: str) -> int:
        sizes = moved_bytes(kinds[kind], shard, policies.get(mode), modules)
        return sum(int(size[0]) for size in sizes.values())

    stage = priced.layout.stages[rank]
    names = [
        name for chunk in stage.chunks for name in request.workload.layers[slice(*chunk.layers)]
    ]
    moved = sum(each(name, "none") for name in names)
    for part in stage.recompute:
        moved -= part.layers * (each(part.kind, "none") - each(part.kind, part.mode))
    return moved
