"""Time of one kernel on one device: a smooth roofline with measured efficiencies.

Every function takes numbers or numpy arrays, which broadcast, and returns seconds as an array of
the broadcast shape; a configuration has the same price alone or among a million. All times are
positive.

The law of a matrix product, for operands that are read once and an output written once::

    t = t0 + smooth_max_p(t_compute, t_memory)
    t_compute = 2 TILE^2 units waves (k + k0) / (e_compute sustained peak)
    t_memory  = bytes / (e_memory bandwidth)

``units`` compute units each work on TILE x TILE tiles of the output. ``waves`` is
``w + wave_share (ceil(w) - w)`` with ``w = tiles / units``: a kernel library chooses tile shapes
and splits the reduction so that only a share of the last wave's idle time is paid. The constants
are in :class:`hardware_profiles.schema.MatmulConstants`; ``benchmarks/kernels/fit.py`` makes them.

Attention uses the same law on the query-key pairs that the kernel visits, with a rate that rises
with the keys per query and with the head dimension (softmax costs the same for each pair however
wide the heads are). Where the two head dimensions differ, both count as the larger: kernels pad the
narrower, and the training kernels measured with 192 and 128 are slower by as much::

    t_compute = flops (1 + half_head_dim / d) (1 + half_length / L) (waves / w) / (e peak)

The backward pass exponentiates each pair once, as the forward pass does, beside 2.5 times the
FLOPs: its ``half_head_dim`` is that much smaller.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from hardware_profiles.schema import AttentionConstants, DeviceSpec, MatmulConstants

FloatArray = npt.NDArray[np.float64]
MatmulStage = Literal["fprop", "dgrad", "wgrad"]
AttentionStage = Literal["forward", "backward"]

TILE = 128
"""Side of the output tile (and of the block of queries or keys) that one compute unit works on."""

BACKWARD_FLOPS = 2.5
"""Attention FLOPs, backward over forward: five products instead of two (the scores are recomputed);
FlashAttention-2, arXiv 2307.08691, section 4."""

ATTENTION_P = 4.0
"""Exponent of the smooth maximum for attention, which is far from the ridge in training."""

OPERAND_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "nvfp4": 0.5625}
"""Bytes per element of a product's operand; nvfp4 has an 8-bit scale for each 16 elements."""

ALIGNMENT = {"bf16": 8, "fp16": 8, "fp32": 4, "fp8": 16, "nvfp4": 32}
"""Elements of 16 bytes, where rows must start for the widest loads: NVIDIA, Matrix Multiplication
Background User's Guide."""

QUANTISATION_BYTES = {"fp8": 4.0, "nvfp4": 5.125}
"""Bytes moved per element of an operand that is quantised for training: 16 bits read, and written
once by rows and once by columns, since the backward reduces over the other dimension (Transformer
Engine's cast-transpose; MXFP8's two blockings). nvfp4 reads it twice: its tensor scale comes first
(NVIDIA, arXiv 2509.25149)."""

_OUTPUT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 2.0, "nvfp4": 2.0}
_ACCUMULATE_BYTES = 8.0


def matmul_time_s(
    device: DeviceSpec,
    dtype: str,
    m: npt.ArrayLike,
    n: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    stage: MatmulStage = "fprop",
    batch: npt.ArrayLike = 1,
    accumulate: bool = True,
) -> FloatArray:
    """Seconds of one kernel that makes ``batch`` products (m, k) x (k, n) of operands in ``dtype``.

    The dimensions are the product's own: for a linear layer with t tokens, ``fprop`` is
    (t, out, in), ``dgrad`` (t, in, out) and ``wgrad`` (out, in, t). ``wgrad`` with ``accumulate``
    adds to an fp32 gradient (8 bytes per element read and written); other stages write 16 bits
    (fp32: 32).
    ``fp32`` means fp32 multiplication: tf32 is off; ``fp8`` and ``nvfp4`` operands are quantised
    already (:func:`quantisation_time_s`). Features are the contiguous dimension of activations and
    weights, tokens are not: only features need alignment. Training kernels of the three stages
    differ by 3 % beyond their traffic (benchmarks/kernels), so there is no factor per stage.

    Raises :class:`ValueError` if the device has no such dtype or the stage is unknown.
    """
    _check("stage", stage, ("fprop", "dgrad", "wgrad"))
    constants = matmul_constants(device, dtype)
    adds = accumulate and stage == "wgrad"
    output_bytes = _ACCUMULATE_BYTES if adds else _OUTPUT_BYTES[dtype]
    features = (m, n) if stage == "wgrad" else (n, k)
    return matmul_law(
        constants,
        m,
        n,
        k,
        batch=batch,
        peak_flops=device.peak_flops[dtype].si,
        bandwidth_bytes_per_s=device.memory_bandwidth.si,
        compute_units=device.compute_units.si,
        operand_bytes=OPERAND_BYTES[dtype],
        output_bytes=output_bytes,
        aligned=_aligned(dtype, *features),
        apart=constants.accumulate_share if adds else 0.0,
    )


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
    accumulate: bool = True,
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
        return matmul_time_s(device, dtype, *dims, stage=stage, batch=groups, accumulate=accumulate)
    count = np.maximum(_array(groups), 1.0)
    one = matmul_time_s(device, dtype, *dims, stage=stage, accumulate=accumulate)
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
    device: DeviceSpec, dtype: str, elements: npt.ArrayLike, tensors: npt.ArrayLike = 1
) -> FloatArray:
    """Seconds to quantise ``elements`` of 16 bits, in ``tensors`` kernels, to ``dtype``."""
    latency_s = device.kernels.memory_bound_latency.si
    bytes_moved = QUANTISATION_BYTES[dtype] * _array(elements)
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
    rate = constants.e_compute * constants.sustained * device.peak_flops[dtype].si
    compute_s = _array(flops) / rate
    memory_s = _array(bytes_moved) / memory_bound_bandwidth_bytes_per_s(device)
    return smooth_maximum(compute_s, memory_s, constants.p)


def memory_bound_bandwidth_bytes_per_s(device: DeviceSpec) -> float:
    """Bytes/s that a large elementwise kernel reaches."""
    return device.memory_bandwidth.si * device.kernels.memory_bound_efficiency.si


def matmul_constants(device: DeviceSpec, dtype: str) -> MatmulConstants:
    """The constants of ``dtype`` on ``device``; fp16 borrows bf16's where their peaks are equal."""
    name = _resolve(device, dtype, device.kernels.matmul.keys())
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


def matmul_law(
    constants: MatmulConstants,
    m: npt.ArrayLike,
    n: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    batch: npt.ArrayLike,
    peak_flops: float,
    bandwidth_bytes_per_s: float,
    compute_units: float,
    operand_bytes: float,
    output_bytes: npt.ArrayLike,
    aligned: npt.ArrayLike = True,
    apart: float = 0.0,
) -> FloatArray:
    """The law in the module's docstring, with the machine spelled out; seconds.

    ``apart`` is the share of the output's traffic that comes after the product.
    """
    m, n, k, batch = _array(m), _array(n), _array(k), _array(batch)
    tiles = batch * (np.ceil(m / TILE) * np.ceil(n / TILE))
    waves = _paid_waves(tiles / compute_units, constants.wave_share)
    flops_per_wave_and_k = 2.0 * TILE * TILE * compute_units
    compute_s = (
        waves
        * (k + constants.k0)
        * (flops_per_wave_and_k / (constants.e_compute * constants.sustained * peak_flops))
        / np.where(aligned, 1.0, constants.misaligned)
    )
    output = batch * _array(output_bytes) * (m * n)
    traffic = batch * (operand_bytes * (k * (m + n))) + (1.0 - apart) * output
    bandwidth = constants.e_memory * bandwidth_bytes_per_s
    product_s = smooth_maximum(compute_s, traffic / bandwidth, constants.p)
    return np.asarray(constants.t0_s + product_s + apart * output / bandwidth)


def attention_law(
    constants: AttentionConstants,
    *,
    batch: npt.ArrayLike,
    q_len: npt.ArrayLike,
    kv_len: npt.ArrayLike,
    heads: npt.ArrayLike,
    kv_heads: npt.ArrayLike,
    qk_head_dim: npt.ArrayLike,
    v_head_dim: npt.ArrayLike,
    causal: bool,
    backward: bool,
    peak_flops: float,
    bandwidth_bytes_per_s: float,
    compute_units: float,
) -> FloatArray:
    """The law of attention in the module's docstring, with the machine spelled out; seconds."""
    batch, q_len, kv_len = _array(batch), _array(q_len), _array(kv_len)
    heads, kv_heads = _array(heads), _array(kv_heads)
    head_dim = np.maximum(_array(qk_head_dim), _array(v_head_dim))
    pairs = visited_pairs(q_len, kv_len, causal=causal)
    keys_per_query = pairs / q_len
    flops = 4.0 * (batch * heads) * pairs * head_dim
    efficiency, half_length, passes = constants.e_forward, constants.half_length, 1.0
    half_head_dim = constants.half_head_dim
    blocks = np.ceil(q_len / TILE)
    if backward:
        efficiency, passes = constants.e_backward, 2.0
        flops = BACKWARD_FLOPS * flops
        half_head_dim = half_head_dim / BACKWARD_FLOPS
        blocks = np.ceil(kv_len / TILE)
        if constants.half_length_backward is not None:
            half_length = constants.half_length_backward
    wave_count = batch * heads * blocks / compute_units
    idle = _paid_waves(wave_count, constants.wave_share) / wave_count
    slowdown = (1.0 + half_length / keys_per_query) * (1.0 + half_head_dim / head_dim)
    compute_s = flops * slowdown * idle / (efficiency * peak_flops)
    traffic = passes * 4.0 * batch * head_dim * (q_len * heads + kv_len * kv_heads)
    memory_s = traffic / bandwidth_bytes_per_s
    return np.asarray(constants.t0_s + smooth_maximum(compute_s, memory_s, ATTENTION_P))


def visited_pairs(q_len: npt.ArrayLike, kv_len: npt.ArrayLike, *, causal: bool) -> FloatArray:
    """Query-key pairs under the mask: all, or those up to each query's own position."""
    q_len, kv_len = _array(q_len), _array(kv_len)
    if not causal:
        return np.asarray(q_len * kv_len)
    seeing = np.minimum(q_len, kv_len)
    return np.asarray(seeing * kv_len - seeing * (seeing - 1.0) / 2.0)


def smooth_maximum(a: FloatArray, b: FloatArray, p: float) -> FloatArray:
    """``(a^p + b^p)^(1/p)``: from the sum (p = 1) to the maximum (p large).

    Powers of two go by squaring and square roots, which IEEE 754 rounds correctly: the same bits
    on every machine, for one element or many, and several times faster than ``pow``.
    """
    high = np.maximum(a, b)
    low = np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0.0)
    doublings = int(p).bit_length() - 1
    if p != 2**doublings:
        return np.asarray(high * np.power(1.0 + np.power(ratio, p), 1.0 / p))
    for _ in range(doublings):
        ratio = ratio * ratio
    scale = 1.0 + ratio
    for _ in range(doublings):
        scale = np.sqrt(scale)
    return np.asarray(high * scale)


def _aligned(dtype: str, *features: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    first, second = (np.mod(each, ALIGNMENT[dtype]) == 0 for each in features)
    return np.asarray(first & second)


def _paid_waves(waves: FloatArray, share: float) -> FloatArray:
    return np.asarray(waves + share * (np.ceil(waves) - waves))


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
