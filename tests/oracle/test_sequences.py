"""Networks that are not decoders, with cuts of unequal size: the planner against brute force."""

from __future__ import annotations

from random import Random

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InfeasibleError
from planner.models.sequence import LayerSequenceSpec
from planner.pipeline import plan
from planner.request import Request, fill_defaults
from planner.specs import FineTuneSpec, JobSpec
from tests.oracle.amount import of
from tests.oracle.brute import brute_force

SLOW = {"value": 1, "unit": "GB/s", "kind": "assumed", "source": "test"}


def draw_network(rng: Random) -> LayerSequenceSpec:
    """A few layers of unlike work and outputs, some of which skip over others."""
    layers = rng.randint(2, 5)
    kinds = {
        f"k{i}": {
            "ops": [
                {
                    "op": "work",
                    "flops": 10 ** rng.uniform(9, 11),
                    "parameters": rng.randint(1, 10**7),
                },
                {"op": "memory", "moved": 10 ** rng.uniform(5, 7)},
                {"op": "matmul", "m": 64, "n": 256, "k": 256, "split": "column"},
            ],
            "saved": int(10 ** rng.uniform(6, 8)),
            "output": int(10 ** rng.uniform(3, 7)),
            **({"output_gradient": 0} if rng.random() < 0.2 else {}),
        }
        for i in range(rng.randint(1, 3))
    }
    entries: list[dict[str, object]] = [{"kind": rng.choice(sorted(kinds))} for _ in range(layers)]
    if layers > 2 and rng.random() < 0.7:
        entries[0]["sends"] = {"skip": rng.choice((None, 10**6))}
        entries[-1]["takes"] = ["skip"]
    return LayerSequenceSpec.model_validate(
        {
            "name": "drawn", "source": "test", "input": 1000, "batch": rng.choice((4, 8, 12)),
            "tensor_parallel": rng.choice((1, 2)), "kinds": kinds, "layers": entries,
        }
    )  # fmt: skip


def draw(seed: int) -> Request:
    rng = Random(seed)
    cluster = load_cluster("-", stdin=f"node: {rng.choice(('dgx-a100', 'l40s-x8'))}\nnodes: 1")
    group = cluster.groups[0]
    node = group.node.model_copy(update={"devices_per_node": rng.choice((2, 4)), "nics": 1})
    if rng.random() < 0.5:
        slow = node.scale_up.model_validate(
            {**node.scale_up.model_dump(), "bandwidth": SLOW, "collectives": ()}
        )
        node = node.model_copy(update={"scale_up": slow})
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"node": node}),)})
    stack = load_stack(rng.choice(("torch-pipelining", "torchgpipe")))
    model = draw_network(rng)
    frozen = stack.name == "torch-pipelining" and model.layer_count > 2 and rng.random() < 0.4
    job = fill_defaults(
        JobSpec(
            stack=stack.name,
            tolerance=0.0,
            memory_margin=0.0,
            finetune=FineTuneSpec(freeze_layers=1) if frozen else None,
            optimizer=rng.choice(("adamw", "sgd")),
        ),
        model,
        cluster.devices,
    )
    return Request(model, cluster, job, stack, capacity_bytes=int(10 ** rng.uniform(9.6, 10.2)))


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_the_optimum_is_that_of_brute_force(start: int) -> None:
    feasible = 0
    for seed in range(start, start + of(10, 4)):
        request = draw(seed)
        answer = brute_force(request)
        try:
            found = plan(request)
        except InfeasibleError:
            assert answer.time is None, f"seed {seed}"
            continue
        feasible += 1
        assert found.prediction.step_time_s * 1e9 == pytest.approx(answer.time, abs=0.5), seed
    assert feasible


def test_cuts_of_unequal_size_matter() -> None:
    """Some instances have them, some optima pipeline across them."""
    requests = [draw(seed) for seed in range(40)]
    assert sum(bool(request.workload.boundaries) for request in requests) > 20
