"""A plan on every node that ships, and what its band says where kernels were not measured."""

from __future__ import annotations

import pytest

from hardware_profiles.loader import catalog_names, load_node
from planner.pipeline import plan, read_request

LIMITS = {"fix": {"tp": 1, "pp": 1, "cp": 1, "microbatch_size": 1}}


@pytest.mark.parametrize("name", catalog_names("node"))
def test_every_node_can_be_planned_for(name: str) -> None:
    device = load_node(name).device
    precision = "bf16" if "bf16" in device.peak_flops else "fp16"
    job = {"precision": precision, "constraints": LIMITS, "sequence_length": 1024}
    request = read_request("gpt2", f"{name}:2", None, job)
    found = plan(request)
    predicted = found.prediction
    assert found.certificate.status == "optimal"
    assert predicted.fits
    low, high = predicted.step_time_band_s
    assert low <= predicted.step_time_s <= high
    assert 0.01 < predicted.mfu < 0.9
    if request.kernel_basis != "measured":
        assert f"kernel efficiencies of {device.name} are not its own" in predicted.band_source


def test_some_nodes_have_no_measured_kernels() -> None:
    bases = {
        read_request("gpt2", name, None, {"sequence_length": 1024}).kernel_basis
        for name in ("dgx-h100", "gaudi2-hls", "mi300x-8")
    }
    assert "measured" in bases
    assert bases != {"measured"}
