"""Which software runs a plan: the default where none is named, and what a stack refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_profiles.loader import catalog_names, load_device, load_stack
from planner.errors import InputError
from planner.pipeline import plan, read_request
from planner.stacks import DEFAULTS, fault


@pytest.mark.parametrize(
    ("model", "cluster", "stack"),
    [
        ("llama-3.1-8b", "dgx-h100", "megatron-core"),
        ("llama-3.1-8b", "mi300x-8", "megatron-core"),
        ("llama-3.1-8b", "tpu-v5p-8", "maxtext-tpu"),
        ("llama-3.1-8b", "aws-trn1", "neuron"),
        ("llama-3.1-8b", "atlas-910b", "mindformers"),
        ("llama-3.1-8b", "gaudi3-hls", "deepspeed-hf"),
        ("qwen3.5-27b", "dgx-h100", "megatron-bridge"),
        ("unet-2015", "dgx-a100", "torch-pipelining"),
    ],
)
def test_the_default_is_the_first_stack_that_can_run_the_job(
    model: str, cluster: str, stack: str
) -> None:
    request = read_request(model, cluster)
    assert (request.stack.name, request.job.stack) == (stack, stack)
    assert (request.remark == "") is (stack == DEFAULTS[0])
    if request.remark:
        assert request.remark.startswith(f"planned for {stack}: megatron-core 0.13 ")


def test_the_default_looks_at_the_job_too() -> None:
    request = read_request("llama-3.1-8b", "dgx-h100", None, {"optimizer": "muon"})
    assert request.stack.name == "megatron-core-muon"


def test_a_named_stack_is_never_replaced() -> None:
    with pytest.raises(InputError, match=r"megatron-core 0\.13 does not run on tpu-v5p") as caught:
        read_request("llama-3.1-8b", "tpu-v5p-8", None, {"stack": "megatron-core"})
    assert caught.value.hint == "--stack maxtext-tpu"


def test_hints_name_only_stacks_that_can_run_the_whole_request() -> None:
    # Of the two stacks for networks of layers only torch-pipelining trains in bf16.
    with pytest.raises(InputError, match=r"torchgpipe 0\.0\.7 does not train in bf16") as caught:
        read_request("unet-2015", "dgx-a100", None, {"stack": "torchgpipe"})
    assert caught.value.hint == "--stack torch-pipelining"


def test_what_nothing_runs_is_said() -> None:
    with pytest.raises(InputError, match="does not run on tpu-v5p") as caught:
        read_request("unet-2015", "tpu-v5p-8")
    assert caught.value.hint == "no stack that ships can run it"


def test_every_stack_says_where_it_runs() -> None:
    vendors = {load_device(name).vendor for name in catalog_names("device")}
    named: set[str] = set()
    for name in catalog_names("stack"):
        stack = load_stack(name)
        assert stack.runs_on, name
        assert set(stack.runs_on) <= vendors, name
        assert all(len(source) > 10 for source in stack.runs_on.values()), name
        named |= set(stack.runs_on)
    assert named == vendors


def test_a_device_of_an_unknown_vendor_may_run_anything(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "name: ours\nnode:\n  extends: dgx-h100\n  name: box\n"
        "  device: {extends: h100-sxm-80gb, name: chip, vendor: acme}\nnodes: 1\n"
    )
    request = read_request("llama-3.1-8b", str(path), None, {"stack": "torchtitan"})
    assert fault(request) is None


def test_a_plan_says_the_stack_that_was_taken_for_it() -> None:
    limits = {"fix": {"microbatch_size": 1}, "max": {"pp": 1}}
    request = read_request("llama-3.1-8b", "tpu-v5p-8:4", None, {"constraints": limits})
    found = plan(request)
    assert found.inputs.job.document["stack"] == found.target.stack == "maxtext-tpu"
