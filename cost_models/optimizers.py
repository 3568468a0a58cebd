"""What an optimizer keeps and does per parameter; a new optimizer is a new entry.

State beside the master weight, per element or per tensor, and the traffic and work of a step. AdamW
keeps two fp32 moments. 8-bit AdamW keeps them in one byte each, with an fp32 scale per block of 256
(Dettmers et al., arXiv 2110.02861). Lion and momentum SGD keep one (Chen et al., arXiv 2302.06675).
Adagrad and RMSprop keep one second moment, NovoGrad a first one and a norm per tensor, AdaMax,
Adadelta and Rprop two of their own (torch.optim; Ginsburg et al., arXiv 1905.11286). Adafactor
keeps a row and a column of second moments per matrix, a full one per vector, and no first moment
(Shazeer and Stern, arXiv 1804.04235; Hugging Face's defaults). Muon keeps one moment of each matrix
and orthogonalises its update by Newton-Schulz iterations; embedding, head and vectors are AdamW's
(Jordan et al. 2024; Liu et al., arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Int64, Weight

NEWTON_SCHULZ_STEPS = 5
"""Iterations of the quintic polynomial (arXiv 2502.16982, section 2.1)."""
BLOCK_8BIT = 256
"""Elements that share a scale in 8-bit states (arXiv 2110.02861 has 2048; bitsandbytes since 0.39
uses 256)."""


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One of the equal tensors that a :class:`Weight` is on one device."""

    elements: Int64
    rows: Int64
    """Its first dimension."""
    count: Int64

    @property
    def total(self) -> Int64:
        """Elements of all of them."""
        return self.elements * self.count


def is_matrix(weight: Weight) -> bool:
    """Whether Muon and Adafactor take a weight as a matrix; Muon leaves the ends to AdamW."""
    return weight.cols > 1


def is_hidden_matrix(weight: Weight) -> bool:
    """A matrix between the ends of the model."""
    return is_matrix(weight) and not weight.name.startswith(("embedding", "head"))


@dataclass(frozen=True)
class OptimizerRule:
    """State and step of one optimizer."""

    name: str
    title: str
    moment_bytes: int
    """State per element that every tensor has, master weight left out."""
    step_bytes: float
    """Read and written per element in a step beyond gradient, norm, master and weight."""
    extra_bytes: Callable[[Weight, LocalTensor], Int64] | None = None
    """State of a weight on one device beyond ``moment_bytes``, before sharding."""
    flat_bytes: int = 0
    """State per element, in place of ``extra_bytes``, of tensors that a stack has flattened: a row
    or a column of them is nobody's."""
    orthogonalises: bool = False
    """Whether matrices take Newton-Schulz iterations, each whole on one rank."""
    matrices: Callable[[Weight], bool] = is_hidden_matrix
    """Which those are."""


def _scales(_: Weight, tensor: LocalTensor) -> Int64:
    return 2 * 4 * -(-tensor.elements // BLOCK_8BIT) * tensor.count


def _factored(weight: Weight, tensor: LocalTensor) -> Int64:
    if not is_matrix(weight):
        return 4 * tensor.elements * tensor.count
    return 4 * (tensor.rows + tensor.elements // tensor.rows) * tensor.count


def _adam_elsewhere(weight: Weight, tensor: LocalTensor) -> Int64:
    second = 0 if is_hidden_matrix(weight) else 4
    return second * tensor.elements * tensor.count


OPTIMIZERS = {
    rule.name: rule
    for rule in (
        OptimizerRule("adamw", "AdamW", 8, 16.0),
        OptimizerRule("adamw_bf16", "AdamW with 16-bit moments", 4, 8.0),
        OptimizerRule("sgd", "SGD with momentum", 4, 8.0),
        OptimizerRule("lion", "Lion", 4, 8.0),
        OptimizerRule("adagrad", "Adagrad", 4, 8.0),
        OptimizerRule("rmsprop", "RMSprop without momentum", 4, 8.0),
        OptimizerRule("novograd", "NovoGrad", 4, 8.0),
        OptimizerRule("adamax", "AdaMax", 8, 16.0),
        OptimizerRule("adadelta", "Adadelta", 8, 16.0),
        OptimizerRule("rprop", "Rprop", 8, 16.0),
        OptimizerRule("adam8bit", "AdamW with 8-bit states", 2, 4.0, _scales),
        OptimizerRule("adafactor", "Adafactor", 0, 8.0, _factored, flat_bytes=4),
        OptimizerRule("muon", "Muon, AdamW for what is no hidden matrix", 4, 8.0, _adam_elsewhere,
                      orthogonalises=True),
    )
}  # fmt: skip
"""By the name that a job uses."""


def rule_of(name: str, momentum_bytes: int = 4, *, experts: bool = True) -> OptimizerRule:
    """The entry of ``name``; Muon's momentum of matrices takes ``momentum_bytes`` per element, and
    without ``experts`` these are AdamW's."""
    rule = OPTIMIZERS[name]
    if not rule.orthogonalises or (momentum_bytes == rule.moment_bytes and experts):
        return rule

    def matrices(weight: Weight) -> bool:
        return is_hidden_matrix(weight) and (experts or not weight.sharding.startswith("expert_"))

    def elsewhere(weight: Weight, tensor: LocalTensor) -> Int64:
        more = 0 if matrices(weight) else 8 - momentum_bytes
        return more * tensor.elements * tensor.count

    return replace(
        rule, moment_bytes=momentum_bytes, extra_bytes=elsewhere, matrices=matrices
    )  # fmt: skip


def newton_schulz_flops(
    weights: Iterable[tuple[Weight, LocalTensor]], *, gram: bool = False
) -> NDArray[np.float64]:
    """FLOPs to orthogonalise the hidden matrices among ``weights`` once, on one device.

    Each step makes ``A = X X^T``, ``A^2`` and ``(b A + c A^2) X`` of the wide form (a, b), a <= b:
    ``4 a^2 b + 2 a^3``. Under tensor parallelism each rank takes its own block (Megatron-Core's
    ``blockwise``).

    ``gram``: five steps on ``R = X X^T`` instead, started again after two: X is multiplied four
    times, matrices of R's size 14 times; a square X takes the other way (DeepSpeed,
    runtime/zero/muon/original_muon.py, ``zeropower_via_gram_newtonschulz``).
    """
    total = np.zeros(1)
    for weight, tensor in weights:
        if not is_hidden_matrix(weight):
            continue
        rows = tensor.rows.astype(np.float64)
        cols = tensor.elements / rows
        short, long = np.minimum(rows, cols), np.maximum(rows, cols)
        each = NEWTON_SCHULZ_STEPS * (4.0 * short**2 * long + 2.0 * short**3)
        if gram:
            each = np.where(long > short, 8.0 * short**2 * long + 28.0 * short**3, each)
        total = total + each * tensor.count
    return total
