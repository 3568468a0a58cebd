"""What the slowest rank of context parallelism does of a causal mask."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.request import Request
from planner.specs import JobSpec


def attention_s(*, balanced: bool, cp: int, cp_kind: str = "p2p", **job: Any) -> float:
    """Attention of a step of long samples, in which nothing else of a kernel matters."""
    stack = load_stack("megatron-core").model_copy(update={"balanced_context": balanced})
    spec = JobSpec(sequence_length=131_072, stack=stack.name, global_batch=8, **job)
    request = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:1"), spec, stack)
    layout = {"cp": cp, "cp_kind": cp_kind, "zero_stage": 1, "recompute": "full",
              "microbatch_size": 1}  # fmt: skip
    found = evaluate(request, layout).prediction.time
    return sum(part.seconds or 0.0 for part in found if part.name == "attention")


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("cp_kind", ["p2p", "all_gather"])
def test_the_last_of_pieces_in_order_does_nearly_twice_the_average(cp: int, cp_kind: str) -> None:
    even = attention_s(balanced=True, cp=cp, cp_kind=cp_kind)
    last = attention_s(balanced=False, cp=cp, cp_kind=cp_kind)
    assert last / even == pytest.approx(2 - 1 / cp, rel=0.02)


def test_heads_exchanged_for_sequence_are_even() -> None:
    even, last = (attention_s(balanced=b, cp=4, cp_kind="a2a") for b in (True, False))
    assert even == last


def test_a_sequence_on_one_rank_is_whole() -> None:
    even, last = (attention_s(balanced=b, cp=1) for b in (True, False))
    assert even == last


def test_neuron_deals_the_sequence_out_in_order() -> None:
    assert not load_stack("neuron").balanced_context
    assert load_stack("megatron-core").balanced_context


def test_torchtitan_deals_in_order_what_does_not_split_twice() -> None:
    """4,100 = 4 x 1,025 tokens over 4 ranks have no 8 equal pieces, 4,104 = 8 x 513 have."""

    def attention(sequence: int, balanced: object) -> float:
        stack = load_stack("torchtitan").model_copy(update={"balanced_context": balanced})
        spec = JobSpec(sequence_length=sequence, stack=stack.name, global_batch=8)
        request = Request(read_model("llama-3.1-8b"), load_cluster("dgx-h100:1"), spec, stack)
        layout = {"cp": 4, "dp_shard": 2, "zero_stage": 3, "microbatch_size": 1}
        found = evaluate(request, layout).prediction.time
        return sum(part.seconds or 0.0 for part in found if part.name == "attention")

    assert attention(4104, "where_it_splits") == attention(4104, True) < attention(4104, False)
    assert attention(4100, "where_it_splits") == attention(4100, False)
    with pytest.raises(InputError, match="twice, for a balanced causal mask"):
        attention(4100, True)
    with pytest.raises(InputError, match=r"4102 does not split over cp$"):
        attention(4102, "where_it_splits")
    assert load_stack("torchtitan").balanced_context == "where_it_splits"
