"""Any network as a sequence of layers: what each computes, holds, keeps and passes on.

For networks that are not decoders (convolutional, graph, encoder-decoder). Sizes are *elements per
unit*, the unit being a sample or a token (``per``); bytes follow from the job's precision. A layer
may pass a tensor over its neighbours (``sends`` ... ``takes``): every cut between the two carries
it, so cuts differ in size, and the pipeline pays for the one it makes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from planner.models.spec import BlockSpec, NonNegative, Positive, Spec

Amount = Annotated[float, Field(ge=0, le=1e18)]

MAX_LAYERS = 20_000


class MatmulOp(Spec):
    """``times`` products of (m, k) by (k, n) per unit, each with its own weight.

    ``split`` says how tensor parallelism divides it: ``column`` over n
    (its input's gradient is then reduced over tp), ``row`` over k (its output is reduced).
    """

    op: Literal["matmul"] = "matmul"
    m: Positive
    n: Positive
    k: Positive
    times: Positive = 1
    weight: bool = True
    """False for a product of two activations."""
    bias: bool = False
    split: Literal["none", "column", "row"] = "none"


class ConvOp(Spec):
    """``times`` convolutions of ``kernel`` positions each, over ``positions`` of the output."""

    op: Literal["conv"] = "conv"
    positions: Positive
    channels: tuple[Positive, Positive]
    """In and out."""
    kernel: Positive = 1
    input_positions: Positive | None = None
    """Where the input has others than the output (strides, transposed convolutions)."""
    groups: Positive = 1
    bias: bool = False
    times: Positive = 1

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if any(channels % self.groups for channels in self.channels):
            taken, made = self.channels
            raise ValueError(f"groups = {self.groups} does not divide channels {taken} and {made}")
        return self

    @property
    def weights(self) -> int:
        """Elements of one kernel."""
        taken, made = self.channels
        return taken // self.groups * made * self.kernel

    @property
    def flops(self) -> float:
        """Forward FLOPs of one: each output position meets each weight once."""
        return 2.0 * self.positions * self.weights

    @property
    def moved(self) -> float:
        """Elements that one reads and writes, its unfolding kept in caches."""
        taken, made = self.channels
        return float((self.input_positions or self.positions) * taken + self.positions * made)


class WorkOp(Spec):
    """Anything else that computes: FLOPs and the elements it moves, as a roofline."""

    op: Literal["work"] = "work"
    flops: Amount
    moved: Amount = 0.0
    """Elements read plus written in the forward."""
    backward_flops: Amount | None = None
    """Default: twice the forward."""
    backward_moved: Amount | None = None
    parameters: NonNegative = 0
    launches: Positive = 1


class MemoryOp(Spec):
    """A memory-bound kernel: normalisation, activation, pooling, gather, scatter, loss."""

    op: Literal["memory"] = "memory"
    moved: Amount
    """Elements read plus written in the forward."""
    backward_moved: Amount | None = None
    """Default: as the forward."""
    parameters: NonNegative = 0
    launches: Positive = 1
    split: bool = False
    """Whether tensor parallelism divides the tensors that it moves."""


class AttentionOp(Spec):
    """Fused softmax attention of ``queries`` over ``keys`` positions; heads split over tp."""

    op: Literal["attention"] = "attention"
    heads: Positive
    kv_heads: Positive | None = None
    head_dim: Positive
    queries: Positive
    keys: Positive
    causal: bool = False


LayerOp = Annotated[MatmulOp | ConvOp | WorkOp | MemoryOp | AttentionOp, Field(discriminator="op")]


class LayerKindSpec(Spec):
    """One kind of layer; sizes in elements per unit."""

    ops: tuple[LayerOp, ...] = ()
    parameters: NonNegative = 0
    """Parameters beside those of the ops, whole on every tensor-parallel rank."""
    saved: Positive
    """Elements kept from forward to backward."""
    saved_split: NonNegative = 0
    """Elements kept that tensor parallelism divides."""
    output: Positive
    """Elements passed to the next layer."""
    output_gradient: NonNegative | None = None
    """Elements that come back for the output; default: as many. 0 where it has no gradient."""
    working: NonNegative | None = None
    """Largest short-lived elements of the backward; default: twice the output."""


class LayerEntry(Spec):
    """``count`` consecutive layers of one kind, and what they pass over their neighbours."""

    kind: str
    count: Positive = 1
    sends: dict[str, Positive | None] = Field(default_factory=dict)
    """Tensors for later layers, by name, with their elements; null: the layer's output itself."""
    takes: tuple[str, ...] = ()
    """Tensors of earlier layers that this one reads."""

    @model_validator(mode="after")
    def _one_sender(self) -> Self:
        if len({*self.takes}) < len(self.takes):
            raise ValueError(f"takes names a tensor twice: {', '.join(self.takes)}")
        if self.count > 1 and self.sends:
            raise ValueError("a layer that sends a tensor stands alone: leave count out")
        return self


class LayerSequenceSpec(Spec):
    """A network as a sequence of layers, between its input and its loss."""

    format: Literal["layers"] = "layers"
    name: str
    source: str
    """Where the sizes are from."""
    per: Literal["sample", "token"] = "sample"
    input: Positive
    """Elements of one unit's input."""
    batch: Positive
    """Samples per step where the job does not say."""
    tensor_parallel: Positive = 1
    """Ways that the split ops can be divided: a multiple of every usable tp."""
    kinds: dict[str, LayerKindSpec]
    layers: tuple[LayerEntry, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty: a network has at least one layer")
        sent: set[str] = set()
        for entry in self.layers:
            if entry.kind not in self.kinds:
                known = ", ".join(sorted(self.kinds)) or "none"
                raise ValueError(f"layers name kind {entry.kind!r}, not in kinds ({known})")
            for name in entry.takes:
                if name not in sent:
                    raise ValueError(
                        f"a layer of kind {entry.kind!r} takes {name!r} before it is sent"
                    )
            for name in entry.sends:
                if name in sent:
                    raise ValueError(f"{name!r} is sent twice")
                sent.add(name)
        unread = sent - {name for entry in self.layers for name in entry.takes}
        if unread:
            raise ValueError(f"{sorted(unread)[0]!r} is sent and never taken")
        if self.layer_count > MAX_LAYERS:
            raise ValueError(f"{self.layer_count:,} layers, and at most {MAX_LAYERS:,}")
        return self

    @property
    def layer_count(self) -> int:
        """Layers."""
        return sum(entry.count for entry in self.layers)

    @property
    def expanded(self) -> tuple[LayerEntry, ...]:
        """One entry per layer."""
        return tuple(entry for entry in self.layers for _ in range(entry.count))

    @property
    def family(self) -> str:
        """What the catalogue files it under."""
        return self.format

    @property
    def blocks(self) -> dict[str, BlockSpec]:
        """No blocks of a decoder."""
        return {}

    @property
    def vision(self) -> None:
        """No vision tower beside a decoder."""

    @property
    def max_sequence(self) -> int | None:
        """Tokens per sample, where samples are of one size."""
        return 1 if self.per == "sample" else None

    @property
    def fixed_sequence(self) -> int | None:
        """Units per sample, where that is not the job's to say."""
        return 1 if self.per == "sample" else None

    @property
    def position_embeddings(self) -> int:
        """No learned positions that would bound the sequence."""
        return 0

    @property
    def default_batch(self) -> int | None:
        """Samples per step where the job does not say."""
        return self.batch

    @property
    def splits_sequence(self) -> bool:
        """Whether context and sequence parallelism apply."""
        return False

    @property
    def tensor_split(self) -> int | None:
        """What tp must divide."""
        return self.tensor_parallel

    @property
    def parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(entry.count * kind_parameters(self.kinds[entry.kind]) for entry in self.layers)


def kind_parameters(kind: LayerKindSpec) -> int:
    """Parameters of one layer."""
    total = kind.parameters
    for op in kind.ops:
        if isinstance(op, MatmulOp) and op.weight:
            total += op.times * (op.n * op.k + (op.n if op.bias else 0))
        elif isinstance(op, ConvOp):
            total += op.times * (op.weights + (op.channels[1] if op.bias else 0))
        elif isinstance(op, WorkOp | MemoryOp):
            total += op.parameters
    return total
