"""Lists of named outputs that stay while a compiled layer runs again, by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from cost_models import traffic
from cost_models.graph import LayerKind, Shard
from cost_models.layout import FULL, RecomputePolicy
from cost_models.memory import Activations, activation_bytes
from cost_models.named_outputs import expanded, no_better, spared, unneeded
from cost_models.ops import Elementwise, MatMul, Op
from cost_models.step import price_layer
from hardware_profiles.loader import load_stack
from hardware_profiles.sourced import Sourced
from planner.errors import InfeasibleError, InputError
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.recompute import named_policy
from planner.request import Request
from planner.save_lists import outputs_of

PARAMETERS = 8_030_261_248
LLAMA = "llama-3.1-8b"
"""4096 wide, 32 heads and 8 KV heads of 128, feed-forward of 14336, gated."""


def request(model: str = LLAMA, **overrides: object) -> Request:
    return read_request(
        model, "dgx-h100:1", None,
        {"stack": "maxtext-gpu", "sequence_length": 1024, "global_batch": 32} | overrides,
    )  # fmt: skip


def layer(model: str = LLAMA) -> LayerKind:
    return list(request(model).workload.kinds.values())[-1]


def shard(tp: int = 1) -> Shard:
    one = np.ones(1, dtype=np.int64)
    return Shard(1024, one, tp * one, one, one, one, np.array([tp > 1]), one)


def keeping(*outputs: str) -> RecomputePolicy:
    return RecomputePolicy("kept", keeps=expanded(outputs), needed_only=True)


def kept(policy: RecomputePolicy, tp: int = 1, model: str = LLAMA) -> int:
    return int(activation_bytes(layer(model), shard(tp), policy)[0][0])


@pytest.mark.parametrize(
    ("outputs", "per_token"),
    [
        ((), 0),
        (("qkv",), (32 + 2 * 8) * 128 * 2),
        (("out_proj",), 4096 * 2),
        # The output, and a statistic of 4 bytes for each head.
        (("attention",), 32 * (128 * 2 + 4)),
        (("mlp_in",), 2 * 14336 * 2),
        # Nothing needs the output of a layer's last product.
        (("mlp_out",), 0),
        (("qkv", "out_proj"), (32 + 2 * 8) * 128 * 2 + 4096 * 2),
        (("query",), 32 * 128 * 2),
        (("key", "value"), 2 * 8 * 128 * 2),
        (("mlp_gate",), 14336 * 2),
    ],
)
def test_a_list_keeps_the_layers_input_and_what_it_names(
    outputs: tuple[str, ...], per_token: int
) -> None:
    assert kept(keeping(*outputs)) == 1024 * (4096 * 2 + per_token)


def test_tensors_named_behind_their_reduction_are_scattered() -> None:
    """Over two ranks with sequence parallelism the input, too, is half of the sequence."""
    assert kept(keeping("out_proj"), tp=2) == 2 * 512 * 4096 * 2
    assert kept(keeping("mlp_in"), tp=2) == 512 * 4096 * 2 + 1024 * 14336 * 2


def again(policy: RecomputePolicy, model: str = LLAMA) -> float:
    found = request(model)
    times = price_layer(layer(model), shard(), found.machine)
    return float(times.repeats.seconds((policy,))[0, 0])


def ops_seconds(*names: str) -> float:
    """Forward time of some ops of the layer, each priced as a layer of its own."""
    found, kind = request(), layer()
    total = 0.0
    for op in kind.ops(shard()):
        if op.name in names:
            alone = replace(kind, ops=lambda _, op=op: (op,))
            times = price_layer(alone, shard(), found.machine)
            total += sum(float(term["forward"][0]) for term in times.terms.values())
    return total


def close(seconds: float) -> object:
    return pytest.approx(seconds, rel=1e-4)


def test_what_runs_again_is_what_a_gradient_needs_and_no_list_spares() -> None:
    """To a hundredth of a percent: a host far ahead of its device is waited for next to never."""
    whole = again(FULL)
    last = ops_seconds("fc2", "mlp_residual")
    assert last > 0.2 * whole
    assert again(keeping()) == close(whole - last)
    assert again(keeping("mlp_out")) == close(whole - last)
    assert again(keeping("qkv")) == close(whole - last - ops_seconds("qkv", "rope"))
    assert again(keeping("attention", "mlp_in")) == close(
        whole - last - ops_seconds("attention", "fc1")
    )


def test_the_end_of_a_layer_is_needed_where_something_reads_it() -> None:
    """Gemma 2 has a norm behind the feed-forward; experts' outputs are weighed by the router."""
    ends = {
        model: unneeded(layer(model).ops(shard(2)))
        for model in (LLAMA, "gemma-2-9b", "mixtral-8x7b")
    }
    assert ends[LLAMA] == {"fc2", "fc2.scatter", "fc2.reduce", "mlp_residual"}
    assert ends["gemma-2-9b"] == frozenset()
    assert ends["mixtral-8x7b"] == {"moe_residual"}
    assert "mlp_out" not in outputs_of(layer())
    assert "mlp_out" in outputs_of(layer("mixtral-8x7b"))


def test_queries_behind_a_norm_of_their_own_need_their_product_again() -> None:
    ops: tuple[Op, ...] = (MatMul("qkv", 8, 8, 8, pieces=(2, 1, 1)), Elementwise("rope", 1.0, 1.0))
    normed = (*ops, Elementwise("qk_norm", 1.0, 1.0))

    def sparing(op: Op, of: tuple[Op, ...]) -> dict[str, float]:
        return {"+".join(sorted(names)): float(share) for names, share in spared(op, of)}

    assert [sparing(op, ops) for op in ops] == [
        {"query": 0.5, "key": 0.25, "value": 0.25}, {"query": 2 / 3, "key": 1 / 3},
    ]  # fmt: skip
    assert [sparing(op, normed) for op in normed] == [
        {"value": 0.25}, {"query": 2 / 3, "key": 1 / 3}, {},
    ]  # fmt: skip
    assert no_better(ops) == {("value", "key")}
    assert not no_better(normed)


def test_a_kept_output_spares_its_collective() -> None:
    found, kind = request(), layer()

    def called(policy: RecomputePolicy) -> list[str]:
        calls = traffic.recomputed_calls(kind, shard(2), found.machine, policy)
        return [call.name for call in calls]

    assert called(FULL) == ["qkv.gather", "proj.scatter", "fc1.gather", "fc2.scatter"]
    assert called(keeping()) == ["qkv.gather", "proj.scatter", "fc1.gather"]
    assert called(keeping("qkv", "out_proj")) == ["fc1.gather"]


def test_a_list_of_ones_own_has_the_stacks_name_where_it_has_one() -> None:
    stack = load_stack("maxtext-tpu")
    assert named_policy("custom:qkv", stack).name == "save_qkv_proj"
    assert named_policy("custom:qkv+attention", stack).name == "custom:attention+qkv"
    assert named_policy("full", stack).needed_only
    with pytest.raises(InputError, match="keeps any of qkv, attention"):
        named_policy("custom:context", stack)
    with pytest.raises(InputError, match="maxtext-tpu knows full, minimal_with_context"):
        named_policy("none", stack)


def test_the_search_offers_every_list_that_a_model_can_tell_apart() -> None:
    """Of four outputs of a dense layer, and a fifth of one with experts: on the device queries,
    keys (with values or without) and the gate (with what it gates or without) apart; on the host
    whole ones or halves, with the layer's input or without. The empty list is full."""
    for model, outputs in ((LLAMA, 4), ("mixtral-8x7b", 5)):
        policies = [p for p in request(model).workload.policies if p.everything is None]
        hosted = [policy for policy in policies if policy.offloads]
        assert len(policies) - len(hosted) == 2 * 3 * 3 * 2 ** (outputs - 2)
        # A layer's input, other outputs, and six ways of two halves: neither, both on one side,
        # the gate alone on either, and one on each. Without the host, three ways of the halves.
        others = outputs - 1
        assert len(hosted) == 2 * 6 * 3**others - 3 * 2**others
        assert {"full", "save_dot_except_mlp", "minimal_offloaded"} <= {p.name for p in policies}
    normed = [p for p in request("qwen3-8b").workload.policies if p.everything is None]
    assert sum(not policy.offloads for policy in normed) == 2**3 * 3 * 2**2


def test_lists_that_the_search_leaves_out_are_no_better() -> None:
    """Values for keys, or what a gate multiplies for the gate: as many bytes, as much time."""
    for left_out, instead in (("value", "key"), ("mlp_up+query", "mlp_gate+query")):
        names = {policy.name for policy in request().workload.policies}
        assert f"custom:{left_out}" not in names
        assert f"custom:{instead}" in names
        one, other = (named_policy(f"custom:{n}", request().stack) for n in (left_out, instead))
        assert kept(one) == kept(other)
        assert again(one) >= again(other)


def test_parts_of_an_output_add_up() -> None:
    whole = again(keeping()) - again(keeping("qkv"))
    parts = [again(keeping()) - again(keeping(part)) for part in ("query", "key", "value")]
    assert sum(parts) == pytest.approx(whole, rel=1e-3)
    assert parts[0] > parts[1] > parts[2] > 0
    halves = again(keeping("mlp_gate")), again(keeping("mlp_up"))
    assert halves[0] == halves[1] == close((again(keeping()) + again(keeping("mlp_in"))) / 2)


def test_a_layers_input_may_wait_on_the_host() -> None:
    """Nothing of the layer is then left on the device between its passes."""
    stack = load_stack("maxtext-gpu")
    policy = named_policy("custom:layer_input@host+qkv@host", stack)
    assert policy.name == "custom:layer_input@host+qkv@host"
    assert kept(policy) == 0
    assert kept(named_policy("custom:layer_input@host+out_proj", stack)) == 1024 * 4096 * 2
    assert named_policy("custom:qkv@host", stack).name == "qkv_proj_offloaded"
    with pytest.raises(InputError, match="query both on the device and on the host"):
        named_policy("custom:query+qkv@host", stack)
    with pytest.raises(InputError, match="keeps any of"):
        named_policy("custom:layer_input", stack)


def test_a_layout_without_a_mode_gets_the_stacks_default() -> None:
    found = evaluate(request(), {"dp_shard": 8, "zero_stage": 3})
    assert {part.mode for part in found.layout.stages[0].recompute} == {"full"}


def test_the_plan_is_no_slower_than_without_the_lists() -> None:
    free = plan(request())
    fixed = plan(request(constraints={"recompute": "full"}))
    assert free.prediction.step_time_s <= fixed.prediction.step_time_s


def test_the_optimizers_state_alone_is_split_over_all_of_data() -> None:
    """8 ranks: fp32 weights and moments are split, 16-bit weights and gradients are whole."""
    layout = {"dp_shard": 8, "zero_stage": 1, "recompute": "full"}
    (stage,) = evaluate(request(), layout).prediction.stages
    held = {term.name: term.bytes or 0 for term in stage.memory}
    assert held["weights"] == pytest.approx(PARAMETERS * (4 / 8 + 2), rel=1e-3)
    assert held["gradients"] == pytest.approx(PARAMETERS * 4, rel=1e-3)
    assert held["optimizer"] == pytest.approx(PARAMETERS * 8 / 8, rel=1e-3)
    with pytest.raises(InputError, match="split over all of dp or not at all"):
        evaluate(request(), {"dp_replicate": 2, "dp_shard": 4, "zero_stage": 1})


def offloaded(mode: str, link: str = "55 GB/s", **layout: object) -> EvaluatedLayout:
    asked = request()
    node = asked.cluster.groups[0].node
    slower = node.model_copy(update={"host_link": Sourced.model_validate(
        {"value": float(link.split()[0]), "unit": "GB/s", "kind": "assumed", "source": "a test"}
    )})  # fmt: skip
    group = replace_model(asked.cluster.groups[0], node=slower)
    cluster = replace_model(asked.cluster, groups=(group,))
    found = Request(asked.model, cluster, asked.job, asked.stack)
    return evaluate(found, {"dp_shard": 8, "zero_stage": 3, "recompute": mode, **layout})


def replace_model(model: Any, **changes: Any) -> Any:
    return model.model_copy(update=changes)


def test_offloaded_outputs_leave_the_device_and_are_not_run_again() -> None:
    """A token's queries, keys and values are 48 heads of 128 in 16 bits; one layer's are on their
    way beside those that the backward works with."""
    policy = named_policy("qkv_proj_offloaded", load_stack("maxtext-gpu"))
    assert policy.offloads == policy.keeps == {"query", "key", "value"}
    assert kept(policy) == kept(keeping())
    assert again(policy) == again(keeping("qkv"))
    moved = 1024 * 48 * 128 * 2
    working = [int(activation_bytes(layer(), shard(), each)[1][0]) for each in (policy, keeping())]
    assert working[0] - working[1] == moved
    found = offloaded("qkv_proj_offloaded")
    host = found.prediction.host
    assert host is not None
    assert host.bytes_per_node == 8 * 32 * moved
    assert host.link_bytes_per_step == 2 * 32 * moved * found.layout.num_microbatches


def test_what_a_pass_does_not_hide_of_the_way_is_waited_for() -> None:
    """On a link of 1 GB/s both ways of 32 layers' outputs take longer than the whole step."""
    fast, slow = offloaded("qkv_proj_offloaded"), offloaded("qkv_proj_offloaded", "1 GB/s")
    moved = 32 * 1024 * 48 * 128 * 2 * fast.layout.num_microbatches
    assert fast.prediction.step_time_s < 2 * moved / 1e9
    assert slow.prediction.step_time_s == pytest.approx(2 * moved / 1e9, rel=0.2)
    assert slow.prediction.step_time_s > 2 * moved / 1e9


def test_hosts_that_cannot_take_the_outputs_are_named() -> None:
    many = request(sequence_length=131072, global_batch=64)
    layout = {"dp_shard": 8, "zero_stage": 3, "microbatch_size": 8}
    with pytest.raises(InputError, match=r"they have no room for them: .* per node, which has "):
        evaluate(many, {**layout, "recompute": "minimal_offloaded"})
    several = request(sequence_length=8192, global_batch=2048)
    layout = {"pp": 2, "dp_shard": 4, "schedule": "gpipe", "zero_stage": 0, "microbatch_size": 1}
    with pytest.raises(InputError, match="of all 512 microbatches to the hosts"):
        evaluate(several, {**layout, "recompute": "minimal_offloaded"})


def test_a_pipelines_hosts_hold_the_outputs_of_all_microbatches() -> None:
    """Half of 32 layers' queries, keys and values of 8 microbatches and one pass on padding, for
    each of 8 devices."""
    found = offloaded("qkv_proj_offloaded", pp=2, dp_shard=4, schedule="gpipe", zero_stage=3)
    assert found.layout.num_microbatches == 8
    host = found.prediction.host
    assert host is not None
    assert host.bytes_per_node == 8 * 16 * (8 + 1) * 1024 * 48 * 128 * 2
    assert host.link_bytes_per_step == 2 * 16 * 8 * 1024 * 48 * 128 * 2


def test_no_plan_sends_outputs_where_there_is_no_room() -> None:
    """Half of the layers of 2,048 microbatches of 8,192 tokens do not fit; one microbatch does."""
    size: dict[str, object] = {"sequence_length": 8192, "global_batch": 2048}
    fixed = {"microbatch_size": 1, "tp": 1, "cp": 1}
    asked = {"recompute": "minimal_offloaded", "fix": {"pp": 2, **fixed}}
    with pytest.raises(InfeasibleError):
        plan(request(constraints=asked, **size))
    asked = {"recompute": "minimal_offloaded", "fix": {"pp": 1, **fixed}}
    assert plan(request(constraints=asked, **size)).prediction.host is not None


DEEPSEEK = "deepseek-v3"
"""Latents of 1536 for queries and of 512 for keys and values."""


def test_a_kept_latent_spares_writing_it() -> None:
    """Its norm reads its input once more for the statistics, so the product before runs again."""
    bare = kept(keeping(), model=DEEPSEEK)
    assert kept(keeping("mla_q"), model=DEEPSEEK) - bare == 1024 * 1536 * 2
    assert kept(keeping("mla_kv"), model=DEEPSEEK) - bare == 1024 * 512 * 2
    ops = layer(DEEPSEEK).ops(shard())
    (norm,) = (op for op in ops if op.name == "latent_norm")
    assert {"+".join(names): float(share) for names, share in spared(norm, ops)} == {
        "mla_q": 0.5 * 1536 / 2048, "mla_kv": 0.5 * 512 / 2048,
    }  # fmt: skip
    saved = {
        names: again(keeping(), DEEPSEEK) - again(keeping(*names), DEEPSEEK)
        for names in (("mla_q",), ("mla_kv",), ("mla_q", "mla_kv"))
    }
    assert saved["mla_q",] == pytest.approx(3 * saved["mla_kv",], rel=1e-3)
    assert saved["mla_q", "mla_kv"] == pytest.approx(4 * saved["mla_kv",], rel=1e-3)


def test_latents_without_a_projection_of_queries_are_those_of_keys_and_values() -> None:
    ops = layer("deepseek-v2-lite").ops(shard())
    (norm,) = (op for op in ops if op.name == "latent_norm")
    assert [names for names, _ in spared(norm, ops)] == [frozenset({"mla_kv"})]
    assert outputs_of(layer("deepseek-v2-lite")) & {"mla_q", "mla_kv"} == {"mla_kv"}


def test_a_list_with_latents_is_priced_where_it_is_named() -> None:
    policy = named_policy("custom:mla_q+mla_kv@host+attention", load_stack("maxtext-tpu"))
    assert policy.keeps == {"mla_q", "mla_kv", "attention"}
    assert policy.offloads == {"mla_kv"}


def test_every_way_of_the_halves_has_a_searched_list_that_is_no_worse() -> None:
    """All lists of halves and whole outputs on either side, listed once more by themselves: each
    has one of the search that keeps, sends and repeats no more, to the byte and the nanosecond."""
    found, kind = request(global_batch=8), layer()
    activations = Activations(kind, shard())
    repeats = price_layer(kind, shard(), found.machine).repeats

    def costs(policies: list[RecomputePolicy]) -> np.ndarray[Any, Any]:
        hosted = [int(activations.listed(p, p.offloads)[0]) for p in policies]
        device = [int(activations.under(p)[0][0]) for p in policies]
        seconds = repeats.seconds(tuple(policies))[:, 0]
        return np.stack([hosted, device, np.round(seconds * 1e9)])

    tensors = ({"query", "key", "value"}, {"attention"}, {"out_proj"}, {"mlp_gate"}, {"mlp_up"})
    every = []
    for places in product(("", "device", "host"), repeat=len(tensors)):
        kept, sent = (
            frozenset[Any]().union(*(t for t, p in zip(tensors, places, strict=True) if p in where))
            for where in (("device", "host"), ("host",))
        )
        every += [
            RecomputePolicy("", keeps=kept | more, offloads=sent | more, needed_only=True)
            for more in (frozenset[Any](), frozenset[Any]({"layer_input"}))
        ]
    assert len(every) == 2 * 3**5
    searched = costs([p for p in found.workload.policies if p.keeps is not None])
    for one in costs(every).T:
        assert np.any(np.all(searched <= one[:, None], axis=0))
