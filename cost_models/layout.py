"""How a workload is laid on devices: degrees, schedules, recompute, sharding.

Vocabulary of the field: ``dp_replicate * dp_shard * cp * tp * pp`` devices; expert parallelism
(``ep * etp``) reuses the ranks of ``dp_shard * cp * tp`` (Megatron-Core's rule of a second mesh).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from hardware_profiles.stack_words import Schedule as NamedSchedule

GivenSchedule = Literal["given", "given_split", "given_v", "given_v_split"]
"""Orders of work that a user gives (``cost_models.given_order``): virtual stages round and round or
on a V, backwards whole or some of them split."""
Schedule: TypeAlias = Literal[NamedSchedule, GivenSchedule]
RecomputeMode: TypeAlias = str
"""``none``, ``full``, or the name of one of the stack's policies (:class:`RecomputePolicy`)."""
CpKind = Literal["p2p", "all_gather", "a2a", "a2a_p2p", "a2a_all_gather"]

NAMED: tuple[NamedSchedule, ...] = get_args(NamedSchedule)
GIVEN: tuple[GivenSchedule, ...] = get_args(GivenSchedule)
SCHEDULES: tuple[Schedule, ...] = (*NAMED, *GIVEN)
CHUNKED: tuple[Schedule, ...] = (
    "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev",
    "looped_bfs_delayed",
)  # fmt: skip
"""Schedules whose ranks hold several virtual stages."""
LISTED: tuple[Schedule, ...] = (*CHUNKED, *GIVEN)
"""Schedules whose partitions are few and listed (``cost_models.partitions``)."""
DELAYED: tuple[Schedule, ...] = ("gpipe_delayed", "looped_bfs_delayed")
"""Those of loops whose transfers take an iteration: what a stage makes is on its way beside its
next pass and used behind that (MaxText, ``pipeline_delay_activation_forwarding``)."""
ONE_CHUNK_AT_ONCE: tuple[Schedule, ...] = ("gpipe", "gpipe_delayed")
LOOPED: tuple[Schedule, ...] = ("looped_bfs", "looped_bfs_delayed")
ALL_AT_ONCE: tuple[Schedule, ...] = (*ONE_CHUNK_AT_ONCE, *LOOPED)
"""Schedules with all forwards before the first backward."""
IN_ROUNDS: tuple[Schedule, ...] = ("interleaved", "interleaved_zero_bubble")
"""The ones that take the microbatches in rounds (``cost_models.orders``)."""
V_SHAPED: tuple[Schedule, ...] = ("zbv", "dualpipev", "given_v", "given_v_split")
"""The ones whose second virtual stages run from the last rank back to the first."""
SPLIT_BACKWARD: tuple[Schedule, ...] = (
    "interleaved_zero_bubble", "zbv", "dualpipev", "given_split", "given_v_split"
)  # fmt: skip
"""Schedules that compute the gradients of inputs and of weights apart."""
OVER_PIPELINE: tuple[Schedule, ...] = ("1f1b_vocab_1", "1f1b_vocab_2", "1f1b_interlaced")
"""Schedules whose ranks all hold a part of the vocabulary (``cost_models.vocabulary_orders``)."""


@lru_cache(maxsize=64)
def running_counts(sequence: tuple[int, ...], kinds: int) -> tuple[tuple[int, ...], ...]:
    """``[i][kind]``: how often each kind is among the first ``i`` of a sequence."""
    counts = [0] * kinds
    result = [tuple(counts)]
    for kind in sequence:
        counts[kind] += 1
        result.append(tuple(counts))
    return tuple(result)


def codes_of(names: Iterable[Schedule]) -> list[int]:
    """What stands for these schedules in arrays of layouts."""
    return [SCHEDULES.index(name) for name in names]


def stage_of(schedule: Schedule, pp: int, rank: int, chunk: int) -> int:
    """Virtual stage that ``rank`` holds as its ``chunk``."""
    if schedule in V_SHAPED and chunk:
        return 2 * pp - 1 - rank
    return chunk * pp + rank


def place_of(schedule: Schedule, pp: int, stage: int) -> tuple[int, int]:
    """Rank and chunk of a virtual stage."""
    if schedule in V_SHAPED and stage >= pp:
        return 2 * pp - 1 - stage, 1
    return stage % pp, stage // pp


def ends_on(schedule: Schedule, pp: int, vpp: int, stage: int) -> tuple[bool, bool]:
    """Whether a virtual stage holds embedding and head, or parts of them."""
    if schedule in OVER_PIPELINE and pp > 1:
        return True, True
    return stage == 0, stage == pp * vpp - 1


def crosses_ranks(schedule: Schedule, pp: int, stage: int) -> bool:
    """Whether ``stage`` sends its output to another rank: all but the last stage do, and but the
    one at the turn of a V."""
    return stage + 1 != pp if schedule in V_SHAPED else pp > 1


OutputKind = Literal[
    "attention", "reduce_scatter", "all_to_all", "matmul", "odd_matmul", "grouped_matmul",
    "query", "key", "value", "out_proj", "mlp_gate", "mlp_up", "mlp_out", "layer_input",
    "mla_q", "mla_kv", "router", "saved",
]  # fmt: skip
"""Ops whose outputs a save list may name; ``odd_matmul`` is the 1st, 3rd, 5th ... product of a
layer, products that stand for several (q, k and v) counted one by one. The others are tensors
that some frameworks name (``cost_models.named_outputs``)."""


@dataclass(frozen=True, slots=True)
class RecomputePolicy:
    """What of a layer's forward is run again in the backward.

    Either the named ``modules``, whose inner tensors are freed, or with ``keeps`` set the whole
    layer, whose input is kept with the outputs of the named ops.
    """

    name: RecomputeMode
    modules: frozenset[str] = frozenset()
    keeps: frozenset[OutputKind] | None = None
    to_the_end: bool = False
    """Whether the layer runs again to its last op, its reduced output, while the gradient of that
    waits all-gathered."""
    offloads: frozenset[OutputKind] = frozenset()
    """Of ``keeps``, what waits on the host (``cost_models.host_outputs``); ``saved`` without
    ``keeps``: all that a layer keeps."""
    in_turn: bool = False
    """Whether it leaves and comes back in turn with the layer's work."""
    group: int = 1
    """Layers that run again together, from the input of the first."""
    hosted_layers: int = 0
    """Of the model's first layers, those whose activations wait on the host; nothing runs again
    (``cost_models.layer_offload``)."""
    needed_only: bool = False
    """Whether what no gradient needs is left out of what runs again
    (``cost_models.named_outputs``)."""
    tiled: frozenset[str] = frozenset()
    """Modules that run piece by piece of the sequence, once more for the backward of each piece,
    when the layer has run again or, with ``modules``, been kept (``cost_models.tiled``)."""
    in_parts: bool = False
    """Whether each tensor-parallel rank keeps its part of the layer's input
    (``cost_models.partitioned``)."""

    everything: frozenset[OutputKind] | None = None
    """Layers of a pipeline without a policy: all that autodiff saves stays and nothing runs again
    (``cost_models.autodiff``); these outputs alone are kept of layers outside the pipeline."""

    @property
    def sends(self) -> bool:
        """Whether anything waits on the host."""
        return bool(self.offloads) or self.hosted_layers > 0


FULL = RecomputePolicy("full", keeps=frozenset())
"""The whole layer from its input."""


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Degrees of one layout. Every field is at least 1."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Devices used."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert: ranks of one stage over ``ep * etp``."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)
