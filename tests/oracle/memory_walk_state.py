"""Parameters of a decoder's modules as they are stored, and their weights, gradients and optimizer
state on a rank: a naive walk.

Megatron-Core: one buffer of all parameters (core/optimizer/param_layout.py). FSDP2: each parameter
split by its first dimension (PyTorch, ``fully_shard``). Adam has two moments in fp32, and a master
weight in fp32 where weights have 16 bits (Rajbhandari et al., arXiv 1910.02054, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import lcm

from planner.models.spec import AttentionSpec, BlockSpec, LatentAttentionSpec, MlpSpec, MoeSpec
from tests.oracle.memory_walk import Case, kv_heads


@dataclass(frozen=True)
class Parameter:
    """A tensor on a rank of tensor parallelism; experts of one kind are ``count`` of them."""

    rows: int
    cols: int
    stored_in: str
    """Neighbours of one name are one tensor in Megatron."""
    low_precision: bool = False
    expert: bool = False
    count: int = 1
    alone: bool = False
    """Whether a bucket holds nothing else: a table that two stages share (``shared_embedding``)."""

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.count


def norm(case: Case, name: str) -> Iterator[Parameter]:
    yield Parameter(case.model.hidden, 1, name)
    if case.model.norm_bias:
        yield Parameter(case.model.hidden, 1, name + ".bias")


def linear(
    rows: int, cols: int, name: str, *, bias: bool = False, kept_rows: int | None = None
) -> Iterator[Parameter]:
    """``kept_rows``: of the bias, where all ranks have it whole."""
    yield Parameter(rows, cols, name, low_precision=True)
    if bias:
        yield Parameter(rows if kept_rows is None else kept_rows, 1, name + ".bias")


def attention(case: Case, spec: AttentionSpec) -> Iterator[Parameter]:
    """As Megatron's modules stand: linear_proj before linear_qkv, which starts with the norm."""
    hidden, width = case.model.hidden, spec.heads // case.tp * spec.head_dim
    yield from linear(hidden, width, "proj", bias=spec.out_bias)
    yield from norm(case, "norm")
    rows = (width, *(kv_heads(case, spec) * spec.head_dim,) * 2)
    for each in rows:
        yield Parameter(each, hidden, "qkv", low_precision=True)
    if spec.qkv_bias:
        for each in rows:
            yield Parameter(each, 1, "qkv.bias")


def latent_attention(case: Case, spec: LatentAttentionSpec) -> Iterator[Parameter]:
    hidden, heads = case.model.hidden, spec.heads // case.tp
    down = case.tp if case.stack.layers.latent_down == "split" else 1
    nope, rope = spec.qk_nope_head_dim, spec.qk_rope_head_dim
    yield from norm(case, "norm")
    yield from linear(hidden, heads * spec.v_head_dim, "proj")
    queries = heads * (nope + rope)
    if spec.q_lora_rank:
        yield from linear(spec.q_lora_rank // down, hidden, "q_down")
        yield Parameter(spec.q_lora_rank, 1, "q_norm")
        yield from linear(queries, spec.q_lora_rank, "q_up")
    else:
        yield from linear(queries, hidden, "q")
    yield from linear((spec.kv_lora_rank + rope) // down, hidden, "kv_down")
    yield Parameter(spec.kv_lora_rank, 1, "kv_norm")
    yield from linear(heads * (nope + spec.v_head_dim), spec.kv_lora_rank, "kv_up")


def feed_forward(
    case: Case, width: int, name: str, *, gated: bool, bias: bool = False
) -> Iterator[Parameter]:
    hidden, inward = case.model.hidden, ("gate", "up") if gated else ("up",)
    fc1 = [name + (part if case.dtensor else "fc1") for part in inward]
    for stored in fc1:
        yield Parameter(width, hidden, stored, low_precision=True)
    if bias:
        for stored in fc1:
            yield Parameter(width, 1, stored + ".bias")
    yield from linear(hidden, width, name + "fc2", bias=bias)


def moe(case: Case, spec: MoeSpec) -> Iterator[Parameter]:
    """Grouped layers hold all their experts' first products before the second ones."""
    hidden, width = case.model.hidden, spec.intermediate // case.etp
    local = spec.experts // case.ep
    yield Parameter(spec.experts, hidden, "router")
    for part in ("gate", "up") if spec.gated else ("up",):
        stored = "experts." + (part if case.dtensor else "fc1")
        yield Parameter(width, hidden, stored, low_precision=True, expert=True, count=local)
    yield Parameter(hidden, width, "experts.fc2", low_precision=True, expert=True, count=local)
    if spec.shared_intermediate:
        yield from feed_forward(
            case, spec.shared_intermediate // case.tp, "shared.", gated=spec.gated
        )


def layer(case: Case, block: BlockSpec) -> list[Parameter]:
    found: list[Parameter] = []
    if isinstance(block.mixer, AttentionSpec):
        found += attention(case, block.mixer)
    elif isinstance(block.mixer, LatentAttentionSpec):
        found += latent_attention(case, block.mixer)
    found += norm(case, "norm2")
    forward = block.feed_forward
    if isinstance(forward, MlpSpec):
        width = forward.intermediate // case.tp
        found += feed_forward(case, width, "", gated=forward.gated, bias=forward.bias)
    elif isinstance(forward, MoeSpec):
        found += moe(case, forward)
    return found


def embedding(case: Case) -> list[Parameter]:
    shared = case.pp > 1 and (case.model.tied_embeddings or bool(case.model.mtp))
    found = [Parameter(case.vocabulary, case.model.hidden, "embedding", alone=shared)]
    if case.model.position_embeddings:
        found.append(Parameter(case.model.position_embeddings, case.model.hidden, "positions"))
    return found


def predictions(case: Case) -> list[Parameter]:
    """Modules that predict further tokens (MultiTokenPredictionLayer)."""
    hidden, found = case.model.hidden, []
    for block in case.predictions():
        found += norm(case, "enorm")
        found += norm(case, "hnorm")
        whole = case.stack.layers.prediction_projection == "whole"
        found += linear(hidden // (1 if whole else case.tp), 2 * hidden, "eh_proj")
        found += layer(case, block)
        found += norm(case, "predicted_norm")
    return found


def tables_of_predictions(case: Case) -> list[Parameter]:
    """Behind a pipeline they have an embedding module of their own (GPTModel, mtp_process)."""
    return embedding(case) if case.pp > 1 and case.model.mtp else []


def head(case: Case) -> list[Parameter]:
    """Final norm, predictions, and output layer, which shares the embedding's weights where both
    are tied and on one stage; its own weight is there all the same beside predictions."""
    found = [*norm(case, "final_norm"), *predictions(case)]
    if not case.model.tied_embeddings or case.pp > 1:
        shared = case.model.tied_embeddings and not case.model.mtp
        found.append(Parameter(case.vocabulary, case.model.hidden, "output", alone=shared))
    return found


def elements(parameters: list[Parameter]) -> int:
    return sum(parameter.elements for parameter in parameters)


def ways(case: Case, *, expert: bool) -> int:
    """Ranks over which state is split: data and context parallelism; of experts, what expert
    parallelism leaves of all ranks of a stage."""
    ranks = case.dp * case.cp
    return ranks * case.tp // (case.ep * case.etp) if expert else ranks


def buffer(case: Case, parameters: list[Parameter], *, expert: bool, bucketed: bool) -> int:
    """Elements of Megatron-Core's buffer, which is filled from the last parameter to the first:
    each starts at a multiple of 64, each bucket ends at one of lcm(ranks, 128), and a bucket is
    full with 40 million elements or one million per rank."""
    sizes: list[tuple[int, bool]] = []
    for _, parts in groupby(
        (parameter for parameter in parameters if parameter.expert == expert),
        key=lambda parameter: parameter.stored_in,
    ):
        tensors = list(parts)
        size = sum(part.rows * part.cols for part in tensors)
        sizes += [(size, tensors[0].alone)] * tensors[0].count
    end = start = 0
    split, ranks = lcm(ways(case, expert=expert), 128), case.dp * case.cp
    for size, alone in reversed(sizes):
        end = -(-end // 64) * 64
        if alone:
            end = -(-end // split) * split
        end += size
        if alone or (bucketed and end - start >= max(40_000_000, 1_000_000 * ranks)):
            start = end = -(-end // split) * split
    return -(-end // split) * split


def shard(case: Case, parameter: Parameter) -> int:
    """Elements of FSDP2's part of a parameter: its first dimension over the ranks, rounded up.
    Experts are one tensor, by expert; by row where there are more ranks than experts."""
    ranks = ways(case, expert=parameter.expert)
    if parameter.expert and ranks <= parameter.count:
        return -(-parameter.count // ranks) * parameter.rows * parameter.cols
    return -(-parameter.rows // ranks) * parameter.cols * parameter.count


def state(case: Case, held: list[list[Parameter]], *, first: bool) -> dict[str, int]:
    """Bytes of a rank that holds one list of parameters for each of its chunks."""
    return _fsdp(case, held) if case.dtensor else _megatron(case, held, first=first)


def _megatron(case: Case, held: list[list[Parameter]], *, first: bool) -> dict[str, int]:
    """16-bit weights, fp32 gradients, fp32 master weights and moments (12 bytes). An fp8 recipe
    keeps every linear layer's weight by rows and by columns beside the 16 bits."""
    whole = own = copies = 0
    for n, parameters in enumerate(held):
        for expert in (False, True):
            if case.zero == 0:
                size = sum(p.elements for p in parameters if p.expert == expert)
                whole, own = whole + size, own + size
                continue
            # Only the first chunk of the first stage waits for gradients bucket by bucket.
            size = buffer(case, parameters, expert=expert, bucketed=first and n == 0)
            whole += size
            own += size // ways(case, expert=expert)
        if case.precision == "fp8":
            copies += 2 * sum(p.elements for p in parameters if p.low_precision)
    return {"weights": 2 * whole + copies, "gradients": 4 * whole, "optimizer": 12 * own}


def _fsdp(case: Case, held: list[list[Parameter]]) -> dict[str, int]:
    """fp32 weights that FSDP2 splits, and moments beside them. Stage 2 (no resharding) keeps the
    gathered 16-bit weights; a pipeline sums whole gradients until its last backward."""
    parameters = [parameter for each in held for parameter in each]
    whole = elements(parameters)
    own = sum(shard(case, parameter) for parameter in parameters) if case.zero else whole
    weights = 4 * own + (2 * whole if case.zero == 2 else 0)
    summed = whole if case.zero == 2 and case.pp > 1 else own
    return {"weights": weights, "gradients": 4 * summed, "optimizer": 8 * own}
