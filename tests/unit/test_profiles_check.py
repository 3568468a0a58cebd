"""Every profile that ships is cross-checked; a profile of one's own is checked the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cost_models.optimizers import OPTIMIZERS
from hardware_profiles import loader, plausibility, provenance
from hardware_profiles.documents import DocumentError
from hardware_profiles.schema import Kind
from planner.blocks.registry import KIND_NAMES
from planner.errors import InputError
from planner.pipeline import plan, read_request
from planner.plan import Prediction
from planner.stack_rules import STACK_RULES
from planner.studies.profile_check import check_profile, kind_of
from tests.cli.process import planner

IN_16_BITS = ("nemo-automodel-bf16", "torchtitan-bf16")
"""Stacks whose weights have no fp32 copy."""
TEN_LINES = """\
name: my-cluster
nodes: 4
network: {leaf_nodes: 2, oversubscription: 2}
node:
  extends: dgx-h100
  scale_out: ethernet-200g
  nics: 4
  device:
    extends: h100
    memory_bandwidth: 2400 GB/s
"""

NEW_CHIP = """\
name: my-chip
vendor: me
peak_flops: {bf16: 500 TFLOP/s, fp8: 1000 TFLOP/s}
memory_capacity: 96 GiB
memory_bandwidth: 3 TB/s
compute_units: 100
"""


TOO_FAST = (
    "collectives: [{collective: all_reduce, devices: 8, latency_s: 1.0e-5, ll_bandwidth: 1.0e+11, "
    "simple_latency_s: 1.0e-5, bandwidth: 9.0e+11, kind: assumed, source: none}]\n"
)
"""900 GB/s over links of 450."""


@pytest.mark.parametrize("kind", ["device", "link", "node", "cluster", "stack"])
def test_nothing_that_ships_contradicts_itself(kind: str) -> None:
    names = loader.catalog_names(kind)  # type: ignore[arg-type]
    assert names
    found = {name: check_profile(name).problems for name in names}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_aliases_name_one_thing() -> None:
    for kind in ("device", "link", "node", "stack"):
        names = set(loader.catalog_names(kind))  # type: ignore[arg-type]
        aliases = loader.catalog_aliases(kind)  # type: ignore[arg-type]
        assert not names & set(aliases)
        written = [
            alias for name in names for alias in getattr(loader, f"load_{kind}")(name).aliases
        ]
        assert len(written) == len(set(written)), kind


def test_instances_that_people_rent() -> None:
    for name, devices, device in (
        ("p4d.24xlarge", 8, "a100-sxm-40gb"),
        ("p5.48xlarge", 8, "h100-sxm-80gb"),
        ("p5e.48xlarge", 8, "h200-sxm-141gb"),
        ("p5en.48xlarge", 8, "h200-sxm-141gb"),
        ("p6-b200.48xlarge", 8, "b200-sxm-180gb"),
        ("u-p6e-gb200x72", 72, "gb200"),
        ("trn1.32xlarge", 16, "trainium1"),
        ("trn2u.48xlarge", 64, "trainium2"),
        ("a2-megagpu-16g", 16, "a100-sxm-40gb"),
        ("a3-ultragpu-8g", 8, "h200-sxm-141gb"),
        ("a4-highgpu-8g", 8, "b200-sxm-180gb"),
        ("nd96isr-h200-v5", 8, "h200-sxm-141gb"),
        ("bm.gpu.mi300x.8", 8, "mi300x"),
        ("v5litepod-16", 16, "tpu-v5e"),
        ("v5p-32", 16, "tpu-v5p"),
    ):
        node = loader.load_node(name)
        assert (node.devices_per_node, node.device.name) == (devices, device)
        assert node.host_memory is not None


def test_a_node_has_its_own_price_and_does_not_lend_it() -> None:
    own = loader.load_node("aws-p4d").price_per_hour
    assert own is not None
    assert own.si == pytest.approx(8 * 4.1)
    assert loader.load_node("gcp-a2-highgpu-8g").price_per_hour is None
    found = plan(read_request("gpt2", "aws-trn1:1")).prediction
    # 16 devices at 1.344 USD/h each.
    assert found.price_usd_per_step == pytest.approx(21.504 * found.step_time_s / 3600, rel=1e-6)
    assert found.price_source is not None
    assert found.price_source.startswith("21.504 USD/h per aws-trn1: ")


def test_a_price_of_the_devices_alone_says_so() -> None:
    found = plan(read_request("gpt2", "azure-nd-h100-v5:1")).prediction
    device = loader.load_device("h100-sxm-80gb").price_per_hour
    assert device is not None
    assert found.price_source == (
        f"{device.value:g} USD/h per h100-sxm-80gb: {device.source}; "
        "no list price of azure-nd-h100-v5 is known"
    )


def test_ten_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEN_LINES)
    report = check_profile(str(path))
    assert (report.kind, report.name, report.problems) == ("cluster", "my-cluster", ())
    basis = {each.what: (each.basis, each.lender) for each in report.efficiencies}
    assert basis["bf16 matrix products"] == ("borrowed", "h100-sxm-80gb")
    assert basis["all-reduce of 8"] == ("measured", None)
    assert sum(report.counts().values()) == len(report.efficiencies)
    device = loader.load_cluster(str(path)).groups[0].node.device
    # The published rates are those of another chip.
    assert device.best_run_mfu == {}
    assert device.price_per_hour is None
    assert device.kernels.matmul["bf16"].error_median is None


def test_same_silicon_keeps_what_was_measured_on_it(tmp_path: Path) -> None:
    path = tmp_path / "cheap.yaml"
    path.write_text("extends: h100\nname: cheap\nprice_per_hour: 2 USD/h\n")
    device, parent = loader.load_device(str(path)), loader.load_device("h100")
    assert device.kernels == parent.kernels
    assert device.best_run_mfu == parent.best_run_mfu
    assert device.price_per_hour is not None
    assert (device.price_per_hour.value, device.price_per_hour.kind) == (2.0, Kind.ASSUMED)


def test_a_chip_that_nobody_measured_can_be_planned_for(tmp_path: Path) -> None:
    (tmp_path / "chip.yaml").write_text(NEW_CHIP)
    (tmp_path / "cluster.yaml").write_text(
        "nodes: 2\nnode: {extends: dgx-h100, name: box, device: ./chip.yaml}\n"
    )
    report = check_profile(str(tmp_path / "chip.yaml"))
    assert report.problems == ()
    assert report.counts()["measured"] == 0
    device = loader.load_device(str(tmp_path / "chip.yaml"))
    assert set(device.kernels.matmul) == {"bf16", "fp8"}
    assert provenance.kernel_basis(device, ("bf16",), "flash2") == "borrowed"
    found = plan(read_request("llama-3.2-1b", str(tmp_path / "cluster.yaml")))
    assert found.prediction.fits
    assert any("my-chip" in note for note in found.prediction.assumptions)
    assert "kernel efficiencies of my-chip are not its own" in found.prediction.band_source
    shipped = plan(read_request("llama-3.2-1b", "dgx-h100:2")).prediction
    assert width(found.prediction) > 1.5 * width(shipped)


def width(prediction: Prediction) -> float:
    """Of the band, relative to the step."""
    low, high = prediction.step_time_band_s
    return (high - low) / prediction.step_time_s


def test_a_changed_device_has_not_its_parent_s_band(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEN_LINES)
    changed = plan(read_request("llama-3.2-1b", str(path))).prediction
    kept = plan(read_request("llama-3.2-1b", "dgx-h100:4")).prediction
    assert width(changed) > 1.5 * width(kept)


def test_basis_is_the_weakest_of_what_a_job_uses() -> None:
    h100, tpu = loader.load_device("h100"), loader.load_device("tpu-v5e")
    assert provenance.kernel_basis(h100, ("bf16",), "flash3") == "measured"
    assert provenance.kernel_basis(tpu, ("bf16",), "flash2") == "borrowed"
    assert provenance.kernel_basis(h100, ("fp4",), "flash3") == "assumed"
    assert provenance.kernel_basis(h100, ("bf16",), "flash9") == "assumed"


def test_merging_maps_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("extends: h100\nname: d\npeak_flops: {bf16: 800 TFLOP/s, tf32: null}\n")
    peaks = loader.load_device(str(path)).peak_flops
    assert peaks["bf16"].si == 800e12
    assert peaks["fp8"].si == 1979e12
    assert "tf32" not in peaks


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory_bandwidth": "3 Tb/s"}, "FLOP per byte"),
        ({"memory_capacity": "96 MiB"}, "reading 0.0938 GiB"),
        ({"peak_flops": "{bf16: 500 TFLOP/s, fp8: 100 TFLOP/s}"}, "exceeds that of fp8"),
        ({"peak_flops": "{bf16: 500 TFLOP/s, fp32: 900 TFLOP/s}"}, "fp32 peak of 900"),
        ({"best_matmul_flops": "{bf16: 300 TFLOP/s}"}, "exceed the best measured, 300"),
        ({"best_matmul_flops": "{bf16: 600 TFLOP/s}"}, "exceeds the peak of 500"),
    ],
)
def test_implausible_devices(tmp_path: Path, change: dict[str, str], says: str) -> None:
    lines = [line for line in NEW_CHIP.splitlines() if line.split(":")[0] not in change]
    lines += [f"{key}: {value}" for key, value in change.items()]
    path = tmp_path / "chip.yaml"
    path.write_text("\n".join(lines))
    assert any(says in problem for problem in check_profile(str(path)).problems)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: dgx-h100\nnics: 800\n", "more than the 450 GB/s of nvlink4"),
        ("extends: dgx-h100\nhost_memory: 2 MB\n", "is a unit wrong?"),
        ("extends: dgx-h100\nhost_memory_bandwidth: 5 GB/s\n", "slower than one device's link"),
        (
            "node: dgx-h100\nnodes: 4\nnetwork: {leaf_nodes: 9}\n",
            "joins 9 nodes, the cluster has 4",
        ),
        ("extends: nvlink4\n" + TOO_FAST, "exceeds the wire"),
        ("extends: infiniband-ndr\nlatency: 7 s\n", "latency of 7e+06 us"),
    ],
)
def test_implausible_machines(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert any(says in problem for problem in check_profile(str(path)).problems)


def test_kind_is_read_off_the_document(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, kind in (
        ("node: dgx-h100\nnodes: 4\n", "cluster"),
        ("extends: torchtitan\nname: mine\n", "stack"),
        ("bandwidth: 5 GB/s\n", "link"),
        (NEW_CHIP, "device"),
    ):
        path.write_text(text)
        assert kind_of(str(path)) == kind
    assert kind_of("dgx-h100:4") == "cluster"
    assert kind_of("nvlink4") == "link"
    path.write_text("extends: torchtitn\nname: mine\n")
    with pytest.raises(DocumentError, match="extends 'torchtitn', which is neither") as refusal:
        kind_of(str(path))
    assert "'torchtitan'" in (refusal.value.hint or "")
    path.write_text("colour: red\n")
    with pytest.raises(DocumentError, match="nothing in it says what it describes"):
        kind_of(str(path))
    assert plausibility.RIDGE[0] < plausibility.RIDGE[1]


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "chip.yaml"
    path.write_text(NEW_CHIP)
    good = planner("catalog", "check", str(path), "--format", "table")
    assert good.code == 0
    assert "4 borrowed, 2 assumed" in good.out
    path.write_text(NEW_CHIP.replace("3 TB/s", "3 Tb/s"))
    bad = planner("catalog", "check", str(path))
    assert bad.code == 5
    assert json.loads(bad.out)["problems"]
    assert "is a unit wrong?" in bad.err
    path.write_text(NEW_CHIP.replace("compute_units", "compute_unit"))
    broken = planner("catalog", "check", str(path))
    assert broken.code == 2
    assert "compute_units" in broken.err
    assert planner("catalog", "check").code == 2


@pytest.mark.parametrize("name", loader.catalog_names("stack"))
def test_a_stack_names_what_exists(name: str) -> None:
    stack = loader.load_stack(name)
    layout_rules = {
        "pipeline_needs_multiple_of_pp",
        "zero_0_is_replicate_only", "no_zero_2_with_pipeline", "no_zero_3_with_pipeline",
        "no_zero_3_with_context", "no_zero_3_with_split_backward",
        "zero_2_needs_expert_parallelism",
        "needs_block_scaled_products", "shards_fill_nodes", "zero_1_shards_over_all",
        "no_accumulation_in_fp8", "no_pipeline_in_fp8", "no_experts_in_fp8",
        "no_sinks_in_16_bit_pipelines",
        "muon_takes_whole_query_groups",
        "zero_2_needs_pipeline", "no_accumulation", "hybrid_shards_are_nodes",
        "replicas_share_weights", "no_prediction_in_chunks", "shards_over_one_rank",
        "whole_gradients_need_one_microbatch",
    }  # fmt: skip
    assert set(stack.rules) <= {*STACK_RULES, *layout_rules}
    assert set(stack.optimizers) <= set(OPTIMIZERS)
    # Moments like 16-bit weights are what bf16 throughout means.
    assert ("adamw_bf16" if name in IN_16_BITS else "adamw") in stack.optimizers
    assert set(stack.layer_kinds) <= {"attention", *KIND_NAMES}
    assert stack.source.strip()
    assert stack.version.strip()


def test_the_stacks_that_people_use_ship() -> None:
    wanted = {
        "megatron-core", "megatron-core-local", "torchtitan", "deepspeed", "megatron-deepspeed",
        "fsdp1", "fsdp2", "maxtext-gpu", "maxtext-tpu", "nemo-automodel", "megatron-lm-2021",
        "llm-foundry", "internevo", "neuron", "mindformers",
    }  # fmt: skip
    assert wanted <= {*loader.catalog_names("stack"), *loader.catalog_aliases("stack")}


@pytest.mark.parametrize(
    ("stack", "model", "cluster", "banned"),
    [
        ("deepspeed", "llama-3.2-1b", "dgx-h100", {"pp", "tp"}),
        ("deepspeed", "qwen3-30b-a3b", "dgx-h100:2", {"pp", "tp", "ep"}),
        ("fsdp1", "llama-3.2-1b", "dgx-a100", {"pp", "cp"}),
        ("fsdp1", "mixtral-8x7b", "dgx-a100:8", {"pp", "tp", "cp", "ep"}),
        ("megatron-core-local", "llama-3.2-1b", "dgx-a100", {"cp"}),
        ("neuron", "llama-3.1-8b", "aws-trn1:4", set()),
        ("neuron", "llama-3.1-8b", "aws-trn2", set()),
        ("mindformers", "llama-3.1-8b", "atlas-910b:2", set()),
        ("maxtext-tpu", "llama-3.1-8b", "v5p-64", set()),
        ("internevo", "llama-2-7b", "hgx-a800:2", {"cp"}),
    ],
)
def test_a_plan_is_within_what_the_stack_runs(
    stack: str, model: str, cluster: str, banned: set[str]
) -> None:
    found = plan(read_request(model, cluster, None, {"stack": stack, "sequence_length": 2048}))
    assert found.certificate.status == "optimal"
    assert all(getattr(found.layout, degree) == 1 for degree in banned)
    others = found.alternatives
    assert all(getattr(other.layout, degree) == 1 for other in others for degree in banned)


def test_a_precision_that_the_stack_has_not() -> None:
    with pytest.raises(InputError, match="does not train in fp8"):
        read_request("gpt2", "dgx-h100", None, {"stack": "fsdp1", "precision": "fp8"})
