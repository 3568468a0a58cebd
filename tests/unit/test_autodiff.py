"""Pipelines whose layers have no recomputation policy: what a pass keeps and takes, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.compute import memory_bound_bandwidth_bytes_per_s
from cost_models.configs import price_configs
from cost_models.graph import Shard
from cost_models.memory import Activations
from cost_models.recompute import mode_rows
from hardware_profiles.loader import catalog_names, load_stack
from hardware_profiles.stack_words import EVERYTHING
from planner.errors import InfeasibleError, InputError
from planner.layouts import configs_of
from planner.pipeline import evaluate, plan, read_request
from planner.recompute import named_policy
from planner.request import Request
from planner.studies.communication import communication
from planner.studies.verify import verify


def request(model: str = "llama-3.1-8b", cluster: str = "dgx-h100:1", /, **job: Any) -> Request:
    asked = {"stack": "maxtext-gpu", "sequence_length": 2048, "global_batch": 32, **job}
    return read_request(model, cluster, None, asked)


def layout(mode: str = EVERYTHING, **more: Any) -> dict[str, Any]:
    return {"pp": 4, "schedule": "gpipe", "recompute": mode, **more}


def test_nothing_runs_again_and_what_is_kept_is_written_and_read_once() -> None:
    asked = request(constraints={"recompute": EVERYTHING})
    priced = price_configs(
        asked.workload, asked.machine, configs_of(evaluate(asked, layout()).layout)
    )
    rows = mode_rows(priced.policies)[EVERYTHING]
    one = np.ones(1, dtype=np.int64)
    shard = Shard(2048, one, one, one, one, one, np.zeros(1, dtype=bool), one)
    (kind,) = asked.workload.kinds.values()
    assert kind.everything is not None
    kept = int(kind.everything(shard)[0])
    beyond = kept - int(Activations(kind, shard).everything[0])
    rate = memory_bound_bandwidth_bytes_per_s(asked.machine.device)
    table = priced.kinds[0][:, 0]
    assert table[rows.kept] == kept
    assert table[rows.extra] == pytest.approx(2e9 * beyond / rate, abs=1)


def kept(request: Request, mode: str = EVERYTHING, **more: Any) -> tuple[int, int]:
    """Bytes that one layer keeps of a pass in the pipeline, and outside it."""
    complete = evaluate(request, layout(mode, **more)).layout
    priced = price_configs(
        request.workload, request.machine, configs_of(complete), capacity_bytes=10**15
    )
    leaf = priced.leaf(
        0, schedule=complete.schedule, vpp=complete.vpp, microbatches=complete.num_microbatches,
        uneven=False, outside=complete.layers_outside,
    )  # fmt: skip
    row = leaf.modes[mode].kept
    return leaf.kinds[0][row], leaf.outside.kinds[0][row] if leaf.outside else 0


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4), ("fp8", 1)])
def test_each_pass_keeps_the_weights_that_it_reads_where_a_rank_has_several_stages(
    precision: str, size: int
) -> None:
    asked = request(precision=precision)
    (kind,) = asked.workload.kinds.values()
    once, _ = kept(asked)
    again, _ = kept(asked, vpp=2, schedule="looped_bfs")
    assert again - once == size * sum(weight.elements for weight in kind.weights)
    listed = kept(asked, "minimal_with_context")
    assert listed == kept(asked, "minimal_with_context", vpp=2, schedule="looped_bfs")


def test_layers_outside_have_a_policy() -> None:
    asked = request()
    named = load_stack("maxtext-gpu").save_lists
    assert named is not None
    assert named.outside_pipeline == "minimal_with_context"
    _, outside = kept(asked, layers_outside=8)
    _, listed = kept(asked, named.outside_pipeline, layers_outside=8)
    assert outside == listed


def test_outside_of_a_pipeline_no_layout_fits() -> None:
    asked = request(constraints={"recompute": EVERYTHING, "fix": {"pp": 2}})
    found = plan(asked)
    assert verify(found) == []
    stages = found.layout.stages
    assert all(part.mode == EVERYTHING for stage in stages for part in stage.recompute)
    alone = request(constraints={"recompute": EVERYTHING, "fix": {"pp": 1}})
    with pytest.raises(InfeasibleError):
        plan(alone)
    with pytest.raises(InputError, match="of layers in a pipeline, pp above 1"):
        evaluate(request(), {"recompute": EVERYTHING})


@pytest.mark.parametrize(
    ("model", "job", "cluster", "said"),
    [
        # Neither runs in fp8 with a policy, nor do sinks in pipelines on TPUs.
        ("mixtral-8x7b", {"precision": "fp8"}, "dgx-h100:1", "no mixture of experts in fp8"),
        (
            "llama-3.1-8b", {"precision": "fp8", "stack": "maxtext-tpu"}, "tpu-v6e-8",
            "layers of a pipeline are not quantised",
        ),
        (
            "gpt-oss-20b", {"stack": "maxtext-tpu"}, "tpu-v6e-8",
            "no derivative of a pipeline's loop over layers with attention sinks",
        ),
    ],
)  # fmt: skip
def test_what_was_not_counted_has_no_price(
    model: str, job: dict[str, Any], cluster: str, said: str
) -> None:
    asked = request(model, cluster, **job)
    assert EVERYTHING not in [policy.name for policy in asked.workload.policies]
    with pytest.raises(InputError, match=said):
        evaluate(asked, layout())


def test_layers_that_were_not_counted_have_no_such_mode() -> None:
    """Sinks in a kernel of GPUs, where MaxText has none."""
    asked = request("gpt-oss-20b")
    assert EVERYTHING in [policy.name for policy in asked.workload.policies]
    flash = replace(asked, stack=asked.stack.model_copy(update={"attention_kernels_of": {}}))
    assert EVERYTHING not in [policy.name for policy in flash.workload.policies]
    with pytest.raises(InputError, match="keeps what autodiff saves, counted in bf16, fp32 and"):
        evaluate(flash, layout())


def test_products_in_fp8_keep_inputs_of_their_own_and_those_in_int8_share_them() -> None:
    """Of Llama's, queries, keys and values read one norm, gate and up the other: five copies in
    8 bits for two in 16. Attention's output and the feed-forward's take half the bytes."""
    tokens, hidden, inner = 2048, 4096, 14336
    shared, own = kept(request())[0], kept(request(precision="fp8"))[0]
    less = tokens * ((2 * 2 - 5) * hidden + hidden + inner)
    assert shared - own == less - 7 * 4 * 1024
    assert kept(request("llama-3.1-8b", "dgx-a100:1", precision="int8"))[0] == shared


def test_on_amd_s_devices_inputs_in_fp8_are_kept_in_16_bits() -> None:
    shared, own = (
        kept(request("llama-3.1-8b", "mi300x-8:1", precision=p))[0] for p in ("bf16", "fp8")
    )
    assert own - shared == 2048 * 3 * 2 * 4096 + 7 * 4 * 1024


def test_masks_of_dropout_are_drawn_once() -> None:
    """Passes of a pipeline have no keys of their own, so none keeps a mask."""
    assert kept(request("gpt-3-175b", dropout=True)) == kept(request("gpt-3-175b", dropout=False))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_plans_of_other_precisions_hold(precision: str) -> None:
    limits = {"recompute": EVERYTHING, "fix": {"pp": 2}}
    found = plan(request("llama-3.2-1b", constraints=limits, precision=precision))
    assert verify(found) == []
    assert {part.mode for stage in found.layout.stages for part in stage.recompute} == {EVERYTHING}


def test_only_maxtext_s_stacks_have_it() -> None:
    for name in catalog_names("stack"):
        stack = load_stack(name)
        assert (EVERYTHING in stack.recompute) == name.startswith("maxtext")
        if EVERYTHING not in stack.recompute:
            with pytest.raises(InputError):
                named_policy(EVERYTHING, stack)


def test_nothing_is_sent_again() -> None:
    """Where experts are on other ranks, a list of outputs sends the tokens to them once more."""

    def again(mode: str) -> int:
        asked = request("mixtral-8x7b")
        result = evaluate(asked, layout(mode, ep=2, pp=4, dp_replicate=1))
        stages = communication(asked, result).stages
        return sum(call.count for calls in stages for call in calls if call.phase == "recompute")

    assert again(EVERYTHING) == 0
    assert again("minimal_with_context") > 0
