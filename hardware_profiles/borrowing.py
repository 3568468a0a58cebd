"""Kernel efficiencies of a device that nobody measured: taken from a sibling, and marked so.

A device that extends another one and changes its silicon (peaks, memory, units) keeps the lender's
fractions of peak as an assumption; one that is described without kernels takes those of
:data:`DEFAULT_LENDER`. What is borrowed carries no error of its own: the lender's errors were
measured on the lender. A link of another bandwidth than the one it extends does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hardware_profiles.schema import (
    AttentionConstants,
    CollectiveConstants,
    DeviceSpec,
    KernelProfile,
    Kind,
    LinkSpec,
    MatmulConstants,
    Sourced,
)

DEFAULT_LENDER = "a100-sxm-80gb"
"""Whose fractions of peak a device without kernels takes: the device with the most public kernel
measurements, of a generation without tricks that others may lack."""

SILICON = frozenset({"peak_flops", "memory_bandwidth", "compute_units", "l2_capacity", "power"})
"""Fields that make another chip: what was measured on the parent is borrowed once one changes."""

EARNED = ("best_matmul_flops", "best_run_mfu", "price_per_hour")
"""What belongs to the parent's chip only and is not inherited by another one."""


def lend(lender: DeviceSpec, peaks: Mapping[str, Any]) -> KernelProfile:
    """The lender's kernels for a device that has the dtypes of ``peaks``, all marked borrowed.

    A dtype that the lender lacks takes the fractions of its bf16 (or fp16) products.
    """
    owner = lender.name
    kernels = lender.kernels
    fallback = kernels.matmul.get("bf16") or kernels.matmul.get("fp16")
    matmul = {
        dtype: _borrowed(constants, owner)
        for dtype in peaks
        if (constants := kernels.matmul.get(dtype) or fallback) is not None and dtype != "tf32"
    }
    attention = {
        kernel: {
            dtype: _borrowed_attention(constants, owner)
            for dtype, constants in by_dtype.items()
            if dtype in peaks
        }
        for kernel, by_dtype in kernels.attention.items()
    }
    return KernelProfile(
        matmul=matmul,
        attention={kernel: by_dtype for kernel, by_dtype in attention.items() if by_dtype},
        memory_bound_efficiency=_assumed(kernels.memory_bound_efficiency, owner),
        memory_bound_latency=_assumed(kernels.memory_bound_latency, owner),
    )


def lend_link(lender: LinkSpec, bandwidth: float) -> dict[str, Any]:
    """What a link of another ``bandwidth`` (bytes/s) takes from ``lender``: its shares, and the
    laws of its collectives with their rates in proportion. All of it is borrowed."""
    ratio = bandwidth / lender.bandwidth.si
    return {
        "efficiency": _assumed(lender.efficiency, lender.name),
        "efficiencies": {
            pattern: _assumed(share, lender.name) for pattern, share in lender.efficiencies.items()
        },
        "collectives": tuple(_scaled(row, ratio, lender.name) for row in lender.collectives),
    }


def _scaled(row: CollectiveConstants, ratio: float, owner: str) -> CollectiveConstants:
    update = {
        "ll_bandwidth": row.ll_bandwidth * ratio,
        "bandwidth": row.bandwidth * ratio,
        "kind": Kind.ASSUMED,
        "borrowed_from": row.borrowed_from or owner,
    }
    return row.model_copy(update=update)


def _borrowed(constants: MatmulConstants, owner: str) -> MatmulConstants:
    return constants.model_copy(update=_marks(constants, owner))


def _borrowed_attention(constants: AttentionConstants, owner: str) -> AttentionConstants:
    return constants.model_copy(update=_marks(constants, owner))


def _marks(constants: MatmulConstants | AttentionConstants, owner: str) -> dict[str, Any]:
    lender = constants.borrowed_from or owner
    return {
        "kind": Kind.ASSUMED,
        "borrowed_from": lender,
        "error_median": None,
        "error_p90": None,
        "note": f"fractions of peak as {lender}: no kernel of this device was measured",
    }


def _assumed(number: Sourced, owner: str) -> Sourced:
    return number.model_copy(
        update={"kind": Kind.ASSUMED, "source": f"as {owner}: {number.source}"}
    )
