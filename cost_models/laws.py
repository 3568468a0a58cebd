"""The laws of products and attention, with the machine spelled out.

The law of a matrix product, for operands that are read once and an output written once::

    t = t0 + smooth_max_p(t_compute, t_memory) + t_latency
    t_compute = 2 TILE^2 units waves (k + k0) / (e_compute sustained peak)
    t_memory  = bytes / (e_memory bandwidth)
    t_latency = tile_latency 2 TILE^2 units k / (1 + k / split_k) / (1 + w) / (e_compute ... peak)

``units`` compute units each work on TILE x TILE tiles of the output. ``waves`` is
``w + wave_share (ceil(w) - w)`` with ``w = tiles / units``: a kernel library chooses tile shapes
and splits the reduction so that only a share of the last wave's idle time is paid. A unit with few
tiles runs through the reduction of each at its latency, until splitting the reduction over idle
units pays. The constants are in :class:`hardware_profiles.schema.MatmulConstants`;
``benchmarks/kernels/fit.py`` makes them.

Benchmarks time one product over and over, with pauses. Short ones then run at a clock that does not
last (``heating``), and small operands stay in the last-level cache (``cache_share``). Neither holds
in a training step, whose kernels follow each other at the power limit: there the rate is
``sustained``, whatever the length of a kernel. Benchmarks pay, for compute and for traffic::

    t_compute (1 + heating t_compute / (t_compute + heating_s)),  sustained = 1
    t_memory  (1 - 1 / (1 + (bytes / (cache_share cache))^2))

Attention uses the same law on the query-key pairs that the kernel visits, with a rate that rises
with the keys per query and with the head dimension (softmax costs the same for each pair however
wide the heads are). Where the two head dimensions differ, both count as the larger: kernels pad the
narrower, and the training kernels measured with 192 and 128 are slower by as much::

    t_compute = flops (1 + half_head_dim / d) (1 + half_length / L) (waves / w) / (e peak)

The backward pass exponentiates each pair once, as the forward pass does, beside 2.5 times the
FLOPs: its ``half_head_dim`` is that much smaller.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hardware_profiles.schema import AttentionConstants, MatmulConstants

FloatArray = npt.NDArray[np.float64]

TILE = 128
"""Side of the output tile (and of the block of queries or keys) that one compute unit works on."""

BACKWARD_FLOPS = 2.5
"""Attention FLOPs, backward over forward: five products instead of two (the scores are recomputed);
FlashAttention-2, arXiv 2307.08691, section 4."""

ATTENTION_P = 4.0
"""Exponent of the smooth maximum for attention, which is far from the ridge in training."""


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
    benchmark_cache_bytes: float | None = None,
) -> FloatArray:
    """The law in the module's docstring, with the machine spelled out; seconds.

    ``apart`` is the share of the output's traffic that comes after the product.
    ``benchmark_cache_bytes``: the product is timed by itself, on a device with so large a
    last-level cache; without it, it is one of a training step.
    """
    m, n, k, batch = _array(m), _array(n), _array(k), _array(batch)
    waves = batch * (np.ceil(m / TILE) * np.ceil(n / TILE)) / compute_units
    share = 1.0 if benchmark_cache_bytes is not None else constants.sustained
    rate = constants.e_compute * share * peak_flops * np.where(aligned, 1.0, constants.misaligned)
    # Seconds of a full wave for each element of the reduction.
    step_s = (2.0 * TILE * TILE * compute_units) / rate
    compute_s = _paid_waves(waves, constants.wave_share) * (k + constants.k0) * step_s
    output = batch * _array(output_bytes) * (m * n)
    traffic = batch * (operand_bytes * (k * (m + n))) + (1.0 - apart) * output
    bandwidth = constants.e_memory * bandwidth_bytes_per_s
    memory_s = traffic / bandwidth
    if benchmark_cache_bytes is not None:
        compute_s = compute_s * (1.0 + constants.heating * _filled(compute_s, constants.heating_s))
        cached_bytes = constants.cache_share * benchmark_cache_bytes
        memory_s = memory_s * _filled(traffic**2, cached_bytes**2)
    seconds = constants.t0_s + smooth_maximum(compute_s, memory_s, constants.p)
    if constants.tile_latency > 0.0:
        length = k / (1.0 + k / constants.split_k)
        seconds = seconds + (constants.tile_latency * step_s) * length / (1.0 + waves)
    return np.asarray(seconds + apart * output / bandwidth)


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


def _paid_waves(waves: FloatArray, share: float) -> FloatArray:
    return np.asarray(waves + share * (np.ceil(waves) - waves))


def _filled(value: FloatArray, half: float) -> FloatArray:
    return np.asarray(value / (value + half))


def _array(value: npt.ArrayLike) -> FloatArray:
    return np.asarray(value, dtype=np.float64)
