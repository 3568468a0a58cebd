"""What quantising the operands of low-precision products moves where Transformer Engine does.

Each linear layer quantises its own part of an input, and of its output's gradient where tensor
parallelism gathers that, before it is gathered; a norm in front of it writes 8 bits itself where
the scale is known before. The backward's product with the input reduces over rows: with one scale
per tensor that takes a transposed copy on devices whose 8-bit products reduce over columns only,
made in the same kernel where nothing is gathered in between and from what was gathered where
something is; scales of blocks differ between rows and columns, so both copies are made at once and
each is gathered where it is needed.

Read in Transformer Engine 1.13.0 and 2.7.0: pytorch/module/layernorm_linear.py, linear.py,
base.py (``grad_output_preprocess``), grouped_linear.py, distributed.py (``gather_along_first_dim``)
and csrc/extensions/normalization.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.graph import Bools, Int64, Shard
from cost_models.ops import Collective, Ints, Quantised, Reals
from hardware_profiles.quantisation import Scaling


@dataclass(frozen=True, slots=True)
class Quantiser:
    """How one job's low-precision operands are quantised on its device."""

    scaling: Scaling
    four_bits: bool = False
    """NVFP4: blocks of 16 under a scale of the whole tensor."""
    transposes: bool = True
    """Whether an operand with one scale needs a transposed copy."""

    pipelined: bool = True
    """Whether products may run in a pipeline with what is gathered for them or scattered."""

    @property
    def by_blocks(self) -> bool:
        """Whether rows and columns have scales of their own."""
        return self.four_bits or self.scaling == "blocks"

    @property
    def bytes_per_64(self) -> int:
        """Of 64 elements by rows, or by columns, with the scales of their blocks: of 16 (NVFP4),
        or of 32 elements."""
        return 36 if self.four_bits else 66 if self.by_blocks else 64

    @property
    def reduces_largest(self) -> bool:
        """Whether the ranks whose parts are gathered agree on one scale before (pytorch/module/
        linear.py, ``with_amax_reduction``)."""
        return self.four_bits or self.scaling == "tensor"

    @property
    def norm_saves(self) -> float:
        """Bytes per element that a norm writes less: it is quantised in the norm's own kernel with
        scales of earlier steps; for blocks by cuDNN's norms only, which recipes mostly leave off
        (Megatron-Bridge, scripts/performance/perf_plugins.py, ``del_cudnn_ln``)."""
        return 1.0 if self._delayed else 0.0

    @property
    def _delayed(self) -> bool:
        return not self.four_bits and self.scaling == "delayed"

    @property
    def _kernels(self) -> int:
        """One; a pass for the largest value before it, and between them one for an 8-bit scale."""
        return 2 if self.four_bits else 3 if self.reduces_largest else 1

    def _bytes(self, *, copies: int, known: bool = False) -> float:
        """Moved per element: 16 bits read, twice where the largest value comes first and is not
        known, and so many copies written."""
        again = 2.0 if self.reduces_largest and not known else 0.0
        return 2.0 + again + copies * self.bytes_per_64 / 64

    @property
    def _both(self) -> int:
        """Copies that forward and backward need together."""
        return 2 if self.by_blocks or self.transposes else 1

    @property
    def _before_gather(self) -> int:
        """Copies that are made of what is then gathered."""
        return 2 if self.by_blocks else 1

    @property
    def _transposed(self) -> float:
        """Bytes per element of a transposed copy of what came quantised."""
        return 2.0 if self.transposes and not self.by_blocks else 0.0

    def gathered_bytes(self, size: Int64, *, gradient: bool = False) -> Int64:
        """Bytes gathered of what are ``size`` in 16 bits: of a gradient, which both products of the
        backward read, one copy, or by rows and by columns."""
        copies = 2 if gradient and self.by_blocks else 1
        return size // 2 * (copies * self.bytes_per_64) // 64

    def agreed(self, name: str, shard: Shard, *, backward: bool) -> tuple[Collective, ...]:
        """The largest value of what tensor-parallel ranks gather, reduced over them."""
        if not self.reduces_largest:
            return ()
        sp, op = shard.sequence_parallel, f"{name}.amax"
        if backward:
            return (Collective(op, "tp", None, 0, "all_reduce", 4, active=sp),)
        return (Collective(op, "tp", "all_reduce", 4, None, 0, active=sp),)

    def column(self, shard: Shard, n: Ints, k: Ints, *, normed: bool) -> Quantised:
        """Of a product whose input tensor parallelism gathers; ``normed``: by a norm of its own."""
        whole, own, gathers = _rows(shard)
        late = gathers | (normed and self._delayed)
        known = normed and self.scaling == "tensor" and not self.four_bits
        copies = np.where(gathers, self._before_gather, self._both)
        each = np.where(
            copies > 1, self._bytes(copies=2, known=known), self._bytes(copies=1, known=known)
        )
        written = normed and self._delayed
        forward = 0.0 * own if written else each * own * k
        transposed = np.where(late, self._transposed, 0.0) * whole * k
        gradient = self._bytes(copies=self._both) * whole * n
        return Quantised(
            forward, transposed + gradient, 0 if written else self._kernels - known,
            self._kernels + np.where(transposed > 0, 1, 0),
        )  # fmt: skip

    def row(self, shard: Shard, n: Ints, k: Ints, *, original: bool = False) -> Quantised:
        """Of a product whose output tensor parallelism scatters, so its gradient is gathered;
        ``original``: the 16-bit input waits, and is quantised again for the backward."""
        whole, own, gathers = _rows(shard)
        copies = np.where(gathers, self._before_gather, self._both)
        each = np.where(copies > 1, self._bytes(copies=2), self._bytes(copies=1))
        transposed = np.where(gathers, self._transposed, 0.0) * whole * n
        forward, again = self._bytes(copies=1 if original else self._both), 0.0
        if original:
            again = self._bytes(copies=1 if self.by_blocks else self._both)
        return Quantised(
            forward * whole * k, each * own * n + transposed + again * whole * k, self._kernels,
            self._kernels * (1 + original) + np.where(transposed > 0, 1, 0),
        )  # fmt: skip

    def plain(self, rows: Reals, n: Ints, k: Ints, tensors: Ints = 1) -> Quantised:
        """Of a product, or of ``tensors`` products of ``rows`` together, that gathers nothing."""
        each = self._bytes(copies=self._both)
        return Quantised(each * rows * k, each * rows * n, tensors, tensors)


def column(
    quantiser: Quantiser | None, shard: Shard, n: Ints, k: Ints, *, normed: bool = False
) -> Quantised | None:
    """As :meth:`Quantiser.column`, where there is one."""
    return None if quantiser is None else quantiser.column(shard, n, k, normed=normed)


def row(
    quantiser: Quantiser | None, shard: Shard, n: Ints, k: Ints, *, original: bool = False
) -> Quantised | None:
    """As :meth:`Quantiser.row`, where there is one."""
    return None if quantiser is None else quantiser.row(shard, n, k, original=original)


def plain(
    quantiser: Quantiser | None, rows: Reals, n: Ints, k: Ints, tensors: Ints = 1
) -> Quantised | None:
    """As :meth:`Quantiser.plain`, where there is one."""
    return None if quantiser is None else quantiser.plain(rows, n, k, tensors)


def _rows(shard: Shard) -> tuple[Int64, Int64, Bools]:
    """Rows of a gathered tensor, those of a rank's part, and whether it is gathered."""
    gathers: Bools = shard.sequence_parallel & (shard.tp > 1)
    return shard.tokens, np.where(gathers, shard.residual_tokens, shard.tokens), gathers
