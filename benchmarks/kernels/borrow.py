"""Devices without tables of their own take over what their lender's fit has become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from fits import DEVICES
from forms import rounded

from hardware_profiles.loader import load_device
from hardware_profiles.schema import (
    AttentionConstants,
    DeviceSpec,
    KernelProfile,
    Kind,
    MatmulConstants,
)

Constants = TypeVar("Constants", MatmulConstants, AttentionConstants)

OWN = ("kind", "source", "error_median", "error_p90", "borrowed_from", "note")
"""What a borrower says for itself."""

CONDITIONS = {"heating": 0.0, "heating_s": 1e-3, "cache_share": 0.0}
"""Of the lender's benchmarks: nobody timed the borrower."""

MAKERS = ("misaligned", "accumulate_share", "wave_share", "tile_latency", "split_k")
"""How a maker's units load, add and share tiles: another maker's are not those of the lender."""


def follow_lenders(profiles: Mapping[str, KernelProfile]) -> None:
    """Rewrite every other device that borrows from one of ``profiles``.

    A number that equals the lender's shipped one follows it; one that differs is the device's own
    and stays. Call it before the lenders themselves are rewritten.
    """
    for path in sorted(DEVICES.glob("*.yaml")):
        inherits = "\nkernels:\n" not in path.read_text(encoding="utf-8")
        if inherits or path.stem in profiles:
            continue
        device = load_device(path.stem)
        changed = followed(device, profiles)
        if changed != device.kernels:
            rewrite(path.stem, changed)


def followed(device: DeviceSpec, profiles: Mapping[str, KernelProfile]) -> KernelProfile:
    """The device's kernels with the lenders' new constants."""
    matmul = {
        dtype: _follow(found, dtype, profiles, lambda kernels: kernels.matmul)
        for dtype, found in device.kernels.matmul.items()
    }
    if device.vendor != "nvidia":
        matmul = {
            dtype: found.model_copy(
                update={field: getattr(device.kernels.matmul[dtype], field) for field in MAKERS}
            )
            for dtype, found in matmul.items()
        }
    for found in list(matmul.values()):
        for dtype, new in _kernels_of(found, profiles, lambda kernels: kernels.matmul).items():
            if dtype in device.peak_flops:
                matmul.setdefault(dtype, lent(new, found))
    attention = {
        kernel: {
            dtype: _follow(
                found, dtype, profiles, lambda kernels, kernel=kernel: kernels.attention[kernel]
            )
            for dtype, found in by_dtype.items()
        }
        for kernel, by_dtype in device.kernels.attention.items()
    }
    flash2 = attention.get("flash2", {}) if device.vendor == "nvidia" else {}
    for dtype, found in flash2.items():
        first = _kernels_of(found, profiles, lambda kernels: kernels.attention).get("flash1", {})
        if dtype in first and "flash1" not in attention:
            attention["flash1"] = {dtype: lent(first[dtype], found)}
    return device.kernels.model_copy(update={"matmul": matmul, "attention": attention})


def lent(new: Constants, beside: Constants) -> Constants:
    """``new`` as borrowed from where ``beside``, of the same device, is."""
    return new.model_copy(
        update={
            "borrowed_from": beside.borrowed_from,
            "kind": Kind.ASSUMED,
            "error_median": None,
            "error_p90": None,
            "note": f"as on {beside.borrowed_from}, with which this device shares other kernels",
        }
    )


def _kernels_of(found: Constants, profiles: Mapping[str, KernelProfile], part: Any) -> Any:
    return part(profiles[found.borrowed_from]) if found.borrowed_from in profiles else {}


def _follow(found: Constants, dtype: str, profiles: Mapping[str, KernelProfile], part: Any) -> Any:
    lender = found.borrowed_from
    if lender not in profiles:
        return found
    old, new = part(load_device(lender).kernels), part(profiles[lender])
    # An fp16-only device borrows the products of bf16.
    name = dtype if dtype in old else "bf16"
    if name not in old or name not in new:
        return found
    update = {
        field: getattr(new[name], field)
        for field in type(found).model_fields
        if field not in OWN and getattr(found, field) == getattr(old[name], field)
    }
    if isinstance(found, MatmulConstants):
        update["sustained"] = found.sustained
        update |= CONDITIONS
        if "e_compute" in update:  # A share of that rate: it moves with it.
            update["sustained"] *= new[name].sustained / old[name].sustained
            update["sustained"] = min(1.0, rounded(update["sustained"]))
    return found.model_copy(update=update)


def rewrite(name: str, profile: KernelProfile) -> None:
    """Replace the ``kernels:`` section, the last of the device's file."""
    path = DEVICES / f"{name}.yaml"
    facts = path.read_text(encoding="utf-8").split("\nkernels:\n")[0].rstrip("\n")
    section = profile.model_dump(mode="json", exclude_none=True)
    body = yaml.safe_dump({"kernels": section}, sort_keys=False, width=96, allow_unicode=True)
    path.write_text(f"{facts}\n{body}", encoding="utf-8")
