"""Optimizers that run on the host as PyTorch's loops, by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from cost_models.host_loops import HOST_LOOPS
from hardware_profiles.holdings import LoopName, OffloadSpec
from hardware_profiles.loader import catalog_names, load_stack
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.plan import Prediction
from planner.studies.verify import verify

PARAMETERS = 8_030_261_248
EACH = {
    # Bytes per parameter: moved in a step, moments, new tensors.
    "sgd": (8 + 12 + 12, 4, 0),
    "rmsprop": (20 + 16 + 16, 4, 4),
    "adamax": (12 + 8 + 16 + 12 + 16, 8, 4),
    "adadelta": (20 + 16 + 16 + 12 + 12 + 20 + 12, 8, 8),
    "adafactor": (4 + 16 + 20 + 20 + 4 + 8 + 8 + 8 + 12, 4, 8),
}
MUON = (12 + 8 + 12 + 8 + 8 + 8 + 8 + 12 + 8 + 12, 16)
"""Of what is no hidden matrix: tests/unit/test_deepspeed_optimizers.py."""


def predicted(optimizer: str, zero_stage: int, stack: str = "deepspeed-hf") -> Prediction:
    job = {"stack": stack, "sequence_length": 2048, "global_batch": 8, "optimizer": optimizer,
           "precision": "bf16", "optimizer_offload": True}  # fmt: skip
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    layout = {"zero_stage": zero_stage, "microbatch_size": 1, "recompute": "full"}
    return evaluate(request, layout).prediction


def test_every_loop_has_a_source() -> None:
    assert set(get_args(LoopName)) == set(HOST_LOOPS) == {*EACH, "muon"}
    for name, loop in HOST_LOOPS.items():
        expected = MUON if name == "muon" else EACH[name][::2]
        assert (loop.moved_bytes, loop.working_bytes) == expected
        assert loop.source
    for name in catalog_names("stack"):
        stack = load_stack(name)
        if stack.offload is not None and stack.offload.loops:
            assert set(stack.offload.loops).isdisjoint(stack.offload.optimizers)
            assert stack.offload.updates_on == "host"


@pytest.mark.parametrize("optimizer", sorted(EACH))
def test_loops_take_all_their_passes(optimizer: str) -> None:
    """Against one pass of AdamW's 28 bytes, over a share of the bandwidth that 8 devices share."""
    spec = load_stack("deepspeed-hf").offload
    request = read_request("llama-3.1-8b", "dgx-h100:1", None, {"stack": "deepspeed-hf"})
    node = request.cluster.groups[0].node
    assert spec is not None
    assert spec.adam_efficiency is not None
    assert node.host_memory_bandwidth is not None
    rate = node.host_memory_bandwidth.si * spec.adam_efficiency.si
    for zero_stage in (2, 3):
        there, adamw = (predicted(name, zero_stage) for name in (optimizer, "adamw"))
        slower = (EACH[optimizer][0] - 28) * PARAMETERS / rate
        assert there.step_time_s - adamw.step_time_s == pytest.approx(slower, rel=1e-3)


@pytest.mark.parametrize("optimizer", sorted(EACH))
def test_hosts_hold_what_loops_keep_and_make(optimizer: str) -> None:
    """Master weight, gradient and moments; new tensors of the shard that is updated at once: all of
    it below stage 3 and, in stage 3, a group of at most 1e9 parameters."""
    _, moments, made = EACH[optimizer]
    spec = load_stack("deepspeed-hf").offload
    assert spec is not None
    assert spec.loop_elements == 10**9
    for zero_stage, group in ((1, PARAMETERS), (2, PARAMETERS), (3, 8 * 10**9)):
        found = predicted(optimizer, zero_stage)
        assert found.host is not None
        expected = (8 + moments) * PARAMETERS + made * group
        assert found.host.bytes_per_node == pytest.approx(expected, rel=1e-6)
        on_device = {term.name: term.bytes for term in found.stages[0].memory}
        assert on_device["optimizer"] == 0


@pytest.mark.parametrize("stack", ["deepspeed-hf", "deepspeed-pipe", "deepspeed-autotp"])
def test_a_plan_with_loops_on_the_hosts_verifies(stack: str) -> None:
    job = {"stack": stack, "sequence_length": 2048, "global_batch": 16, "optimizer": "adamax",
           "precision": "bf16", "optimizer_offload": True}  # fmt: skip
    found = plan(read_request("llama-3.1-8b", "dgx-h100:1", None, job))
    assert verify(found) == []


ON_DRIVES = {"lion": (4, 0), "adagrad": (4, 0)} | {name: each[1:] for name, each in EACH.items()}


@pytest.mark.parametrize("optimizer", sorted(ON_DRIVES))
def test_drives_hold_and_swap_what_an_optimizer_keeps(optimizer: str) -> None:
    """Weight, gradient and moments, read at 52 GB/s and written at 28 GB/s beside the update as in
    memory; memory has four buffers of a group of 10^9 parameters and what a loop makes of one."""
    moments, made = ON_DRIVES[optimizer]
    memory, found = (predicted(optimizer, 3, f"deepspeed-{s}") for s in ("hf", "nvme"))
    assert found.host is not None
    assert found.host.place == "drives"
    assert found.host.bytes_per_node == (8 + moments) * PARAMETERS
    assert found.host.buffer_bytes_per_node == 8 * (16 + made) * 10**9
    swapped = (8 + moments) * PARAMETERS * (1 / 52e9 + 1 / 28e9)
    assert found.step_time_s - memory.step_time_s == pytest.approx(swapped, rel=1e-6)
    assert found.max_peak_bytes == memory.max_peak_bytes
    piped = predicted(optimizer, 3, "deepspeed-nvme-pipelined").host
    assert piped is not None
    assert piped.buffer_bytes_per_node == 8 * (48 + made) * -(-PARAMETERS // 80)


def test_a_plan_with_loops_beside_drives_verifies() -> None:
    job = {"stack": "deepspeed-nvme", "sequence_length": 2048, "global_batch": 16,
           "optimizer": "adadelta", "precision": "bf16", "optimizer_offload": True,
           "parameter_offload": True}  # fmt: skip
    assert verify(plan(read_request("llama-3.1-8b", "dgx-h100:1", None, job))) == []
    asked = read_request("llama-3.1-8b", "dgx-h100:1", None, job | {"optimizer": "adam8bit"})
    with pytest.raises(InputError, match="no adam8bit on the host: bitsandbytes"):
        evaluate(asked, {"zero_stage": 3})


def test_loops_belong_to_hosts() -> None:
    spec = load_stack("maxtext-gpu").offload
    assert spec is not None
    with pytest.raises(ValueError, match="optimizers that the host updates"):
        OffloadSpec.model_validate(spec.model_dump() | {"loops": ["sgd"]})


def test_loops_are_all_or_nothing() -> None:
    """Twin-Flow's devices run AdamW (stage3.py, backup_optimizer)."""
    job = {"stack": "deepspeed-hf", "sequence_length": 2048, "global_batch": 8, "optimizer": "sgd",
           "optimizer_offload": True, "optimizer_offload_share": 0.5}  # fmt: skip
    asked = read_request("llama-3.1-8b", "dgx-h100:1", None, job)
    with pytest.raises(InputError, match="all optimizer state of sgd or none"):
        evaluate(asked, {"zero_stage": 3})
