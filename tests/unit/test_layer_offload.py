"""Activations of a model's first layers on the host, against hand-made numbers and a replay of the
handler that sends them."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from cost_models.layer_offload import waits_ns, windows
from hardware_profiles.loader import load_cluster, load_stack
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import EvaluatedLayout, evaluate, plan, read_request
from planner.plan import Plan
from planner.request import Request
from planner.specs import JobSpec
from planner.studies.communication import communication
from planner.studies.verify import verify

TOKENS = 8192
LAYERS = 32
# Llama-3.1-8B, one device: inputs of both norms and what they put out, queries with 8 heads of keys
# and 8 of values, the attention's output, both halves of the gate and their product, in 16 bits;
# of each token one statistic of each norm, and of each of 32 heads one, in fp32.
SENT = TOKENS * (2 * (4 * 4096 + 48 * 128 + 4096 + 3 * 14336) + 4 * (2 + 32))
LAYOUT = {"dp_shard": 8, "zero_stage": 1, "microbatch_size": 1}


def replayed(copies: list[int], passes: list[int], sent: int, *, backward: bool) -> tuple[int, int]:
    """When a pass through all layers is over, and the most layers on the device at any time, as
    Transformer Engine's handler runs it: streams as clocks, events as the times that they have."""
    count = len(passes)
    each, more = divmod(count, sent)
    ends = [each * (i + 1) - 1 + (i + 1 if i < more else more) for i in range(sent)]
    compute = stream = done = most = 0
    on_device = count - sent if backward else 0
    for layer in reversed(range(count)) if backward else range(count):
        if not backward:
            on_device += 1
            most = max(most, on_device)
            compute += passes[layer]
            if layer == 0:
                stream = max(stream, compute) + copies[0]
            if done < sent and ends[done] == layer:
                compute = stream = max(stream, compute)
                on_device -= 1
                done += 1
                if done < sent:
                    stream += copies[done]
            continue
        group = sent - 1 - done
        if group >= 0 and ends[group] == layer:
            compute = stream = max(stream, compute)
            stream += copies[group]
            on_device += 1
            done += 1
        if layer == 0:
            compute = max(compute, stream)
        most = max(most, on_device)
        compute += passes[layer]
        on_device -= 1
    return compute, most


@pytest.mark.parametrize("backward", [False, True])
def test_waits_are_those_of_the_handler(backward: bool) -> None:
    rng = Random(7)
    for _ in range(300):
        count = rng.randint(2, 24)
        sent = rng.randint(1, count - 1)
        names = [rng.choice("ab") for _ in range(count)] if rng.random() < 0.5 else ["a"] * count
        copies = {name: rng.randint(0, 400) for name in "ab"}
        passes = {name: rng.randint(1, 100) for name in "ab"}
        time, most = replayed(
            [copies[n] for n in names], [passes[n] for n in names], sent, backward=backward
        )
        found = waits_ns(
            names, windows(count, sent, spread=True),
            {n: np.array([size]) for n, size in copies.items()},
            {n: np.array([size]) for n, size in passes.items()},
        )  # fmt: skip
        assert time == sum(passes[n] for n in names) + int(found[0])
        assert most <= count - sent + 1


def evaluated(mode: str, stack: str = "megatron-core", **layout: object) -> EvaluatedLayout:
    asked = {"stack": stack, "sequence_length": TOKENS, "global_batch": 16}
    return evaluate(
        read_request("llama-3.1-8b", "dgx-h100:1", None, asked),
        {**LAYOUT, "recompute": mode, **layout},
    )


def bytes_of(found: EvaluatedLayout, *names: str) -> int:
    return sum(t.bytes or 0 for t in found.prediction.stages[0].memory if t.name in names)


@pytest.mark.parametrize(("stack", "beside"), [("megatron-core", 3), ("megatron-fsdp", 1)])
def test_what_the_first_layers_keep_is_on_the_host(stack: str, beside: int) -> None:
    """Of 32 layers 20 are not there in the last backward, but for the one that is fetched, or two
    buffers and the one whose blocks lie free beside the loss."""
    plain, away = evaluated("none", stack), evaluated("offload:20", stack)
    short = [bytes_of(found, "activations", "working") for found in (plain, away)]
    # What the average layer has away is a share of one: the last ones have none.
    share = SENT * 20 // 32
    assert short[0] - short[1] == pytest.approx(20 * SENT - beside * SENT, abs=share + LAYERS)
    assert away.prediction.host is not None
    assert away.prediction.host.bytes_per_node == 8 * 20 * SENT
    assert away.prediction.host.link_bytes_per_step == 2 * 2 * 20 * SENT


def test_copies_hide_behind_the_passes_of_their_windows() -> None:
    """All 32 layers' passes are there for two copies, and for 31 each but the first has one."""
    times = {
        n: evaluated(f"offload:{n}" if n else "none").prediction.step_time_s for n in (0, 2, 31)
    }
    assert times[2] == times[0]
    found = evaluated("offload:31")
    waited = {t.name: t.seconds or 0.0 for t in found.prediction.time}
    assert "recompute" not in waited
    leaf = found.priced.leaf
    link = load_cluster("dgx-h100:1").groups[0].node.host_link.si
    copy = -(-SENT / link * 1e9 // 1)
    row = leaf.kinds[0]
    # Windows of one layer each; the first has one too, as 32 = 31 + 1.
    each = max(copy - row[0], 0) + max(copy - row[1], 0)
    assert waited["host_link"] == pytest.approx(2 * 31 * each / 1e9, rel=1e-6)
    assert times[31] - times[0] == pytest.approx(waited["host_link"], rel=1e-6)


def test_nothing_more_is_communicated() -> None:
    request = read_request(
        "llama-3.1-8b", "dgx-h100:1", None,
        {"stack": "megatron-core", "sequence_length": TOKENS, "global_batch": 16},
    )  # fmt: skip
    split = {"tp": 2, "sequence_parallel": True, "dp_shard": 4}
    plain, away = (evaluated(mode, **split) for mode in ("none", "offload:20"))
    assert communication(request, plain).stages == communication(request, away).stages


@pytest.mark.parametrize(
    ("mode", "layout"), [("offload:8", {"pp": 2, "dp_shard": 4}), ("offload:32", {})]
)
def test_no_pipeline_and_not_every_layer(mode: str, layout: dict[str, object]) -> None:
    with pytest.raises(InputError, match="fewer layers than the model has, without a pipeline"):
        evaluated(mode, **layout)


@pytest.mark.parametrize("stack", ["megatron-core-local", "megatron-core-offload", "torchtitan"])
def test_software_without_it_has_no_such_mode(stack: str) -> None:
    with pytest.raises(InputError, match="recompute is 'offload:8'"):
        evaluated("offload:8", stack)


def searched(**more: object) -> Plan:
    asked = {"stack": "megatron-core-cpu-offload", "sequence_length": 32768, "global_batch": 16}
    return plan(read_request("llama-3.1-8b", "dgx-h100:1", None, asked | more))


def test_the_search_sends_layers_where_they_do_not_fit_and_waits_for_nothing() -> None:
    found = searched()
    (part,) = found.layout.stages[0].recompute
    assert part.mode.startswith("offload:")
    assert "host_link" not in {term.name for term in found.prediction.time}
    assert verify(found) == []
    layout = {**found.layout.model_dump(), "recompute": "none"}
    for name in ("stages", "expert_dp", "rank_order", "reshard_after_forward", "num_microbatches"):
        del layout[name]
    asked = {"stack": "megatron-core-cpu-offload", "sequence_length": 32768, "global_batch": 16}
    kept = evaluate(read_request("llama-3.1-8b", "dgx-h100:1", None, asked), layout)
    assert kept.prediction.step_time_s == found.prediction.step_time_s
    assert not kept.prediction.fits


def test_a_job_that_names_a_number_gets_it_on_any_stack_that_can() -> None:
    found = searched(stack="megatron-core", constraints={"recompute": "offload:20"})
    assert {part.mode for part in found.layout.stages[0].recompute} == {"offload:20"}
    assert found.layout.pp == 1
    assert verify(found) == []


def test_hosts_that_are_too_small_take_nothing() -> None:
    cluster = load_cluster("dgx-h100:1")
    node = cluster.groups[0].node
    assert node.host_memory is not None
    room = node.host_memory.model_copy(update={"value": 0.1, "unit": "GB"})
    group = cluster.groups[0].model_copy(
        update={"node": node.model_copy(update={"host_memory": room})}
    )
    stack = load_stack("megatron-core-cpu-offload")
    job = JobSpec(sequence_length=TOKENS, global_batch=16, stack=stack.name)
    small = cluster.model_copy(update={"groups": (group,)})
    request = Request(read_model("llama-3.1-8b"), small, job, stack)
    with pytest.raises(InputError, match="they have no room"):
        evaluate(request, {**LAYOUT, "recompute": "offload:1"})
