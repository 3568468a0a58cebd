"""Make the kernel constants of the devices from the measured tables in ``data/``.

    python benchmarks/kernels/fit.py            # prints the left-out errors
    python benchmarks/kernels/fit.py --write    # and rewrites the `kernels:` section of each device
                                                # and benchmarks/results/kernels.md

How each device comes by its constants (own tables, a relative's, an assumption) is written here;
the fits themselves are in ``fits.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from attention_fits import fit_attention, fit_attention_train, fit_flash
from borrow import CONDITIONS, follow_lenders, rewrite
from fits import (
    Errors,
    fit_matmul,
    fit_sustained,
    judge_training,
    machine,
    same_training_rate,
    streamed_quantisation_s,
    timed_quantisation_s,
)
from forms import rounded
from page import PAGE, as_page, as_text
from tables import FloatArray, Table

from hardware_profiles.loader import load_device
from hardware_profiles.schema import (
    AttentionConstants,
    KernelProfile,
    Kind,
    MatmulConstants,
    Sourced,
)

A100, A100_40, A100_PCIE = "a100-sxm-80gb", "a100-sxm-40gb", "a100-pcie-80gb"
H100, H800, H200 = "h100-sxm-80gb", "h800-sxm-80gb", "h200-sxm-141gb"
B200, GB200, L40S, RTX_4090 = "b200-sxm-180gb", "gb200", "l40s", "rtx-4090"
LOW_PRECISION = {H100: ("fp8",), H200: ("fp8",), B200: ("fp8", "nvfp4"), GB200: ("fp8", "nvfp4"),
                 L40S: ("fp8",)}  # fmt: skip

BF16_COLUMN, LOW_COLUMN = "us_sglang", "us_trtllm"
DISTURBED = {H200: "us_trtllm"}
"""Devices whose ``BF16_COLUMN`` was disturbed (``data/README.md``), and what stands in for it."""
SIMUMAX = "MooreThreads/SimuMax (Apache-2.0), default memory-bound op"
DECODE = "aiconfigurator-core 0.12.0 (Apache-2.0), KV read rate of decode attention"

STREAMING: dict[str, tuple[float, Kind, str]] = {
    A100_PCIE: (0.752, Kind.MEASURED, f"{SIMUMAX} of A100 PCIe: 0.91 of 1600 GB/s"),
    A100: (0.752, Kind.ASSUMED, f"{SIMUMAX}: the fraction reached by A100 PCIe"),
    H100: (0.80, Kind.ASSUMED, f"{DECODE}, 2942 GB/s, times 0.91 (their ratio on A100)"),
    H200: (0.77, Kind.ASSUMED, f"{DECODE}, 4038 GB/s, times 0.91 (their ratio on A100)"),
    B200: (0.666, Kind.MEASURED, f"{SIMUMAX} of B200"),
    GB200: (0.666, Kind.ASSUMED, f"{SIMUMAX}: the fraction reached by B200"),
    L40S: (0.76, Kind.ASSUMED, f"{DECODE}, 718 of 864 GB/s, times 0.91"),
    RTX_4090: (0.76, Kind.ASSUMED, f"{DECODE} of L40S, 718 of 864 GB/s, times 0.91"),
}
"""Fraction of the bandwidth that elementwise kernels reach."""

HALF_RATE_E_COMPUTE = 0.90
"""GeForce tensor units run at half rate with fp32 accumulation, so that power does not limit them:
cuBLAS reaches 105-115 of 119.5 TFLOP/s on the L20, of the same generation (CUDA-Learn-Notes)."""

MISALIGNED = 0.5
"""Rate with rows that do not start on 16 bytes: half. A GPT of 124M parameters trains 25 % faster
with its vocabulary padded from 50257 to 50304 (nanoGPT, A100), which halving the rate of its head's
products, a quarter of the padded step, explains. NVIDIA's guide (Matrix Multiplication Background)
gives the condition; no table at hand has such shapes."""

FLASH1 = 1.0 / (1.3 * 2.5) ** 0.5
"""Triton's kernel of the first generation over FlashAttention-2, which is 1.3 to 2.5 times faster
(arXiv 2307.08691, section 4.1, A100): the geometric middle."""

FP32_E_COMPUTE = 0.80
"""No table of fp32 products on CUDA cores at hand; a round figure for large products."""


def lend(constants: Any, source_device: str, **update: Any) -> Any:
    """``constants`` as borrowed from ``source_device``."""
    own = {
        "borrowed_from": source_device,
        "note": constants.note or f"as on {source_device}, with which this device shares its die",
    }
    if isinstance(constants, MatmulConstants):
        own |= CONDITIONS
    return constants.model_copy(update=own | update)


def fp32_constants(bf16: MatmulConstants) -> MatmulConstants:
    """Assumed constants of fp32 products: the memory side of ``bf16``, a round compute side."""
    return bf16.model_copy(
        update={
            "e_compute": FP32_E_COMPUTE,
            "k0": 0.0,
            "sustained": 1.0,
            "misaligned": 1.0,
            "kind": Kind.ASSUMED,
            "source": "assumed compute efficiency; memory constants as bf16",
            "error_median": None,
            "error_p90": None,
            "note": "fp32 products on the CUDA cores: tf32 off",
        }
    )


def sustained(constants: MatmulConstants, share: float) -> MatmulConstants:
    """``constants`` of short benchmarks at the rate that lasts under a training load.

    Training kernels run back to back at the power limit. Both rates were measured on the die of the
    A100 (its PCIe card) and on B200; between them, Hopper takes their geometric mean.
    """
    note = (
        f"training kernels of A100 PCIe and B200 say sustained {share:.3f}, the prior of what "
        "benchmarks/accuracy fits; the errors are those of short benchmarks"
    )
    if constants.note:
        note = f"{constants.note}; {note}"
    return constants.model_copy(update={"sustained": rounded(share), "note": note})


def keep_training_rates(name: str, found: dict[str, MatmulConstants]) -> None:
    """Let training products of ``found`` last as long as by the constants that ship: their rate is
    for ``benchmarks/accuracy`` to fit, which short benchmarks do not change."""
    shipped = load_device(name).kernels.matmul
    for dtype, constants in found.items():
        if dtype in shipped:
            share = same_training_rate(name, dtype, shipped[dtype], constants)
            found[dtype] = constants.model_copy(update={"sustained": rounded(share)})


def quantisation(name: str, dtype: str) -> Callable[[Table], FloatArray]:
    """What the tables of 8- and 4-bit products include beside the product, in seconds."""
    if dtype == "fp8":
        return partial(timed_quantisation_s, name)
    return lambda rows: streamed_quantisation_s(name, dtype, rows, STREAMING[name][0])


def make_matmuls(report: list[Errors]) -> dict[str, dict[str, MatmulConstants]]:
    """Matmul constants by device and dtype."""
    burst: dict[str, dict[str, MatmulConstants]] = {}
    for name in (A100, H100, H200, B200, GB200, L40S):
        found, errors = fit_matmul(name, "bf16", DISTURBED.get(name, BF16_COLUMN))
        burst[name] = {"bf16": found}
        report.append(errors)
        for dtype in LOW_PRECISION.get(name, ()):
            found, errors = fit_matmul(name, dtype, LOW_COLUMN, beside=quantisation(name, dtype))
            burst[name][dtype] = found.model_copy(
                update={"note": "without the quantisation that the tables include"}
            )
            report.append(errors)
    report.append(judge_training(B200, burst[B200]["bf16"]))
    by_device = {name: dict(found) for name, found in burst.items()}
    by_device[A100_PCIE] = {"bf16": burst[A100]["bf16"]}
    share: dict[str, float] = {}
    for name in (B200, A100_PCIE):
        lasting, errors_list = fit_sustained(name, by_device[name]["bf16"])
        report.extend(errors_list)
        share[name] = lasting.e_compute / by_device[name]["bf16"].e_compute
        by_device[name]["bf16"] = lasting
    lasting = by_device[B200]["bf16"]
    by_device[B200]["bf16"] = lasting.model_copy(
        update={
            "e_compute": burst[B200]["bf16"].e_compute,
            "sustained": rounded(share[B200]),
            "note": f"training kernels of this device say sustained {rounded(share[B200])}, the "
            "prior of what benchmarks/accuracy fits; the errors are those of short benchmarks",
        }
    )
    middle = (share[A100_PCIE] * share[B200]) ** 0.5
    lent = {A100: share[A100_PCIE], H100: middle, H200: middle, GB200: share[B200]}
    for name, value in lent.items():
        for dtype, constants in by_device[name].items():
            by_device[name][dtype] = sustained(constants, value)
    for name in (B200, GB200):
        for dtype in LOW_PRECISION[name]:
            # Sustained 8- and 4-bit products were not measured on this generation.
            by_device[name][dtype] = sustained(burst[name][dtype], middle)
    for name, found in by_device.items():
        measured = by_device[A100_PCIE if name == A100 else B200]["bf16"].accumulate_share
        for dtype, constants in found.items():
            own = constants.accumulate_share or measured
            update = {"misaligned": MISALIGNED, "accumulate_share": own}
            found[dtype] = constants.model_copy(update=update)
    for name in burst:
        keep_training_rates(name, by_device[name])
    ada_note = (
        "e_compute assumed: half-rate units are not power limited (L20, same generation, 0.88-0.96)"
    )
    by_device[RTX_4090] = {
        dtype: lend(
            constants,
            L40S,
            e_compute=HALF_RATE_E_COMPUTE,
            sustained=1.0,
            kind=Kind.ASSUMED,
            note=ada_note,
            error_median=None,
            error_p90=None,
        )
        for dtype, constants in by_device[L40S].items()
    }
    for name in by_device:
        by_device[name]["fp32"] = fp32_constants(by_device[name]["bf16"])
    return by_device


def make_attention(report: list[Errors]) -> dict[str, dict[str, AttentionConstants]]:
    """Attention constants (bf16) by device and kernel."""
    flash2, errors = fit_flash("flash2", None)
    report.append(errors)
    flash3 = {}
    for name in (H100, H200):
        flash3[name], errors = fit_attention(name, "us_sglang")
        report.append(errors)
    flash3[H100], errors = fit_flash("flash3", flash3[H100])
    report.append(errors)
    back_ratio = flash3[H100].e_backward / flash3[H100].e_forward
    flash3[H100] = flash3[H100].model_copy(
        update={
            "source": f"forward: {flash3[H100].source}; backward: FlashAttention-3 paper, H100 "
            "figures (third-party transcription)"
        }
    )
    flash3[H200] = flash3[H200].model_copy(
        update={
            "e_backward": rounded(flash3[H200].e_forward * back_ratio),
            "half_length_backward": flash3[H100].half_length_backward,
            "note": "backward over forward rate as on H100",
        }
    )
    a100, errors = fit_attention(A100, "us_sglang", half_head_dim=flash2.half_head_dim)
    report.append(errors)
    pcie, errors = fit_attention_train(A100_PCIE, a100, length=False)
    report.append(errors)
    a100 = a100.model_copy(
        update={
            "e_backward": rounded(a100.e_forward * pcie.e_backward / pcie.e_forward),
            "note": "backward over forward rate as on A100 PCIe; half_head_dim as flash2 on H100",
        }
    )
    b200, errors = fit_attention(B200, "us_trtllm")
    report.append(errors)
    b200, errors = fit_attention_train(B200, b200, length=True)
    report.append(errors)
    ada, errors = fit_attention(L40S, "us_vllm")
    report.append(errors)
    l40s, rtx = machine(L40S), machine(RTX_4090)
    softmax = ada.half_head_dim / (ada.e_forward * l40s.peak_flops["bf16"]) * l40s.compute_units
    rtx_dim = softmax * HALF_RATE_E_COMPUTE * rtx.peak_flops["bf16"] / rtx.compute_units
    rtx_4090 = lend(
        ada,
        L40S,
        e_forward=HALF_RATE_E_COMPUTE,
        e_backward=rounded(HALF_RATE_E_COMPUTE * flash2.e_backward / flash2.e_forward),
        half_length_backward=flash2.half_length_backward,
        half_head_dim=round(rtx_dim, 1),
        kind=Kind.ASSUMED,
        error_median=None,
        error_p90=None,
        note="rates assumed (half-rate units); softmax time per pair and unit as on L40S; backward "
        "over forward rate as flash2 on H100",
    )
    return {
        A100: {"flash1": first_generation(a100), "flash2": a100},
        A100_PCIE: {"flash1": first_generation(pcie), "flash2": pcie},
        H100: {"flash1": first_generation(flash2), "flash2": flash2, "flash3": flash3[H100]},
        H200: {"flash2": lend(flash2, H100), "flash3": flash3[H200]},
        B200: {"cudnn": b200, "flash4": load_device(B200).kernels.attention["flash4"]["bf16"]},
        GB200: {
            kernel: found["bf16"] for kernel, found in load_device(GB200).kernels.attention.items()
        },
        L40S: {
            "flash2": ada.model_copy(
                update={
                    "e_backward": rounded(ada.e_forward * flash2.e_backward / flash2.e_forward),
                    "half_length_backward": flash2.half_length_backward,
                    "note": "backward over forward rate as flash2 on H100",
                }
            )
        },
        RTX_4090: {"flash2": rtx_4090},
    }


def first_generation(flash2: AttentionConstants) -> AttentionConstants:
    """Triton's FlashAttention of the first generation from FlashAttention-2 on the same device."""
    return flash2.model_copy(
        update={
            "e_forward": rounded(FLASH1 * flash2.e_forward),
            "e_backward": rounded(FLASH1 * flash2.e_backward),
            "kind": Kind.ASSUMED,
            "source": "FlashAttention-2 paper, arXiv 2307.08691, section 4.1: 1.3 to 2.5 times the "
            "Triton kernel; flash2 over the geometric middle",
            "error_median": None,
            "error_p90": None,
        }
    )


def make_profiles(report: list[Errors]) -> dict[str, KernelProfile]:
    """The ``kernels`` section of every device."""
    matmuls, attention = make_matmuls(report), make_attention(report)
    profiles = {}
    for name, matmul in matmuls.items():
        fraction, kind, source = STREAMING[name]
        profiles[name] = KernelProfile(
            matmul=matmul,
            attention={kernel: {"bf16": found} for kernel, found in attention[name].items()},
            memory_bound_efficiency=Sourced(value=fraction, unit="1", kind=kind, source=source),
            memory_bound_latency=Sourced(
                value=rounded(matmul["bf16"].t0_s * 1e6),
                unit="us",
                kind=Kind.FITTED,
                source="fixed time of short kernels: t0_s of the bf16 matrix products",
            ),
        )
    profiles[A100_40] = borrowed(profiles[A100], A100)
    profiles[H800] = borrowed(profiles[H100], H100)
    return profiles


def borrowed(profile: KernelProfile, name: str) -> KernelProfile:
    """``profile`` for a device with the same die as ``name``."""
    return profile.model_copy(
        update={
            "matmul": {dtype: lend(found, name) for dtype, found in profile.matmul.items()},
            "attention": {
                kernel: {dtype: lend(found, name) for dtype, found in by_dtype.items()}
                for kernel, by_dtype in profile.attention.items()
            },
        }
    )


def main() -> None:
    """Fit, print the errors, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="rewrite the device files and results/kernels.md"
    )
    arguments = parser.parse_args()
    report: list[Errors] = []
    profiles = make_profiles(report)
    print(as_text(report))
    if arguments.write:
        follow_lenders(profiles)
        for name, profile in profiles.items():
            rewrite(name, profile)
        PAGE.write_text(as_page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
