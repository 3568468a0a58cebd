"""``evaluate --comm``: what a layout communicates, per layer and per step, by stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from cost_models import traffic
from cost_models.autodiff import outside_policy
from cost_models.configs import data_parallel_of, shard_of, tied_gradient_bytes
from cost_models.graph import LayerKind
from cost_models.layout import RecomputeMode
from cost_models.outside import outside_configs
from cost_models.recompute import group_of
from cost_models.step import Field
from cost_models.traffic import Calls, Pass
from cost_models.transfers import scattered
from planner.given_outside import outside_recompute
from planner.pipeline import EvaluatedLayout, Request
from planner.stage_recompute import modes_of


@dataclass(frozen=True)
class Communication:
    """Calls of one device."""

    layers: dict[str, tuple[Calls, ...]]
    """One layer of each kind (``embedding`` and ``head`` too): forward and backward of one
    microbatch without recomputation, and what is called once per step."""
    stages: tuple[tuple[Calls, ...], ...]
    """A whole step on one device of each pipeline rank, recomputation and pipeline included."""

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "layers": {
                name: [asdict(call) for call in calls] for name, calls in self.layers.items()
            },
            "stages": [
                {
                    "stage": stage,
                    "calls": [
                        {key: value for key, value in asdict(call).items() if key != "name"}
                        for call in calls
                    ],
                }
                for stage, calls in enumerate(self.stages)
            ],
        }


def communication(request: Request, result: EvaluatedLayout) -> Communication:
    """Everything that ``result``'s layout communicates, from the ops that are priced."""
    counter = _Counter(request, result)
    names = dict.fromkeys(request.workload.layers)
    layers = {name: counter.layer(request.workload.kinds[name]) for name in names}
    layers["embedding"] = counter.layer(request.workload.embedding)
    layers["head"] = counter.layer(request.workload.head)
    stages = tuple(traffic.total(counter.stage(rank)) for rank in range(result.layout.pp))
    return Communication(layers, stages)


class _Counter:
    """Calls of one priced layout."""

    def __init__(self, request: Request, result: EvaluatedLayout) -> None:
        self.request, self.layout, self.priced = request, result.layout, result.priced
        self.configs = result.priced.tables.configs
        self.shard = shard_of(request.workload, self.configs)
        self.data = data_parallel_of(self.configs)
        self.machine = request.machine
        self.policies = {policy.name: policy for policy in self.priced.tables.workload.policies}

    def layer(self, kind: LayerKind) -> tuple[Calls, ...]:
        """One layer, one microbatch."""
        tied = kind.name == "head" and self.layout.pp == 1
        return (
            *traffic.layer_calls(kind, self.shard, self.machine),
            *traffic.data_calls(
                kind, self.shard, self.data, self.machine,
                vocab_divisor=self.request.workload.vocab_divisor, tied=tied,
            ),
        )  # fmt: skip

    def stage(self, rank: int) -> Iterator[Calls]:
        """A step of one device of a pipeline rank."""
        microbatches = self.layout.num_microbatches
        for kind, mode, again, first in self._held(rank):
            for call in self.layer(kind):
                yield call if call.phase == "step" else call.times(microbatches)
            if mode != "none":
                policy = self.policies[mode]
                for call in traffic.recomputed_calls(
                    kind, self.shard, self.machine, policy, first=first
                ):
                    yield call.times(microbatches * again)
        yield from self._outside()
        yield from self._pipeline(rank)
        yield from self._step(rank)

    def _outside(self) -> Iterator[Calls]:
        """The layers outside the pipeline: one pass of a device's share of the batch."""
        if not self.layout.layers_outside:
            return
        configs = outside_configs(self.configs, self.request.global_batch)
        shard, data = shard_of(self.request.workload, configs), data_parallel_of(configs)
        for (name, mode), count in outside_recompute(self.layout, self.request).items():
            kind = self.request.workload.kinds[name]
            calls = [
                *traffic.layer_calls(kind, shard, self.machine),
                *traffic.data_calls(
                    kind, shard, data, self.machine,
                    vocab_divisor=self.request.workload.vocab_divisor,
                ),
            ]  # fmt: skip
            if mode != "none":
                policy = outside_policy(self.policies[mode])
                calls += traffic.recomputed_calls(kind, shard, self.machine, policy)
            for call in calls:
                yield call.times(count)

    def _held(self, rank: int) -> Iterator[tuple[LayerKind, RecomputeMode, int, bool]]:
        """Layers and ends of a rank, with their recomputation, how often it runs, and whether it
        runs from that layer on."""
        workload, completion = self.request.workload, self.priced.completion
        leaf, stages = self.priced.leaf, self.priced.leaf.stages
        for j in leaf.held(rank):
            first, last = completion.bounds[j], completion.bounds[j + 1]
            for index, mode_here in modes_of(completion.recompute[j], first, last):
                passes = leaf.kinds[leaf.sequence[index]][Field.WEIGHT_PASSES]
                again = 1 + passes * (leaf.splits_backward and j > 0)
                starts = (index - first) % group_of(mode_here) == 0
                yield workload.kinds[workload.layers[index]], mode_here, again, starts
            if j == 0 or leaf.shared is not None:
                yield workload.embedding, "none", 0, True
            if j == stages - 1 or leaf.shared is not None:
                yield workload.head, "none", 0, True

    def _pipeline(self, rank: int) -> Iterator[Calls]:
        """Boundaries sent and received: activations forward, their gradients backward."""
        leaf = self.priced.leaf
        for j in leaf.held(rank):
            if leaf.sends_on(j - 1):
                yield from self._cut(j, ("recv", "send"))
            if leaf.sends_on(j):
                yield from self._cut(j + 1, ("send", "recv"))

    def _cut(self, stage: int, kinds: tuple[str, str]) -> Iterator[Calls]:
        """Transfers at the cut before virtual stage ``stage``: forward, then backward."""
        workload, passes = self.request.workload, ("forward", "backward")
        sizes = (workload.boundary_bytes_per_token,) * 2
        if workload.boundaries:
            sizes = workload.boundaries[self.priced.completion.bounds[stage]]
        pp, count = self.layout.pp, self.layout.num_microbatches
        for phase, kind, size in zip(passes, kinds, sizes, strict=True):
            if pp > 1:
                each, step = int(self.shard.residual_tokens[0]) * size, cast("Pass", phase)
                parts = int(scattered(self.machine, self.shard)[0])
                yield Calls("boundary", "pp", pp, step, kind, count, count * each // parts)
                if parts > 1 and kind == "recv":
                    yield Calls("boundary", "tp", parts, step, "all_gather", count, count * each)

    def _step(self, rank: int) -> Iterator[Calls]:
        workload = self.request.workload
        if self.request.devices > 1:
            yield Calls("gradient_norm", "world", self.request.devices, "step", "all_reduce", 1, 4)
        if workload.shares_table and self.priced.leaf.tied_ns and rank in (0, self.layout.pp - 1):
            size = int(tied_gradient_bytes(workload, self.machine, self.shard)[0])
            yield Calls("tied_embedding", "pp", 2, "step", "all_reduce", 1, size)
