"""One instance through planner and brute force, and what it covered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from planner.models.spec import MoeSpec
from planner.refute import better_layout
from planner.request import Request
from planner.search import Search, SearchResult
from tests.oracle.brute import Answer, BruteForce, brute_force
from tests.oracle.brute_prices import priced_alone
from tests.oracle.instances import draw


@dataclass(frozen=True)
class Compared:
    """Both answers for one instance."""

    seed: int
    request: Request
    answer: Answer
    result: SearchResult
    alive: int
    """Leaves that the search opened and that had a completion."""


class _Counting(Search):
    """A search that counts the leaves that stay neither removed nor pruned."""

    alive = 0

    def _open(self, *args: object, **kwargs: object) -> None:
        removed, pruned = args[-1], self.pruned
        assert isinstance(removed, Counter)
        before = sum(removed.values())
        super()._open(*args, **kwargs)  # type: ignore[arg-type]
        self.alive += sum(removed.values()) == before and self.pruned == pruned


def compare(
    seed: int,
    answer: Answer | None = None,
    stack: str | None = None,
    request: Request | None = None,
) -> Compared:
    """Solve the instance of ``seed`` twice; ``answer`` is brute force's where it is known, and
    ``stack`` a shipped one to draw it with. ``request`` is what was made of the instance."""
    request = request or draw(seed, stack)
    answer = answer or brute_force(request)
    search = _Counting(request)
    try:
        result = search.run()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise
    return Compared(seed, request, answer, result, search.alive)


def agreed(seed: int, request: Request) -> Answer:
    """Both answers for what was made of the instance, equal: nothing is faster, and the recheck
    finds what is, where the claim is too slow."""
    each = compare(seed, request=request)
    assert not differences(each), seed
    time = each.answer.time
    if time is not None:
        assert better_layout(request, time) is None, seed
        assert better_layout(request, time + 1) is not None, seed
    return each.answer


def differences(each: Compared) -> list[str]:
    """What the two disagree on, or what does not add up; empty is right."""
    answer, result = each.answer, each.result
    problems = []
    found = None if result.best is None else result.best.time_ns
    if found != answer.time:
        problems.append(
            f"planner {found} ns, brute force {answer.time} ns with {answer.layout} "
            f"{answer.sizes} {answer.options}; planner's "
            f"{result.best and (result.best.degrees, result.best.completion)}"
        )
    if not result.complete:
        problems.append("the search did not end by itself")
    if result.best is not None and result.bound_ns != result.best.time_ns:
        problems.append(f"bound {result.bound_ns} != optimum {result.best.time_ns}")
    counted = sum(result.removed.values()) + result.pruned + each.alive
    if counted != result.size:
        problems.append(
            f"{result.size} layouts, but {sum(result.removed.values())} removed + "
            f"{result.pruned} pruned + {each.alive} opened = {counted}"
        )
    if answer.layouts > result.size:
        problems.append(f"{answer.layouts} layouts allowed of {result.size} enumerated")
    if answer.layout is not None:
        alone = priced_alone(each.request, answer.layout)
        together = BruteForce(each.request).prices([answer.layout])[answer.layout.config()]
        if alone.key() != together.key():
            problems.append("priced alone and priced together differ")
    return [f"seed {each.seed}: {problem}" for problem in problems]


def cover(each: Compared, count: Counter[str]) -> None:
    """Count what the instance is and what its optimum looks like."""
    request, answer = each.request, each.answer
    count["instances"] += 1
    count[f"devices {request.devices}"] += 1
    count[f"stack {request.stack.name}"] += 1
    count["several nodes"] += request.cluster.nodes > 1
    feeds = [request.model.blocks[run.block].feed_forward for run in request.model.layers]
    moe = [isinstance(feed, MoeSpec) for feed in feeds]
    count["model: MoE" if all(moe) else "model: mixed" if any(moe) else "model: dense"] += 1
    count["model: tied embeddings"] += request.model.tied_embeddings
    count["model: prediction modules"] += bool(request.model.mtp)
    limits = request.job.constraints
    count["constraint: fix"] += bool(limits.fix)
    count["constraint: max"] += bool(limits.max)
    count["constraint: forbid"] += bool(limits.forbid)
    count["constraint: size of rounds"] += "round_size" in (
        *limits.fix,
        *limits.max,
        *limits.forbid,
    )
    count["constraint: free virtual stages"] += request.free_stages
    count["stack: per-stage recompute"] += request.stack.recompute_per_stage
    count["stack: even stages only"] += not request.stack.uneven_stages
    count["stack: hybrid sharding"] += request.stack.hybrid_sharding
    count["stack: weights kept by fewer ranks"] += request.stack.reshard_group is not None
    count["stack: layers recomputed together"] += request.stack.recompute_groups > 1
    count["stack: replicas reduce once"] += request.stack.replica_reduction == "step"
    count["layouts looked at by brute force"] += answer.layouts
    count["completions looked at by brute force"] += answer.completions
    if answer.time is None or answer.layout is None:
        count["infeasible"] += 1
        count["infeasible: memory"] += answer.layouts > 0
        count["infeasible: no layout passes the rules"] += answer.layouts == 0
        return
    count["feasible"] += 1
    x = answer.layout
    beaten = answer.uniform_time is None or answer.uniform_time > answer.time
    count["no uniform plan reaches the optimum"] += beaten
    count["  of which: a uniform plan fits, but is slower"] += (
        answer.uniform_time is not None and answer.uniform_time > answer.time
    )
    for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "sp"):
        count[f"optimum: {name} > {0 if name == 'sp' else 1}"] += getattr(x, name) > (name != "sp")
    if x.cp > 1:
        count[f"optimum: cp kind {x.cp_kind}"] += 1
    count["optimum: dp > 1"] += x.dp > 1
    count["optimum: dp_replicate and dp_shard > 1"] += min(x.dp_replicate, x.dp_shard) > 1
    count[f"optimum: zero stage {x.zero}"] += 1
    if x.pp > 1:
        count[f"optimum: schedule {x.schedule}"] += 1
        inner = set(answer.sizes)
        free = request.free_stages and x.vpp > 1
        count["optimum: free virtual stages"] += free
        count["optimum: rounds of more than pp"] += answer.round_size > x.pp
        count["optimum: layers outside the pipeline"] += x.outside > 0
        count["optimum: uneven stages"] += len(inner) > 1
        count["optimum: an end stage without layers"] += 0 in inner
        count["optimum: recompute differs by stage"] += len(set(answer.options)) > 1
    for mode in {mode for mode, _ in answer.options}:
        count[f"optimum: recompute {mode}"] += 1
    count["optimum: recompute of some of a stage's layers"] += any(
        mode == "full" and limit < max(answer.sizes) for mode, limit in answer.options
    )
