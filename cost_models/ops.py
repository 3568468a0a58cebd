"""The priced vocabulary: what a layer does, as plain data over numpy arrays.

Every size is an integer array (or scalar) that broadcasts over the configurations being priced.
An op describes its forward; the backward that follows from it is part of its meaning:

* :class:`MatMul` with a weight has a data gradient and a weight gradient of the same FLOPs;
* :class:`MatMul` of two activations has two products of the same FLOPs;
* :class:`Attention` has the five products of a fused backward (2.5 x forward);
* :class:`Elementwise`, :class:`Roofline` and :class:`Collective` state both directions.

``modules`` are the parts of a layer that an op or a tensor belongs to, in the words of the stacks
(``core_attn``, ``mlp``, ``moe_act``, ``layernorm`` ...): recomputing one of them runs the op again
in the backward pass and frees the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.integer[Any]] | int
Reals: TypeAlias = NDArray[np.integer[Any]] | NDArray[np.floating[Any]] | float

Group = Literal[
    "tp", "tp_transposed", "tp_straight", "tp_shards", "tp_and_shards", "tp_sharing",
    "cp", "cp_exchange", "cp_ring", "cp_gather", "ep", "etp"
]  # fmt: skip
"""``tp_transposed`` are those of tp's ranks that split a feed-forward's matrices along the residual
stream's width, ``tp_straight`` those that split its own (``planner.blocks.transposed``);
``tp_shards`` the fsdp ranks beside them, ``tp_and_shards`` these with all of tp, ``tp_sharing`` all
that share out a step's tokens.
``cp_exchange`` are the context-parallel ranks that exchange heads, ``cp_ring`` those that pass
keys and values round: two levels of groups under ``a2a_p2p``, else one of them is all of cp."""
CollectiveKind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ring", "permute"
]


@dataclass(frozen=True, slots=True)
class Quantised:
    """What quantising a low-precision product's input and its output's gradient moves, in bytes,
    with transposed copies, and the kernels that do."""

    forward_bytes: Reals
    backward_bytes: Reals
    forward_kernels: Ints = 1
    backward_kernels: Ints = 1


@dataclass(frozen=True, slots=True)
class MatMul:
    """``batch`` products of (m, k) by (k, n)."""

    name: str
    m: Reals
    n: Ints
    k: Ints
    batch: Reals = 1
    weight: bool = True
    backward: bool = True
    """Whether a gradient flows through it."""
    low_precision: bool = True
    """Whether an 8-bit recipe runs this product in 8 bits."""
    modules: tuple[str, ...] = ()
    parts: tuple[Ints, ...] = (1,)
    """Relative widths of the products of separate weights that this one stands for."""
    pieces: tuple[Ints, ...] = (1,)
    """Relative widths of the tensors that its output holds, which a framework may name apart."""
    frozen: bool = False
    """Whether its weight is not trained: the backward has no weight gradient."""
    quantised: Quantised | None = None
    """How a low-precision one gets its operands; None: each whole, by a kernel of its own."""
    alike: tuple[Ints, Ints, Ints] = (1, 1, 1)
    """How many ranks compute the same of it, of its input's gradient and of its weight's: as many
    times the columns (of the input's gradient, too)."""


@dataclass(frozen=True, slots=True)
class GroupedMatMul:
    """``groups`` products of (rows, k) by (k, n), one launch: the experts of one rank."""

    name: str
    groups: Ints
    rows: Reals
    n: Ints
    k: Ints
    low_precision: bool = True
    modules: tuple[str, ...] = ()
    frozen: bool = False
    pieces: tuple[Ints, ...] = (1,)
    """As those of :class:`MatMul`."""
    room: Reals = 1
    """Rows that its output has room for over those that it computes."""
    quantised: Quantised | None = None
    """As that of :class:`MatMul`."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused softmax attention of ``heads`` query heads on this rank.

    ``q_len`` queries per sample are on this rank; ``kv_len`` keys are attended (with context
    parallelism the ring brings them), half of them where ``causal``.
    """

    name: str
    batch: Reals
    """Samples, or the pieces of samples that attend within themselves only."""
    q_len: Reals
    kv_len: Ints
    heads: Ints
    kv_heads: Ints
    qk_head_dim: int
    v_head_dim: int
    causal: bool = True
    last: bool | NDArray[np.bool_] = False
    """Whether the queries are the last of a causal mask's, which see most keys, instead of an even
    share of all."""
    exchanged: Ints = 1
    """Ranks that exchanged heads: each then has as many times longer a piece of the sequence, for
    as many times fewer of ``heads``."""
    blocks: Ints = 1
    """Pieces in which keys and values come round a ring, each with a kernel of its own."""
    modules: tuple[str, ...] = ("core_attn",)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A kernel without matrix products: bytes read plus written, forward and backward, and the
    fp32 vector FLOPs of one that computes more than it moves."""

    name: str
    forward_bytes: Reals
    backward_bytes: Reals
    forward_launches: Ints = 1
    backward_launches: Ints = 1
    modules: tuple[str, ...] = ()
    forward_flops: Reals = 0.0
    backward_flops: Reals = 0.0
    again: bool = False
    """Whether the backward runs the forward once more: not in a layer that runs again itself."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose experts: what their exchange depends on beyond its bytes."""

    tokens: Ints
    """Tokens of one rank, each with one row."""
    row_bytes: int
    experts: int
    top_k: int
    groups: int = 1
    """Equal groups of experts, of which one token may use ``group_limit``."""
    group_limit: int = 1


@dataclass(frozen=True, slots=True)
class Side:
    """One direction of a collective: what is called, and what it may run beside."""

    kind: CollectiveKind
    bytes: Reals
    count: Ints
    hidden: str | None
    product: str | None


@dataclass(frozen=True, slots=True)
class Roofline:
    """Any other computation, by its FLOPs and its bytes read plus written."""

    name: str
    forward_flops: Reals
    forward_bytes: Reals
    backward_flops: Reals
    backward_bytes: Reals
    forward_launches: int = 1
    backward_launches: int = 2
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Collective:
    """Communication inside a layer; bytes are the full (gathered or unreduced) buffer.

    ``forward_hidden`` and ``backward_hidden`` name ops whose kernels run at the same time:
    ``"name:fprop"``, ``"name:dgrad"`` or ``"name:wgrad"``; exposure is decided in
    ``cost_models.communication``. ``forward_product`` and ``backward_product`` name the product
    that a stack may cut in chunks and run with it in a pipeline: it reads what is gathered, or
    makes what is scattered. ``ring`` is size - 1 neighbour exchanges of ``bytes`` each, ``permute``
    one send of ``bytes`` to any rank of the group.
    """

    name: str
    group: Group
    forward_kind: CollectiveKind | None
    forward_bytes: Reals
    backward_kind: CollectiveKind | None
    backward_bytes: Reals
    forward_hidden: str | None = None
    backward_hidden: str | None = None
    backward_count: Ints = 1
    forward_count: Ints = 1
    active: NDArray[np.bool_] | bool = True
    """Where False the collective does not happen (for example without sequence parallelism)."""
    forward_product: str | None = None
    backward_product: str | None = None
    routing: Routing | None = None
    """Set where tokens travel to their experts: the stack's dispatcher then decides what is sent;
    ``all_to_all`` of ``bytes`` is the plain one."""
    back: bool = False
    """Whether the forward of a routed exchange brings outputs back (combine)."""
    modules: tuple[str, ...] = ()

    def sides(self) -> tuple[Side | None, Side | None]:
        """Forward and backward; ``None`` where that direction communicates nothing."""
        forward = self.forward_kind and Side(
            self.forward_kind, self.forward_bytes, self.forward_count, self.forward_hidden,
            self.forward_product,
        )  # fmt: skip
        backward = self.backward_kind and Side(
            self.backward_kind, self.backward_bytes, self.backward_count, self.backward_hidden,
            self.backward_product,
        )  # fmt: skip
        return forward or None, backward or None


@dataclass(frozen=True, slots=True)
class Repeat:
    """``ops`` run ``count`` times, with overlap inside one run only: the blocks of a tower."""

    name: str
    ops: tuple[Op, ...]
    count: int
    modules: tuple[str, ...] = ()


Kernel: TypeAlias = MatMul | GroupedMatMul | Attention | Elementwise | Roofline
Op: TypeAlias = Kernel | Collective | Repeat


def collectives(ops: tuple[Op, ...], times: int = 1) -> Iterator[tuple[Collective, int]]:
    """The collectives among ``ops`` and how often each happens."""
    for op in ops:
        if isinstance(op, Collective):
            yield op, times
        elif isinstance(op, Repeat):
            yield from collectives(op.ops, times * op.count)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor kept from forward to backward of one microbatch, in bytes per device.

    It is freed where one of its ``modules`` is recomputed. Where the whole layer is, only the
    layer's input and what a save list names are kept, whatever this list says.
    """

    name: str
    bytes: Ints
    modules: tuple[str, ...] = ()
    input_of: str | None = None
    """Module whose input it is, where a stack can keep that on the host until the backward
    (``cost_models.activation_offload``)."""
    last: bool = False
    """Whether no op with a weight comes behind the one that keeps it."""
    instead: Ints = 0
    """Bytes kept in its place where one of its ``modules`` is recomputed: an input of the module
    that nothing else keeps."""
