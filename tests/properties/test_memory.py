"""Memory grows with the work, recomputation never keeps more, sharding never holds more state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.graph import Shard
from cost_models.memory import activation_bytes
from cost_models.recompute import mode_rows
from hardware_profiles.loader import catalog_names, load_cluster, load_stack
from hardware_profiles.stack import StackSpec
from planner.errors import InputError
from planner.models.reader import read_model
from planner.models.spec import ModelSpec
from planner.pipeline import evaluate
from planner.plan import StagePrediction
from planner.recompute import named_policy
from planner.request import Request
from planner.specs import JobSpec
from tests.oracle.amount import of

MODELS = {name: read_model(name) for name in ("llama-3.2-1b", "mixtral-8x7b", "deepseek-v2-lite")}
STACKS = ("megatron-core", "torchtitan", "torchtitan-decomposed")
STATE = ("weights", "gradients", "optimizer", "buffers")


def stage(
    model: ModelSpec, stack: str, layout: dict[str, int | str], sequence: int, samples: int
) -> StagePrediction:
    """The only stage of a step of one microbatch of ``samples`` on 8 devices."""
    dp = 8 // int(layout["tp"])
    job = JobSpec(sequence_length=sequence, global_batch=dp * samples, stack=stack)
    request = Request(model, load_cluster("dgx-h100:1"), job, load_stack(stack))
    chosen = layout | {"microbatch_size": samples, "sequence_parallel": int(layout["tp"]) > 1}
    return evaluate(request, chosen).prediction.stages[0]


def layers(model: ModelSpec, more: int) -> ModelSpec:
    last = model.layers[-1]
    runs = (*model.layers[:-1], last.model_copy(update={"count": last.count + more}))
    return model.model_copy(update={"layers": runs})


places = st.tuples(
    st.sampled_from(sorted(MODELS)), st.sampled_from(STACKS), st.sampled_from((1, 2, 4)),
    st.sampled_from(("none", "selective", "full")), st.sampled_from((512, 1024, 2048)),
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=of(60, 20))
@given(places, st.sampled_from(("samples", "sequence", "layers")))
def test_more_work_takes_more_memory(place: tuple[str, str, int, str, int], more: str) -> None:
    name, stack, tp, recompute, sequence = place
    model, layout = MODELS[name], {"tp": tp, "recompute": recompute}
    small = stage(model, stack, layout, sequence, 1)
    large = stage(
        layers(model, 1) if more == "layers" else model, stack, layout,
        2 * sequence if more == "sequence" else sequence, 2 if more == "samples" else 1,
    )  # fmt: skip
    assert large.peak_bytes >= small.peak_bytes


@settings(deadline=None, derandomize=True, max_examples=of(60, 20))
@given(
    st.sampled_from(("gpt3-350m", "gpt3-6.7b", "gpt3-13b")), st.sampled_from((1, 2)),
    st.integers(2, 24), st.integers(1, 8), st.integers(0, 8), st.integers(1, 2),
    st.sampled_from(("samples", "sequence", "layers")),
)  # fmt: skip
def test_inputs_in_blocks_of_scores_grow_with_the_work(
    name: str, tp: int, inputs: int, below: int, above: int, samples: int, more: str
) -> None:
    """Unfused attention under full recomputation, around the lengths (with heads of 128: multiples
    of 128 tp) at which one more input fits into a block."""
    model, layout = read_model(name), {"tp": tp, "recompute": "full"}
    stack, fits = "megatron-lm-2022", 128 * tp * inputs
    small = stage(model, stack, layout, fits - 8 * below, samples)
    large = stage(
        layers(model, 1) if more == "layers" else model, stack, layout,
        fits + 8 * above if more == "sequence" else fits - 8 * below, samples + (more == "samples"),
    )  # fmt: skip
    assert large.peak_bytes >= small.peak_bytes


@settings(deadline=None, derandomize=True, max_examples=of(60, 20))
@given(places, st.data())
def test_recomputation_never_keeps_more(
    place: tuple[str, str, int, str, int], data: st.DataObject
) -> None:
    """Nor does one more module, for any of the modules that the stack may combine."""
    name, stack_name, tp, _, sequence = place
    model, stack = MODELS[name], load_stack(stack_name)
    job = JobSpec(sequence_length=sequence, global_batch=8, stack=stack_name)
    request = Request(model, load_cluster("dgx-h100:1"), job, stack)
    one = np.ones(1, dtype=np.int64)
    place_on = Shard(sequence, one, tp * one, one, one, one, np.array([tp > 1]), 0 * one)
    names = set(stack.recompute) - {"none", "custom"}
    if stack.save_lists is not None:
        kept_outputs = st.sets(st.sampled_from(stack.save_lists.outputs), min_size=1)
        names.add("custom:" + "+".join(sorted(data.draw(kept_outputs))))
    modes = [named_policy(n, stack) for n in sorted(names)]
    if stack.recompute_modules:
        some = data.draw(st.sets(st.sampled_from(stack.recompute_modules), min_size=2))
        fewer = some - {sorted(some)[0]}
        modes = [named_policy("+".join(some), stack), named_policy("+".join(fewer), stack)]
    for kind in request.workload.kinds.values():
        everything = activation_bytes(kind, place_on, None)[0]
        kept = [activation_bytes(kind, place_on, mode)[0] for mode in modes]
        assert all(size <= everything for size in kept)
        if stack.recompute_modules:
            assert kept[0] <= kept[1]


def persistent_bytes(found: StagePrediction) -> int:
    return sum(term.bytes or 0 for term in found.memory if term.name in STATE)


def runs(model: str, stack: StackSpec, layout: dict[str, int | str]) -> StagePrediction | None:
    """The stage of a layout with the stack's first way to recompute, or None where it has none."""
    job = JobSpec(sequence_length=1024, global_batch=8, stack=stack.name)
    request = Request(MODELS[model], load_cluster("dgx-h100:1"), job, stack)
    chosen = {"recompute": stack.recompute[0], "microbatch_size": 1} | layout
    try:
        return evaluate(request, chosen).prediction.stages[0]
    except InputError:
        return None


@pytest.mark.parametrize("name", catalog_names("stack"))
def test_every_stack_takes_more_memory_for_more_work(name: str) -> None:
    """Twice the samples, twice the sequence, one more layer, in each way to recompute."""
    stack, compared = load_stack(name), 0
    model = read_model("llama-3.1-8b")
    ways = ({}, {"samples": 2}, {"sequence": 2048}, {"more": 1})
    for recompute in stack.recompute[:3]:
        found = [peak_of_work(model, stack, recompute, **way) for way in ways]
        if found[0] is not None:
            assert all(size is not None and size >= found[0] for size in found), recompute
            compared += 1
    assert compared > 0


def peak_of_work(
    model: ModelSpec, stack: StackSpec, recompute: str, *, samples: int = 1, sequence: int = 1024,
    more: int = 0,
) -> int | None:  # fmt: skip
    """Peak bytes of one microbatch on 16 devices, or None where the stack has no such layout."""
    job = JobSpec(sequence_length=sequence, global_batch=16 * samples, stack=stack.name)
    grown = layers(model, more) if more else model
    request = Request(grown, load_cluster("dgx-h100:2"), job, stack)
    layout: dict[str, int | str] = {
        "zero_stage": stack.zero_stages[-1], "recompute": recompute, "microbatch_size": samples
    }  # fmt: skip
    try:
        return evaluate(request, layout).prediction.max_peak_bytes
    except InputError:
        return None


@pytest.mark.parametrize("name", catalog_names("stack"))
def test_sharding_never_holds_more_state(name: str) -> None:
    """Of one ZeRO stage to the next that the stack has, and of more ranks that shard."""
    stack, compared = load_stack(name), 0
    for model in MODELS:
        held = []
        for zero in stack.zero_stages:
            for shards in (2, 8):
                ways = {"dp_shard": shards, "dp_replicate": 8 // shards, "zero_stage": zero}
                found = runs(model, stack, ways)
                if found is not None:
                    held.append((zero, shards, persistent_bytes(found)))
        for zero, shards, size in held:
            for below, fewer, most in held:
                if below <= zero and fewer <= shards:
                    assert size <= most, (model, (below, fewer), (zero, shards))
                    compared += (below, fewer) != (zero, shards)
    if len(stack.zero_stages) > 1:
        assert compared > 0


def test_every_mode_has_rows_of_its_own() -> None:
    rows = mode_rows(("selective", "full"))
    places_of = [place for mode in rows.values() for place in mode]
    assert len(places_of) == len(set(places_of)) == 9


def fullest_state(model: ModelSpec, stack: str, layout: dict[str, int | str], nodes: int) -> int:
    """Bytes of the state of the fullest stage."""
    split = int(layout["tp"]) * int(layout["pp"])
    job = JobSpec(sequence_length=1024, global_batch=8 * nodes // split * 8, stack=stack)
    request = Request(model, load_cluster(f"dgx-h100:{nodes}"), job, load_stack(stack))
    chosen = layout | {"microbatch_size": 1, "sequence_parallel": int(layout["tp"]) > 1}
    stages = evaluate(request, chosen).prediction.stages
    return max(
        sum(term.bytes or 0 for term in each.memory if term.name in STATE) for each in stages
    )


@settings(deadline=None, derandomize=True, max_examples=of(40, 15))
@given(
    st.sampled_from(sorted(MODELS)), st.sampled_from(("megatron-core", "torchtitan")),
    st.sampled_from((1, 2)), st.sampled_from((1, 2)), st.sampled_from((1, 2)),
    st.sampled_from((1, 2)), st.sampled_from(("tp", "pp", "ep", "dp")),
)  # fmt: skip
def test_more_ranks_never_hold_more_state(
    name: str, stack: str, tp: int, pp: int, ep: int, nodes: int, more: str
) -> None:
    """Twice the ranks of one kind, and twice the devices; of expert parallelism on the same."""
    ep = ep if name != "llama-3.2-1b" else 1
    zero = 1
    if stack == "torchtitan":
        zero, pp, more = 3, 1, "dp" if more == "pp" else more  # shards exclude a pipeline there
    small: dict[str, int | str] = {
        "tp": tp, "pp": pp, "ep": ep, "zero_stage": zero, "recompute": "full"
    }  # fmt: skip
    if more == "ep" and name == "llama-3.2-1b":
        more = "dp"
    large = small if more == "dp" else small | {more: 2 * int(small[more])}
    grown = nodes if more == "ep" else 2 * nodes
    least = fullest_state(MODELS[name], stack, large, grown)
    assert least <= fullest_state(MODELS[name], stack, small, nodes)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_that_are_gathered_each_pass_take_no_more(name: str) -> None:
    """FSDP2's stage 2 holds gathered weights through the step beside the shards, stage 3 the
    shards alone."""
    shards, gathered = (
        fullest_state(MODELS[name], "torchtitan", {"tp": 1, "pp": 1, "zero_stage": zero}, 1)
        for zero in (3, 2)
    )
    assert shards <= gathered
