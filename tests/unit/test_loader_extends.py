"""Documents of one's own: what a changed link borrows, what units must measure, what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_profiles import loader
from hardware_profiles.documents import DocumentError
from hardware_profiles.provenance import link_efficiencies
from hardware_profiles.schema import Kind
from planner.pipeline import evaluate, read_request

HALF = "extends: nvlink4\nname: half\nbandwidth: 225 GB/s\n"


def written(folder: Path, text: str, name: str = "own.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_link_of_another_bandwidth_scales_what_it_inherits(tmp_path: Path) -> None:
    parent, half = loader.load_link("nvlink4"), loader.load_link(written(tmp_path, HALF))
    assert len(half.collectives) == len(parent.collectives) > 0
    for own, theirs in zip(half.collectives, parent.collectives, strict=True):
        assert own.bandwidth == theirs.bandwidth / 2
        assert own.ll_bandwidth == theirs.ll_bandwidth / 2
        assert own.latency_s == theirs.latency_s
        assert own.kind is Kind.ASSUMED
        assert own.borrowed_from == (theirs.borrowed_from or "nvlink4")
    assert half.efficiency.si == parent.efficiency.si
    assert "measured" not in {found.basis for found in link_efficiencies(half)}


def test_what_a_link_states_itself_is_its_own(tmp_path: Path) -> None:
    text = HALF + "efficiency: {value: 0.7, kind: measured, source: our own nccl-tests}\n"
    found = {e.what: e.basis for e in link_efficiencies(loader.load_link(written(tmp_path, text)))}
    assert found["large transfers"] == "measured"
    assert found["all-reduce of 8"] == "borrowed"


def test_a_link_that_keeps_its_bandwidth_keeps_its_measurements(tmp_path: Path) -> None:
    parent = loader.load_link("nvlink4")
    same = loader.load_link(written(tmp_path, "extends: nvlink4\nname: mine\nlatency: 1 us\n"))
    assert same.collectives == parent.collectives
    assert same.efficiency == parent.efficiency


def test_half_the_bandwidth_inside_a_node_is_priced(tmp_path: Path) -> None:
    link = HALF.replace("\n", ", ").rstrip(", ")
    own = written(tmp_path, f"extends: dgx-h100\nname: box\nscale_up: {{{link}}}\n")
    layout = {"tp": 8, "sequence_parallel": True}
    job = {"global_batch": 8, "sequence_length": 4096}
    times = []
    for cluster in ("dgx-h100", own):
        priced = evaluate(read_request("llama-3.1-8b", cluster, None, job), layout)
        times.append({t.name: t.seconds for t in priced.prediction.time})
    assert times[1]["matmul"] == times[0]["matmul"]
    ratio = (times[1]["tp_comm"] or 0) / (times[0]["tp_comm"] or 1)
    assert 1.7 < ratio < 2.1


def test_a_node_file_is_a_cluster_of_one(tmp_path: Path) -> None:
    own = written(tmp_path, "extends: dgx-h100\nname: box\nnics: 4\n")
    cluster = loader.load_cluster(own)
    assert (cluster.name, cluster.nodes, cluster.groups[0].node.nics) == ("box:1", 1, 4)
    assert loader.load_cluster(f"{own}:16").nodes == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scale_up: {extends: nvlink4, bandwidth: 225 TFLOP/s}", "bandwidth: must be a number of "),
        (
            "scale_up: {extends: nvlink4, bandwidth: 225}",
            "bytes per second (GB/s, Gb/s), got '225'",
        ),
        ("host_link: 5 s", "host_link: must be a number of bytes per second"),
        ("host_memory: 2 TB/s", "host_memory: must be a number of bytes (GB, GiB), got '2 TB/s'"),
        ("scale_out: {extends: infiniband-ndr, latency: 5 GB}", "must be a number of seconds (us)"),
        ("device: {extends: a10g, power: 300 GB}", "power: must be a number of watts"),
        ("device: {extends: a10g, peak_flops: {bf16: 70 GB/s}}", "peak_flops.bf16: must be"),
        ("device: {extends: a10g, compute_units: 80 GB}", "compute_units: must be a plain number"),
        ("price_per_hour: 30 W", "must be a number of USD per hour (USD/h), got '30 W'"),
        ("scale_up: {extends: nvlink4, bandwidth: 0 GB/s}", "bandwidth must be > 0, got 0"),
        ("host_link: -5 GB/s", "host_link: must be finite and >= 0, got -5"),
        ("host_link: 5 GBps", "unknown unit 'GBps'"),
    ],
)
def test_a_number_of_the_wrong_unit_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        loader.load_node(written(tmp_path, f"extends: dgx-h100\n{text}\n"))
    assert says in str(caught.value)
    assert "a mapping of" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("device", "name: chip\nvendor: acme\npeak_flops: {bf16: 500 TFLOP/s}\n"),
        ("link", "name: wire\nbandwidth: 50 GB/s\n"),
        ("node", "name: box\ndevice: a10g\ndevices_per_node: 4\nscale_up: pcie4-x16\n"),
    ],
)
def test_what_is_missing_comes_with_an_example(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(DocumentError, match="missing") as caught:
        getattr(loader, f"load_{kind}")(written(tmp_path, text))
    assert f"planner catalog {kind} " in str(caught.value.hint)
    assert "extends: " in str(caught.value.hint)


def test_extends_that_goes_round_in_circles_says_how(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nnics: 2\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nnics: 4\n")
    with pytest.raises(DocumentError, match=r"circles: a\.yaml -> b\.yaml -> a\.yaml"):
        loader.load_node(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zero_stages: []", "zero_stages: must have at least 1 item"),
        ("rules: [no_such_rule]", "no_such_rule"),
        ("fused: [grouped_gem]", "grouped_gem"),
        ("rank_order: [tp, dp]", "dp"),
        ("recompute: [foo]", "recompute names 'foo'"),
        ("rank_order: [tp]", "rank_order must hold each of tp, cp"),
        ("optimizers: [foo]", r"optimizers\[0\]: must be 'adamw'"),
        ("layer_kinds: [foo]", r"layer_kinds\[0\]: must be 'attention'"),
        ("launch_overhead: 5 GB", "launch_overhead: must be a number of seconds"),
        ("not_priced: [a, b]", "not_priced: must be a mapping, got a list of 2"),
    ],
)
def test_a_stack_of_ones_own_is_checked(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: torchtitan\n{line}\n")
    with pytest.raises(DocumentError, match=message):
        loader.load_stack(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compute_units: 0", "compute_units: must be more than 0"),
        ("memory_capacity: 0 GB", "memory_capacity: must be more than 0"),
        ("peak_flops: {bf16: 0 TFLOP/s}", r"peak_flops\.bf16: must be more than 0"),
        ("peak_flops: {int4: 3 TFLOP/s}", "no arithmetic is called 'int4'"),
    ],
)
def test_a_device_without_what_everything_needs_is_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: h100-sxm-80gb\n{line}\n")
    with pytest.raises(DocumentError, match=message):
        loader.load_device(str(path))


@pytest.mark.parametrize("rest", ["groups: []", "devices_per_node: 4"])
def test_a_misspelt_extends_is_found(tmp_path: Path, rest: str) -> None:
    """It is read before the fields of what it starts from are known."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"extnds: dgx-h100\n{rest}\n")
    with pytest.raises(DocumentError, match="unknown key 'extnds'") as error:
        loader.load_cluster(str(path))
    assert error.value.hint == "did you mean 'extends'?"
