"""Layer sequences: counts that were published, cuts by hand, descriptions that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hardware_profiles.documents import DocumentError, validate
from hardware_profiles.loader import load_device, load_stack
from planner.errors import InputError
from planner.lowering import lower
from planner.models.reader import model_from_document, read_model
from planner.models.sequence import LayerEntry, LayerSequenceSpec
from planner.pipeline import evaluate, plan, read_request
from planner.sequence_workload import cut_elements, unit_flops
from planner.specs import JobSpec
from tests.cli.process import planner

NETS = {
    "amoebanet-d-18-208": 82e6,
    "amoebanet-d-18-416": 318e6,
    "amoebanet-d-36-544": 1.05e9,
    "amoebanet-d-72-512": 1.8e9,
}
"""Parameters in table 1 of arXiv 1811.06965."""

SMALL: dict[str, Any] = {
    "format": "layers",
    "source": "by hand",
    "input": 10,
    "batch": 4,
    "kinds": {
        "a": {"ops": [{"op": "matmul", "m": 2, "n": 3, "k": 5, "bias": True}],
              "saved": 7, "output": 6},
        "b": {"ops": [{"op": "conv", "positions": 4, "channels": [2, 3], "kernel": 9}],
              "saved": 9, "output": 12, "output_gradient": 0},
    },
    "layers": [
        {"kind": "a", "sends": {"x": None}}, {"kind": "b", "sends": {"y": 100}}, {"kind": "a"},
        {"kind": "a", "takes": ["x", "y"]},
    ],
}  # fmt: skip


def small(**changes: Any) -> LayerSequenceSpec:
    model = model_from_document({**SMALL, **changes}, where="small")
    assert isinstance(model, LayerSequenceSpec)
    return model


@pytest.mark.parametrize(("name", "published"), NETS.items())
def test_amoebanet_has_the_published_parameters(name: str, published: float) -> None:
    model = read_model(name)
    assert isinstance(model, LayerSequenceSpec)
    assert model.parameters == pytest.approx(published, rel=0.025)


def test_exact_parameter_counts() -> None:
    """DeeperGCN: 112 layers of an edge product (4,160), a two-layer MLP with batch norm (16,832)
    and a norm (128), and 9,016 at the ends. T5: the counts of the released checkpoints."""
    counts = {"deepergcn-112": 2_374_456, "t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344}
    assert counts["deepergcn-112"] == 112 * (4160 + 16_832 + 128) + 9016
    for name, count in counts.items():
        model = read_model(name)
        assert isinstance(model, LayerSequenceSpec)
        assert model.parameters == count


def test_cuts_by_hand() -> None:
    """Input 10, no gradient. After a: its output 6, which is x. After b: 12 + 100 (y) + 6 (x), and
    no gradient for b's own output. After the third: 6 + 106. After the last: its output."""
    assert cut_elements(small()) == ((10, 0), (6, 6), (118, 106), (112, 112), (6, 6))


def test_flops_and_parameters_by_hand() -> None:
    model = small()
    assert unit_flops(model.kinds["a"]) == 3 * 2 * 2 * 3 * 5
    assert unit_flops(model.kinds["b"]) == 3 * 2 * 4 * 2 * 3 * 9
    # a: 3 x 5 + 3, three times; b: 2 x 3 x 9.
    assert model.parameters == 3 * 18 + 54


def test_one_kind_with_two_inputs_is_two_kinds() -> None:
    """Layers of kind a read 10 (the input), 12, and 6 + 6 + 100 elements."""
    stack = load_stack("torch-pipelining")
    job = JobSpec(stack=stack.name, sequence_length=1, global_batch=4)
    graph = lower(small(), job, stack, load_device("h100"))
    assert graph.layers == ("a", "b", "a#2", "a#3")
    assert graph.boundary_bytes_per_token == 0
    assert graph.boundaries[1] == (12, 12)


def test_the_pipeline_pays_for_the_cut_it_makes() -> None:
    """U-Net cut where one skip passes, or where all four do: the sends differ by their bytes."""
    request = read_request(
        "unet-2015", "rtx4090-x2", None, {"stack": "torch-pipelining", "global_batch": 2}
    )

    def hops(cut: int) -> tuple[int, int]:
        stages = [
            {"chunks": [{"layers": [0, cut], "has_embedding": True}]},
            {"chunks": [{"layers": [cut, 10], "has_head": True}]},
        ]
        leaf = evaluate(request, {"pp": 2, "stages": stages}).priced.leaf
        return leaf.sends[cut]

    sizes = request.workload.boundaries
    shallow, deep = hops(1), hops(4)
    assert sizes[4][0] > sizes[1][0]
    assert deep[0] > shallow[0]
    assert min(size for cut in sizes for size in cut) == request.workload.boundary_bytes_per_token


@pytest.mark.parametrize("name", ["amoebanet-d-36-544", "deepergcn-112", "unet-2015", "t5-3b"])
def test_planned_end_to_end(name: str) -> None:
    overrides = {"stack": "torch-pipelining", "constraints": {"fix": {"pp": 2}}}
    found = plan(read_request(name, "dgx-a100", None, overrides))
    assert found.layout.pp == 2
    assert found.prediction.fits
    assert found.certificate.status == "optimal"
    assert 0.001 < found.prediction.mfu < 0.9


def test_tp_only_where_declared() -> None:
    declared = read_request("t5-3b", "dgx-a100", None, {"stack": "torch-pipelining"})
    assert evaluate(declared, {"tp": 4, "dp_shard": 2}).prediction.step_time_s > 0
    other = read_request("unet-2015", "dgx-a100", None, {"stack": "torch-pipelining"})
    with pytest.raises(InputError, match="does not split over tp"):
        evaluate(other, {"tp": 4, "dp_shard": 2})


def test_a_stack_for_decoders_refuses() -> None:
    with pytest.raises(InputError, match="has no sequences of layers of its own") as caught:
        read_request("unet-2015", "dgx-a100", None, {"stack": "megatron-core"})
    assert "--stack torch-pipelining" in str(caught.value.hint)
    with pytest.raises(InputError, match="samples of unet-2015 are of one size"):
        read_request(
            "unet-2015", "dgx-a100", None, {"stack": "torch-pipelining", "sequence_length": 4096}
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [{"kind": "c"}]}, "not in kinds (a, b)"),
        ({"layers": [{"kind": "a", "takes": ["z"]}]}, "takes 'z' before it is sent"),
        ({"layers": [{"kind": "a", "sends": {"z": None}}]}, "'z' is sent and never taken"),
        ({"layers": [{"kind": "a", "count": 2, "sends": {"z": None}}]}, "stands alone"),
        ({"layers": [{"kind": "a", "count": 0}]}, "greater than or equal to 1"),
        ({"kinds": {"a": {"saved": 0, "output": 1}}}, "saved"),
        ({"kinds": {"a": {"ops": [{"op": "warp"}], "saved": 1, "output": 1}}}, "op"),
        ({"input": 0}, "input"),
        ({"layers": [{"kind": "a", "count": 30_000}]}, "30,000 layers"),
    ],
)
def test_descriptions_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        small(**changes)
    assert says in caught.value.message


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(json.dumps(SMALL))
    done = planner(
        "plan", path, "dgx-a100", "--stack", "torch-pipelining", "-o", tmp_path / "plan.json"
    )
    assert done.code == 0, done.err
    assert planner("verify", tmp_path / "plan.json").code == 0
    exported = planner("export", "megatron-core", tmp_path / "plan.json")
    assert exported.code == 2
    shown = planner("catalog", "model", path)
    assert json.loads(shown.out)["parameters"]["total"] == 108


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "conv", "positions": 4, "channels": [3, 64], "groups": 7}, "groups = 7 does not"),
        ({"op": "foo"}, r"ops\[0\]\.op: must be one of matmul, conv"),
    ],
)
def test_an_op_that_cannot_be_is_told_in_its_own_words(
    change: dict[str, object], message: str
) -> None:
    document = {
        "format": "layers", "name": "n", "source": "s", "input": 4, "batch": 1,
        "kinds": {"a": {"ops": [change], "saved": 1, "output": 1}}, "layers": [{"kind": "a"}],
    }  # fmt: skip
    with pytest.raises(DocumentError, match=message):
        validate(LayerSequenceSpec, document, where="n.yaml")


def test_a_tensor_is_taken_once() -> None:
    with pytest.raises(ValueError, match="takes names a tensor twice"):
        LayerEntry(kind="a", takes=("x", "x"))
