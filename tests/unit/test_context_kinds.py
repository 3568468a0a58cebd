"""Which kinds of context parallelism run which attention, and what two levels of it cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cost_models.cp_kinds import CP_KINDS, cp_kind_code, cp_kind_of, exchange_ways, ring_ways
from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import EvaluatedLayout, evaluate
from planner.request import Request
from planner.space import build_space
from planner.specs import ConstraintSpec, JobSpec


def request_of(model: str, *, stack: str = "megatron-core", nodes: int = 4, **job: Any) -> Request:
    spec = JobSpec(sequence_length=65_536, global_batch=nodes, stack=stack, **job)
    return Request(read_model(model), load_cluster(f"dgx-h100:{nodes}"), spec, load_stack(stack))


def price(model: str, **layout: Any) -> EvaluatedLayout:
    return evaluate(request_of(model), {"zero_stage": 1, "recompute": "full", **layout})


def context_s(**layout: Any) -> float:
    terms = price("llama-3.1-8b", **layout).prediction.time
    return sum(term.seconds or 0.0 for term in terms if term.name == "cp_comm")


@pytest.mark.parametrize("kind", CP_KINDS)
@pytest.mark.parametrize("inner", [2, 3, 64])
def test_a_code_says_kind_and_inner_groups(kind: str, inner: int) -> None:
    code = cp_kind_code(kind, inner)
    assert cp_kind_of(code) == (kind, inner if kind.startswith("a2a_") else 1)


def test_levels_multiply_to_all_ranks() -> None:
    """8 ranks: one ring, one exchange, 2 x 4; a gather has neither."""
    codes = np.array([cp_kind_code(k) for k in CP_KINDS[:3]] + [cp_kind_code("a2a_p2p", 2)])
    cp = np.full(4, 8)
    assert exchange_ways(codes, cp).tolist() == [1, 1, 8, 2]
    assert ring_ways(codes, cp).tolist() == [8, 1, 1, 4]


def test_inner_groups_inside_a_node_keep_the_ring_short() -> None:
    """Two nodes of 8: exchanging among the 8 of a node leaves one hop, with all ports at work; a
    ring of 16 sends the same keys and values 15 times."""
    layout = {"cp": 16, "microbatch_size": 1}
    ring = context_s(**layout, cp_kind="p2p")
    levels = [context_s(**layout, cp_kind="a2a_p2p", cp_inner=n) for n in (2, 4, 8)]
    assert ring > levels[0] > levels[1] > levels[2]


@pytest.mark.parametrize(
    ("model", "first", "refused"),
    [
        ("gpt-oss-20b", "all_gather", "p2p"),
        ("deepseek-v2-lite", "p2p", "a2a"),
        ("llama-3.1-8b", "p2p", None),
    ],
)
def test_attention_limits_the_kinds(model: str, first: str, refused: str | None) -> None:
    """Transformer Engine's rings have no windows, and only they take latent attention."""
    assert price(model, cp=4, tp=2, pp=2).layout.cp_kind == first
    if refused is not None:
        with pytest.raises(InputError, match="context parallelism of"):
            price(model, cp=4, tp=2, pp=2, cp_kind=refused)


def test_the_space_has_inner_groups_that_heads_allow() -> None:
    """8 KV heads: of cp 16 and tp 2, inner groups of 2 and 4; of tp 8, none."""
    limits = ConstraintSpec(fix={"cp": 16, "pp": 1})
    meshes = build_space(request_of("llama-3.1-8b", nodes=16, constraints=limits)).meshes
    found = {
        (int(tp), *cp_kind_of(int(code)))
        for tp, code in zip(meshes.tp, meshes.cp_kind, strict=True)
    }
    assert {inner for tp, kind, inner in found if (tp, kind) == (2, "a2a_p2p")} == {2, 4}
    assert {kind for tp, kind, _ in found if tp == 8} == {"p2p", "all_gather"}


@pytest.mark.parametrize("inner", [1, 3, 8])
def test_inner_groups_must_be_levels(inner: int) -> None:
    with pytest.raises(InputError, match="cp_inner"):
        price("llama-3.1-8b", cp=8, cp_kind="a2a_p2p", cp_inner=inner)


def test_inner_groups_belong_to_two_levels() -> None:
    with pytest.raises(InputError, match="belongs to"):
        price("llama-3.1-8b", cp=8, cp_kind="p2p", cp_inner=2)
