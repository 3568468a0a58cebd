"""What a request keeps in the memory of its hosts or on their drives, and why a layout cannot."""

from __future__ import annotations

from collections import Counter

from cost_models import orthogonalise
from cost_models.host_loops import loop_of
from cost_models.host_room import bytes_there, fills_drives, leaving
from cost_models.optimizers import OPTIMIZERS
from hardware_profiles.holdings import DrivesSpec
from hardware_profiles.units import format_bytes
from planner.recompute import NOT_BOTH, named_policy, shares_hosts
from planner.request import Request


def least_bytes_per_node(request: Request) -> int:
    """Bytes of state on each node, on its drives where the stack fills any, were the hosts filled
    evenly and each parameter held once. The fullest node holds no less; what it holds is known with
    the pipeline stages (``cost_models.host_room``)."""
    optimizer, weights = bytes_there(request.machine)
    share = request.machine.offload.optimizer_per_1000
    held = _parameters(request, trained=True) * optimizer * share // 1000
    held += _parameters(request) * weights
    return held // request.cluster.nodes


def offload_stage(request: Request) -> int:
    """Least ZeRO stage in which the host can hold the weights: that in which they are split."""
    spec = request.stack.offload
    return 2 if spec is not None and spec.with_weights else 3


def _beside_drives(request: Request) -> int:
    """Bytes of all state that leaves the devices and stays in memory beside the drives."""
    drives, parts = on_drives(request), leaving(request.machine)
    stays = {} if drives is None else {k: v for k, v in parts.items() if k not in drives.holds}
    trained = _parameters(request, trained=True) * stays.get("optimizer", 0)
    if "optimizer" in stays and request.machine.momentum_on_host:
        # Muon's two moments of what is no hidden matrix.
        more = OPTIMIZERS["adamw"].moment_bytes - request.machine.rules.optimizer.moment_bytes
        trained += more * _parameters(request, trained=True, matrices=False)
    return trained + _parameters(request) * stays.get("parameters", 0)


def _parameters(request: Request, *, trained: bool = False, matrices: bool = True) -> int:
    """Of the whole model, or those that are trained, or are in no matrix that Muon takes; what
    embedding and head share counts once."""
    workload, is_matrix = request.workload, request.machine.rules.optimizer.matrices
    held = [(workload.embedding, 1), (workload.head, 1)]
    # By kind, not by layer: the recheck asks for every layout.
    held += [(workload.kinds[name], count) for name, count in Counter(workload.layers).items()]
    return sum(
        weight.elements * count
        for kind, count in held
        for weight in kind.weights
        if not weight.copy
        and not (trained and weight.frozen)
        and (matrices or not is_matrix(weight))
    )


def on_drives(request: Request) -> DrivesSpec | None:
    """How the stack keeps on NVMe drives some of what leaves the devices, or None."""
    spec = request.stack.offload
    return spec.drives if spec is not None and fills_drives(request.machine) else None


def host_capacity(request: Request) -> int | None:
    """Bytes of a node's host memory, or of its drives where the stack fills those."""
    node = request.cluster.groups[0].node
    room = node.host_memory if on_drives(request) is None else node.drives
    return None if room is None else int(room.si)


def buffer_bytes_per_node(request: Request) -> int:
    """Bytes of host memory of each node for what is on its way to the drives and back, for what an
    update there makes, and for what stays there beside the drives, were all state split over all
    devices."""
    drives = on_drives(request)
    if drives is None:
        return 0
    devices = request.cluster.groups[0].node.devices_per_node
    working = -(-_parameters(request) // request.devices // drives.groups)
    each, parts = 0, leaving(request.machine).keys() & {*drives.holds}
    if "optimizer" in parts:
        each += min(drives.buffer_elements, working) * drives.buffer_bytes
    if "parameters" in parts:
        each += drives.parameter_buffer_bytes
    spec = request.stack.offload
    loop = loop_of(request.job.optimizer, spec)
    if request.job.optimizer_offload and loop is not None and spec is not None:
        if loop.matrix_passes is not None:
            others = _parameters(request, trained=True, matrices=False)
            working = -(-others // request.devices // drives.groups)
        each += min(spec.loop_elements, working) * loop.working_bytes
    return each * devices + -(-_beside_drives(request) // request.cluster.nodes)


def loses_gradients(request: Request, ways: int) -> bool:
    """Whether drives lose gradients of matrices that ``ways`` ranks share, under Muon."""
    machine, kinds = request.machine, request.workload.kinds.values()
    if machine.offload.swapped == (0, 0):
        return False
    takes = machine.rules.optimizer.matrices
    sizes = {
        weight.elements // weight.count
        for kind in kinds
        for weight in kind.weights
        if takes(weight) and not weight.frozen
    }
    return orthogonalise.loses_gradients(sizes, ways, machine)


def cannot_offload(request: Request) -> str | None:
    """Why no layout of this request can keep on the host what the job asks, or None."""
    job, spec, node = request.job, request.stack.offload, request.cluster.groups[0].node
    if not request.machine.offload.anything:
        return None
    if spec is None:
        return f"{request.stack.name} {request.stack.version} keeps nothing on the host"
    if job.activation_offload and not spec.checkpoints:
        return f"{request.stack.name} {request.stack.version} keeps activations on the device"
    alone = job.parameter_offload and not job.optimizer_offload
    if alone and spec.updates_on == "host":
        return "weights leave the device only with the optimizer state"
    if job.optimizer_offload and spec.with_weights and not job.parameter_offload:
        return (
            f"{request.stack.name} {request.stack.version} offloads optimizer state with the "
            "weights only (parameter_offload)"
        )
    able = {*spec.optimizers, *spec.loops}
    if request.least_zero_stage > max(request.zero_stages):
        able.discard("muon")
    if job.optimizer_offload and spec.optimizers and job.optimizer not in able:
        why = f": {spec.lacks[job.optimizer]}" if job.optimizer in spec.lacks else ""
        label = f"{request.stack.name} {request.stack.version}"
        return f"{label} has no {job.optimizer} on the host{why}"
    shared = request.machine.offload.optimizer_per_1000 < 1000
    if shared and (spec.share_zero_stage is None or job.optimizer != "adamw"):
        label = f"{request.stack.name} {request.stack.version}"
        return f"{label} offloads all optimizer state of {job.optimizer} or none"
    if job.optimizer_offload and request.workload.expert_count and not spec.takes_experts:
        return f"{request.stack.name} {request.stack.version} keeps mixtures on the device"
    if job.parameter_offload and spec.parameter_bytes is None:
        return f"{request.stack.name} {request.stack.version} keeps weights on the device"
    asked = job.constraints.recompute
    if request.machine.offload.state and asked:
        policy = named_policy(asked, request.stack)
        if policy.sends and not shares_hosts(request.stack):
            return f"recompute {asked} sends outputs to the hosts, {NOT_BOTH}"
    updates = job.optimizer_offload and spec.updates_on == "host"
    if node.host_memory is None or (updates and node.host_memory_bandwidth is None):
        key = "host_memory" if node.host_memory is None else "host_memory_bandwidth"
        return f"{node.name} states no {key}: add it under node of a cluster file"
    if on_drives(request) is not None:
        figures = (node.drives, node.drives_read_bandwidth, node.drives_write_bandwidth)
        if None in figures:
            return f"{node.name} states no NVMe drives (drives and their two bandwidths)"
        buffers = buffer_bytes_per_node(request)
        if buffers > node.host_memory.si:
            return (
                f"host memory of {format_bytes(int(node.host_memory.si))} per node does not hold "
                f"{format_bytes(buffers)} of buffers for the drives and what stays beside them"
            )
    return None


def overfilled(request: Request) -> str:
    """The reason of a layout whose state is more than the hosts have."""
    capacity = host_capacity(request)
    room = "host memory" if on_drives(request) is None else "NVMe drives"
    holds = "does" if on_drives(request) is None else "do"
    least = least_bytes_per_node(request)
    state = f" (state alone takes {format_bytes(least)} or more)" if least else ""
    has = f"{room} of {format_bytes(capacity or 0)} per node"
    return f"{has} {holds} not hold what is offloaded{state}"
