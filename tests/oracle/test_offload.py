"""Optimizers on hosts that bind: the planner equals brute force, which counts node by node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hardware_profiles.schema import ClusterSpec
from planner.hosting import cannot_offload
from planner.recompute import named_policy
from planner.refute import better_layout
from planner.request import Request
from tests.oracle.amount import of
from tests.oracle.brute import BruteForce, brute_force
from tests.oracle.compare import agreed, compare, differences
from tests.oracle.host_memory import LOOPS, bytes_on_nodes
from tests.oracle.instances import draw, number
from tests.oracle.layouts import every_layout, partitions, recompute_choices

INSTANCES = of(100, 40)
STACK = "megatron-core"
NAMED_LISTS = ("qkv_proj_offloaded", "minimal_offloaded")


def with_memory(cluster: ClusterSpec, size: int, rate: float = 2e10) -> ClusterSpec:
    """The cluster with ``size`` bytes of host memory in a node, and as many on its drives, which
    read and write at ``rate``."""
    (group,) = cluster.groups
    changes = dict.fromkeys(("host_memory", "drives"), number(float(size), "B"))
    for bandwidth in ("drives_read_bandwidth", "drives_write_bandwidth"):
        changes[bandwidth] = number(rate, "B/s")
    if group.node.host_memory_bandwidth is None:
        changes["host_memory_bandwidth"] = number(3e11, "B/s")
    node = group.node.model_copy(update=changes)
    return cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})


def offloaded(
    seed: int, stack: str = STACK, share: float = 1.0, loop: str | None = None
) -> Request | None:
    """The instance of ``seed`` with a share of its optimizer on the hosts, whose memory is what
    some completion needs or a little less; None where it has no layout. ``loop``: the optimizer."""
    request, rng = draw(seed, stack), Random(f"host {seed}")
    optimizer = "muon" if stack == "maxtext-gpu" and seed % 3 == 0 else "adamw"
    changes = {"optimizer_offload": True, "optimizer": loop or optimizer, "precision": "bf16",
               "optimizer_offload_share": share}  # fmt: skip
    request = replace(request, job=request.job.model_copy(update=changes))
    if stack == "maxtext-gpu":
        # Two lists that send outputs: brute force with all takes a hundred times as long.
        named = {"recompute": NAMED_LISTS}
        request = replace(request, stack=request.stack.model_copy(update=named))
    request = replace(request, cluster=with_memory(request.cluster, 10**15))
    layouts = list(every_layout(request))
    options = recompute_choices(request)
    if not layouts or not options or cannot_offload(request):
        return None
    x = rng.choice(layouts)
    layers, uneven = request.model.layer_count, request.stack.uneven_stages
    cuts = list(partitions(layers, x.schedule, x.pp, x.vpp, uneven, request.free_stages))
    if x.outside:
        cuts = [[(layers - x.outside) // (x.pp * x.vpp)] * (x.pp * x.vpp)]
    sizes, m = rng.choice(cuts), request.global_batch // (x.dp * x.microbatch)
    sends = {policy.name for policy in request.workload.policies if policy.offloads}
    sending = [option for option in options if option[0] in sends]
    option = Random(f"sends {seed}").choice(sending or options[:1])
    needed = max(bytes_on_nodes(request, x, sizes, [option] * x.pp, m))
    room = int(needed * rng.choice((1, 1, 0.98, 1.3)))
    return replace(request, cluster=with_memory(request.cluster, room))


def test_planner_equals_brute_force_with_the_optimizer_on_the_hosts() -> None:
    """The optimum, its bound and the recheck; hosts change the answer often enough to matter."""
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in range(INSTANCES):
        request = offloaded(seed)
        if request is None:
            continue
        each = compare(seed, request=request)
        found = differences(each)
        problems += found
        roomy = replace(request, cluster=with_memory(request.cluster, 10**15))
        free = brute_force(roomy)
        count["all"] += 1
        count["feasible"] += each.answer.time is not None
        count["bound by hosts"] += free.time != each.answer.time
        time = each.answer.time
        if time is not None and not found:
            # Nothing is faster; and the recheck finds what is, where the claim is too slow.
            assert better_layout(request, time) is None, seed
            assert better_layout(request, time + 1) is not None, seed
        count["several nodes"] += request.cluster.nodes > 1
        count["pipeline"] += each.answer.layout is not None and each.answer.layout.pp > 1
    assert not problems, "\n".join(problems[:20])
    assert count["all"] >= 0.5 * INSTANCES
    assert count["feasible"] >= 0.2 * count["all"]
    assert count["bound by hosts"] >= 0.1 * count["all"]
    assert count["several nodes"]
    assert count["pipeline"]


def test_planner_equals_brute_force_with_outputs_beside_the_state() -> None:
    """Moments and outputs of layers share the hosts' memory, which decides between them: some
    optimum keeps on the devices what it would send where there is room."""
    count: Counter[str] = Counter()
    problems: list[str] = []
    for seed in range(6000, 6000 + INSTANCES // 2):
        try:
            request = offloaded(seed, "maxtext-gpu")
        except ValueError:
            continue  # no figures of the stack's attention kernel on this device
        if request is None or request.unsupported is not None:
            continue
        each = compare(seed, request=request)
        found = differences(each)
        problems += found
        count["all"] += 1
        time = each.answer.time
        if time is None:
            continue
        count["feasible"] += 1
        free = brute_force(replace(request, cluster=with_memory(request.cluster, 10**15)))
        count["bound by hosts"] += free.time != time
        mode = each.answer.options[0][0]
        count["sends outputs"] += bool(named_policy(mode, request.stack).offloads)
        if not found:
            assert better_layout(request, time) is None, seed
            assert better_layout(request, time + 1) is not None, seed
    assert not problems, "\n".join(problems[:20])
    assert count["feasible"] >= 0.3 * count["all"] > 3
    assert count["bound by hosts"]
    assert count["sends outputs"]


def test_brute_force_looks_at_the_hosts() -> None:
    """Without a byte of host memory nothing fits."""
    request = next(r for r in map(offloaded, range(20)) if r and brute_force(r).time is not None)
    none = replace(request, cluster=with_memory(request.cluster, 1))
    assert BruteForce(none).run().time is None


def test_planner_equals_brute_force_with_a_share_of_the_optimizer_on_the_hosts() -> None:
    """DeepSpeed's Twin-Flow: less of the state on the host, the rest on the devices."""
    count: Counter[str] = Counter()
    for seed in range(INSTANCES // 2):
        share = Random(f"share {seed}").choice((0.25, 0.5, 0.9))
        request = offloaded(seed, "deepspeed-hf", share)
        if request is None:
            continue
        each = compare(seed, request=request)
        assert not differences(each)
        time = each.answer.time
        if time is not None:
            assert better_layout(request, time) is None, seed
            assert better_layout(request, time + 1) is not None, seed
        job = request.job.model_copy(update={"optimizer_offload_share": 1.0})
        count["all"] += 1
        count["feasible"] += time is not None
        count["not as without"] += brute_force(replace(request, job=job)).time != time
    assert count["feasible"], count
    assert count["not as without"], count


def roomy_hosts(request: Request) -> Request:
    """The request with all the host memory it may want, whatever its drives hold."""
    (group,) = request.cluster.groups
    node = group.node.model_copy(update={"host_memory": number(1e15, "B")})
    groups = (group.model_copy(update={"node": node}),)
    return replace(request, cluster=request.cluster.model_copy(update={"groups": groups}))


def in_groups(request: Request, seed: int) -> Request:
    """Loops on the hosts over groups of few parameters, or as many as the stack has."""
    offload = request.stack.offload
    assert offload is not None
    elements = Random(f"group {seed}").choice((1000, offload.loop_elements))
    offload = offload.model_copy(update={"loop_elements": elements})
    return replace(request, stack=request.stack.model_copy(update={"offload": offload}))


def test_planner_equals_brute_force_with_loops_on_the_hosts() -> None:
    """Optimizers that PyTorch runs there; groups of parameters so small that stage 3 has room where
    stages 1 and 2, which update a shard at once, do not."""
    count: Counter[str] = Counter()
    for seed in range(INSTANCES // 2):
        loop = Random(f"loop {seed}").choice(sorted(LOOPS))
        request = offloaded(seed, "deepspeed-hf", loop=loop)
        if request is None:
            continue
        request = in_groups(request, seed)
        time = agreed(seed, request).time
        count["all"] += 1
        count["feasible"] += time is not None
        count[loop] += time is not None
        roomy = replace(request, cluster=with_memory(request.cluster, 10**15))
        count["bound by hosts"] += brute_force(roomy).time != time
    assert count["feasible"], count
    assert count["bound by hosts"], count
    assert sum(count[loop] > 0 for loop in LOOPS) > 1, count


def test_planner_equals_brute_force_with_optimizers_on_the_drives() -> None:
    """State by the moments that an optimizer keeps, on drives that are as large as some completion
    needs or a little less; the memory beside them has room for all that passes through."""
    count: Counter[str] = Counter()
    for seed in range(7018, 7026):
        optimizer = Random(f"drives {seed}").choice(("lion", "adagrad", *sorted(LOOPS)))
        request = offloaded(seed, "deepspeed-nvme", loop=optimizer)
        if request is None:
            continue
        request = roomy_hosts(request)
        time = agreed(seed, request).time
        count["all"] += 1
        count[optimizer] += time is not None
        roomy = replace(request, cluster=with_memory(request.cluster, 10**15))
        free = brute_force(roomy).time
        count["fits the devices"] += free is not None
        count["bound by drives"] += free != time
    assert count["fits the devices"] > 3, count
    assert count["bound by drives"], count
    assert sum(count[name] > 0 for name in ("lion", "adagrad", *LOOPS)) > 1, count


def test_planner_equals_brute_force_with_muon_on_the_hosts() -> None:
    """Two bytes of momentum of matrices, two moments of all else; only stage 3 iterates, or one
    rank; groups so small that what an update makes of them is little, or as large as they come."""
    count: Counter[str] = Counter()
    for seed in (8004, 8018, 8025, 8027, 8048):
        request = offloaded(seed, "deepspeed-hf", loop="muon")
        if request is None:
            continue
        request = in_groups(request, seed)
        answer = agreed(seed, request)
        time, x = answer.time, answer.layout
        assert x is None or x.zero == 3 or x.dp_shard * x.dp_replicate * x.cp == 1
        count["all"] += 1
        count["feasible"] += time is not None
        count["several ranks"] += x is not None and x.dp_shard > 1
        roomy = replace(request, cluster=with_memory(request.cluster, 10**15))
        count["bound by hosts"] += brute_force(roomy).time != time
    assert count["several ranks"] > 1, count
    assert count["feasible"] > count["several ranks"], count
    assert count["bound by hosts"], count
