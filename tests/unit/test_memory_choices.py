"""Choices of a stack that change memory: each by how much, against hand-computed bytes."""

from __future__ import annotations

from typing import Any

import pytest

from hardware_profiles.loader import load_cluster, load_stack
from hardware_profiles.schema import StackSpec
from planner.errors import InputError
from planner.models.reader import read_model
from planner.pipeline import evaluate
from planner.plan import StagePrediction
from planner.request import Request
from planner.specs import JobSpec
from planner.studies.communication import communication

MODEL = read_model("llama-3.1-8b")
PARAMETERS = 8_030_261_248
LAYER = 218_112_000
"""4096 x (4096 + 2 x 1024 + 4096) + 3 x 4096 x 14336 weights and two norms of 4096."""
VOCABULARY = 128_256 * 4096
"""Embedding or head; the head's unit has the final norm as well."""
LOGITS = 4096 * 128_256
GIB = 2**30


def stage(stack: StackSpec, **changes: Any) -> StagePrediction:
    """The stage of 8 devices that take one sample of 4,096 tokens each, ZeRO stage 3."""
    layout = {"zero_stage": 3, "microbatch_size": 1} | changes.pop("layout", {})
    job = JobSpec(sequence_length=4096, global_batch=8, stack=stack.name, **changes)
    request = Request(MODEL, load_cluster("dgx-h100:1"), job, stack)
    return evaluate(request, layout).prediction.stages[0]


def terms(found: StagePrediction) -> dict[str, int]:
    return {term.name: term.bytes or 0 for term in found.memory}


def changed(stack: str, **fields: Any) -> StackSpec:
    return load_stack(stack).model_copy(update=fields)


@pytest.mark.parametrize(
    "stack", ["torchtitan", "megatron-core", "deepspeed-hf", "internevo", "megatron-fsdp"]
)
def test_terms_add_up_to_the_device(stack: str) -> None:
    zero = max(load_stack(stack).zero_stages)
    found = stage(load_stack(stack), layout={"zero_stage": zero})
    assert sum(terms(found).values()) == found.peak_bytes == found.device_bytes
    assert found.allocated_bytes <= found.reserved_bytes <= found.device_bytes


def test_precision_aware_optimizer() -> None:
    """bf16 main gradients; 2 bytes of master weight and 2 + 2 of moments, over 8 ranks."""
    found = stage(
        load_stack("megatron-core-precision-aware"), optimizer="adamw_bf16",
        layout={"zero_stage": 1},
    )  # fmt: skip
    held = terms(found)
    assert held["gradients"] == pytest.approx(2 * PARAMETERS, rel=1e-5)
    assert held["optimizer"] == pytest.approx(6 * PARAMETERS / 8, rel=1e-5)


def test_8_bit_primary_weights_take_the_bytes_of_the_16_bit_ones() -> None:
    """One byte by row and one by column; beside 16-bit weights both copies come on top."""
    layout = {"zero_stage": 1}
    both = terms(stage(load_stack("megatron-core"), precision="fp8", layout=layout))
    primary = terms(stage(load_stack("megatron-core-fp8-weights"), precision="fp8", layout=layout))
    linear = 32 * (LAYER - 2 * 4096)
    assert primary["weights"] == pytest.approx(2 * PARAMETERS, rel=1e-5)
    assert both["weights"] - primary["weights"] == pytest.approx(2 * linear, rel=1e-5)


@pytest.mark.parametrize(
    ("stack", "beside"), [("nemo-fp8", 0), ("megatron-bridge-fp8", 0), ("nemo-fp8-flash2", 2)]
)
def test_fp8_presets_with_primary_weights_hold_no_copies_beside_them(
    stack: str, beside: int
) -> None:
    """NeMo 2's and Megatron-Bridge's set fp8_param_gather; the launcher's scripts did not."""
    layout = {"zero_stage": 1}
    held = terms(stage(load_stack(stack), precision="fp8", layout=layout))
    linear = 32 * (LAYER - 2 * 4096)
    assert held["weights"] == pytest.approx(2 * PARAMETERS + beside * linear, rel=1e-5)


def test_megatron_fsdp_splits_weights_gradients_and_state() -> None:
    """2 + 4 + 12 bytes over 8 ranks, where Megatron-Core's stage 1 splits the 12 only."""
    held = terms(stage(load_stack("megatron-fsdp")))
    whole = terms(stage(load_stack("megatron-core"), layout={"zero_stage": 1}))
    assert sum(held[n] for n in ("weights", "gradients", "optimizer")) == pytest.approx(
        18 * PARAMETERS / 8, rel=1e-5
    )
    assert whole["weights"] + whole["gradients"] == pytest.approx(6 * PARAMETERS, rel=1e-5)


def test_a_layer_gathered_ahead_is_a_layer_more() -> None:
    """Ten layers and eleven at once are more than the loss: 2 bytes of one more layer in the peak
    of a layer's backward, and in the buffers that gathers write into."""
    layout = {"recompute": "full"}
    ten, eleven = (stage(changed("torchtitan", prefetched_units=n), layout=layout) for n in (9, 10))
    assert terms(eleven)["gather_buffers"] - terms(ten)["gather_buffers"] == 2 * LAYER
    assert terms(eleven)["working"] - terms(ten)["working"] == 2 * LAYER


def test_weights_may_stay_split_over_fewer_ranks() -> None:
    """16-bit weights over 2 ranks, held from forward to backward: P bytes."""
    over_all = terms(stage(load_stack("torchtitan")))
    over_two = terms(stage(changed("torchtitan", reshard_group=2)))
    assert over_two["weights"] - over_all["weights"] == pytest.approx(PARAMETERS, rel=1e-6)
    assert terms(stage(changed("torchtitan", reshard_group=8))) == over_all


def test_reduced_gradients_keep_blocks_of_their_own() -> None:
    """fp32 shards over 8 ranks beside the peak at the loss, when none of them is made yet."""
    own = terms(stage(load_stack("torchtitan")))
    shared = stage(changed("torchtitan", stream_pools=False))
    assert own["gradients"] == terms(shared)["gradients"] == 0
    assert own["stream_blocks"] == pytest.approx(4 * PARAMETERS / 8, rel=1e-6)
    assert own["gather_buffers"] == 2 * VOCABULARY + 2 * 4096
    gained = own["stream_blocks"] + own["gather_buffers"]
    assert stage(load_stack("torchtitan")).peak_bytes - shared.peak_bytes == gained


def test_16_bit_logits_leave_a_block() -> None:
    assert terms(stage(load_stack("torchtitan")))["idle_logits"] == 2 * LOGITS
    for stack, loss in (("torchtitan", "chunked"), ("torchtitan-compile", "whole")):
        assert "idle_logits" not in terms(stage(load_stack(stack), loss=loss))


def test_gradients_travel_in_copies() -> None:
    """The largest tensor is the embedding: twice in 16 bits with DeepSpeed ZeRO; with its bf16
    optimizer the fp32 sum and a 16-bit copy of it (DeepSpeedEngine.allreduce_bucket)."""
    assert terms(stage(load_stack("deepspeed-hf")))["reduction_buffers"] == 2 * 2 * VOCABULARY
    held = terms(stage(load_stack("megatron-deepspeed"), layout={"zero_stage": 1}))
    padded = -(-128_256 // 128) * 128 * 4096
    assert held["reduction_buffers"] == (4 + 2) * padded


def test_unfused_adam_makes_temporaries() -> None:
    """InternEvo's step: 2 + 4 of gradients, 8 of the second moment's root and denominator; below
    stage 3 also 4 that the norm of the gradients leaves in blocks of single tensors."""
    for zero_stage, each in ((1, 18), (3, 14)):
        held = terms(stage(load_stack("internevo"), layout={"zero_stage": zero_stage}))
        assert held["optimizer_step"] == pytest.approx(each * PARAMETERS / 8, rel=1e-5)


def test_user_buffers_and_graph_pools() -> None:
    """Ten gathered activations of 4,096 tokens x 4,096 numbers; a pool as large as stated."""
    layout = {"tp": 4, "zero_stage": 1}
    held = terms(stage(load_stack("nemo"), layout=layout))
    assert held["overlap_buffers"] == 10 * 2 * 4096 * 4096
    assert "overlap_buffers" not in terms(stage(load_stack("nemo"), layout={"zero_stage": 1}))
    pool = load_stack("nemo").reserve.fragmentation.model_copy(update={"value": 3.0})
    graphs = stage(changed("nemo", graph_pool=pool), layout=layout)
    assert terms(graphs)["graph_pool"] == 3 * GIB
    plain = stage(load_stack("nemo"), layout=layout)
    assert graphs.peak_bytes - plain.peak_bytes == 3 * GIB


def test_weights_gathered_in_8_bits() -> None:
    """One byte of each weight of a linear layer, two of norms and ends, in the buffers that gathers
    write into and in the layers gathered: thirty of them, more than the loss works with."""
    linear = LAYER - 2 * 4096
    layout = {"recompute": "full"}
    wide, narrow = (
        stage(changed(name, prefetched_units=29), precision="fp8", layout=layout)
        for name in ("torchtitan-compile", "torchtitan-float8-gather")
    )
    assert terms(wide)["gather_buffers"] - terms(narrow)["gather_buffers"] == 30 * linear
    assert terms(wide)["working"] - terms(narrow)["working"] == 30 * linear
    assert terms(wide)["weights"] == terms(narrow)["weights"]
    assert terms(wide)["stream_blocks"] == terms(narrow)["stream_blocks"]


def test_gathers_in_8_bits_carry_less() -> None:
    gathered: dict[str, int] = {}
    reduced: dict[str, int] = {}
    for name in ("torchtitan-compile", "torchtitan-float8-gather"):
        job = JobSpec(sequence_length=4096, global_batch=8, stack=name, precision="fp8")
        request = Request(MODEL, load_cluster("dgx-h100:1"), job, load_stack(name))
        found = evaluate(request, {"zero_stage": 3, "microbatch_size": 1})
        (calls,) = communication(request, found).stages
        gathered[name], reduced[name] = (
            sum(call.bytes for call in calls if call.kind == kind)
            for kind in ("all_gather", "reduce_scatter")
        )
    # Twice for each of 32 layers, forward and backward.
    less = gathered["torchtitan-compile"] - gathered["torchtitan-float8-gather"]
    assert less == 2 * 32 * (LAYER - 2 * 4096)
    assert reduced["torchtitan-compile"] == reduced["torchtitan-float8-gather"]


def test_a_fused_loss_makes_the_gradient_of_the_head() -> None:
    """16 bits to sum in, and of each chunk a product in 16 bits and its fp32 copy; not of a head
    that is not trained."""
    layout = {"recompute": "full"}
    held, plain = (
        terms(stage(stack, layout=layout))
        for stack in (load_stack("deepspeed-hf"), changed("deepspeed-hf", loss_gradient_bytes=0))
    )
    # The loss takes the peak over from the backward of a layer.
    assert held["activations"] > plain["activations"]
    loss = held["activations"] + held["working"]
    assert loss - 8 * VOCABULARY < plain["activations"] + plain["working"] < loss
    tuned = {"lora_rank": 16}
    with_adapters = stage(load_stack("deepspeed-hf"), layout=layout, finetune=tuned)
    without = stage(changed("deepspeed-hf", loss_gradient_bytes=0), layout=layout, finetune=tuned)
    assert terms(with_adapters) == terms(without)


def test_mxfp8_has_a_scale_for_each_32_elements_of_either_copy() -> None:
    layout = {"zero_stage": 1}
    plain, scaled = (
        terms(stage(load_stack(name), precision="fp8", layout=layout))
        for name in ("megatron-core", "megatron-core-mxfp8")
    )
    linear = 32 * (LAYER - 2 * 4096)
    assert scaled["weights"] - plain["weights"] == 4 * linear // 64
    # Inputs of the four products of a layer: 4096 (norm), 4096, 4096 (norm) and 14336 wide.
    inputs = 32 * 4096 * (3 * 4096 + 14_336)
    assert scaled["activations"] - plain["activations"] == 2 * inputs // 64


def test_primary_weights_in_8_bits_are_gathered_in_8_bits() -> None:
    gathered = []
    for name in ("megatron-core", "megatron-core-fp8-weights"):
        job = JobSpec(sequence_length=4096, global_batch=8, stack=name, precision="fp8")
        request = Request(MODEL, load_cluster("dgx-h100:1"), job, load_stack(name))
        (calls,) = communication(
            request, evaluate(request, {"zero_stage": 1, "microbatch_size": 1})
        ).stages
        gathered.append(sum(call.bytes for call in calls if call.kind == "all_gather"))
    assert gathered[0] - gathered[1] == 32 * (LAYER - 2 * 4096)


def test_blocks_that_the_forward_leaves_stay_beside_the_loss() -> None:
    """What a layer does not keep under recomputation, cached but in no tensor; nothing where all is
    kept, or where the loss comes in pieces."""
    kept = stage(load_stack("torchtitan"))
    assert "idle_forward" not in terms(kept)
    layout = {"recompute": "full"}
    left, shared = (
        stage(stack, layout=layout)
        for stack in (load_stack("torchtitan"), changed("torchtitan", idle_forward=False))
    )
    every = terms(kept)["activations"] - terms(left)["activations"]
    # Of 32 layers that keep their input, one's.
    assert terms(left)["idle_forward"] == every // 32
    assert left.allocated_bytes == shared.allocated_bytes
    assert left.reserved_bytes - shared.reserved_bytes == every // 32
    assert left.peak_bytes - shared.peak_bytes == every // 32
    pieces = stage(load_stack("torchtitan"), layout=layout, loss="chunked")
    assert "idle_forward" not in terms(pieces)


def test_communicators_that_multicast_hold_buffers_for_each_rank_of_a_node() -> None:
    """tp 2 and dp 4 on one node: groups of 2 (tp; tp with pp), 4 (gradients, loss) and 8 (all)."""
    layout = {"tp": 2, "zero_stage": 1}
    stack = load_stack("megatron-core-0.6")
    held = terms(stage(stack, layout=layout))["communicators"]
    pair, more = round(0.4 * GIB), round(0.52 * GIB)
    assert held == pytest.approx(2 * pair + 3 * more + (4 + 4 + 8) * 192 * 2**20, abs=10)
    later = terms(stage(load_stack("megatron-core"), layout=layout))["communicators"]
    assert later == pytest.approx(2 * pair + 2 * more, abs=10)
    job = JobSpec(sequence_length=4096, global_batch=8, stack=stack.name)
    request = Request(MODEL, load_cluster("dgx-a100:1"), job, stack)
    found = evaluate(request, {"microbatch_size": 1} | layout).prediction.stages[0]
    assert terms(found)["communicators"] == pytest.approx(2 * pair + 3 * more, abs=10)


def test_bf16_with_stochastic_rounding_has_no_master_weights() -> None:
    """NxD Training's bf16SR: weights and gradients in bf16; moments in bf16 or, of
    adamw_fp32OptState, in fp32, over 8 ranks that cut first dimensions evenly."""
    for name, moments in (("adamw_bf16", 4), ("adamw", 8)):
        rounded = terms(
            stage(load_stack("neuron-bf16-sr"), optimizer=name, layout={"zero_stage": 1})
        )
        assert rounded["weights"] == 2 * PARAMETERS
        assert rounded["gradients"] == 2 * PARAMETERS
        assert rounded["optimizer"] == pytest.approx(moments * PARAMETERS / 8, rel=1e-6)
    mixed = terms(stage(load_stack("neuron"), layout={"zero_stage": 1}))
    assert mixed["gradients"] == 4 * PARAMETERS
    assert mixed["optimizer"] == pytest.approx(12 * PARAMETERS / 8, rel=1e-6)


def test_either_half_of_neurons_mixed_precision() -> None:
    """NxD Training's precision type manual: fp32 master weights without fp32 gradients, and the
    other way round; the latter needs ZeRO 1 as the former does."""
    narrow = terms(stage(load_stack("neuron-bf16-gradients"), layout={"zero_stage": 1}))
    assert narrow["gradients"] == 2 * PARAMETERS
    assert narrow["optimizer"] == pytest.approx(12 * PARAMETERS / 8, rel=1e-6)
    wide = terms(stage(load_stack("neuron-fp32-gradients"), layout={"zero_stage": 1}))
    assert wide["gradients"] == 4 * PARAMETERS
    assert wide["optimizer"] == pytest.approx(8 * PARAMETERS / 8, rel=1e-6)
    for name in ("neuron", "neuron-bf16-gradients", "neuron-fp32-gradients"):
        with pytest.raises(InputError, match="no ZeRO stage 0 in bf16"):
            stage(load_stack(name), layout={"zero_stage": 0})


def test_neuron_in_fp32_needs_no_zero() -> None:
    """Precision type fp32 has no master weights that only ZeRO 1 would keep."""
    whole, split = (
        terms(stage(load_stack("neuron"), precision="fp32", layout={"zero_stage": zero}))
        for zero in (0, 1)
    )
    assert whole["optimizer"] == 8 * PARAMETERS
    assert split["optimizer"] == pytest.approx(PARAMETERS, rel=1e-6)
    assert whole["weights"] == split["weights"] == 4 * PARAMETERS


def test_autograd_keeps_the_weights_that_stage_3_has_let_go() -> None:
    """16-bit weights of 32 layers and of the head, which a linear layer's backward reads; with full
    recomputation the head's only. A lookup reads none."""
    stack = load_stack("deepspeed-transformers")
    own = changed(stack.name, state=stack.state.model_copy(update={"graph_keeps_gathered": False}))
    head = 2 * (VOCABULARY + 4096)
    for recompute, more in (("none", 2 * 32 * LAYER + head), ("full", head)):
        layout = {"recompute": recompute}
        kept, let_go = (terms(stage(each, layout=layout)) for each in (stack, own))
        assert kept["activations"] - let_go["activations"] == more
    below = {"zero_stage": 2}
    assert terms(stage(stack, layout=below)) == terms(stage(own, layout=below))


def test_a_norm_that_scales_in_16_bits_keeps_16() -> None:
    """2 bytes less of 4,096 x 4,096 numbers for each of 65 norms."""
    narrow, wide = (
        terms(stage(changed("deepspeed-transformers", norm_copy_bytes=n))) for n in (2, 4)
    )
    assert wide["activations"] - narrow["activations"] == 2 * 65 * 4096 * 4096


def test_a_pipeline_reduces_a_unit_at_a_time_in_a_block_of_its_own() -> None:
    """fp32 gradients of head and final norm; without a pipeline the buffers of two units are in the
    backward's own peak, and one device reduces nothing."""
    layout = {"zero_stage": 2, "pp": 2}
    assert terms(stage(load_stack("torchtitan"), layout=layout))["reduction_block"] == 4 * (
        VOCABULARY + 4096
    )
    assert "reduction_block" not in terms(stage(load_stack("torchtitan")))
    layout = {"zero_stage": 1, "pp": 2}
    assert "reduction_block" not in terms(stage(load_stack("megatron-core"), layout=layout))


def test_the_first_step_gathers_the_head_where_the_loss_asks_for_it() -> None:
    """Its 16-bit weights and the final norm's once more, in stage 3 only."""
    held = terms(stage(load_stack("deepspeed-hf")))
    assert held["first_gather"] == 2 * (VOCABULARY + 4096)
    assert "first_gather" not in terms(stage(load_stack("deepspeed-hf"), layout={"zero_stage": 2}))
    assert "first_gather" not in terms(stage(load_stack("deepspeed-transformers")))


def test_megatron_fsdp_of_the_optimizers_state_alone() -> None:
    """Weights (2 bytes) and main gradients (4) are whole; fp32 weights and moments are split."""
    held = terms(stage(load_stack("megatron-fsdp"), layout={"zero_stage": 1}))
    assert held["weights"] == 2 * PARAMETERS
    assert held["gradients"] == 4 * PARAMETERS
    assert held["optimizer"] == pytest.approx(12 * PARAMETERS / 8, rel=1e-6)


def test_fsdp2_under_megatron_shards_bf16_weights_and_fp32_masters() -> None:
    """2 + 2 + 12 bytes over 8 ranks; the step adds fp32 gradients of the shards."""
    held = terms(stage(load_stack("megatron-torch-fsdp2"), layout={"recompute": "full"}))
    shard = PARAMETERS / 8
    for name, each in (
        ("weights", 2),
        ("gradients", 2),
        ("optimizer", 12),
        ("optimizer_update", 4),
    ):
        assert held[name] == pytest.approx(each * shard, rel=1e-6)


def test_delayed_scaling_has_a_communicator() -> None:
    """Largest values are reduced over all eight ranks in fp8, not in bf16 nor with block scales."""
    more = load_stack("megatron-core").reserve.communicator.si
    assert communicators("megatron-core", "fp8") - communicators("megatron-core", "bf16") == int(
        more
    )
    assert communicators("megatron-bridge", "fp8") == communicators("megatron-bridge", "bf16")


def communicators(stack: str, precision: str) -> int:
    found = stage(load_stack(stack), precision=precision, layout={"zero_stage": 1})
    return terms(found)["communicators"]


@pytest.mark.parametrize(
    ("stack", "each"),
    [("megatron-core", 6.34), ("pytorch-fsdp2", 6.34), ("torchtitan", 0.0)],
)
def test_uneven_routing_leaves_idle_blocks_where_ranks_hold_different_experts(
    stack: str, each: float
) -> None:
    """Each microbatch has other shapes then, unless segments grow (torchtitan's launcher)."""
    for ep, imbalance in ((1, 0.5), (8, 0.0), (8, 0.5)):
        held = routed(stack, ep, imbalance)
        expected = int(each * GIB) if ep > 1 and imbalance else 0
        assert terms(held).get("routing_fragmentation", 0) == expected
        assert held.reserved_bytes - held.allocated_bytes >= expected


def test_idle_blocks_of_uneven_routing_are_part_of_the_peak() -> None:
    stack = load_stack("megatron-core")
    routing = stack.routing_fragmentation
    assert routing is not None
    without = routed(changed(stack.name, routing_fragmentation=None), 8, 0.5)
    assert routed(stack, 8, 0.5).peak_bytes - without.peak_bytes == int(routing.si)


def routed(stack: str | StackSpec, ep: int, imbalance: float) -> StagePrediction:
    """Qwen3-30B-A3B on 8 devices."""
    spec = load_stack(stack) if isinstance(stack, str) else stack
    job = JobSpec(sequence_length=4096, global_batch=8, stack=spec.name, expert_imbalance=imbalance)
    request = Request(read_model("qwen3-30b-a3b"), load_cluster("dgx-h100:1"), job, spec)
    layout = {"ep": ep, "microbatch_size": 1, "zero_stage": max(spec.zero_stages)}
    return evaluate(request, layout).prediction.stages[0]
