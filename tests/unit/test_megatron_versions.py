"""What changed between Megatron-Core 0.12, 0.13 and 0.14 in what a rank holds and sends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.memory import activation_bytes
from cost_models.ops import Collective, MatMul
from cost_models.state import local_tensor
from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import StackSpec
from planner.blocks import routing
from planner.errors import InputError
from planner.models.reader import read_model
from planner.models.spec import MoeSpec
from planner.pipeline import evaluate, read_request
from planner.recompute import named_policy
from planner.request import Request
from planner.specs import JobSpec

ONE = np.ones(1, dtype=np.int64)
TOKENS, HIDDEN, TOP_K, QUERY, KEYS, ROTATED, EXPERT = 4096, 7168, 8, 1536, 512, 64, 2048


def layer(name: str | StackSpec) -> LayerKind:
    """A mixture layer of DeepSeek-V3."""
    stack = load_stack(name) if isinstance(name, str) else name
    job = JobSpec(sequence_length=TOKENS, global_batch=32)
    request = Request(read_model("deepseek-v3"), load_cluster("dgx-h100:4"), job, stack)
    return request.workload.kinds["moe"]


def shard(tp: int, sp: bool) -> Shard:
    return Shard(
        sequence=TOKENS, microbatch=ONE, tp=tp * ONE, cp=ONE, ep=ONE, etp=ONE,
        sequence_parallel=np.array([sp]), cp_kind=0 * ONE,
    )  # fmt: skip


def kept(stack: str | StackSpec, tp: int = 1, sp: bool = False) -> dict[str, int]:
    return {
        each.name: int(np.atleast_1d(each.bytes)[0]) for each in layer(stack).saved(shard(tp, sp))
    }


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ("nemo", TOKENS * TOP_K * HIDDEN * 2),
        ("torchtitan", TOKENS * TOP_K * HIDDEN * 4),
        ("megatron-core", 0),
        ("megatron-core-deepep", 0),
        ("megatron-core-no-overlap", 0),
        ("megatron-bridge", 0),
        ("megatron-bridge-fp8", 0),
        ("megatron-fsdp", 0),
    ],
)
def test_outputs_of_experts_stay_where_they_are_weighed(stack: str, expected: int) -> None:
    assert kept(stack).get("combined", 0) == expected


def test_the_unfused_activation_stays_where_it_is_weighed() -> None:
    stack = load_stack("megatron-core")
    unfused = stack.model_copy(update={"fused": tuple(f for f in stack.fused if f != "swiglu")})
    rows = TOKENS * TOP_K
    assert kept(stack)["expert_unweighed"] == 0
    assert kept(unfused)["expert_unweighed"] == rows * EXPERT * 2


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize(
    ("stack", "split"),
    [
        ("megatron-core", True),
        ("megatron-core-deepep", True),
        ("nemo", True),
        ("megatron-bridge", False),
        ("megatron-core-no-overlap", False),
        ("megatron-torch-fsdp2", False),
    ],
)
def test_a_rank_has_its_columns_of_the_down_projections(stack: str, split: bool, tp: int) -> None:
    down = [w for w in layer(stack).weights if w.name in ("attention.q_down", "attention.kv_down")]
    elements = sum(int(local_tensor(w, shard(tp, tp > 1), 1).total[0]) for w in down)
    assert elements == (QUERY + KEYS + ROTATED) * HIDDEN // (tp if split else 1)


@pytest.mark.parametrize(
    ("stack", "tp", "sp", "expected"),
    [
        ("megatron-core", 1, False, TOKENS * (QUERY + KEYS + ROTATED)),
        # The queries' rows are a slice of what was gathered, the keys' and values' are copied.
        ("megatron-core", 8, True, TOKENS * QUERY + TOKENS // 8 * KEYS),
        ("megatron-bridge", 8, True, TOKENS // 8 * (QUERY + KEYS + ROTATED)),
    ],
)
def test_norms_of_latents_keep_what_holds_their_input(
    stack: str, tp: int, sp: bool, expected: int
) -> None:
    assert kept(stack, tp, sp)["latent_norm_input"] == 2 * expected


ROUTED = json.loads(
    (Path(__file__).parent / "data" / "megatron_router.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", ROUTED, ids=lambda c: f"{c['version']}-{c['score']}")
def test_router_and_dispatcher_keep_what_those_of_megatron_core_do(case: dict[str, object]) -> None:
    """``benchmarks/memory/megatron_router.py`` counted the storages of the real modules."""
    tokens, experts, top_k = (int(str(case[name])) for name in ("tokens", "experts", "top_k"))
    stack = load_stack("megatron-core")
    model = read_model("deepseek-v3")
    spec = MoeSpec(experts=experts, top_k=top_k, intermediate=64)
    blocks = {
        name: block.model_copy(update={"feed_forward": spec})
        for name, block in model.blocks.items()
    }
    job = JobSpec(sequence_length=tokens, global_batch=8)
    cluster = load_cluster("dgx-h100:1")
    family = "deepseek_v3" if case["score"] == "sigmoid" else "mixtral"
    model = model.model_copy(update={"blocks": blocks, "family": family})
    request = Request(model, cluster, job, stack)
    place = Shard(
        sequence=tokens, microbatch=ONE, tp=ONE, cp=ONE, ep=ONE, etp=ONE,
        sequence_parallel=np.array([False]), cp_kind=0 * ONE,
    )  # fmt: skip
    kind = request.workload.kinds["moe"]
    names = ("router_probabilities", "routing_map", "arrived_probabilities")
    saved = {tensor.name: int(np.ravel(tensor.bytes)[0]) for tensor in kind.saved(place)}
    assert sum(saved[name] for name in names) == sum(size for _, size in case["kept"])  # type: ignore[attr-defined]
    assert int(kind.buffer_bytes(place)[0]) == sum(case["stays"].values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("stack", ["megatron-core-deepep", "nemo", "torchtitan"])
def test_maps_are_those_of_dispatchers_that_were_read(stack: str) -> None:
    assert "routing_map" not in kept(stack)
    assert "routing_map" in kept("megatron-core")
    assert routing.__doc__ is not None


def sent(stack: str, tp: int, sp: bool) -> dict[str, list[float]]:
    """Bytes of each collective between the norm and the up-projections, forward and backward."""
    place, found = shard(tp, sp), {}
    for op in layer(stack).ops(place):
        if isinstance(op, Collective) and op.name.startswith(("q_down", "kv_down", "q_up")):
            if not np.all(op.active):
                continue
            sides = [0.0 if s is None else float(np.ravel(s.bytes)[0]) for s in op.sides()]
            found[op.name] = sides
    return found


def test_split_down_projections_gather_their_input_and_their_outputs() -> None:
    """multi_latent_attention.py of 0.13.1: each is a column-parallel layer; the backward of the cut
    into rows gathers, that of the gathered columns cuts."""
    hidden, keys = 2 * TOKENS * HIDDEN, KEYS + ROTATED
    assert sent("megatron-core", 8, True) == {
        "q_down.gather": [hidden, hidden],
        "q_down.scatter": [0, hidden],
        "q_down.columns": [2 * TOKENS * QUERY, 2 * TOKENS * QUERY],
        "kv_down.gather": [hidden, hidden],
        "kv_down.scatter": [0, hidden],
        "kv_down.columns": [2 * TOKENS * keys, 2 * TOKENS * KEYS],
        "q_up.gather": [2 * TOKENS * (QUERY + KEYS)] * 2,
        "q_up.scatter": [0, 2 * TOKENS * (QUERY + KEYS)],
    }
    assert set(sent("megatron-bridge", 8, True)) == {"q_up.gather", "q_up.scatter"}


@pytest.mark.parametrize("sp", [False, True])
def test_split_down_projections_compute_a_part_of_the_columns_of_all_rows(sp: bool) -> None:
    down = [
        op for op in layer("megatron-core").ops(shard(8, sp))
        if isinstance(op, MatMul) and op.name in ("q_down", "kv_down")
    ]  # fmt: skip
    assert [int(np.ravel(op.m)[0]) for op in down] == [TOKENS, TOKENS]
    assert [int(np.ravel(op.n)[0]) for op in down] == [QUERY // 8, (KEYS + ROTATED) // 8]


@pytest.mark.parametrize(
    ("stack", "tp", "sp", "held"),
    [
        ("megatron-core", 8, True, KEYS + ROTATED),
        ("megatron-bridge", 8, True, ROTATED),
        ("megatron-core", 8, False, 0),
        ("megatron-core", 1, False, 0),
    ],
)
def test_up_projections_that_run_again_keep_the_rotated_part_as_it_came(
    stack: str, tp: int, sp: bool, held: int
) -> None:
    kind, place = layer(stack), shard(tp, sp)
    policy = named_policy("mla_up_proj", load_stack(stack))
    everything, _ = activation_bytes(kind, place, None)
    left, _ = activation_bytes(kind, place, policy)
    freed = sum(t.bytes for t in kind.saved(place) if "mla_up_proj" in t.modules)
    assert int((left - everything + freed)[0]) == 2 * TOKENS * held


@pytest.mark.parametrize("precision", ["", "-fp8", "-mxfp8"])
def test_bridge_from_0_4_on_runs_what_megatron_core_0_17_does(precision: str) -> None:
    """Four KV heads under tp 8, and a list of kinds of context parallelism: a core of 0.14 or 0.15
    refuses the first, one below 0.17 the second."""
    job = {"sequence_length": 4096, "global_batch": 64, "precision": "fp8" if precision else "bf16"}
    wide = {"tp": 8, "sequence_parallel": True, "ep": 8}
    listed = {"cp": 2}
    for release, runs in (("", False), ("-0.4", True)):
        stack = f"megatron-bridge{precision}{release}"
        asked = read_request("qwen3-235b-a22b", "dgx-b200:8", None, job | {"stack": stack})
        kinds = job | {"stack": stack, "cp_kinds": ["p2p", "a2a"]}
        if runs:
            assert evaluate(asked, wide).layout.tp == 8
            by_layer = read_request("qwen3-32b", "dgx-b200:8", None, kinds)
            assert evaluate(by_layer, listed).layout.cp == 2
            continue
        with pytest.raises(InputError, match="KV heads do not split over tp"):
            evaluate(asked, wide)
        with pytest.raises(InputError):
            evaluate(read_request("qwen3-32b", "dgx-b200:8", None, kinds), listed)
