"""``planner calibrate`` as a process: constants, profiles, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.process import planner

PRODUCTS = "m,n,k,time_us\n" + "\n".join(
    f"{m},{n},{k},{5 + 2e-6 * m * n * k / 250:.3f}"
    for m in (512, 2048, 8192)
    for n in (1024, 4096)
    for k in (1024, 8192)
)
"""5 us and 250 TFLOP/s."""


def test_products_become_a_device_that_plans(tmp_path: Path) -> None:
    file, folder = tmp_path / "gemm.csv", tmp_path / "profiles"
    file.write_text(PRODUCTS)
    result = planner(
        "calibrate", file, "--device", "a100-sxm-80gb", "--profiles", folder, "--format", "json"
    )
    assert result.code == 0, result.err
    (fit,) = json.loads(result.out)["fits"]
    moved = {row["name"]: row for row in fit["constants"]}
    # 250 of the A100's 312 TFLOP/s.
    assert 0.75 < moved["e_compute"]["after"] < 0.86
    assert "left out" in result.err
    (profile,) = folder.iterdir()
    node = tmp_path / "node.yaml"
    node.write_text(f"extends: dgx-a100\nname: mine\ndevice: {profile}\n")
    priced = planner("evaluate", "llama-3.1-8b", f"{node}:1", "--tp", "2", "--format", "json")
    assert priced.code == 0, priced.err


def test_a_table_names_the_files_and_quiet_is_quiet(tmp_path: Path) -> None:
    file = tmp_path / "gemm.csv"
    file.write_text(PRODUCTS)
    result = planner("calibrate", file, "--device", "a100-sxm-80gb", "-q", "--format", "table")
    assert (result.code, result.err) == (0, "")
    assert "--profiles FOLDER writes a100-sxm-80gb-calibrated.yaml" in " ".join(result.out.split())


def test_bad_input_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gemm.csv"
    file.write_text(PRODUCTS)
    for args, words in (
        ((tmp_path / "absent.csv",), "cannot be read"),
        ((file,), "--device"),
        ((file, "--device", "a1000"), "a1000"),
        ((file, "--device", "a100", "--parameters", tmp_path / "absent.yaml"), "absent.yaml"),
        ((file, "--device", "a100", "--profiles", file), "cannot be made"),
    ):
        result = planner("calibrate", *args)
        assert (result.code, result.out) == (2, ""), words
        assert words in result.err
        assert "Traceback" not in result.err
