"""What NeMo AutoModel shards, orthogonalises and gives back, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.interconnect import collective_time_s
from cost_models.recompute import mode_rows
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication
from planner.studies.verify import verify

DENSE, MIXTURE = "llama-3.1-8b", "mixtral-8x7b"
MATRICES = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14_336)
REST = 2 * 128_256 * 4096 + 65 * 4096
EXPERTS = 32 * 8 * 3 * 4096 * 14_336


def request(model: str = DENSE, **more: object) -> Request:
    asked = {"stack": "nemo-automodel", "sequence_length": 4096, "global_batch": 64}
    return read_request(model, "dgx-h100:2", None, asked | more)


def optimizer_bytes(asked: Request, **layout: object) -> int:
    found = evaluate(asked, {"dp_shard": 16, "zero_stage": 3, "recompute": "full", **layout})
    terms = {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}
    return terms["optimizer"]


def test_moments_of_16_bits_take_half() -> None:
    whole, half = (optimizer_bytes(request(optimizer=name)) for name in ("adamw", "adamw_bf16"))
    assert whole == 2 * half == 8 * (MATRICES + REST) // 16


def test_muon_keeps_one_moment_of_matrices_and_leaves_experts_to_adam() -> None:
    assert optimizer_bytes(request(optimizer="muon")) == (4 * MATRICES + 8 * REST) // 16
    muon, adam = (optimizer_bytes(request(MIXTURE, optimizer=o)) for o in ("muon", "adamw"))
    dense = 32 * 4096 * (4096 + 1024 + 1024 + 4096 + 8)
    assert adam - muon == pytest.approx(4 * dense / 16, rel=1e-3)


def test_matrices_come_together_in_two_exchanges() -> None:
    """Each rank iterates on a sixteenth of the matrices (n x m, n <= m: 5 (4 n^2 m + 2 n^3)
    FLOPs), below the device's 989 TFLOP/s and above half; their shards travel there and back."""
    asked = request(optimizer="muon")
    layout = {"dp_shard": 16, "zero_stage": 3, "recompute": "full"}
    seconds = {
        name: next(
            term.seconds or 0.0
            for term in evaluate(request(optimizer=name), layout).prediction.time
            if term.name == "optimizer_and_gather"
        )
        for name in ("muon", "adamw")
    }
    exchange = collective_time_s(
        asked.machine.fabric, "all_to_all", np.array([2.0 * MATRICES / 32 / 16]),
        size=np.array([16]), stride=np.array([1]),
    )  # fmt: skip
    shapes = 2 * [(4096, 4096)] + 2 * [(1024, 4096)] + 3 * [(4096, 14_336)]
    flops = 32 * sum(5 * (4 * n * n * m + 2 * n**3) for n, m in shapes) / 16
    least = 32 * 2 * float(exchange[0])
    added = seconds["muon"] - seconds["adamw"]
    assert least + flops / 989e12 < added < least + 2 * flops / 989e12


def test_muon_takes_whole_matrices_only() -> None:
    with pytest.raises(InputError, match="matrices that tp does not split"):
        evaluate(request(optimizer="muon"), {"tp": 2, "dp_shard": 8, "zero_stage": 3})
    best = plan(request(optimizer="muon"))
    assert best.layout.tp == 1
    assert verify(best) == []


@pytest.mark.parametrize("pp", [1, 4])
def test_dense_layers_give_their_weights_back_after_each_forward(pp: int) -> None:
    with pytest.raises(InputError, match="give their weights back after each forward"):
        evaluate(request(), {"dp_shard": 16 // pp, "pp": pp, "zero_stage": 2})
    assert evaluate(request(), {"dp_shard": 16 // pp, "pp": pp}).layout.zero_stage == 3
    if pp > 1:
        # No weight gets a gradient there (torch's stage_backward_input).
        with pytest.raises(InputError, match="two halves"):
            evaluate(request(), {"dp_shard": 4, "pp": 4, "vpp": 2, "schedule": "zbv"})


def test_mixtures_under_ep_may_keep_theirs() -> None:
    assert evaluate(request(MIXTURE), {"dp_shard": 16, "ep": 8, "zero_stage": 2})
    assert verify(plan(request())) == []


def test_experts_are_split_by_rows() -> None:
    """Eight experts over three ranks: a third of the rows of each, or three experts on one rank."""
    held = {}
    for stack in ("nemo-automodel", "torchtitan"):
        job = {"stack": stack, "sequence_length": 4096, "global_batch": 48, "optimizer": "adamw"}
        asked = read_request(MIXTURE, "dgx-h100:3", None, job)
        held[stack] = optimizer_bytes(asked, dp_shard=3, dp_replicate=8)
    more = 8 * EXPERTS * (3 / 8 - 1 / 3)
    assert held["torchtitan"] - held["nemo-automodel"] == pytest.approx(more, rel=0.01)


LAYOUT = {"dp_shard": 16, "zero_stage": 3, "recompute": "full"}
EARLY = "nemo-automodel-reduce-each"


def terms_of(asked: Request, **layout: object) -> dict[str, float]:
    found = evaluate(asked, LAYOUT | layout).prediction
    held = {term.name: float(term.bytes or 0) for term in found.stages[0].memory}
    return held | {term.name: term.seconds or 0.0 for term in found.time}


def test_gradients_wait_whole_in_16_bits_for_the_last_of_several_microbatches() -> None:
    late, early = terms_of(request()), terms_of(request(stack=EARLY))
    assert late["gradients"] == 2 * (MATRICES + REST)
    assert early["gradients"] == 4 * (MATRICES + REST) // 16
    # What they become is made on a stream of its own.
    assert late["stream_blocks"] - early.get("stream_blocks", 0) == early["gradients"]
    one = [terms_of(request(stack=stack, global_batch=16)) for stack in ("nemo-automodel", EARLY)]
    assert one[0]["dp_comm"] == one[1]["dp_comm"]
    assert one[0].get("gradient_reduction") == one[1].get("gradient_reduction")
    assert "gradients" not in one[0] or one[0]["gradients"] == one[1]["gradients"]


def test_the_last_microbatch_alone_reduces() -> None:
    asked = {"sequence_length": 4096, "global_batch": 64}
    both = [
        read_request(DENSE, "dgx-a100:2", None, asked | {"stack": stack})
        for stack in ("nemo-automodel", EARLY)
    ]
    calls = [communication(each, evaluate(each, LAYOUT)) for each in both]
    layers = [found.layers["decoder"] for found in calls]
    sums = [[c for c in layer if c.kind == "reduce_scatter"] for layer in layers]
    assert [[c.phase for c in each] for each in sums] == [["step"], ["backward"]]
    assert sums[0][0].bytes == sums[1][0].bytes == 2 * (MATRICES // 32 + 2 * 4096)
    gathers = [[c.phase for c in layer if c.kind == "all_gather"] for layer in layers]
    assert gathers[0] == gathers[1] == ["forward", "backward"]
    assert terms_of(both[0])["dp_comm"] < terms_of(both[1])["dp_comm"]


def test_plans_whose_gradients_wait_are_certified() -> None:
    asked = read_request(
        "llama-3.2-1b", "dgx-h100:1", None,
        {"stack": "nemo-automodel", "sequence_length": 8192, "global_batch": 64},
    )  # fmt: skip
    assert verify(plan(asked)) == []


def test_replicas_are_of_weights_that_several_ranks_share() -> None:
    with pytest.raises(InputError, match="several data-parallel ranks share"):
        evaluate(request(), {"dp_replicate": 8, "cp": 2, "zero_stage": 3})
    assert evaluate(request(), {"dp_replicate": 4, "dp_shard": 2, "cp": 2, "zero_stage": 3})


def test_the_router_s_product_stays_where_a_job_asks_for_it() -> None:
    """Eight scores in 16 bits of each of 4,096 tokens stay, and a small product is spared."""
    layout = {"dp_shard": 16, "ep": 8, "zero_stage": 3}
    seconds, kept = [], []
    for mode in ("custom:router", "full"):
        found = evaluate(request(MIXTURE), layout | {"recompute": mode})
        tables = found.priced.tables
        rows = mode_rows(tuple(policy.name for policy in tables.workload.policies))
        kept.append(int(tables.kinds[0][rows[mode].kept][0]))
        seconds.append(found.prediction.step_time_s)
    assert kept[0] - kept[1] == 2 * 8 * 4096
    assert seconds[0] < seconds[1] < 1.01 * seconds[0]


@pytest.mark.parametrize(("layout", "stage"), [({"tp": 8}, 3), ({"tp": 4, "pp": 2}, 3)])
def test_weights_that_no_rank_shares_are_sharded_over_one(
    layout: dict[str, int], stage: int
) -> None:
    """FSDP2 over one rank: the unit's 16-bit copy and its 16-bit gradients beside the whole."""
    asked = read_request(DENSE, "dgx-h100:1", None, {"stack": "nemo-automodel"})
    found = evaluate(asked, layout)
    assert found.layout.zero_stage == stage
    with pytest.raises(InputError, match="sharded over one"):
        evaluate(asked, {**layout, "zero_stage": 0})
    calls = communication(asked, found).layers["decoder"]
    assert {c.group for c in calls} == {"tp"}


def test_one_device_by_itself_has_no_fsdp() -> None:
    alone = read_request("llama-3.2-1b", "gh200-x1:1", None, {"stack": "nemo-automodel"})
    assert evaluate(alone, {}).layout.zero_stage == 0
    with pytest.raises(InputError, match="sharding over one rank"):
        evaluate(alone, {"zero_stage": 3})


@pytest.mark.parametrize("ep", [1, 2])
def test_mixtures_choose_whether_to_give_weights_back_under_ep_only(ep: int) -> None:
    """_transformers/infrastructure.py: without ep they are wrapped as models without experts."""
    layout = {"zero_stage": 2, "ep": ep, "recompute": "full"}
    if ep > 1:
        assert evaluate(request(MIXTURE), layout).layout.zero_stage == 2
    else:
        with pytest.raises(InputError, match="after each forward"):
            evaluate(request(MIXTURE), layout)


MEGATRON = "nemo-automodel-megatron-fsdp"


def test_megatron_fsdp_holds_16_bits_of_weights_and_gradients_and_nothing_beside() -> None:
    """Of one parameter 2 + 2 bytes, and moments of 8 (FusedAdam) or 4 (torch.optim's)."""
    for optimizer, moments in (("adamw", 8), ("adamw_bf16", 4)):
        held = terms_of(request(stack=MEGATRON, optimizer=optimizer), recompute="none")
        total = held["weights"] + held["gradients"] + held["optimizer"]
        assert total == pytest.approx((4 + moments) * (MATRICES + REST) / 16, rel=1e-4)


def test_megatron_fsdp_sums_whole_gradients_of_one_microbatch() -> None:
    """optim: an all-reduce, and a gather behind the update; optim_grads: reduce-scatters."""
    layer = 2 * (MATRICES // 32 + 2 * 4096)
    for stage, batch, kind in ((1, 16, "all_reduce"), (2, 64, "reduce_scatter")):
        asked = request(stack=MEGATRON, global_batch=batch)
        found = evaluate(asked, {"dp_shard": 16, "zero_stage": stage, "microbatch_size": 1})
        calls = {c.kind: (c.count, c.bytes) for c in communication(asked, found).layers["decoder"]}
        assert calls == {kind: (1, layer), "all_gather": (1, layer)}
    with pytest.raises(InputError, match="summed anew"):
        evaluate(request(stack=MEGATRON), {"zero_stage": 1, "microbatch_size": 1})


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"pp": 2}, "no pipeline"),
        ({"tp": 2, "sequence_parallel": True}, "no sequence parallelism"),
        ({"recompute": "full"}, "recompute"),
    ],
)
def test_megatron_fsdp_has_one_dimension_beside_tp(layout: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        evaluate(request(stack=MEGATRON), layout)


def test_a_plan_on_megatron_fsdp_verifies() -> None:
    best = plan(request(stack=MEGATRON, global_batch=16))
    assert verify(best) == []
