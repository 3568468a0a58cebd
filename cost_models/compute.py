"""Time of one kernel on one device: a smooth roofline with measured efficiencies.

Every function takes numbers or numpy arrays, which broadcast, and returns seconds as an array of
the broadcast shape; a configuration has the same price alone or among a million. All times are
positive.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from cost_models.laws import attention_law, matmul_law, smooth_maximum
from hardware_profiles.schema import AttentionConstants, DeviceSpec, MatmulConstants

FloatArray = npt.NDArray[np.float64]
MatmulStage = Literal["fprop", "dgrad", "wgrad"]
AttentionStage = Literal["forward", "backward"]

CAST = {"fp32_in_bf16": "bf16"}
"""Operands that a compiler casts between memory and the product, by what they are cast to."""

OPERAND_BYTES = {
    "bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5625,
    "fp32_in_bf16": 4.0,
}  # fmt: skip
"""Bytes per element of a product's operand; nvfp4 has an 8-bit scale for each 16 elements."""

ALIGNMENT = {
    "bf16": 8, "fp16": 8, "fp32": 4, "fp8": 16, "int8": 16, "nvfp4": 32, "fp32_in_bf16": 4,
}  # fmt: skip
"""Elements of 16 bytes, where rows must start for the widest loads: NVIDIA, Matrix Multiplication
Background User's Guide."""

QUANTISATION_BYTES = {"fp8": 4.0, "int8": 4.0, "nvfp4": 5.125}
"""Bytes moved per element of an operand that is quantised for training: 16 bits read, and written
once by rows and once by columns, since the backward reduces over the other dimension (Transformer
Engine's cast-transpose; MXFP8's two blockings). nvfp4 reads it twice: its tensor scale comes first
(NVIDIA, arXiv 2509.25149); of the others, what a stack says (``quantisation_reads``)."""

CUDA_CORE_SHARE = 0.626
"""Share of the fp32 vector peak at which products run that have no kernel on tensor cores: 12.21 of
the A100's 19.5 TFLOP/s with heads of 140 elements (bf16, CUDA 11.6; github pytorch/pytorch issue
83272). BLOOM's tests of heads of 108, 150 and 450 elements say 10 to 11."""

_OUTPUT_BYTES = {
    "bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 2.0, "int8": 2.0, "nvfp4": 2.0,
    "fp32_in_bf16": 4.0,
}  # fmt: skip


def matmul_time_s(
    device: DeviceSpec,
    dtype: str,
    m: npt.ArrayLike,
    n: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    stage: MatmulStage = "fprop",
    batch: npt.ArrayLike = 1,
    accumulated_bytes: float = 8.0,
    alone: bool = False,
    sliced: bool = False,
) -> FloatArray:
    """Seconds of one kernel that makes ``batch`` products (m, k) x (k, n) of operands in ``dtype``.

    The dimensions are the product's own: for a linear layer with t tokens, ``fprop`` is
    (t, out, in), ``dgrad`` (t, in, out) and ``wgrad`` (out, in, t). ``wgrad`` reads and writes
    ``accumulated_bytes`` per element of a gradient that it adds to (8: fp32); 0: it writes its own
    like the other stages, 16 bits (fp32: 32).
    ``fp32`` means fp32 multiplication: tf32 is off; ``fp32_in_bf16`` operands and results are fp32
    in memory and bf16 in the product (:data:`CAST`); ``fp8`` and ``nvfp4`` operands are quantised
    already (:func:`quantisation_time_s`). Features are the contiguous dimension of activations and
    weights, tokens are not: only features need alignment. Training kernels of the three stages
    differ by 3 % beyond their traffic (benchmarks/kernels), so there is no factor per stage.
    ``alone``: timed by itself in a benchmark, instead of as part of a training step. ``sliced``:
    operands are slices of a larger tensor, as heads are, which the matrix library takes to the
    tensor cores only where they are aligned (:data:`CUDA_CORE_SHARE`).

    Raises :class:`ValueError` if the device has no such dtype or the stage is unknown.
    """
    _check("stage", stage, ("fprop", "dgrad", "wgrad"))
    constants = matmul_constants(device, dtype)
    adds = accumulated_bytes > 0 and stage == "wgrad"
    output_bytes = accumulated_bytes if adds else _OUTPUT_BYTES[dtype]
    aligned = _aligned(dtype, *((m, n) if stage == "wgrad" else (n, k)))
    time = matmul_law(
        constants,
        m,
        n,
        k,
        batch=batch,
        peak_flops=device.peak_flops[arithmetic(dtype)].si,
        bandwidth_bytes_per_s=device.memory_bandwidth.si,
        compute_units=device.compute_units.si,
        operand_bytes=OPERAND_BYTES[dtype],
        output_bytes=output_bytes,
        aligned=aligned,
        apart=constants.accumulate_share if adds else 0.0,
        benchmark_cache_bytes=_cache_bytes(device) if alone else None,
    )
    cares = constants.misaligned < 1.0 and "fp32" in device.peak_flops
    if not (sliced and cares) or aligned.all():
        return time
    vector_rate = CUDA_CORE_SHARE * device.peak_flops["fp32"].si
    flops = 2.0 * _array(batch) * _array(m) * _array(n) * _array(k)
    return np.asarray(np.where(aligned, time, np.maximum(time, flops / vector_rate)))


def grouped_matmul_time_s(
    device: DeviceSpec,
    dtype: str,
    groups: npt.ArrayLike,
    rows_per_group: npt.ArrayLike,
    n: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    stage: MatmulStage = "fprop",
    single_launch: bool = False,
    accumulated_bytes: float = 8.0,
) -> FloatArray:
    """Seconds of ``groups`` expert products, each with ``rows_per_group`` tokens.

    ``n`` and ``k`` are the product's own columns and reduction in ``fprop`` and ``dgrad``:
    (rows, k) x (k, n). In ``wgrad`` each group makes the (n, k) gradient of a weight by reducing
    over its rows. ``single_launch`` counts waves over the tiles of all groups in one kernel;
    otherwise each group pays its own fixed time and last wave, which is what the measured training
    kernels show (benchmarks/kernels).

    Raises :class:`ValueError` as :func:`matmul_time_s`.
    """
    dims = (n, k, rows_per_group) if stage == "wgrad" else (rows_per_group, n, k)
    if single_launch:
        return matmul_time_s(
            device, dtype, *dims, stage=stage, batch=groups, accumulated_bytes=accumulated_bytes
        )
    count = np.maximum(_array(groups), 1.0)
    one = matmul_time_s(device, dtype, *dims, stage=stage, accumulated_bytes=accumulated_bytes)
    return np.asarray(count * one)


def attention_time_s(
    device: DeviceSpec,
    dtype: str,
    kernel: str,
    *,
    batch: npt.ArrayLike,
    q_len: npt.ArrayLike,
    kv_len: npt.ArrayLike,
    heads: npt.ArrayLike,
    kv_heads: npt.ArrayLike,
    qk_head_dim: npt.ArrayLike,
    v_head_dim: npt.ArrayLike,
    causal: bool,
    stage: AttentionStage = "forward",
) -> FloatArray:
    """Seconds of one fused attention kernel (``flash3``, ``cudnn``), 16-bit operands.

    ``causal`` aligns the mask to the last key (the last query sees every key), so that
    ``q_len < kv_len`` is a chunk at the end of the sequence. Only visited pairs are counted. The
    backward pass does ``BACKWARD_FLOPS`` times the FLOPs at its own efficiency.

    Raises :class:`ValueError` if the device has no constants for ``kernel`` and ``dtype``.
    """
    _check("stage", stage, ("forward", "backward"))
    return attention_law(
        attention_constants(device, dtype, kernel),
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        qk_head_dim=qk_head_dim,
        v_head_dim=v_head_dim,
        causal=causal,
        backward=stage == "backward",
        peak_flops=device.peak_flops[dtype].si,
        bandwidth_bytes_per_s=memory_bound_bandwidth_bytes_per_s(device),
        compute_units=device.compute_units.si,
    )


def memory_bound_time_s(device: DeviceSpec, bytes_moved: npt.ArrayLike) -> FloatArray:
    """Seconds of one kernel that reads and writes ``bytes_moved`` and computes next to nothing."""
    latency_s = device.kernels.memory_bound_latency.si
    streaming_s = _array(bytes_moved) / memory_bound_bandwidth_bytes_per_s(device)
    return np.asarray(latency_s + streaming_s)


def quantisation_time_s(
    device: DeviceSpec,
    dtype: str,
    elements: npt.ArrayLike,
    tensors: npt.ArrayLike = 1,
    *,
    reads: int = 1,
) -> FloatArray:
    """Seconds to quantise ``elements`` of 16 bits, in ``tensors`` kernels, to ``dtype``; 8-bit
    scales that need a pass of their own make it two ``reads``."""
    latency_s = device.kernels.memory_bound_latency.si
    again = 0.0 if dtype == "nvfp4" else 2.0 * (reads - 1)
    bytes_moved = (QUANTISATION_BYTES[dtype] + again) * _array(elements)
    streaming_s = bytes_moved / memory_bound_bandwidth_bytes_per_s(device)
    return np.asarray(_array(tensors) * latency_s + streaming_s)


def roofline_time_s(
    device: DeviceSpec, dtype: str, flops: npt.ArrayLike, bytes_moved: npt.ArrayLike
) -> FloatArray:
    """Seconds of a computation known by its FLOPs and bytes alone, launches left out.

    The roofline of large matrix products: no tile, no last wave and no short reduction is charged,
    since nothing is known of its shape. Raises :class:`ValueError` as :func:`matmul_time_s`.
    """
    constants = matmul_constants(device, dtype)
    rate = constants.e_compute * constants.sustained * device.peak_flops[arithmetic(dtype)].si
    compute_s = _array(flops) / rate
    memory_s = _array(bytes_moved) / memory_bound_bandwidth_bytes_per_s(device)
    return smooth_maximum(compute_s, memory_s, constants.p)


def memory_bound_bandwidth_bytes_per_s(device: DeviceSpec) -> float:
    """Bytes/s that a large elementwise kernel reaches."""
    return device.memory_bandwidth.si * device.kernels.memory_bound_efficiency.si


def arithmetic(dtype: str) -> str:
    """What a product of operands in ``dtype`` computes in."""
    return CAST.get(dtype, dtype)


def matmul_constants(device: DeviceSpec, dtype: str) -> MatmulConstants:
    """The constants of ``dtype`` on ``device``; fp16 borrows bf16's where their peaks are equal."""
    name = _resolve(device, arithmetic(dtype), device.kernels.matmul.keys())
    if name is None:
        raise ValueError(
            f"{device.name} has no {dtype} matrix products; it has "
            f"{', '.join(sorted(device.kernels.matmul))}"
        )
    return device.kernels.matmul[name]


def attention_constants(device: DeviceSpec, dtype: str, kernel: str) -> AttentionConstants:
    """The constants of one attention kernel; fp16 borrows bf16's where their peaks are equal."""
    if kernel not in device.kernels.attention:
        raise ValueError(
            f"{device.name} has no attention kernel {kernel!r}; it has "
            f"{', '.join(sorted(device.kernels.attention)) or 'none'}"
        )
    by_dtype = device.kernels.attention[kernel]
    name = _resolve(device, dtype, by_dtype.keys())
    if name is None:
        raise ValueError(
            f"{kernel} on {device.name} has no {dtype} kernel; it has {', '.join(sorted(by_dtype))}"
        )
    return by_dtype[name]


def _aligned(dtype: str, *features: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    first, second = (np.mod(each, ALIGNMENT[dtype]) == 0 for each in features)
    return np.asarray(first & second)


def _cache_bytes(device: DeviceSpec) -> float:
    return 0.0 if device.l2_capacity is None else device.l2_capacity.si


def _resolve(device: DeviceSpec, dtype: str, known: Collection[str]) -> str | None:
    if dtype not in device.peak_flops:
        return None
    if dtype in known:
        return dtype
    same_peak = (
        "bf16" in device.peak_flops and device.peak_flops["bf16"].si == device.peak_flops[dtype].si
    )
    return "bf16" if dtype == "fp16" and same_peak and "bf16" in known else None


def _array(value: npt.ArrayLike) -> FloatArray:
    return np.asarray(value, dtype=np.float64)


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
