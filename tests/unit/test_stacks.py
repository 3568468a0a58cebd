"""Which software runs a plan: the default where none is named, and what a stack refuses."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from cost_models.optimizers import OPTIMIZERS
from hardware_profiles.documents import DocumentError
from hardware_profiles.loader import catalog_names, load_device, load_stack
from hardware_profiles.stack_words import OptimizerName, StackRule, Trainable
from planner.blocks.registry import KINDS
from planner.errors import InfeasibleError, InputError
from planner.models.spec import Spec
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.specs import Optimizer
from planner.stack_rules import STACK_RULES
from planner.stacks import DEFAULTS, MOST_NAMED, fault


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
    able = (
        "maxtext-tpu", "maxtext-tpu-dot-product", "maxtext-tpu-ring-of-experts",
        "maxtext-tpu-sharded-optimizer",
    )  # fmt: skip
    assert caught.value.hint == " or ".join(f"--stack {name}" for name in able)


def test_hints_name_only_stacks_that_can_run_the_whole_request() -> None:
    # Of the stacks for networks of layers torchgpipe alone does not train in bf16.
    with pytest.raises(InputError, match=r"torchgpipe 0\.0\.7 does not train in bf16") as caught:
        read_request("unet-2015", "dgx-a100", None, {"stack": "torchgpipe"})
    assert caught.value.hint == "--stack torch-pipelining or --stack deepspeed-pipe"


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


def test_the_rules_that_a_stack_may_name_are_those_that_are_implemented() -> None:
    implemented = set(STACK_RULES)
    named = set(get_args(StackRule))
    assert implemented <= named
    # The others are read where layouts are made (planner.rules.layout_rules), or with the device.
    assert named - implemented == {
        "pipeline_needs_multiple_of_pp",
        "hybrid_shards_are_nodes",
        "replicas_share_weights",
        "muon_takes_whole_query_groups",
        "needs_block_scaled_products",
        "no_accumulation",
        "no_accumulation_in_fp8",
        "no_experts_in_fp8",
        "no_pipeline_in_fp8",
        "no_prediction_in_chunks",
        "no_zero_2_with_pipeline",
        "no_zero_3_with_context",
        "zero_2_needs_expert_parallelism",
        "no_zero_3_with_pipeline",
        "no_zero_3_with_split_backward",
        "shards_fill_nodes",
        "shards_over_one_rank",
        "whole_gradients_need_one_microbatch",
        "zero_0_is_replicate_only",
        "zero_2_needs_pipeline",
        "zero_1_shards_over_all",
    }


def test_a_hint_names_a_precision_where_only_another_one_has_what_was_asked() -> None:
    asked = {"constraints": {"schedule": "1f1b_vocab_1"}}
    with pytest.raises(InputError, match="has no schedule") as caught:
        read_request("llama-3.1-8b", "dgx-h100", None, asked)
    assert caught.value.hint == "--stack megatron-vocabulary-parallel, with --precision fp16"


def test_a_long_hint_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        read_request("llama-3.1-8b", "dgx-h100", None, {"stack": "torchgpipe"})
    assert str(caught.value.hint).count("--stack") == MOST_NAMED
    assert str(caught.value.hint).endswith(" more can")


@pytest.mark.parametrize("field", ["sequence_length", "global_batch", "global_batch_tokens"])
def test_sizes_without_bounds_are_refused_at_once(field: str) -> None:
    with pytest.raises(DocumentError, match=f"{field}: must be less than or equal to"):
        read_request("llama-3.1-8b", "dgx-h100", None, {field: 10**30})


def test_what_a_stack_runs_and_no_layout_has_is_said_with_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: torchtitan\nname: mine\nnot_priced: {a pass: not counted yet}\n")
    job = {"stack": str(path), "sequence_length": 2048, "global_batch": 8}
    result = plan(read_request("llama-3.2-1b", "dgx-h100", None, job))
    assert result.target.not_priced == ("a pass",)


def test_no_stack_that_ships_leaves_out_what_it_runs() -> None:
    assert not [name for name in catalog_names("stack") if load_stack(name).not_priced]


def test_orders_of_one_s_own_run_where_pytorch_reads_them_from_a_file() -> None:
    able = {name for name in catalog_names("stack") if load_stack(name).given_orders}
    titan = {name for name in catalog_names("stack") if name.startswith("torchtitan")}
    automodel = {"nemo-automodel", "nemo-automodel-bf16", "nemo-automodel-reduce-each"}
    assert able == {*titan, *automodel}


@pytest.mark.parametrize("name", catalog_names("stack"))
def test_what_is_not_priced_has_a_reason(name: str) -> None:
    stack = load_stack(name)
    assert not stack.not_priced.keys() & stack.not_described.keys()
    for thing, why in (*stack.not_priced.items(), *stack.not_described.items()):
        assert len(why) > len(thing) > 3


def test_neuron_ties_no_embeddings_under_a_pipeline() -> None:
    """NxD Training, known_issues.rst: its pipeline asserts that shared weights have gradients."""
    request = read_request("llama-3.2-1b", "aws-trn1", None, {"stack": "neuron"})
    assert request.workload.tied_embeddings
    with pytest.raises(InputError, match="no tied embeddings under a pipeline"):
        evaluate(request, {"pp": 2})


def test_internevo_shards_weights_without_a_pipeline_only() -> None:
    """launch.py: FSDP is refused where the pipeline has more than one stage."""
    request = read_request("llama-2-7b", "dgx-a100", None, {"stack": "internevo"})
    with pytest.raises(InputError, match="parameters stay gathered under a pipeline"):
        evaluate(request, {"pp": 2, "zero_stage": 3})
    assert evaluate(request, {"pp": 2, "zero_stage": 0}).layout.zero_stage == 0


def test_dropout_is_refused_where_layers_have_none() -> None:
    with pytest.raises(InputError, match=r"the layers of torchtitan 0\.3\.0 have no dropout"):
        read_request_with("torchtitan", {"dropout": True})
    assert read_request_with("megatron-core", {"dropout": True}).job.dropout


@pytest.mark.parametrize("stack", ["megatron-core", "nemo", "megatron-fsdp"])
def test_a_chunked_loss_is_refused_where_there_is_none(stack: str) -> None:
    with pytest.raises(InputError, match="has no chunked loss") as caught:
        read_request_with(stack, {"loss": "chunked"})
    assert "--stack torchtitan" in (caught.value.hint or "")
    assert read_request_with(stack, {"loss": "whole"}).job.loss == "whole"


def test_a_loss_that_is_chunked_by_itself_is_not_asked_for() -> None:
    """Liger-Kernel's, ops/fused_linear_cross_entropy.py."""
    with pytest.raises(InputError, match="takes the sequence in pieces of its own") as caught:
        read_request_with("deepspeed-hf", {"loss": "chunked"})
    assert caught.value.hint == "leave loss out"


def test_every_stack_runs_the_plain_loss_and_some_a_chunked_one() -> None:
    stacks = [load_stack(name) for name in catalog_names("stack")]
    chunked = {stack.name for stack in stacks if stack.loss_chunks > 1}
    assert {"torchtitan", "torchtitan-compile"} <= chunked
    assert all(name.startswith(("torch", "maxtext")) for name in chunked)


def test_what_a_job_asks_in_vain_is_said() -> None:
    request = read_request_with("megatron-core", {"document_length": 10**6})
    assert "documents of 1,000,000 tokens: each fills a sample of 4,096" in (
        request.workload.assumptions
    )


def test_an_adapter_is_no_wider_than_the_model() -> None:
    with pytest.raises(InputError, match=r"lora_rank = 5,000, and llama-2-7b is 4,096 wide"):
        read_request_with("nemo", {"finetune": {"lora_rank": 5000}}).workload  # noqa: B018


def read_request_with(stack: str, job: dict[str, object]) -> Request:
    return read_request("llama-2-7b", "dgx-a100", None, {"stack": stack, **job})


def test_stacks_and_code_use_one_vocabulary() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS) == set(get_args(Optimizer))
    kinds = {spec.model_fields["kind"].default for spec in KINDS if issubclass(spec, Spec)}
    assert set(get_args(Trainable)) == kinds | {"vision", "layers"}


@pytest.mark.parametrize("fix", [{"zero_stage": 3}, {"ep": 3}])
def test_what_nothing_can_be_is_no_matter_of_memory(fix: dict[str, int]) -> None:
    """Some layouts do not fit either, but no memory makes the wish possible."""
    request = read_request("llama-3.2-1b", "dgx-h100", None, {"constraints": {"fix": fix}})
    with pytest.raises(InfeasibleError) as caught:
        plan(request)
    assert "no layout is possible on 8 devices: asked for" in str(caught.value)


def test_a_wish_that_the_stack_has_not_is_named_before_what_took_more_layouts() -> None:
    job = {"stack": "deepspeed-mics", "optimizer_offload": True}
    request = read_request("llama-3.2-1b", "dgx-h100", None, job)
    with pytest.raises(InfeasibleError, match="keeps nothing on the host") as caught:
        plan(request)
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.ways_out[0].change == "optimizer_offload: false"


def test_mxfp8_runs_where_products_take_blocks_with_scales() -> None:
    job = {"stack": "megatron-core-mxfp8", "precision": "fp8"}
    assert read_request("llama-3.1-8b", "dgx-b200", None, job).remark == ""
    with pytest.raises(InputError, match="h100-sxm-80gb has no block-scaled products"):
        read_request("llama-3.1-8b", "dgx-h100", None, job)


def test_a_stack_of_one_precision_hints_at_it() -> None:
    with pytest.raises(InputError, match="does not train in bf16") as caught:
        read_request("llama-3.1-8b", "dgx-h100", None, {"stack": "torchtitan-float8-gather"})
    assert caught.value.hint == "--precision fp8"


def test_a_device_without_the_stacks_attention_kernel_is_refused() -> None:
    with pytest.raises(InputError, match=r"runs flash2 attention, and b200\S* has") as caught:
        read_request("llama-3.1-8b", "dgx-b200:1", None, {"stack": "internevo"})
    assert caught.value.hint is not None
    assert "--stack " in caught.value.hint
