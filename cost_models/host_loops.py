"""Optimizers that run on the host as PyTorch's loops: bytes through its memory per parameter.

On a CPU ``torch.optim`` takes its single-tensor path (torch 2.13.0, torch/utils/_foreach_utils.py:
foreach kernels are for accelerators only): each elementwise op reads its operands, 4 bytes each,
and writes its result before the next begins, and a rank's flat shard is far larger than any cache.
An operand that an op names twice comes once. DeepSpeed's own optimizers there do all in one pass
(``cost_models.offload``). Options are the optimizers' defaults, so without weight decay; SGD has a
momentum. Flat shards have no rows: Adafactor keeps its second moments whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.graph import Int64
from hardware_profiles.holdings import OffloadSpec

_TORCH = "torch 2.13.0, torch/optim"


@dataclass(frozen=True, slots=True)
class HostLoop:
    """One optimizer's step on fp32 tensors of the host, per parameter."""

    passes: tuple[int, ...]
    """Bytes that each op reads and writes, in turn."""
    working_bytes: int
    """Of new tensors, as many as exist at once."""
    source: str
    matrix_passes: tuple[int, ...] | None = None
    """In place of ``passes``, without new tensors, of matrices that Muon orthogonalises: their
    update comes as the gradient. None: it is not Muon."""

    @property
    def moved_bytes(self) -> int:
        """Read and written in a step."""
        return sum(self.passes)

    @property
    def spared_bytes(self) -> int:
        """By how much less of a matrix."""
        return 0 if self.matrix_passes is None else self.moved_bytes - sum(self.matrix_passes)


HOST_LOOPS = {
    "sgd": HostLoop(
        # buf.mul_, .add_(grad); param.add_(buf)
        (8, 12, 12), 0, f"{_TORCH}/sgd.py, _single_tensor_sgd",
    ),
    "rmsprop": HostLoop(
        # square_avg.mul_, .addcmul_(grad, grad); avg: sqrt, add_; param.addcdiv_(grad, avg)
        (8, 12, 8, 8, 16), 4, f"{_TORCH}/rmsprop.py, _single_tensor_rmsprop",
    ),
    "adamax": HostLoop(
        # exp_avg.lerp_(grad); exp_inf.mul_, grad.abs, add_, maximum; param.addcdiv_
        (12, 8, 8, 8, 12, 16), 4, f"{_TORCH}/adamax.py, _single_tensor_adamax",
    ),
    "adadelta": HostLoop(
        # square_avg.mul_, .addcmul_; std: add, sqrt_; delta: add, sqrt_, div_(std), mul_(grad);
        # acc_delta.mul_, .addcmul_; param.add_(delta)
        (8, 12, 8, 8, 8, 8, 12, 12, 8, 12, 12), 8,
        f"{_TORCH}/adadelta.py, _single_tensor_adadelta",
    ),
    "adafactor": HostLoop(
        # norm of param; grad ** 2, + eps; exp_avg_sq.mul_, .add_; update: rsqrt, mul_(grad), its
        # norm, div_, mul_(lr); -update, param.add_
        (4, 8, 8, 8, 12, 8, 12, 4, 8, 8, 8, 12), 8,
        "transformers 4.57.1, transformers/optimization.py, Adafactor.step, not factored",
    ),
    "muon": HostLoop(
        # buf1.lerp_(grad); grad.square(), buf2.lerp_; both / (1 - beta ** step); sqrt, + eps, their
        # quotient; p.mul_, .add_(update)
        (12, 8, 12, 8, 8, 8, 8, 12, 8, 12), 16,
        "DeepSpeed 0.19.3, runtime/zero/muon: MuonWithAuxAdam.step and adam_update",
        # p.mul_, .add_(grad)
        matrix_passes=(8, 12),
    ),
}  # fmt: skip
"""By the name that a job uses."""


def loop_of(optimizer: str, spec: OffloadSpec | None) -> HostLoop | None:
    """The loop in which the host updates, or None: one pass, or the device updates."""
    return HOST_LOOPS[optimizer] if spec is not None and optimizer in spec.loops else None


def working_bytes(
    optimizer: str, spec: OffloadSpec | None, elements: Int64, zero_stage: Int64
) -> tuple[Int64, Int64]:
    """Host bytes of new tensors: per element of a shard that is updated at once, as below ZeRO
    stage 3, and of a device with a shard of ``elements`` that goes group by group, as in it, where
    Muon runs on one rank too."""
    loop = loop_of(optimizer, spec)
    if loop is None or spec is None:
        return np.zeros_like(zero_stage), np.zeros_like(zero_stage)
    groups = (zero_stage == 3) | (loop.matrix_passes is not None)
    group = np.minimum(elements, spec.loop_elements) * loop.working_bytes
    return np.where(groups, 0, loop.working_bytes), np.where(groups, group, 0)
