"""What changed between Megatron-Core 0.12, 0.13 and 0.14 in what a rank holds."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.graph import LayerKind, Shard
from cost_models.state import local_tensor
from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import StackSpec
from planner.models.reader import read_model
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
