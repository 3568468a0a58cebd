"""Which left-out runs a band was earned on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.accuracy import RunClass, band, band_of, path_of, table

H100 = RunClass("h100-sxm-80gb", "bf16", "nemo", moe=False, context_parallel=False, devices=64,
                launch_share=0.0, layer_s=0.02, tensor_parallel=4)  # fmt: skip


def test_a_class_narrows_from_the_device_to_the_size() -> None:
    families = table()["families"]
    assert path_of(H100, families) == (
        "Hopper", "16-bit", "dense", "Megatron-Core", "up to 128 devices",
    )  # fmt: skip
    sparse = replace(H100, moe=True, context_parallel=True, precision="fp8", devices=2048)
    assert path_of(sparse, families) == (
        "Hopper", "8-bit", "MoE with context parallelism", "Megatron-Core", "over 1024 devices",
    )  # fmt: skip
    sizes = {
        share: path_of(replace(H100, launch_share=share), families)[-1]
        for share in (0.02, 0.2, 0.5)
    }
    assert sizes == {
        0.02: "up to 128 devices, at the host's pace, tp 4",
        0.2: "up to 128 devices, partly host-bound, tp 4",
        0.5: "up to 128 devices, host-bound, tp 4",
    }
    short = path_of(replace(H100, layer_s=0.001, tensor_parallel=1), families)
    assert short[-1] == "up to 128 devices, short layers, tp 1"


def test_a_profile_of_the_users_own_is_in_its_parents_family() -> None:
    mine = replace(H100, device="h100-sxm-80gb-calibrated", stack="megatron-core-custom")
    families = table()["families"]
    assert path_of(mine, families) == path_of(H100, families)


def test_the_band_holds_the_prediction_and_names_its_runs() -> None:
    low, high, source = band(2.0, H100)
    assert low < 2.0 < high
    assert "left-out runs" in source
    assert "Hopper, 16-bit, dense, Megatron-Core" in source


def test_an_unseen_stack_has_the_band_of_what_is_known_of_the_device() -> None:
    strange = band_of(replace(H100, stack="somebody-elses"))
    assert "Hopper, 16-bit, dense" in strange.source
    assert "somebody-elses" not in strange.source


def test_an_unseen_device_has_the_band_of_first_encounters() -> None:
    unseen = band_of(replace(H100, device="mi300x"))
    assert "no run on mi300x was seen" in unseen.source
    known = band_of(H100)
    assert unseen.high - unseen.low > known.high - known.low


@pytest.mark.parametrize("name", list(table()["classes"]))
def test_every_shipped_band_is_a_band(name: str) -> None:
    found = table()["classes"][name]
    assert 0 < found["low"] < 1 < found["high"]
    assert found["runs"] >= found["sources"] >= 1
