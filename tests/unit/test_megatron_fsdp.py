"""Megatron-FSDP in a pipeline, and PyTorch's FSDP2 under Megatron-Core."""

from __future__ import annotations

import pytest

from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.request import Request
from planner.studies.communication import communication


def request(stack: str = "megatron-fsdp", model: str = "llama-3.1-8b", **more: object) -> Request:
    asked = {"stack": stack, "sequence_length": 2048, "global_batch": 32} | more
    return read_request(model, "dgx-h100:1", None, asked)


def test_units_of_a_pipeline_are_gathered_with_every_microbatch() -> None:
    """2 stages of 16 layers on 4 ranks each, 8 microbatches. Both passes gather every layer; the
    first stage's embedding too; the head is gathered once and stays for its backward."""
    layout = {"pp": 2, "dp_shard": 4, "zero_stage": 3}
    found = communication(request(), evaluate(request(), layout))
    counts = [
        {(c.phase, c.kind): c.count for c in stage if c.group == "dp_shard"}
        for stage in found.stages
    ]  # fmt: skip
    for stage, (forward, backward) in zip(counts, ((17, 17), (17, 16)), strict=True):
        assert stage["forward", "all_gather"] == 8 * forward
        assert stage["backward", "all_gather"] == 8 * backward
        assert stage["backward", "reduce_scatter"] == 8 * 17


REDUCES = ("reduce_scatter", "all_reduce")


def gradient_calls(layout: dict[str, object]) -> list[tuple[str, str, int]]:
    """Phase, kind and count of the reductions of the first stage."""
    found = communication(request(), evaluate(request(), layout)).stages[0]
    return [(c.phase, c.kind, c.count) for c in found if c.kind in REDUCES]


@pytest.mark.parametrize("vpp", [1, 2])
def test_split_gradients_are_reduced_with_every_microbatch_of_a_pipeline(vpp: int) -> None:
    """8 microbatches of 16 layers and an embedding; in stage 1 the last backward alone reduces."""
    layout = {"pp": 2, "vpp": vpp, "dp_shard": 4}
    each = gradient_calls({**layout, "zero_stage": 2})
    assert ("backward", "reduce_scatter", 8 * 17) in each
    once = gradient_calls({**layout, "zero_stage": 1})
    assert ("step", "reduce_scatter", 17) in once


def test_split_gradients_take_a_quarter_on_four_ranks_of_a_pipeline() -> None:
    whole, split = (
        memory("megatron-fsdp", {"pp": 2, "dp_shard": 4, "zero_stage": stage}) for stage in (1, 2)
    )
    assert split["gradients"] == pytest.approx(whole["gradients"] / 4, rel=1e-6)
    assert split["weights"] == whole["weights"]
    # A unit's gradients are whole until they are reduced: in 16 bits, and copied to 32.
    assert split["working"] > whole["working"]


def test_virtual_stages_gather_as_often_as_stages() -> None:
    """Each chunk is wrapped by itself; its units are gathered whenever it runs."""
    counts = []
    for vpp in (1, 2):
        layout = {"pp": 2, "vpp": vpp, "dp_shard": 4, "zero_stage": 3}
        stage = communication(request(), evaluate(request(), layout)).stages[0]
        counts.append([c.count for c in stage if c.kind == "all_gather"])
    assert counts[0] == counts[1]
    best = plan(request(constraints={"fix": {"pp": 2, "vpp": 2}})).layout
    assert best.schedule == "interleaved"


def memory(stack: str, layout: dict[str, object], **more: object) -> dict[str, int]:
    """Bytes of the first stage by term."""
    asked = request(stack, **more)
    terms = evaluate(asked, layout).prediction.stages[0].memory
    return {term.name: term.bytes or 0 for term in terms}


PARAMETERS = 8_030_261_248
VOCABULARY = 128_256 * 4096


def test_weights_that_stay_gathered_are_there_once_and_whole() -> None:
    """--torch-fsdp2-no-reshard-after-forward: as many bytes as all weights in bf16 beside their
    eighth, and no gather in the backward."""
    found = request("megatron-torch-fsdp2")
    kinds = []
    for stage in (2, 3):
        counted = communication(found, evaluate(found, {"zero_stage": stage})).stages[0]
        kinds.append({c.phase for c in counted if c.kind == "all_gather"})
    assert kinds == [{"forward"}, {"forward", "backward"}]
    stays, goes = (memory("megatron-torch-fsdp2", {"zero_stage": stage}) for stage in (2, 3))
    assert stays["weights"] - goes["weights"] == 2 * PARAMETERS
    assert stays["optimizer"] == goes["optimizer"]


def test_quantised_copies_of_whole_weights_stay_under_fsdp2() -> None:
    """2 bytes per element of a linear layer (fp8 by row and by column), beside bf16 shards."""
    wide, narrow = (
        memory("megatron-torch-fsdp2", {"zero_stage": 3}, precision=name)
        for name in ("bf16", "fp8")
    )
    linear = PARAMETERS - 2 * VOCABULARY - 65 * 4096
    assert narrow["weights"] - wide["weights"] == 2 * linear


def test_fp32_weights_are_split_wherever_fsdp2_keeps_them_gathered() -> None:
    """In fp32 as in bf16: stage 2 of FSDP2 is stage 3 that does not reshard."""
    stays, goes = (
        memory("torchtitan", {"zero_stage": stage, "recompute": "full"}, precision="fp32")
        for stage in (2, 3)
    )
    assert stays["optimizer"] == goes["optimizer"]
    assert stays["weights"] - goes["weights"] == 4 * PARAMETERS


def test_fsdp2_under_megatron_refuses_what_its_arguments_refuse() -> None:
    found = request("megatron-torch-fsdp2")
    with pytest.raises(InputError, match="no pipeline parallelism"):
        evaluate(found, {"pp": 2, "dp_shard": 4, "zero_stage": 3})
    tied = request("megatron-torch-fsdp2", "llama-3.2-1b")
    with pytest.raises(InputError, match="no tied embeddings"):
        evaluate(tied, {"dp_shard": 8, "zero_stage": 3})
    experts = request("megatron-torch-fsdp2", "mixtral-8x7b")
    with pytest.raises(InputError, match="no expert parallelism"):
        evaluate(experts, {"dp_shard": 8, "ep": 8, "zero_stage": 3})
    best = plan(found).layout
    assert (best.pp, best.dp_replicate) == (1, 1)
    assert best.zero_stage in (2, 3)
