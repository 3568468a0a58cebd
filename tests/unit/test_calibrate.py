"""Fits recover what made the measurements, stay in bounds and judge what they left out."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from cost_models.laws import matmul_law
from hardware_profiles.loader import load_cluster, load_device, load_node, load_stack
from planner.errors import InputError
from planner.predict import price
from planner.studies.calibrate.cases import RunPricer, cases_of
from planner.studies.calibrate.fit import Problem, family_weights, fit, linear_optimum
from planner.studies.calibrate.folds import leave_one_out
from planner.studies.calibrate.parameters import Overlay, Parameter, Target
from planner.studies.calibrate.study import calibrate
from planner.studies.runs import read_runs

RUN = {
    "id": "", "source": "", "framework": "megatron-core", "layers": "8", "hidden": "4096",
    "heads": "32", "kv_heads": "8", "ffn_hidden": "14336", "gated_mlp": "1", "vocab": "32000",
    "tied_embeddings": "0", "seq": "4096", "precision": "bf16", "accelerator": "A100-80GB",
    "gpus": "16", "gpus_per_node": "8", "tp": "2", "sp": "1", "pp": "2", "vpp": "1", "cp": "1",
    "zero_stage": "1", "mbs": "1", "gbs": "64", "recompute": "none", "step_time_s": "99",
}  # fmt: skip


def parameter(**changes: object) -> Parameter:
    """The sustained rate of A100."""
    fields: dict[str, object] = {
        "name": "sustained", "low": 0.5, "high": 1.0, "prior": 0.9, "spread": 1.0, "source": "test",
        "targets": (
            Target(kind="device", names=("a100-*",), path="kernels.matmul.*.sustained"),
        ),
    }  # fmt: skip
    return Parameter.model_validate({**fields, **changes})


def runs_text(times: list[float] | None = None) -> str:
    """Nine runs of three sources."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(RUN), lineterminator="\n")
    writer.writeheader()
    for index in range(9):
        changes = {
            "id": f"r{index}", "source": f"s{index % 3}", "hidden": str(2048 * (1 + index % 3)),
            "heads": str(16 * (1 + index % 3)), "kv_heads": "8", "tp": str(2 ** (index // 3)),
        }  # fmt: skip
        if times:
            changes["step_time_s"] = repr(times[index])
        writer.writerow({**RUN, **changes})
    return out.getvalue()


def measured_under(value: float) -> str:
    """Runs whose times are the model's own with a sustained rate of ``value``."""
    cases = cases_of(read_runs(runs_text()))
    pricer = RunPricer(cases, [parameter()])
    return runs_text((99 * np.exp(pricer.residuals({"sustained": value}))).tolist())


def test_an_overlay_changes_what_it_names_and_nothing_else() -> None:
    cluster, stack = load_cluster("dgx-a100:2"), load_stack("megatron-core")
    overlay = Overlay([parameter()], {"sustained": 0.7})
    changed = overlay.cluster(cluster).groups[0].node
    assert {c.sustained for c in changed.device.kernels.matmul.values()} == {0.7}
    assert overlay.stack(stack) == stack
    assert overlay.cluster(load_cluster("dgx-h100:2")) == load_cluster("dgx-h100:2")
    back = load_node("dgx-a100")
    assert changed.model_copy(update={"device": back.device}) == back


def test_a_fit_recovers_the_constant_that_made_the_times() -> None:
    cases = cases_of(read_runs(measured_under(0.77)))
    pricer = RunPricer(cases, [parameter()])
    problem = Problem(pricer, family_weights(pricer.families))
    fitted = fit(problem)
    assert fitted.values(pricer.parameters)["sustained"] == pytest.approx(0.77, rel=0.01)
    left_out = leave_one_out(problem, fitted)
    assert set(left_out.values) == {"s0", "s1", "s2"}
    assert np.max(np.abs(left_out.residuals)) < 0.01


def test_a_constant_stays_inside_its_bounds() -> None:
    cases = cases_of(read_runs(measured_under(0.6)))
    pricer = RunPricer(cases, [parameter(low=0.8)])
    values = fit(Problem(pricer, family_weights(pricer.families))).values(pricer.parameters)
    assert values["sustained"] == pytest.approx(0.8)


def test_without_measurements_the_prior_stays() -> None:
    cases = cases_of(read_runs(measured_under(0.77)))
    elsewhere = parameter(
        name="other", targets=(Target(kind="stack", names=("torchtitan",), path="launch_overhead"),)
    )
    pricer = RunPricer(cases, [parameter(), elsewhere])
    fitted = fit(Problem(pricer, family_weights(pricer.families)))
    assert fitted.values(pricer.parameters)["other"] == pytest.approx(0.9)


def test_families_weigh_the_same() -> None:
    weights = family_weights(["a"] * 100 + ["b"] * 10 + ["c"])
    assert weights[:100].sum() == pytest.approx(weights[100:110].sum())
    # One run is one observation.
    assert weights[110] == 1


def test_a_left_out_family_has_no_part_in_its_constants() -> None:
    cases = cases_of(read_runs(measured_under(0.77)))
    # The first family's times are those of another machine.
    odd = [
        case if case.family != "s0" else type(case)(**{**_fields(case), "measured_s": 9.0})
        for case in cases
    ]
    pricer = RunPricer(odd, [parameter()])
    problem = Problem(pricer, family_weights(pricer.families))
    left_out = leave_one_out(problem, fit(problem), refine=1)
    assert left_out.values["s0"]["sustained"] == pytest.approx(0.77, rel=0.02)


def _fields(case: object) -> dict[str, object]:
    return {name: getattr(case, name) for name in type(case).__dataclass_fields__}  # type: ignore[attr-defined]


def test_one_outlier_moves_a_robust_fit_less_than_a_mean() -> None:
    cases = cases_of(read_runs(measured_under(0.9)))
    pricer = RunPricer(cases, [parameter()])
    problem = Problem(pricer, np.ones(len(cases)))
    # Linear model r + x: eight errors of nothing and one of 1. A mean would move by 1/9.
    residuals = np.array([1.0] + [0.0] * 8)
    x = linear_optimum(problem, np.zeros(1), residuals, np.ones((9, 1)), problem.weights)
    assert -0.03 < x[0] < 0


def test_gemm_constants_come_back(tmp_path: Path) -> None:
    device = load_device("a100-sxm-80gb")
    truth = device.kernels.matmul["bf16"].model_copy(
        update={"e_compute": 0.7, "t0_s": 8e-6, "sustained": 1.0}
    )
    lines = ["m,n,k,time_us"]
    for m in (256, 1024, 4096, 16384):
        for n in (512, 2048, 8192):
            for k in (512, 4096):
                time = matmul_law(
                    truth, m, n, k, batch=1, peak_flops=device.peak_flops["bf16"].si,
                    bandwidth_bytes_per_s=device.memory_bandwidth.si,
                    compute_units=device.compute_units.si, operand_bytes=2, output_bytes=2,
                )  # fmt: skip
                lines.append(f"{m},{n},{k},{float(time) * 1e6}")
    file = tmp_path / "gemm.csv"
    file.write_text("\n".join(lines))
    document = calibrate([file], device="a100-sxm-80gb")
    after = {row["name"]: row["after"] for row in document["fits"][0]["constants"]}
    assert after["e_compute"] == pytest.approx(0.7, rel=0.02)
    assert after["t0_s"] == pytest.approx(8e-6, rel=0.1)
    assert document["fits"][0]["errors"]["left_out"]["median"] < 0.01
    (name,) = document["profiles"]
    (tmp_path / name).write_text(document["profiles"][name])
    kept = load_device(str(tmp_path / name)).kernels.matmul["bf16"]
    assert kept.e_compute == pytest.approx(0.7, rel=0.02)
    assert kept.sustained == 1
    assert kept.error_median is not None


def nccl_log(collective: str, devices: int, hosts: int) -> str:
    """A log whose out-of-place times follow 20 us + bytes of the wire over 200 GB/s."""
    lines = [f"# Collective test starting: {collective}_perf", "# nThread 1 nGpus 1"]
    lines += [
        f"#  Rank {rank:2d} Group  0 Pid 7 on host{rank * hosts // devices} device {rank} [0x1b] X"
        for rank in range(devices)
    ]
    bus = 2 * (devices - 1) / devices
    for power in range(12, 31, 2):
        size = 2**power
        time_us = 20 + size * bus / 200e9 * 1e6
        lines.append(f"{size} {size // 4} float sum -1 {time_us:.2f} 1.0 1.0 0 {time_us:.2f} 1 1 0")
    return "\n".join(lines)


def test_a_log_of_one_node_gives_the_two_protocol_law(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(nccl_log("all_reduce", 4, 1))
    document = calibrate([file], cluster="dgx-h100:1")
    fit_ = document["fits"][0]
    assert fit_["title"] == "all_reduce of 4"
    after = {row["name"]: row["after"] for row in fit_["constants"]}
    assert max(after["bandwidth"], after["ll_bandwidth"]) == pytest.approx(200e9, rel=0.05)
    assert fit_["errors"]["after"]["median"] < 0.02
    assert list(document["profiles"]) == ["nvlink4-calibrated.yaml"]


def test_a_log_over_nodes_gives_the_share_of_the_ports(tmp_path: Path) -> None:
    file = tmp_path / "all_reduce.txt"
    file.write_text(nccl_log("all_reduce", 16, 2))
    document = calibrate([file], cluster="dgx-h100:2")
    after = {row["name"]: row["after"] for row in document["fits"][0]["constants"]}
    # 200 GB/s of bus bandwidth over ports of 8 x 50 GB/s, part of the time inside the nodes.
    assert 0.5 <= after["efficiency"] < 0.7
    assert "dgx-h100-calibrated.yaml" in document["profiles"]


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("gemm.csv", "m,n,k,time_us\n1,2,3,4", {}, "products of which device"),
        ("gemm.csv", "m,n,k,time_us\n1,2,3,0", {"device": "h100-sxm-80gb"}, "line 2: sizes"),
        (
            "gemm.csv",
            "m,n,k,time_us\n1,2,x,4",
            {"device": "h100-sxm-80gb"},
            "line 2: k = 'x' is not a whole",
        ),
        ("gemm.csv", "m,n,k\n1,2,3", {"device": "h100-sxm-80gb"}, "one of time_us"),
        ("gemm.csv", "m,n,k,time_us\n1,2,3,4", {"device": "h100-sxm-80gb"}, "at least 3"),
        ("gemm.csv", "m,n,k,time_us,dtype\n1,2,3,4,nvfp4", {"device": "h100-sxm-80gb"}, "no nvfp4"),
        ("x.log", "# nThread 1", {"cluster": "dgx-h100:1"}, "which collective"),
        ("all_reduce.log", "# nThread 1", {"cluster": "dgx-h100:1"}, "not a log of nccl-tests"),
        ("all_reduce.log", "# nThread 1", {}, "logs of which machine"),
    ],
)
def test_bad_measurements_say_what_is_wrong(
    tmp_path: Path, name: str, text: str, options: dict[str, str], words: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        calibrate([file], **options)  # type: ignore[arg-type]


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("m,n,k,time_us\n1,2,3,4")
    (tmp_path / "b.csv").write_text(runs_text())
    with pytest.raises(InputError, match="several kinds: products, runs"):
        calibrate([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_runs_of_one_source_are_judged_by_parts_and_profiles_load(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(measured_under(0.77).replace(",s1,", ",s0,").replace(",s2,", ",s0,"))
    document = calibrate([file], parameters=[parameter()])
    assert document["fits"][0]["errors"]["left_out"]["median"] < 0.02
    for name, text in document["profiles"].items():
        (tmp_path / name).write_text(text)
    node = load_cluster(f"{tmp_path}/dgx-a100-calibrated.yaml:2").groups[0].node
    assert node.device.kernels.matmul["bf16"].sustained == pytest.approx(0.77, rel=0.01)


def test_runs_priced_together_cost_what_each_costs_alone() -> None:
    cases = cases_of(read_runs(runs_text()))
    times = 99 * np.exp(RunPricer(cases, []).residuals({}))
    alone = [price(case.layout, case.request).step.total_ns / 1e9 for case in cases]
    assert times == pytest.approx(alone, rel=1e-9)
