"""What the caching allocator cannot use again: formulas against sizes worked out by hand, and the
replay of the allocator that they are compared with against its rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import StackSpec
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.plan import StagePrediction
from planner.request import Request
from planner.specs import JobSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "memory"))
from allocator import CachingAllocator

MODEL = read_model("llama-3.1-8b")
MIB = 2**20


def stage(stack: StackSpec, sequence: int, **layout: int | str) -> StagePrediction:
    job = JobSpec(sequence_length=sequence, global_batch=8, stack=stack.name)
    request = Request(MODEL, load_cluster("dgx-h100:1"), job, stack)
    return evaluate(request, {"microbatch_size": 1, **layout}).prediction.stages[0]


def terms(found: StagePrediction) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.memory}


def test_less_than_one_activation_is_left_of_each_block_of_weights() -> None:
    """4,096 tokens of 4,096 in 16 bits are 32 MiB; the four matrices of a layer have 48, 32, 224
    and 112, the head more; the embedding's input are token numbers of 8 bytes."""
    stack = load_stack("megatron-core")
    found = stage(stack, 4096, zero_stage=1)
    assert terms(found)["left_blocks"] == (32 * 4 + 1) * 32 * MIB + 8 * 4096
    state = stack.state.model_copy(update={"copies_weights": False})
    without = stage(stack.model_copy(update={"state": state}), 4096, zero_stage=1)
    assert found.allocated_bytes == without.allocated_bytes
    assert found.reserved_bytes - without.reserved_bytes == terms(found)["left_blocks"]
    # Nothing is copied where the optimizer is not distributed.
    assert "left_blocks" not in terms(stage(stack, 4096, zero_stage=0, recompute="full"))


def _reserved(table: int, activations: list[int], *, looks_up: bool) -> int:
    """Bytes of segments of a first rank of 1F1B with four microbatches in flight."""
    allocator = CachingAllocator()
    in_flight = []
    for i in range(12):
        in_flight.append([allocator.allocate(size) for size in activations])
        if i < 3:
            continue
        for block in reversed(in_flight.pop(0)):
            allocator.release(block)
        if looks_up:
            allocator.release(allocator.allocate(table))
    return allocator.reserved


@pytest.mark.parametrize("table", [100 * MIB, 300 * MIB, 1400 * MIB])
def test_the_gradient_of_a_lookup_keeps_a_block_unless_an_activations_is_larger(table: int) -> None:
    activations = [24 * MIB, 72 * MIB, 24 * MIB, 96 * MIB, 96 * MIB, 24 * MIB] * 4
    more = _reserved(table, activations, looks_up=True)
    more -= _reserved(table, activations, looks_up=False)
    assert more == (table if table > max(activations) else 0)
    larger = [*activations, 2000 * MIB]
    assert _reserved(table, larger, looks_up=True) == _reserved(table, larger, looks_up=False)


def test_the_first_rank_has_the_block_of_its_lookups_gradient() -> None:
    """128,256 rows of 4,096 in 16 bits, on the first of two ranks; with 40,960 tokens the gate and
    up projections' outputs (14,336 each) are larger."""
    stack = load_stack("megatron-core")
    size = 128_256 * 4096 * 2

    def blocks(sequence: int) -> list[int]:
        job = JobSpec(sequence_length=sequence, global_batch=8, stack=stack.name)
        request = Request(MODEL, load_cluster("dgx-h100:1"), job, stack)
        asked = {"microbatch_size": 1, "pp": 2, "zero_stage": 1}
        stages = evaluate(request, asked).prediction.stages
        return [terms(found).get("lookup_block", 0) for found in stages]

    assert blocks(4096) == [size, 0]
    assert blocks(40_960) == [0, 0]


def test_layer_inputs_split_the_blocks_of_scores() -> None:
    """Scores of 32 heads and 4,160 tokens take 1,107,558,400 bytes: 32 inputs of 34,078,720, and
    532,480 bytes more for each. With 4,096 tokens exactly 32 fit, with 4,224 exactly 33 of
    34,603,008, which is 524,288 more."""
    stack = load_stack("megatron-lm-2022")
    layout: dict[str, int | str] = {"zero_stage": 1, "recompute": "full"}
    found = stage(stack, 4160, **layout)
    assert terms(found)["split_blocks"] == 32 * 524_288
    whole = stage(stack.model_copy(update={"splits_blocks": False}), 4160, **layout)
    assert terms(found)["activations"] == terms(whole)["activations"]
    assert found.allocated_bytes == whole.allocated_bytes
    assert found.peak_bytes - whole.peak_bytes == 32 * 524_288
    for exact in (4096, 4224):
        assert "split_blocks" not in terms(stage(stack, exact, **layout))
    # 4,104 tokens leave less than is missing for one more: 2,101,248 bytes of
    # 1,077,940,224.
    assert terms(stage(stack, 4104, **layout))["split_blocks"] == 32 * 65_664
    assert "split_blocks" not in terms(stage(stack, 4160, **layout | {"recompute": "selective"}))


@pytest.mark.parametrize(("tp", "mode", "part"), [(8, "partitioned", 8), (1, "full:3", 1)])
def test_parts_and_groups_of_inputs_split_blocks_too(tp: int, mode: str, part: int) -> None:
    """4,160 tokens with 32 / tp heads: scores of 138,444,800 bytes on each of eight ranks, in which
    32 parts of 4,259,840 bytes leave 66,560 each, of which 65,536 are missing for one more; of
    whole inputs four leave 532,480, of which 524,288. Three layers share an input of one rank's 32,
    the last two have one to themselves."""
    whole = load_stack("megatron-lm-2022")
    stack = whole.model_copy(update={"recompute_groups_named": True})
    layout = {"zero_stage": int(tp == 1), "tp": tp, "sequence_parallel": False}
    found = stage(stack, 4160, recompute=mode, **layout)
    each = 524_288 // part
    layers = 32 if part > 1 else 11
    assert terms(found)["split_blocks"] == pytest.approx(layers * each, abs=33)
    plain = stage(stack.model_copy(update={"splits_blocks": False}), 4160, recompute=mode, **layout)
    assert terms(found)["activations"] == terms(plain)["activations"]
    assert found.allocated_bytes == plain.allocated_bytes
    assert found.peak_bytes - plain.peak_bytes == terms(found)["split_blocks"]


def test_replayed_allocator() -> None:
    memory = CachingAllocator()
    first = memory.allocate(30 * MIB)
    assert memory.reserved == 30 * MIB
    memory.release(first)
    # The block is split; its parts serve what fits. A rest of 1 MiB stays with its tensor.
    one, rest = memory.allocate(20 * MIB), memory.allocate(10 * MIB)
    assert memory.reserved == 30 * MIB
    memory.release(one)
    memory.allocate(25 * MIB)
    assert memory.reserved == (30 + 26) * MIB
    memory.release(rest)
    memory.allocate(30 * MIB)
    assert memory.reserved == (30 + 26) * MIB
    assert memory.peak_allocated == (30 + 26) * MIB


@pytest.mark.parametrize(
    ("size", "segment"), [(MIB, 2), (MIB + 1, 20), (10 * MIB, 10), (9 * MIB, 20)]
)
def test_sizes_of_segments(size: int, segment: int) -> None:
    memory = CachingAllocator()
    memory.allocate(size)
    assert memory.reserved == segment * MIB
