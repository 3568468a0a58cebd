"""Time of a layer's attention kernels, whole or block by block around a ring."""

from __future__ import annotations

import numpy as np

from cost_models import compute
from cost_models.ops import Attention, Reals
from cost_models.repeat import Real
from hardware_profiles.schema import DeviceSpec


def attention_passes(
    op: Attention, device: DeviceSpec, dtype: str, kernel: str
) -> tuple[Real, Real]:
    """Seconds of ``op`` forward and backward for every configuration.

    Where keys and values go round a ring they come in blocks, and each block has a kernel of its
    own (Liu et al., arXiv 2310.01889). Of a causal mask a rank has one block on the diagonal; of
    each other, with balanced pieces, either all queries see the first half or the second half of
    the queries sees all. All wait for the rank with the last piece, for which it is always the
    former (Transformer Engine, ``AttnFuncWithCPAndKVP2P``); without balance it sees all of each.
    Other masks are priced as one kernel, as whole causal attention is without a ring.
    """
    forward, backward = (_whole(op, device, dtype, kernel, s) for s in ("forward", "backward"))
    blocks = np.asarray(op.blocks)
    if not op.causal or not np.any(blocks > 1):
        return forward, backward
    around = [_around(op, device, dtype, kernel, stage) for stage in ("forward", "backward")]
    return np.where(blocks > 1, around[0], forward), np.where(blocks > 1, around[1], backward)


def _whole(
    op: Attention, device: DeviceSpec, dtype: str, kernel: str, stage: compute.AttentionStage
) -> Real:
    # A rank with an even share of a causal mask's queries has that share of their work.
    batch, q_len = op.batch, op.q_len
    if op.causal:
        ways = np.asarray(op.exchanged)
        share = np.where(op.last, 1.0 / ways, op.q_len / np.asarray(op.kv_len))
        batch, q_len = op.batch * share, np.where(op.last, op.q_len * ways, op.kv_len)
    return _one(op, device, dtype, kernel, stage, batch, q_len, op.kv_len, causal=op.causal)


def _around(
    op: Attention, device: DeviceSpec, dtype: str, kernel: str, stage: compute.AttentionStage
) -> Real:
    ways, others = np.asarray(op.exchanged), np.asarray(op.blocks) - 1
    batch, block = op.batch / ways, op.q_len * ways
    seen = np.where(op.last, block, block / 2)
    own = _one(op, device, dtype, kernel, stage, batch, block, block, causal=True)
    each = _one(op, device, dtype, kernel, stage, batch, block, seen, causal=False)
    return np.asarray(own + others * each)


def _one(
    op: Attention, device: DeviceSpec, dtype: str, kernel: str, stage: compute.AttentionStage,
    batch: Reals, q_len: Reals, kv_len: Reals, *, causal: bool,
) -> Real:  # fmt: skip
    return compute.attention_time_s(
        device, dtype, kernel, batch=batch, q_len=q_len, kv_len=kv_len, heads=op.heads,
        kv_heads=op.kv_heads, qk_head_dim=op.qk_head_dim, v_head_dim=op.v_head_dim, causal=causal,
        stage=stage,
    )  # fmt: skip
